"""Verifying a built folder: each kind of damage is found, by the check that should, with the first offender named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from blake3 import blake3
from variant_folder import pack, quantization, seal, write_config, write_safetensors

from inference.checkpoint import read_header
from publisher import verify
from publisher.prune import Pruned
from publisher.schema import Manifest
from publisher.verify import verify_folder

UP = "model.layers.0.mlp.up_proj"


def failures(folder):
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    return {c.name: c.detail for c in verify_folder(folder, manifest) if not c.passed}


def shard(folder, n=1):
    return folder / f"model-0000{n}-of-00002.safetensors"


def rewrite(project, change, config=None):
    """Change tensors of shard 1, and make manifest and config agree with the files again."""
    folder = project.store.variant("Q4")
    values = {}
    for path in (shard(folder, 1), shard(folder, 2)):
        for t in read_header(path)[0]:
            kind = {"U32": "<u4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}[t.dtype]
            values[t.name] = (path, t.dtype, np.frombuffer(t.read(), kind).reshape(t.shape))
    change(values)
    for path in (shard(folder, 1), shard(folder, 2)):
        write_safetensors(path, {n: (d, a) for n, (p, d, a) in values.items() if p == path})
    index = json.loads((folder / verify.INDEX).read_text())
    index["weight_map"] = {n: p.name for n, (p, _, _) in sorted(values.items())}
    (folder / verify.INDEX).write_text(json.dumps(index))
    if config is not None:
        write_config(folder, config)
    seal(
        project,
        "Q4",
        [(n, d, list(a.shape), blake3(a.tobytes()).hexdigest()) for n, (_, d, a) in values.items()],
    )
    return folder


def with_entry(module, entry):
    block = quantization()
    if entry is None:
        del block[module]
    else:
        block[module] = entry
    return {"quantization": block, "quantization_config": block}


def test_a_sound_folder_passes_every_check(folder):
    assert failures(folder) == {}


def test_a_flipped_bit_is_found_in_file_and_tensor(folder):
    data = bytearray(shard(folder).read_bytes())
    data[-1] ^= 1
    shard(folder).write_bytes(data)
    found = failures(folder)
    assert set(found) == {"files", "tensors", "weights hash"}
    assert shard(folder).name in found["files"]


def test_a_flipped_bit_is_found_again_after_a_good_pass(folder):
    assert failures(folder) == {}
    data = bytearray(shard(folder).read_bytes())
    data[-1] ^= 1
    shard(folder).write_bytes(data)
    assert "files" in failures(folder)


def test_a_missing_file_is_found(folder):
    (folder / "tokenizer.json").unlink()
    assert failures(folder) == {"files": "tokenizer.json: No such file or directory"}


def test_a_missing_shard_is_found(folder):
    shard(folder, 2).unlink()
    found = failures(folder)
    assert "no such file" in found["shards"]
    assert "files" in found
    assert "index" in found
    assert "is in no shard" in found["tensors"]


def test_a_truncated_shard_is_found(folder):
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[:-10])
    found = failures(folder)
    assert "bytes, manifest says" in found["files"]
    assert "lie outside the file" in found["shards"]


def test_an_extra_shard_is_found(folder):
    shutil.copy(shard(folder), folder / "model-00003-of-00003.safetensors")
    found = failures(folder)
    assert found["no other files"] == "model-00003-of-00003.safetensors is not in the manifest"
    assert "model-00003-of-00003.safetensors is in no" in found["index"]


def test_wrong_bits_in_the_config_are_found(project):
    folder = rewrite(project, lambda v: None, with_entry(UP, {"group_size": 64, "bits": 8, "mode": "affine"}))
    found = failures(folder)
    assert found["packed weights"].startswith(f"{UP}: 16 packed columns hold 64 weights of 8 bits, 2 groups of 64")
    assert set(found) == {"packed weights"}


def test_a_wrong_group_size_is_found(project):
    folder = rewrite(project, lambda v: None, with_entry(UP, {"group_size": 128, "bits": 4, "mode": "affine"}))
    assert "packed weights" in failures(folder)


def test_two_wrongs_that_would_cancel_are_found_by_the_weights_hash(folder):
    """2 bits in groups of 32 fit the same columns as 4 bits in groups of 64: only the hash can tell."""
    config = with_entry(UP, {"group_size": 128, "bits": 8, "mode": "affine"})
    write_config(folder, config)
    assert "weights hash" in failures(folder)


def test_another_mode_is_found(project):
    folder = rewrite(project, lambda v: None, with_entry(UP, {"group_size": 32, "bits": 4, "mode": "mxfp4"}))
    assert "packed weights" in failures(folder)


def test_a_module_without_an_entry_is_found(project):
    folder = rewrite(project, lambda v: None, with_entry(UP, None))
    assert failures(folder) == {"module formats": f"{UP} is packed, but config.json has no entry for it"}


def test_an_entry_for_a_dense_module_is_found(project):
    entry = {"group_size": 64, "bits": 4, "mode": "affine"}
    folder = rewrite(project, lambda v: None, with_entry("model.norm", entry))
    assert failures(folder) == {"module formats": "model.norm has an entry in config.json, but no scales"}


def test_scales_without_a_weight_are_found(project):
    folder = rewrite(project, lambda v: v.pop(f"{UP}.weight"))
    assert f"has no {UP}.weight beside it" in failures(folder)["packed weights"]


def test_missing_biases_are_found(project):
    folder = rewrite(project, lambda v: v.pop(f"{UP}.biases"))
    assert failures(folder) == {"packed weights": f"{UP}.biases: found nothing, 4-bit needs F16 [16, 2]"}


def test_a_packed_weight_without_scales_is_found(project):
    def change(values):
        values["model.odd.weight"] = (shard(project.store.variant("Q4")), "U32", pack(np.zeros((4, 32), int), 4))

    assert failures(rewrite(project, change)) == {
        "module formats": "model.odd.weight is packed (U32), but has no scales"
    }


def test_a_shard_that_only_our_reader_takes_is_found(project, folder):
    data = shard(folder).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"data_offsets": [0,', b'"data_offsets": [-0,')
    header += b" " * (-len(header) % 8)
    shard(folder).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    seal(project, "Q4")
    found = failures(folder)
    assert set(found) == {"second reader"}
    assert f"{shard(folder).name}: the safetensors library refuses it: " in found["second reader"]


def test_a_tensor_that_the_two_readers_see_differently_is_found(folder, monkeypatch):
    def reads_otherwise(path):
        found, metadata = read_header(path)
        return [replace(t, dtype="I32") if t.dtype == "U32" else t for t in found], metadata

    monkeypatch.setattr(verify, "read_header", reads_otherwise)
    assert "is I32 [16, 32], for the safetensors library U32 [16, 32]" in failures(folder)["second reader"]


def test_two_blocks_that_differ_are_found(project):
    config = {"quantization": quantization(), "quantization_config": {"bits": 4, "group_size": 64}}
    assert "differ" in failures(rewrite(project, lambda v: None, config))["config"]


def test_one_block_alone_is_found(project):
    assert "both" in failures(rewrite(project, lambda v: None, {"quantization": quantization()}))["config"]


def test_an_index_that_disagrees_is_found(project, folder):
    index = json.loads((folder / verify.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shard(folder, 1).name
    (folder / verify.INDEX).write_text(json.dumps(index))
    seal(project, "Q4")
    assert set(failures(folder)) == {"index"}


def test_a_manifest_that_leads_out_of_the_folder_is_found(folder, tmp_path):
    (tmp_path / "secret").write_text("x")
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"tokenizer.json"', '"../../secret"'))
    assert "leads out of the folder" in failures(folder)["files"]


def test_a_link_is_no_file(folder, tmp_path):
    (tmp_path / "elsewhere").write_bytes((folder / "LICENSE").read_bytes())
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to(tmp_path / "elsewhere")
    assert "no regular file" in failures(folder)["files"]


def test_each_shard_is_read_once(folder, monkeypatch):
    verify._hashes.clear()
    reads = []
    monkeypatch.setattr(verify, "_feed", lambda f, n, *h, feed=verify._feed: (reads.append(f.name), feed(f, n, *h))[1])
    assert failures(folder) == {}
    before = len(reads)
    assert failures(folder) == {}
    assert verify.sha256_of(shard(folder))
    assert len(reads) == before


# ------------------------------------------------------------------------------------------------ folders and what may lie there


@pytest.mark.parametrize(
    "name",
    [
        "provenance/lock.json", "provenance/variants.yaml", "provenance/variants.allocations/Q4.yaml",
        "provenance/results/quality.json", "images/kld.png", "model.sig",
    ],
)  # fmt: skip
def test_what_may_stand_beside_the_manifest_is_no_stray(name, folder):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    assert failures(folder) == {}


@pytest.mark.parametrize(
    "name", ["provenance/results/other.json", "provenance/model.safetensors", "provenance/a/lock.json", "x/model.sig"]
)
def test_a_name_like_that_elsewhere_is_a_stray(name, folder):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    assert failures(folder)["no other files"] == f"{name} is not in the manifest"


def test_a_downloaded_folder_is_verified_without_a_ladder(folder, tmp_path, publish):
    copy = shutil.copytree(folder, tmp_path / "downloaded")
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (copy / ".cache/huggingface").mkdir(parents=True)
    (copy / ".cache/huggingface/notes").write_text("x")
    (copy / "theirs.txt").write_text("x")
    found = json.loads(publish("verify", "./downloaded", "--json", cwd=tmp_path).ok().out)["./downloaded"]
    assert next(c for c in found if c["name"] == "no other files")["detail"] == "not ours: theirs.txt"
    assert "a folder is on no hub" in publish("verify", "./downloaded", "--remote", cwd=tmp_path).refused(2)
    shutil.copy(shard(copy), copy / "model-00003-of-00003.safetensors")
    told = publish("verify", str(copy), cwd=tmp_path).refused(1)
    assert "no other files: model-00003-of-00003.safetensors is not in the manifest" in told


@pytest.mark.parametrize("name", ["/tmp/nope/nowhere", "./nope", "variants.yaml/x"])
def test_a_path_to_no_folder_is_told_as_such_without_a_ladder(name, publish, tmp_path):
    assert publish("verify", name, cwd=tmp_path).refused(2) == f"{name}: no such folder"


def pruned_checks(folder, *gone):
    """name → (passed, detail) once these shards are pruned."""
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    files = {f.path: f.sha256 for f in manifest.files if folder / f.path in gone}
    for path in gone:
        path.unlink()
    pruned = Pruned(SimpleNamespace(repo="acme/Q4", commit="0" * 40), files)  # type: ignore[arg-type]
    return {c.name: (c.passed, c.detail) for c in verify_folder(folder, manifest, pruned)}


def test_what_read_nothing_of_pruned_weights_does_not_say_ok(folder):
    found = pruned_checks(folder, shard(folder, 1), shard(folder, 2))
    for name in ("shards", "second reader", "tensors", "packed weights"):
        assert found[name] == (None, "not checked: pruned")
    assert all(found[name][0] for name in ("files", "no other files", "index", "config", "weights hash"))


def test_of_weights_pruned_in_part_the_rest_is_checked(folder):
    own = len(read_header(shard(folder, 1))[0])
    found = pruned_checks(folder, shard(folder, 2))
    assert found["shards"] == (True, "1 safetensors files parse")
    assert found["tensors"] == (True, f"{own} of 10 tensors, bytes as in the manifest")


def test_a_folder_without_a_manifest_is_taken_for_a_variant(project, publish):
    assert "no variant './base'" in publish("verify", "./base", cwd=project.folder).refused(2)
