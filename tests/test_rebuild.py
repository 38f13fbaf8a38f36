"""`publish verify --rebuild`: the same bytes again, and the first thing that is not the same."""

from __future__ import annotations

import fcntl
import json
import re
import shutil

import pytest
import test_solve_build as solved
from blake3 import blake3
from conftest import EXAMPLE, write_ladder
from huggingface_hub import HfApi

import publisher.calibrate
from inference.checkpoint import read_header
from publisher.localhub import LocalHub
from publisher.provenance import expected, write
from publisher.rebuild import compare
from publisher.schema import Costs, FileEntry, Manifest, TensorEntry
from publisher.scratch import scratch
from publisher.store import sha256_file, write_model
from publisher.variants import load_project
from quant.folder import weights_hash

ID = "Q2_K_XL"
WRITE, BASE = "hf_rebuildWRITEtoken", "acme/Tiny-base"


def manifest(ladder, id=ID):
    return Manifest.model_validate_json((ladder / f"build/{id}/manifest.json").read_bytes())


def left_behind(folder):
    return [p.name for p in folder.glob("**/publish-rebuild-*")]


@pytest.fixture
def inputs(tmp_path):
    """What a stranger would need beside the repo: the local base and imatrix, by the names in the provenance."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "Qwen3.5-tiny").symlink_to(EXAMPLE / "model")
    shutil.copy(EXAMPLE / "imatrix-tiny.gguf", folder)
    return folder


@pytest.fixture
def repo(built, tmp_path):
    """A downloaded repo, without the ladder that made it."""
    return shutil.copytree(built / f"build/{ID}", tmp_path / "repo")


def test_a_variant_of_the_ladder_is_built_again_to_the_same_bytes(ladder, publish):
    def all_files():
        return sorted((p.as_posix(), p.stat().st_mtime_ns) for p in ladder.rglob("*") if p.is_file())

    before = all_files()
    ran = publish("verify", ID, "--rebuild", "--json", cwd=ladder).ok()
    checks = {c["name"]: c for c in json.loads(ran.out)[ID]}
    assert all(c["passed"] for c in checks.values())
    assert checks["rebuilt weights"]["detail"].startswith(manifest(ladder).weights_hash[:12])
    assert "135 tensors" in checks["rebuilt tensors"]["detail"]
    assert all_files() == before


def test_a_downloaded_folder_is_rebuilt_without_the_ladder(repo, inputs, publish, tmp_path):
    publish("verify", str(repo), "--rebuild", "--inputs", str(inputs), cwd=tmp_path).ok()
    told = publish("verify", str(repo), "--rebuild", cwd=tmp_path).refused(2)
    assert told == (
        "the base Qwen3.5-tiny is a local one named 'Qwen3.5-tiny', and not here; "
        "put it into a folder and give --inputs FOLDER"
    )
    (inputs / "imatrix-tiny.gguf").rename(inputs / "other.gguf")
    told = publish("verify", str(repo), "--rebuild", "--inputs", str(inputs), cwd=tmp_path).refused(2)
    where = inputs / "imatrix-tiny.gguf"
    assert told == f"the imatrix is a local one named 'imatrix-tiny.gguf', and not here at {where}; put it there"


def test_another_imatrix_or_base_is_told_before_anything_is_built(repo, inputs, publish, tmp_path):
    data = bytearray((inputs / "imatrix-tiny.gguf").read_bytes())
    data[-1] ^= 1
    (inputs / "imatrix-tiny.gguf").write_bytes(data)
    told = publish("verify", str(repo), "--rebuild", "--inputs", str(inputs), cwd=tmp_path).refused(2)
    assert re.fullmatch(
        r"the imatrix 'imatrix-tiny.gguf': found sha256 \w{12} at .*/inputs/imatrix-tiny.gguf, on record is \w{12}",
        told,
    )
    shutil.copy(EXAMPLE / "imatrix-tiny.gguf", inputs)
    (inputs / "Qwen3.5-tiny").unlink()
    base = shutil.copytree(EXAMPLE / "model", inputs / "Qwen3.5-tiny")
    (shard,) = base.glob("*.safetensors")
    used = next(t for t in read_header(shard)[0] if t.name.endswith("layers.1.mlp.down_proj.weight"))
    data = bytearray(shard.read_bytes())
    data[used.start] ^= 1
    shard.write_bytes(data)
    ran = publish("verify", str(repo), "--rebuild", "--inputs", str(inputs), cwd=tmp_path)
    assert "inputs: base weights: " in ran.refused(1)
    assert "building it again" not in ran.err


def test_weights_that_the_recipe_does_not_give_are_found_by_their_first_tensor(ladder, publish):
    """Everything in the folder agrees with everything else: only building it again can tell."""
    folder = ladder / f"build/{ID}"
    path, found = folder / "model.safetensors", manifest(ladder)
    tensors = read_header(path)[0]
    victim = next(t for t in tensors if t.name.endswith("layers.1.mlp.down_proj.weight"))
    data = bytearray(path.read_bytes())
    data[victim.start] ^= 1
    path.write_bytes(data)
    own = blake3(data[victim.start : victim.start + victim.nbytes]).hexdigest()
    entries = [t if t.name != victim.name else TensorEntry(**{**t.model_dump(), "blake3": own}) for t in found.tensors]
    files = [
        f if f.path != path.name else FileEntry(path=f.path, size=f.size, sha256=sha256_file(path)) for f in found.files
    ]
    config = json.loads((folder / "config.json").read_text())
    hashed = weights_hash([(t.name, t.dtype, t.shape, t.blake3) for t in entries], config["quantization"])
    forged = found.model_copy(update={"tensors": entries, "files": files, "weights_hash": hashed})
    write_model(folder / "manifest.json", forged)
    project = load_project(ladder / "variants.yaml")
    write(folder, expected(project, forged))
    publish("verify", ID, cwd=ladder).ok()

    told = publish("verify", ID, "--rebuild", cwd=ladder).refused(1)
    assert f"rebuilt tensors: {victim.name} is the first that differs: BLAKE3 " in told
    assert "rebuilt weights: built again: " in told
    assert "rebuilt files: model.safetensors: sha256 " in told
    assert not left_behind(ladder)


def test_what_was_built_is_rebuilt_although_the_ladder_says_something_else_now(ladder, publish):
    path = ladder / "variants.yaml"
    path.write_text(path.read_text().replace("bits: 2,", "bits: 3,"))
    publish("verify", ID, "--rebuild", cwd=ladder).ok()


def test_the_comparison_names_what_is_missing_or_more(built):
    found = manifest(built)
    short = found.model_copy(update={"tensors": found.tensors[1:], "files": found.files[1:], "params": 1})
    faults = {c.name: c.detail for c in compare(found, short) if not c.passed}
    assert faults == {
        "rebuilt tensors": f"{found.tensors[0].name} was not built again",
        "rebuilt files": f"{found.files[0].path} was not built again",
        "rebuilt manifest": "params differs",
    }
    faults = {c.name: c.detail for c in compare(short, found) if not c.passed}
    assert faults["rebuilt tensors"] == f"{found.tensors[0].name} is not in the manifest"


def test_other_versions_are_told_and_no_failure(ladder, publish):
    path = ladder / f"build/{ID}/provenance/lock.json"
    lock = json.loads(path.read_text())
    path.write_text(json.dumps({**lock, "versions": {**lock["versions"], "mlx": "0.1.0"}}))
    ran = publish("verify", ID, "--rebuild", "--json", cwd=ladder).ok()
    versions = next(c for c in json.loads(ran.out)[ID] if c["name"] == "versions")
    assert versions["passed"] is None
    assert versions["detail"].startswith("mlx 0.1.0 → ")


def test_a_full_disk_is_told_before_anything_is_built(ladder, publish, monkeypatch):
    monkeypatch.setattr("publisher.fetch.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert "1.00 kB free" in publish("verify", ID, "--rebuild", cwd=ladder).refused(2)
    assert not left_behind(ladder)


@pytest.mark.parametrize(
    ("name", "content", "code", "told"),
    [
        ("variants.yaml", None, 2, "provenance/variants.yaml is missing"),
        ("lock.json", None, 2, "provenance/lock.json is missing"),
        ("lock.json", "{", 2, "lock.json (provenance): "),
        ("variants.yaml", "a: &x [1]\nb: *x\n", 2, "provenance/variants.yaml:2: not YAML: found *x"),
        ("variants.yaml", "base: x/y\nvariants: {A: {bits: 2}, B: {bits: 2}}\n", 2, "variants: found A, B; expected"),
        ("variants.yaml", "base: /etc\nimatrix: ../../x\nvariants: {Q2_K_XL: {bits: 2}}\n", 2, "named 'etc'"),
        ("variants.yaml", "base: ..\nvariants: {Q2_K_XL: {bits: 2}}\n", 2, "named '..'"),
        ("variants.yaml", "#" * 5_000_000, 2, "provenance/variants.yaml: larger than 4000000 bytes"),
        ("variants.yaml", "base: ./Qwen3.5-tiny\nvariants: {Q2_K_XL: {bits: 8}}\n", 1, "inputs: "),
    ],
)
def test_a_strangers_provenance_is_input_like_any_other(name, content, code, told, repo, inputs, publish, tmp_path):
    path = repo / "provenance" / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert told in publish("verify", str(repo), "--rebuild", "--inputs", str(inputs), cwd=tmp_path).refused(code)


def test_a_link_in_place_of_the_provenance_is_not_followed(repo, inputs, publish, tmp_path):
    shutil.move(repo / "provenance", tmp_path / "elsewhere")
    (repo / "provenance").symlink_to(tmp_path / "elsewhere")
    args = ("verify", str(repo), "--rebuild", "--inputs", str(inputs))
    assert "provenance/lock.json is missing" in publish(*args, cwd=tmp_path).refused(2)


def test_statistics_are_found_in_the_ladder_and_collected_again_without_it(tmp_path, publish, monkeypatch):
    empty = Costs(statistics="0" * 64, solver="gptq", version=1, modules={})
    monkeypatch.setattr(publisher.calibrate, "measure_costs", lambda *args: empty)
    folder = tmp_path / "mine"
    folder.mkdir()
    words = (EXAMPLE.parents[1] / "publisher/data/calibration.txt").read_text(encoding="utf-8")[:2000]
    (folder / "words.txt").write_text(words, encoding="utf-8")
    write_ladder(folder, solved.HEAD + "variants:\n  A: {bits: 4}\n")
    publish("calibrate", cwd=folder).ok()
    publish("build", "A", "--skip", "smoke", "--skip", "bench", cwd=folder).ok()
    ran = publish("verify", "A", "--rebuild", cwd=folder).ok()
    assert "collecting them again" not in ran.err
    (tmp_path / "tiny").symlink_to(EXAMPLE / "model")
    args = ("verify", str(folder / "build/A"), "--rebuild", "--inputs", str(tmp_path))
    assert "calibration.text is a local one named 'words.txt'" in publish(*args, cwd=tmp_path).refused(2)
    (tmp_path / "words.txt").write_text(words, encoding="utf-8")
    assert "collecting them again" in publish(*args, cwd=tmp_path).ok().err
    (tmp_path / "words.txt").write_text("other words", encoding="utf-8")
    assert "calibration.text 'words.txt': found sha256" in publish(*args, cwd=tmp_path).refused(2)


def test_a_base_and_imatrix_of_the_hub_need_nothing_but_the_repo(tmp_path, publish, quick_yaml):
    with LocalHub(tmp_path / "hub", {WRITE: "write:acme"}) as hub:
        api = HfApi(hub.url, WRITE)
        for repo, source, patterns in ((BASE, EXAMPLE / "model", None), ("acme/statistics", EXAMPLE, ["*.gguf"])):
            api.create_repo(repo)
            api.upload_folder(repo_id=repo, folder_path=source, allow_patterns=patterns)
        text = re.sub(r"(?m)^base:\n(?:  .*\n)+", f"base: {BASE}\n", quick_yaml)
        text = text.replace("imatrix: ./imatrix-tiny.gguf", "imatrix: {repo: acme/statistics, file: imatrix-tiny.gguf}")
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "variants.yaml").write_text(text)
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HOME": str(tmp_path / "home")}
        publish("build", ID, "--skip", "smoke", "--skip", "bench", cwd=folder, env=env).ok()
        repo = shutil.move(folder / f"build/{ID}", tmp_path / "repo")
        shutil.rmtree(folder)
        lock = json.loads((repo / "provenance/lock.json").read_text())
        assert lock["base"]["commit"] == api.model_info(BASE).sha
        assert lock["imatrix"]["commit"] == api.model_info("acme/statistics").sha
        hub.stats.reset()
        publish("verify", str(repo), "--rebuild", cwd=tmp_path, env=env | {"HF_HUB_OFFLINE": "1"}).ok()
        assert not hub.stats.requests
        shutil.rmtree(tmp_path / "home")
        publish("verify", str(repo), "--rebuild", cwd=tmp_path, env=env).ok()
        assert sum(hub.stats.sent.values()) > 10_000_000, "base and imatrix came from the hub"


# ------------------------------------------------------------------------------------------------ the scratch folder


def test_what_a_killed_run_left_is_removed_and_what_another_works_in_is_not(tmp_path):
    for name in ("killed", "working"):
        (tmp_path / f"publish-rebuild-{name}/work").mkdir(parents=True)
        (tmp_path / f"publish-rebuild-{name}/.lock").touch()
    (tmp_path / "publish-rebuild-mine").mkdir()  # no lock: not made by us
    with open(tmp_path / "publish-rebuild-working/.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with scratch("rebuild", tmp_path) as work:
            assert work.is_dir()
            assert not (tmp_path / "publish-rebuild-killed").exists()
    assert sorted(left_behind(tmp_path)) == ["publish-rebuild-mine", "publish-rebuild-working"]


def test_a_failure_leaves_nothing(tmp_path):
    def stopped():
        with scratch("rebuild", tmp_path) as work:
            (work / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not list(tmp_path.iterdir())
