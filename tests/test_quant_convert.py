"""The build: what is stored, how it is laid out, and that strangers can load it."""

import hashlib
import json
import os
import shutil
import threading
import time
import weakref
from collections import Counter, namedtuple
from dataclasses import replace

import numpy as np
import pytest
from blake3 import blake3
from engine_checkpoints import write_moe
from mlx_lm.utils import load_model
from quant_jobs import BAND, TINY_IMATRIX, contents, job, ladder, load_tensors

from inference.backend import BACKEND, mx
from inference.checkpoint import QuantSpec, read_checkpoint, read_quantization
from inference.errors import CheckpointError, InputError, ResourceError
from inference.load import load
from quant import convert as convert_module
from quant import solve as solve_module
from quant import stream
from quant.convert import convert, finish
from quant.folder import weights_hash
from quant.job import Lane
from quant.moments import FromImportance
from quant.shards import plan_layout
from quant.source import source_hash_of

TOKENS = mx.array([[5, 900, 17, 2048, 77, 31, 8, 1999, 640, 3]])
SIDE = ["LICENSE", "chat_template.jinja", "generation_config.json", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json", "video_preprocessor_config.json"]  # fmt: skip


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    """A plain 4-bit variant."""
    (done,) = convert([job(tiny, tmp_path_factory.mktemp("built") / "4bit")])
    return done


def original(name: str) -> str:
    name = name.replace("language_model.lm_head", "lm_head").replace("vision_tower.", "model.visual.")
    return name.replace("language_model.model.", "model.language_model.")


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()


def test_every_matrix_is_what_mx_quantize_makes_of_it(tiny, built):
    source, stored = load_tensors(tiny), load_tensors(built.folder)
    _, modules = read_quantization(json.loads((built.folder / "config.json").read_text()))
    assert len(modules) == 3 * 8 + 7 + 2
    for module, spec in modules.items():
        assert spec is not None
        w = source[original(f"{module}.weight")]
        codes, scales, biases = mx.quantize(w, spec.group_size, spec.bits)
        assert same(stored[f"{module}.weight"], codes)
        assert same(stored[f"{module}.scales"], scales)
        assert same(stored[f"{module}.biases"], biases)


def test_everything_else_keeps_its_bytes_but_for_the_norms_plus_one(tiny, built):
    source, stored = load_tensors(tiny), load_tensors(built.folder)
    _, modules = read_quantization(json.loads((built.folder / "config.json").read_text()))
    seen = 0
    for name, x in stored.items():
        if name.rpartition(".")[0] in modules:
            continue
        w = source[original(name)]
        if name.endswith("layernorm.weight") or (
            "norm" in name and not name.startswith("vision") and "attn.norm" not in name
        ):
            w = (1 + w.astype(mx.float32)).astype(mx.bfloat16)
        elif name.endswith("conv1d.weight"):
            w = w.swapaxes(1, 2)
        elif name.endswith("patch_embed.proj.weight"):
            w = mx.moveaxis(w, 1, -1)
        elif name.endswith("linear_attn.norm.weight"):
            w = w.astype(mx.bfloat16)  # float32 in the source
        assert same(x, w), name
        seen += 1
    assert seen > 60
    assert stored["language_model.model.layers.0.linear_attn.A_log"].dtype == mx.float32


@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_formats_are_stored_without_biases_and_load(tiny, tmp_path, recipe):
    (done,) = convert([job(tiny, tmp_path / recipe, recipe=recipe)])
    stored, source = load_tensors(done.folder), load_tensors(tiny)
    config = json.loads((done.folder / "config.json").read_text())
    top, _ = read_quantization(config)
    assert top is not None
    codes, scales = mx.quantize(source["lm_head.weight"], top.group_size, top.bits, mode=recipe)
    assert same(stored["language_model.lm_head.weight"], codes)
    assert same(stored["language_model.lm_head.scales"], scales)
    assert "language_model.lm_head.biases" not in stored
    assert mx.isfinite(load_model(done.folder, strict=True)[0](TOKENS)).all()


def test_a_variant_has_the_same_bytes_alone_or_in_a_ladder_and_in_bands_of_any_size(tiny, tmp_path):
    together = convert(ladder(tiny, tmp_path / "together"))
    for alone, done in zip(ladder(tiny, tmp_path / "alone"), together, strict=True):
        (single,) = convert([alone], band_bytes=BAND)
        assert contents(single.folder) == contents(done.folder)
        assert (single.weights_hash, single.source_hash) == (done.weights_hash, done.source_hash)
        assert single.files == done.files


def test_a_ladder_computes_what_variants_share_once_and_reads_the_source_once(tiny, tmp_path, monkeypatch):
    """Equal formats, the 8-bit tensors of a recipe, bf16 tensors and folded ones, across recipes and group sizes."""
    solved, hashed, read = Counter(), Counter(), Counter()
    together, read_band = stream.solve_together, stream.read_band
    hash_ = stream._Product.hash

    def solve(weights, specs):
        solved[weights.shape] += len(specs)
        return together(weights, specs)

    monkeypatch.setattr(stream, "solve_together", solve)
    monkeypatch.setattr(stream, "solve", lambda *_: pytest.fail("rtn on a CPU is solved together"))
    monkeypatch.setattr(stream._Product, "hash", lambda p, parts: (hashed.update([p.key]), hash_(p, parts))[1])
    monkeypatch.setattr(
        stream, "read_band", lambda t, *rows: (read.update([(t.source.name, t.op)]), read_band(t, *rows))[1]
    )
    jobs = [
        *(job(tiny, tmp_path / str(i), bits) for i, bits in enumerate((4, 4, 5, 8))),
        job(tiny, tmp_path / "uniform", 8, recipe="uniform"),
        *(job(tiny, tmp_path / f"awq{bits}", bits, imatrix=TINY_IMATRIX) for bits in (4, 5)),
    ]
    done = convert(jobs)
    matrices = {(p.target.name, p.spec, fold_of(j, p)): p.target.shape for j in jobs for p in j.plans if p.spec}
    assert solved == Counter(matrices.values())
    assert len(matrices) < sum(bool(p.spec) for j in jobs for p in j.plans) / 2
    changed = {(p.target.name, fold_of(j, p)) for j in jobs for p in j.plans if not p.spec and changes(j, p)}
    assert hashed.total() == len(matrices) + len(changed)  # where bytes are the source's, so is their hash
    assert set(read.values()) == {1}
    assert done[0].bytes_read == sum(t.nbytes for t in read_checkpoint(tiny).tensors.values())
    for lane in done:
        for name, _, _, digest in lane.tensors[:20] + lane.tensors[-20:]:
            assert blake3(read_checkpoint(lane.folder).tensors[name].read()).hexdigest() == digest


def fold_of(j, plan):
    return j.folds[plan.target.name].digest() if plan.target.name in j.folds else ""


def changes(j, plan):
    target = plan.target
    return target.op == "plus_one" or target.name in j.folds or target.dtype != target.source.dtype


def test_memory_holds_the_weights_in_flight_and_none_that_are_written(tiny, tmp_path, monkeypatch):
    alive: weakref.WeakSet = weakref.WeakSet()
    init = stream._Product.__init__
    monkeypatch.setattr(stream._Product, "__init__", lambda self, *a: (init(self, *a), alive.add(self))[0])
    held, reads = [], []
    read = stream.read_band
    monkeypatch.setattr(stream, "read_band", lambda *a: reads.append(read(*a).nbytes) or read(*a))
    jobs = ladder(tiny, tmp_path)
    convert(jobs, lambda _: held.append(sum(any(p.rest) for p in alive)), BAND, at_once=2)
    bands = 2 * 3 + 2  # in solving and in writing
    assert 0 < max(held) <= bands * len(jobs)
    row = max(t.nbytes // t.shape[0] for t in read_checkpoint(tiny).tensors.values())
    assert max(reads) <= max(BAND, row)


def test_the_way_of_a_gpu_leaves_the_same_bytes(tiny, tmp_path, monkeypatch):
    """Its order of work (arrays of MLX, one solver, one evaluation a band), here on a CPU."""
    expected = convert(ladder(tiny, tmp_path / "cpu"))
    monkeypatch.setattr(stream, "BACKEND", "cuda")
    monkeypatch.setattr(solve_module, "BACKEND", "cuda")
    monkeypatch.setattr("quant.nearest.quantize", lambda *_: pytest.fail("for CPUs"))
    for done, known in zip(convert(ladder(tiny, tmp_path / "gpu"), band_bytes=BAND), expected, strict=True):
        assert contents(done.folder) == contents(known.folder)


@pytest.mark.skipif(BACKEND != "cpu", reason="a GPU solves one band at a time")
def test_jobs_bound_what_is_solved_at_once_and_held_and_change_no_byte(tiny, tmp_path, monkeypatch):
    solve, read, write = stream.solve_together, stream.read_band, Lane.write
    lock, meet = threading.Lock(), threading.Barrier(3)
    busy, most, alive, held = [], [], weakref.WeakSet(), []

    class Band(np.ndarray):  # a plain array cannot be in a set
        __hash__ = object.__hash__

    def counting_read(*args):
        band = read(*args).view(Band)
        with lock:
            alive.add(band)
            held.append(len(alive))
        return band

    def counting_solve(*args):
        with lock:
            busy.append(1)
            most.append(len(busy))
        if len(most) <= 3 and jobs == 3:
            meet.wait(30)  # broken, and so an error, unless three come
        out = solve(*args)
        with lock:
            busy.pop()
        return out

    def slow_write(*args):
        time.sleep(0.001)  # the disk is what everything waits for
        write(*args)

    monkeypatch.setattr(stream, "read_band", counting_read)
    monkeypatch.setattr(stream, "solve_together", counting_solve)
    monkeypatch.setattr(Lane, "write", slow_write)
    seen = {}
    for jobs in (1, 3):
        most.clear()
        held.clear()
        done = convert(ladder(tiny, tmp_path / str(jobs)), band_bytes=BAND, at_once=jobs)
        seen[jobs] = (max(most), max(held), [contents(d.folder) for d in done])
    assert (seen[1][0], seen[3][0]) == (1, 3)
    assert seen[1][1] < seen[3][1]
    assert seen[1][1] <= 2 * (1 + 1) + 2  # in solving, in writing, and one at each end
    assert seen[1][2] == seen[3][2]


def test_mlx_lm_and_the_engine_load_it_strictly_and_agree(built):
    theirs, _ = load_model(built.folder, strict=True)
    theirs.set_dtype(mx.float32)
    ours = load(built.folder, mx.float32).forward(TOKENS)
    assert mx.abs(theirs(TOKENS) - ours).max().item() < 1e-2


def test_mlx_lm_keeps_dense_what_the_config_does_not_name(tiny, tmp_path):
    (done,) = convert([job(tiny, tmp_path / "v", recipe="unsloth")])
    model, _ = load_model(done.folder, strict=True)
    layer = model.language_model.model.layers[0]
    assert layer.linear_attn.out_proj.weight.dtype == mx.bfloat16
    assert layer.mlp.gate_proj.weight.dtype == mx.uint32
    assert layer.mlp.gate_proj.bits == 4
    assert layer.mlp.down_proj.bits == 5


def test_the_config_is_the_bases_with_one_explicit_block(tiny, built):
    base = json.loads((tiny / "config.json").read_text())
    config = json.loads((built.folder / "config.json").read_text())
    assert list(config) == [*base, "quantization", "quantization_config"]
    assert {k: config[k] for k in base} == base
    assert json.dumps(config["quantization"]) == json.dumps(config["quantization_config"])
    q = config["quantization"]
    assert {k: q[k] for k in ("group_size", "bits", "mode")} == {"group_size": 64, "bits": 6, "mode": "affine"}
    assert q["language_model.model.layers.0.mlp.gate_proj"] == {"group_size": 64, "bits": 4, "mode": "affine"}


def test_the_config_forgets_the_local_path_of_the_base(tiny, tmp_path):
    j = job(tiny, tmp_path / "v")
    (done,) = convert([replace(j, config={"_name_or_path": "/home/me/model", **j.config})])
    assert "_name_or_path" not in json.loads((done.folder / "config.json").read_text())


def test_files_index_and_hashes_are_true(tiny, built):
    assert [n for n, _, _ in built.files] == sorted(
        [*SIDE, "config.json", "model.safetensors", "model.safetensors.index.json"]
    )
    for name, size, sha in built.files:
        data = (built.folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, sha)
        if name in SIDE:
            assert data == (tiny / name).read_bytes()
    checkpoint = read_checkpoint(built.folder)  # checks the index against the shards
    assert checkpoint.mlx
    index = json.loads((built.folder / "model.safetensors.index.json").read_text())
    params = sum(int(np.prod(t.shape)) for t in read_checkpoint(tiny).tensors.values())
    assert index["metadata"] == {
        "total_size": sum(t.nbytes for t in checkpoint.tensors.values()),
        "total_parameters": params,
    }
    assert list(index["weight_map"]) == sorted(checkpoint.tensors)
    for name, dtype, shape, digest in built.tensors:
        t = checkpoint.tensors[name]
        assert (t.dtype, t.shape, blake3(t.read()).hexdigest()) == (dtype, shape, digest)
    assert len(built.tensors) == len(checkpoint.tensors)
    assert built.weights_hash == weights_hash(reversed(built.tensors), checkpoint.config["quantization"])
    assert built.source_hash == source_hash_of(p.target for p in job(tiny, built.folder).plans)


def test_small_shards_load_and_hold_the_same_tensors(tiny, tmp_path, built):
    (done,) = convert([job(tiny, tmp_path / "v", max_shard_bytes=1_200_000)])
    shards = sorted(done.folder.glob("*.safetensors"))
    assert [s.name for s in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) > 5
    assert max(s.stat().st_size for s in shards) <= 1_200_000
    assert done.weights_hash == built.weights_hash
    model, _ = load_model(done.folder, strict=True)
    assert mx.array_equal(model(TOKENS), load_model(built.folder, strict=True)[0](TOKENS))


def test_a_weight_larger_than_the_limit_gets_a_shard_of_its_own():
    parts = [[(f"{n}.weight", "F32", (size,))] for n, size in (("a", 10), ("b", 1000), ("c", 10), ("d", 10))]
    layout = plan_layout(parts, 800)
    assert [[t.name for g in layout.groups for t in g if t.shard == i] for i in range(len(layout.shards))] == [
        ["a.weight"], ["b.weight"], ["c.weight", "d.weight"],
    ]  # fmt: skip


def test_experts_are_stacked_as_mlx_lm_wants_them(tmp_path):
    base = write_moe(tmp_path / "moe")
    j = job(base, tmp_path / "v", recipe="uniform")
    (done,) = convert([j], band_bytes=2048)
    stored, source = load_tensors(done.folder), load_tensors(base)
    fused = source["model.language_model.layers.2.mlp.experts.gate_up_proj"]
    for i, half in enumerate(("gate", "up")):
        module = f"language_model.model.layers.2.mlp.switch_mlp.{half}_proj"
        codes, scales, biases = mx.quantize(mx.contiguous(fused[:, i * 64 : (i + 1) * 64]), 64, 4)
        assert same(stored[f"{module}.weight"], codes)
        assert same(stored[f"{module}.scales"], scales)
        assert same(stored[f"{module}.biases"], biases)
    router = stored["language_model.model.layers.2.mlp.gate.weight"]
    assert same(router, mx.quantize(source["model.language_model.layers.2.mlp.gate.weight"], 64, 8)[0])
    tokens = mx.array([[3, 77, 200, 12, 9]])
    theirs, _ = load_model(done.folder, strict=True)
    theirs.set_dtype(mx.float32)
    ours = load(done.folder, mx.float32).forward(tokens)
    assert mx.abs(theirs(tokens) - ours).max().item() < 1e-2
    assert mx.isfinite(ours).all()


def test_the_mtp_head_is_kept_dropped_or_split_off(tiny, tmp_path):
    modes = ("keep", "drop", "split")
    kept, dropped, split = convert([job(tiny, tmp_path / m, mtp=m) for m in modes])
    names = [{t[0] for t in v.tensors} for v in (kept, dropped, split)]
    mtp = {n for n in names[0] if n.startswith("mtp.")}
    assert len(mtp) > 5
    assert names[1] == names[0] - mtp
    assert names[2] == names[0]
    assert split.weights_hash == kept.weights_hash != dropped.weights_hash
    config = json.loads((split.folder / "config.json").read_text())
    assert config["mlx_lm_extra_tensors"] == {"mtp_file": "mtp.safetensors", "mtp_tensor_count": len(mtp)}
    side = mx.load(str(split.folder / "mtp.safetensors"))
    assert set(side) == mtp  # type: ignore[arg-type]
    assert same(side["mtp.fc.weight"], load_tensors(tiny)["mtp.fc.weight"])  # type: ignore[index]
    assert not mtp & read_checkpoint(split.folder).tensors.keys()
    for v in (kept, dropped, split):
        assert mx.isfinite(load_model(v.folder, strict=True)[0](TOKENS)).all()


def test_finish_replaces_the_old_folder_and_no_stale_shard_survives(tiny, tmp_path):
    final = tmp_path / "out/4bit"
    first, second = job(tiny, tmp_path / "s1", max_shard_bytes=1_000_000), job(tiny, tmp_path / "s2")
    convert([first])
    finish(first.staging, final)
    assert len(list(final.glob("model*.safetensors"))) > 5
    (done,) = convert([second])
    expected = contents(done.folder)
    finish(second.staging, final)
    assert contents(final) == expected
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert os.listdir(tmp_path / "out") == ["4bit"]


def test_finish_puts_the_old_folder_back_if_the_move_fails(tmp_path):
    final = tmp_path / "v"
    final.mkdir()
    (final / "old").touch()
    (tmp_path / "staging").mkdir()
    with pytest.raises(FileNotFoundError):
        finish(tmp_path / "staging", final)
    assert os.listdir(final) == ["old"]


def test_too_small_a_disk_is_refused_with_both_figures_before_anything_is_written(tiny, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: usage(9, 9, 10_000_000))
    with pytest.raises(ResourceError) as e:
        convert(ladder(tiny, tmp_path / "out"))
    assert str(e.value) == f"disk: 0.02 GB needed at {tmp_path}/out, 0.01 GB free"
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quant.shards.ShardWriter._write", full)
    with pytest.raises(ResourceError, match=r"^disk is full at .*; free some space and run again$"):
        convert([job(tiny, tmp_path / "v")])


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "base")


def test_a_side_file_that_links_out_of_the_base_is_refused(copy, tmp_path):
    (tmp_path / "secret").write_text("x")
    (copy / "LICENSE").unlink()
    (copy / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError) as e:
        convert([job(copy, tmp_path / "v")])
    assert str(e.value) == f"base/LICENSE: links to {tmp_path}/secret, outside the base folder; copy the file itself"


def test_links_into_the_blobs_of_a_hugging_face_cache_are_copied_as_files(tiny, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(tiny.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    (done,) = convert([job(snapshot, tmp_path / "v")])
    assert not (done.folder / "LICENSE").is_symlink()
    assert (done.folder / "LICENSE").read_bytes() == (tiny / "LICENSE").read_bytes()


def test_no_code_is_copied(copy, tmp_path):
    (copy / "LICENSE.py").write_text("print()")
    (copy / "modeling.py").write_text("print()")
    (done,) = convert([job(copy, tmp_path / "v")])
    assert not list(done.folder.glob("*.py"))


@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0])
def test_a_source_that_is_not_finite_is_refused(copy, tmp_path, bits):
    info = read_checkpoint(copy).tensors["model.language_model.layers.1.mlp.up_proj.weight"]
    with open(info.file, "r+b") as f:
        f.seek(info.start + 1000)
        f.write(bits.to_bytes(2, "little"))
    with pytest.raises(CheckpointError) as e:
        convert([job(copy, tmp_path / "v")])
    assert str(e.value) == f"{info.file.name}: {info.name} holds values that are not finite"


def test_an_unknown_solver_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"^solver 'magic' is unknown; known: rtn, ls, gptq$"):
        convert([job(tiny, tmp_path / "v", solver="magic")])


def test_solvers_get_the_statistics_of_what_the_folded_weight_sees(tiny, tmp_path, monkeypatch):
    seen = {}

    def spy(w, moments, spec, effort, dtype):
        if moments is not None:
            seen[w.shape] = (moments.second, w.dtype, dtype)
        return solve_module._rtn(w, None, spec, effort, dtype)

    monkeypatch.setitem(solve_module.SOLVERS, "spy", solve_module.Solver(spy, uses_second=True))
    j = job(tiny, tmp_path / "v", imatrix=TINY_IMATRIX, solver="spy")
    module = "language_model.model.layers.0.mlp.down_proj"
    convert([replace(j, moments=FromImportance({module: np.full(768, 2.0, np.float32)}))])
    second, given, stored = seen[256, 768]
    np.testing.assert_allclose(second, 2 / j.folds[f"{module}.weight"].columns ** 2, rtol=1e-6)
    assert (given, stored) == (mx.float32, mx.bfloat16)  # not rounded before it is quantized


def test_a_spec_knows_its_stored_parts():
    assert QuantSpec(4, 64).parts("a.weight", (8, 128)) == [
        ("a.weight", "U32", (8, 16)), ("a.scales", "BF16", (8, 2)), ("a.biases", "BF16", (8, 2)),
    ]  # fmt: skip
