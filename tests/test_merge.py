"""`publish merge`: what other hosts built comes in by hash, or not at all, and is then what one host would have built."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLE, environment, own_base, write_ladder
from solved_ladder import HEAD

import publisher.calibrate
import publisher.merge
from inference.checkpoint import read_header
from inference.errors import InputError
from publisher.build import Cards
from publisher.locks import repo_lock
from publisher.schema import Costs, History, Receipt
from publisher.scratch import scratch
from publisher.store import Store, model_text, read_model, write_model

IDS = [f"Q{bits}_K_XL" for bits in (2, 3, 4, 5, 6, 8)]
Q2, Q4 = IDS[0], IDS[2]


def worker(built: Path, folder: Path, *ids: str) -> Path:
    """The output folder of a host that built these."""
    out = folder / "build"
    out.mkdir(parents=True)
    (out / ".lock").touch()
    for id in ids:
        shutil.copytree(built / "build" / id, out / id)
        weights = manifest(out, id)["weights_hash"]
        shutil.copytree(built / "build/results" / weights, out / "results" / weights)
    return out


def manifest(out: Path, id: str) -> dict:
    return json.loads((out / id / "manifest.json").read_text())


def edit_manifest(out: Path, at: str, **values: object) -> None:
    (out / at / "manifest.json").write_text(json.dumps(manifest(out, at) | values))


def shard(out: Path, id: str) -> Path:
    return next((out / id).glob("*.safetensors"))


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def tree(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def states(ran) -> dict[str, str]:
    return {v["id"]: v["state"] for v in json.loads(ran.out)["variants"]}


@pytest.fixture
def cards() -> None:
    """Asked for by tests that look at cards."""


@pytest.fixture(autouse=True)
def _no_cards(request, monkeypatch):
    """A quarter of a second each, which the others need not wait for."""
    if "cards" not in request.fixturenames:
        monkeypatch.setattr(publisher.merge, "render_cards", lambda project, base: Cards(frozenset(), {}))


@pytest.fixture
def main(tmp_path: Path, quick_yaml: str) -> Path:
    """A project that has built nothing."""
    return write_ladder(tmp_path / "main", quick_yaml).parent


@pytest.fixture
def two(built: Path, tmp_path: Path) -> tuple[Path, Path]:
    return worker(built, tmp_path / "one", *IDS[:2]), worker(built, tmp_path / "two", *IDS[2:])


# ------------------------------------------------------------------------------------------------ good


def test_the_parts_become_the_ladder_of_one_host(publish, main, two, built, cards):
    before = [tree(out) for out in two]
    ran = publish("merge", "../one/build", "../two/build", cwd=main).ok()
    assert "every variant of the ladder is here" in ran.out
    assert [tree(out) for out in two] == before
    merged, whole = tree(main / "build"), tree(built / "build")
    assert {p for p in whole if p not in merged} <= {"base.json"}
    differs = {p for p in merged if merged[p] != whole.get(p)}
    assert not differs - {".lock", "base.json"}  # cards and their pictures, too: they were rendered of the same results
    assert os.path.samefile(shard(main / "build", Q4), shard(two[1], Q4))
    rows = json.loads(publish("status", "--json", cwd=main).ok().out)["variants"]
    assert not [step for row in rows for step, why in row["stale"].items() if why and step != "quality"]
    assert "nothing to do: all is current" in publish("build", "--all", cwd=main).ok().err
    assert not list((main / "build/staging").iterdir())


def test_a_part_alone_says_what_is_missing_and_its_cards_follow(publish, main, two, cards):
    said = json.loads(publish("merge", "../one/build", "--json", cwd=main).ok().out)
    assert said["absent"] == IDS[2:]
    alone = (main / "build" / Q2 / "README.md").read_text()
    assert "UD-Q8_K_XL | not built" in alone
    assert json.loads(publish("merge", "../two/build", "--json", cwd=main).ok().out)["cards_changed"] == IDS
    assert "not built" not in (main / "build" / Q2 / "README.md").read_text()


def test_what_is_here_stays_and_what_is_damaged_here_is_replaced(publish, main, two):
    publish("merge", "../one/build", "../two/build", cwd=main).ok()
    for out in two:  # no longer the same files
        shutil.rmtree(out)
    worker(main, main.parent / "three", *IDS)
    shard(main / "build", Q4).unlink()
    before = shard(main / "build", Q2).stat().st_ino
    assert states(publish("merge", "../three/build", "--json", cwd=main).ok()) == dict.fromkeys(IDS, "kept") | {
        Q4: "replaced"
    }
    assert shard(main / "build", Q2).stat().st_ino == before
    publish("verify", Q4, cwd=main).ok()


def test_old_weights_here_are_replaced_and_the_notes_stay(publish, main, two, built, cards):
    worker(built, main, *IDS)
    edit_manifest(main / "build", Q4, inputs=manifest(main / "build", Q4)["inputs"] | {"quant_version": 0})
    card = main / "build" / Q4 / "README.md"
    text = card.read_text()
    at = text.index("<!-- notes:begin -->\n") + len("<!-- notes:begin -->\n")
    card.write_text(text[:at] + "Ours.\n" + text[text.index("<!-- notes:end -->") :])
    assert states(publish("merge", "../two/build", "--json", cwd=main).ok())[Q4] == "replaced"
    assert "begin -->\nOurs.\n<!--" in card.read_text()


def test_notes_and_pictures_of_the_other_host_come_along_where_there_are_none_here(publish, main, two, cards):
    card = two[1] / Q4 / "README.md"
    text = card.read_text()
    at = text.index("<!-- notes:begin -->\n") + len("<!-- notes:begin -->\n")
    card.write_text(text[:at] + "Theirs.\n" + text[text.index("<!-- notes:end -->") :])
    (two[1] / Q4 / "images").mkdir(exist_ok=True)
    (two[1] / Q4 / "images/own.png").write_bytes(b"picture")
    (two[1] / Q4 / "images/secret.png").symlink_to("/etc/hostname")
    os.mkfifo(two[1] / Q4 / "images/pipe.png")
    (two[1] / IDS[3] / "README.md").unlink()
    os.mkfifo(two[1] / IDS[3] / "README.md")
    (two[1] / IDS[4] / "README.md").write_text("<!-- notes:begin -->\n<!-- notes:begin -->\n")
    publish("merge", "../two/build", cwd=main).ok()
    assert "begin -->\nTheirs.\n<!--" in (main / "build" / Q4 / "README.md").read_text()
    assert (main / "build" / Q4 / "images/own.png").read_bytes() == b"picture"
    assert {p.name for p in (main / "build" / Q4 / "images").iterdir()} == {"own.png"}
    for id in IDS[3:5]:
        assert "# " in (main / "build" / id / "README.md").read_text()


def test_what_others_may_write_to_or_another_disk_holds_is_copied(publish, main, two, monkeypatch):
    shard(two[1], Q4).chmod(0o664)
    publish("merge", "../two/build", cwd=main).ok()
    assert not os.path.samefile(shard(main / "build", Q4), shard(two[1], Q4))

    def other_disk(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    said = json.loads(publish("merge", "../one/build", "--json", cwd=main).ok().out)["variants"]
    assert all(v["detail"].endswith("GB copied") for v in said)
    publish("verify", cwd=main).ok()


def test_merging_needs_no_mlx(main, two):
    code = (
        "import sys\nfrom publisher.cli import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code\nassert 'mlx' not in sys.modules\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "merge", "../one/build"], cwd=main, capture_output=True, text=True, check=False,
        env=environment(main) | {"PYTHONPATH": str(EXAMPLE.parents[1])},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


# ------------------------------------------------------------------------------------------------ not taken


def test_what_is_stale_stays_out_and_says_why_and_the_rest_comes_in(publish, main, two):
    path = main / "variants.yaml"
    path.write_text(path.read_text().replace("Q4_K_XL: {bits: 4}", "Q4_K_XL: {bits: 4, group_size: 32}"))
    ran = publish("merge", "../one/build", "../two/build", "--json", cwd=main)
    assert f"{Q4} of {two[1]}: not taken: " in (said := ran.refused(3))
    assert "group_size: 64 → 32" in said
    plain = publish("merge", "../one/build", "../two/build", cwd=main)
    assert "group_size: 64 → 32" in plain.refused(3)
    assert "group_size" not in plain.out  # the error has it
    assert states(ran) == dict.fromkeys(IDS, "added") | {Q4: "stale"}
    assert not (main / "build" / Q4).exists()


def test_a_stale_part_is_no_fault_where_another_folder_has_a_current_one(publish, main, two):
    shutil.copytree(two[1], main.parent / "old/build")
    edit_manifest(main.parent / "old/build", Q4, inputs=manifest(two[1], Q4)["inputs"] | {"quant_version": 0})
    said = publish("merge", "../old/build", "../two/build", "--json", cwd=main).ok()
    assert [v["state"] for v in json.loads(said.out)["variants"] if v["id"] == Q4] == ["stale", "added"]


def test_what_was_built_of_another_base_is_foreign(publish, main, two):
    path = next(own_base(main).glob("*.safetensors"))
    flip(path, next(t.start for t in read_header(path)[0] if "layers.0.mlp" in t.name))
    ran = publish("merge", "../one/build", cwd=main)
    assert f"{Q2} of {two[0]}: not taken: base weights: " in ran.refused(3)
    assert not (main / "build" / Q2).exists()


def damage_byte(out: Path) -> str:
    flip(shard(out, Q4))
    return "has sha256"


def damage_side_file(out: Path) -> str:
    flip(out / Q4 / "tokenizer.json", 5)
    return "tokenizer.json has sha256"


def damage_missing(out: Path) -> str:
    shard(out, Q4).unlink()
    return "No such file"


def damage_short(out: Path) -> str:
    path = shard(out, Q4)
    path.write_bytes(path.read_bytes()[:-1])
    return "bytes, manifest says"


def damage_link(out: Path) -> str:
    path = shard(out, Q4)
    path.rename(out / "elsewhere")
    path.symlink_to(out / "elsewhere")
    return "is no regular file"


def damage_pipe(out: Path) -> str:
    (out / Q4 / "tokenizer.json").unlink()
    os.mkfifo(out / Q4 / "tokenizer.json")
    return "is no regular file"


def damage_path(out: Path) -> str:
    files = manifest(out, Q4)["files"]
    edit_manifest(out, Q4, files=[files[0] | {"path": "../../main/variants.yaml"}, *files[1:]])
    return "is no plain file name"


def damage_hash(out: Path) -> str:
    edit_manifest(out, Q4, weights_hash="0" * 64)
    return "manifest says 000000000000"


def damage_tensor(out: Path) -> str:
    tensors = manifest(out, Q4)["tensors"]
    edit_manifest(out, Q4, tensors=tensors[1:])
    return "is not in the manifest"


def damage_manifest(out: Path) -> str:
    (out / Q4 / "manifest.json").write_text('{"schema_version": 1')
    return "manifest.json"


def damage_name(out: Path) -> str:
    edit_manifest(out, Q4, id=Q2)
    return f"manifest.json is of {Q2}"


@pytest.mark.parametrize(
    "damage",
    [
        damage_byte, damage_side_file, damage_missing, damage_short, damage_link, damage_pipe, damage_path, damage_hash,
        damage_tensor, damage_manifest, damage_name,
    ],
)  # fmt: skip
def test_what_is_not_as_its_manifest_says_stays_out(damage, publish, main, built, tmp_path):
    out = worker(built, tmp_path / "one", Q2, Q4)
    reason = damage(out)
    ran = publish("merge", "../one/build", "--json", cwd=main)
    said = ran.refused(1)
    assert said.startswith(f"{Q4} of {out}: not taken: ")
    assert reason in said
    assert states(ran) == {Q2: "added", Q4: "damaged"}
    assert not (main / "build" / Q4).exists()
    staging = main / "build/staging"
    assert not [p for p in staging.rglob("*.safetensors") if p.is_file() and damage is damage_byte]
    shutil.rmtree(out.parent)
    worker(built, tmp_path / "one", Q4)
    assert states(publish("merge", "../one/build", "--json", cwd=main).ok()) == {Q4: "added"}
    assert not list(staging.iterdir())


@pytest.mark.parametrize("copying", [False, True])
def test_a_good_folder_is_not_blamed_for_the_bytes_of_a_bad_one(copying, publish, main, built, tmp_path, monkeypatch):
    bad, _ = worker(built, tmp_path / "bad", Q4), worker(built, tmp_path / "good", Q4)
    flip(shard(bad, Q4))
    missing = bad / Q4 / manifest(bad, Q4)["files"][-1]["path"]
    assert missing.suffix != ".safetensors"
    missing.unlink()  # met after the weights were taken
    if copying:
        monkeypatch.setattr(publisher.merge, "_link", lambda *args: False)
    ran = publish("merge", "../bad/build", "../good/build", "--json", cwd=main)
    assert ran.refused(1).startswith(f"{Q4} of {bad}: not taken: ")
    assert [v["state"] for v in json.loads(ran.out)["variants"]] == ["damaged", "added"]
    publish("verify", Q4, cwd=main).ok()


def test_what_a_killed_merge_took_of_a_bad_folder_is_not_taken_for_a_good_one(
    publish, main, built, tmp_path, monkeypatch
):
    bad, good = worker(built, tmp_path / "bad", Q4), worker(built, tmp_path / "good", Q4)
    flip(shard(bad, Q4))
    with monkeypatch.context() as patch:

        def killed(*args: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(publisher.merge, "verify_folder", killed)
        assert publish("merge", "../bad/build", cwd=main).code == 130
    assert list((main / "build/staging").rglob("*.safetensors"))
    assert states(publish("merge", "../good/build", "--json", cwd=main).ok()) == {Q4: "added"}
    assert os.path.samefile(shard(main / "build", Q4), shard(good, Q4))
    assert not list((main / "build/staging").iterdir())


def test_other_weights_of_the_same_inputs_are_a_conflict_that_names_both(publish, main, two):
    publish("merge", "../two/build", cwd=main).ok()
    ours = manifest(main / "build", Q4)["weights_hash"]
    edit_manifest(two[1], Q4, weights_hash="ab" * 32)
    before = tree(main / "build" / Q4)
    said = publish("merge", "../two/build", cwd=main).refused(1)
    assert said.startswith(
        f"{Q4} of {two[1]}: not taken: weights abababababab there, {ours[:12]} here, of the same inputs"
    )
    assert tree(main / "build" / Q4) == before


def test_a_folder_of_the_publishers_own_files_is_not_replaced(publish, main, two):
    (main / "build" / Q4).mkdir(parents=True)
    (main / "build" / Q4 / "thesis.txt").write_text("mine")
    assert "thesis.txt" in publish("merge", "../two/build", cwd=main).refused(2)
    assert (main / "build" / Q4 / "thesis.txt").read_text() == "mine"


def test_folders_that_are_no_other_hosts_output_are_refused(publish, main, two):
    publish("merge", "../one/build", cwd=main).ok()
    assert "the output of variants.yaml" in publish("merge", "build", cwd=main).refused(2)
    assert "the output of variants.yaml" in publish("merge", ".", cwd=main).refused(2)
    assert "holds no variant of variants.yaml" in publish("merge", "../one", cwd=main).refused(2)
    (two[1] / "Q99").mkdir()
    (two[1] / "Q99/manifest.json").write_text("{}")
    publish("merge", "../two/build", cwd=main).ok()
    assert not (main / "build/Q99").exists()


def test_a_folder_where_a_build_is_at_work_is_refused(publish, main, two):
    with Store(two[0]).lock("build"):
        assert "another publish is at work there" in publish("merge", "../one/build", cwd=main).refused(2)
    publish("merge", "../one/build", "../one/build", cwd=main).ok()


def lock_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def lock_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def lock_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("move", [(), ("--move",)])
@pytest.mark.parametrize("lock", [lock_pipe, lock_folder, lock_link])
def test_a_lock_that_is_no_file_is_refused_and_nobody_waits_for_it(lock, move, publish, main, two):
    lock(two[0] / ".lock")
    ran = publish("merge", "../one/build", *move, cwd=main)
    assert ran.refused(2) == f"{two[0]}/.lock: is no regular file; remove it"
    assert not (main / "build" / Q2).exists()


def test_a_move_from_a_copy_without_a_lock_takes_one(publish, main, two, monkeypatch):
    (two[0] / ".lock").unlink()
    publish("merge", "../one/build", cwd=main).ok()
    assert not (two[0] / ".lock").exists()  # it is only read
    met = []

    def move(project: object, root: Path) -> None:
        with pytest.raises(InputError) as e, Store(root).lock("build"):
            pass
        met.append(str(e.value))

    monkeypatch.setattr(publisher.merge, "_finish_moves", move)
    publish("merge", "../one/build", "--move", cwd=main).ok()
    assert len(met) == 1
    assert "another publish is at work there (merge --move, process " in met[0]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_told_as_such(code, publish, main, two, monkeypatch):
    real = fcntl.flock

    def flock(file, how: int) -> None:
        if str(file.name).startswith(str(two[0])):
            raise OSError(code, os.strerror(code))
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    told = f"{two[0]}/.lock: this file system has no locks ({os.strerror(code)}); choose an output on one that has"
    assert publish("merge", "../one/build", cwd=main).refused(2) == told
    with pytest.raises(InputError) as e, Store(two[0]).lock("build"):
        pass
    assert str(e.value) == told


def test_scratch_folders_and_the_hubs_cache_do_without_locks(tmp_path, monkeypatch):
    def flock(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with repo_lock(tmp_path, "http://hub", "demo/x"), scratch("merge", tmp_path) as first:
        with scratch("merge", tmp_path):
            pass
        assert first.is_dir()  # of a run at work, for all that another one can tell


# ------------------------------------------------------------------------------------------------ killed


def test_a_merge_is_whole_or_not_there_at_any_moment(publish, main, two, monkeypatch):
    """What lies in the output whenever a file is about to change is what a kill leaves."""
    out, seen, watching = main / "build", [], True
    old = manifest(two[1], Q4)
    shutil.copytree(two[1] / Q4, out / Q4)
    edit_manifest(out, Q4, inputs=old["inputs"] | {"quant_version": 0})

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal watching
        if watching and event in ("os.rename", "os.link", "os.remove", "os.rmdir"):
            watching = False  # what is looked at here is no event
            for id in IDS:
                if (out / id).exists():
                    files = manifest(out, id)["files"]
                    seen.append(all((out / id / f["path"]).stat().st_size == f["size"] for f in files))
            watching = True

    sys.addaudithook(hook)
    try:
        publish("merge", "../one/build", "../two/build", cwd=main).ok()
    finally:
        watching = False
    assert len(seen) > 50
    assert all(seen)


def test_an_interrupted_merge_goes_on_without_copying_again(publish, main, two, monkeypatch):
    def other_disk(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    copied, plain = [], shutil.copyfile

    def copy(source: Path, target: Path, **kwargs: object) -> object:
        if len(copied) == 4:
            target.write_bytes(source.read_bytes()[:100])
            copied.append("killed")
            raise KeyboardInterrupt
        copied.append(source)
        return plain(source, target, **kwargs)

    monkeypatch.setattr(os, "link", other_disk)
    monkeypatch.setattr(shutil, "copyfile", copy)
    assert publish("merge", "../one/build", cwd=main).code == 130
    assert not (main / "build" / Q2).exists()
    publish("merge", "../one/build", cwd=main).ok()
    names = [p for p in copied if isinstance(p, Path) and p.parent.name == Q2 and p.name != "README.md"]
    assert len(names) == len(set(names)) >= 4
    publish("verify", *IDS[:2], cwd=main).ok()


# ------------------------------------------------------------------------------------------------ moving


def test_moved_variants_are_deleted_there_once_they_are_here(publish, main, two):
    flip(shard(two[1], Q4))
    results = tree(two[1] / "results")
    publish("merge", "../two/build", "--move", cwd=main).refused(1)
    assert {p.name for p in two[1].iterdir() if p.is_dir()} == {Q4, "results"}
    assert tree(two[1] / "results") == results
    publish("verify", *IDS[3:], cwd=main).ok()
    shutil.rmtree(two[1] / Q4)
    said = publish("merge", "../two/build", "--move", cwd=main).ok().out
    assert said.startswith(f"{two[1]}: nothing to take, it holds no variant\n")
    assert json.loads(publish("merge", "../two/build", "--move", "--json", cwd=main).ok().out)["variants"] == []


def test_a_copy_is_not_deleted_for_one_here_that_is_damaged(publish, main, two, built):
    worker(built, main, *IDS)
    flip(shard(main / "build", Q4))  # nothing that a glance tells
    assert states(publish("merge", "../two/build", "--move", "--json", cwd=main).ok())[Q4] == "replaced"
    publish("verify", Q4, cwd=main).ok()


def test_a_deletion_that_was_killed_is_finished(publish, main, two):
    publish("merge", "../two/build", cwd=main).ok()
    (two[1] / Q4).rename(two[1] / f".{Q4}.moved")
    publish("merge", "../two/build", "--move", cwd=main).ok()
    assert {p.name for p in two[1].iterdir()} == {".lock", "results"}


# ------------------------------------------------------------------------------------------------ results and receipts


def result(out: Path, id: str, name: str) -> Path:
    return out / "results" / manifest(out, id)["weights_hash"] / f"{name}.json"


def test_results_come_as_far_as_they_are_current_and_of_these_weights(publish, main, two):
    stale, foreign, broken = (result(two[1], id, "smoke") for id in IDS[2:5])
    stale.write_text(json.dumps(json.loads(stale.read_text()) | {"settings": "other prompts"}))
    foreign.write_text(json.dumps(json.loads(foreign.read_text()) | {"weights_hash": "0" * 64}))
    broken.write_text("{")
    said = json.loads(publish("merge", "../two/build", "--json", cwd=main).ok().out)
    took = {v["id"]: v["results"] for v in said["variants"]}
    assert took == dict.fromkeys(IDS[2:5], ["build", "bench"]) | {IDS[5]: ["build", "smoke", "bench"]}
    assert "smoke: prompts, text or seed changed" in said["others"][0]
    assert "of weights 000000000000" in said["others"][1]
    assert "smoke.json" in said["others"][2]
    rows = json.loads(publish("status", "--json", cwd=main).ok().out)["variants"]
    assert [r["id"] for r in rows if r["stale"]["smoke"] and r["id"] in IDS[2:]] == IDS[2:5]


def test_a_current_result_here_stays_and_a_stale_one_does_not(publish, main, two):
    publish("merge", "../two/build", cwd=main).ok()
    ours, other = result(main / "build", Q4, "bench"), result(main / "build", IDS[3], "bench")
    kept = json.loads(ours.read_text()) | {"run": "ours"}
    ours.write_text(json.dumps(kept))
    other.write_text(json.dumps(json.loads(other.read_text()) | {"settings": "another protocol"}))
    said = json.loads(publish("merge", "../two/build", "--json", cwd=main).ok().out)
    assert {v["id"]: v["results"] for v in said["variants"] if v["results"]} == {IDS[3]: ["bench"]}
    assert json.loads(ours.read_text()) == kept


def receipt(id: str, weights: str, commit: str = "a") -> Receipt:
    return Receipt(
        id=id, repo=f"demo/Qwen3.5-tiny-UD-{id}-mlx", endpoint="http://hub", commit=commit * 40, weights_hash=weights,
        files=[], pushed_at="2026-12-24T00:00:00+00:00", tag="v1", pruned_at="2026-12-25T00:00:00+00:00",
    )  # fmt: skip


def test_receipts_come_along_and_never_replace_one(publish, main, two):
    weights = manifest(two[1], Q4)["weights_hash"]
    there, here = Store(two[1]), Store(main / "build")
    write_model(there.receipt(Q4), receipt(Q4, weights))
    write_model(there.history(Q4), History(id=Q4, releases=[]))
    write_model(there.receipt(IDS[3]), receipt(IDS[3], weights).model_copy(update={"repo": "somebody/else"}))
    said = json.loads(publish("merge", "../two/build", "--json", cwd=main).ok().out)["others"]
    found = read_model(here.receipt(Q4), Receipt)
    assert found == receipt(Q4, weights).model_copy(update={"pruned_at": None})  # its weights are here
    assert here.history(Q4).exists()
    assert [e["id"] for e in json.loads(here.ladder_receipt.read_text())["repos"]] == [Q4]
    assert not here.receipt(IDS[3]).exists()
    assert any("somebody/else" in line for line in said)
    write_model(there.receipt(Q4), receipt(Q4, weights, "b"))
    said = json.loads(publish("merge", "../two/build", "--json", cwd=main).ok().out)["others"]
    assert any("here is one of commit aaaaaaaaaaaa" in line for line in said)
    assert here.receipt(Q4).read_text() == model_text(found)


# ------------------------------------------------------------------------------------------------ statistics

SOLVED = HEAD + "variants:\n  A: {bits: 4}\n"


@pytest.fixture
def solved(tmp_path, publish, monkeypatch) -> tuple[Path, Path]:
    """A main host that has nothing, and a worker that collected statistics and solved with them."""
    empty = Costs(statistics="0" * 64, solver="gptq", version=1, modules={})
    monkeypatch.setattr(publisher.calibrate, "measure_costs", lambda *args: empty)
    words = (EXAMPLE.parents[1] / "publisher/data/calibration.txt").read_text(encoding="utf-8")[:2000]
    for name in ("main", "worker"):
        write_ladder(tmp_path / name, SOLVED)
        (tmp_path / name / "words.txt").write_text(words, encoding="utf-8")
    publish("calibrate", "-q", cwd=tmp_path / "worker").ok()
    publish("build", "A", "--skip", "smoke", "--skip", "bench", "-q", cwd=tmp_path / "worker").ok()
    return tmp_path / "main", tmp_path / "worker/build"


def test_statistics_are_taken_by_the_hash_of_what_they_depend_on(solved, publish):
    main, there = solved
    (folder,) = (there / "statistics").iterdir()
    data = next(folder.glob("layer-*.safetensors"))
    flip(data)
    said = json.loads(publish("merge", "../worker/build", "--json", cwd=main).ok().out)
    assert said["others"] == [f"statistics {folder.name} of {there} left: {data.name} is not what statistics.json says"]
    assert said["variants"][0]["state"] == "added"  # solved with them there: its bytes are its own proof
    assert not list((main / "build/statistics").glob("*"))
    assert not list((main / "build/staging").iterdir())
    flip(data)
    said = json.loads(publish("merge", "../worker/build", "--json", cwd=main).ok().out)
    assert said["others"] == [f"statistics {folder.name}: came along"]
    assert tree(main / "build/statistics") == tree(there / "statistics")
    shutil.rmtree(main / "build/A")
    publish("build", "A", "--skip", "smoke", "--skip", "bench", "-q", cwd=main).ok()
    assert manifest(main / "build", "A") == manifest(there, "A")


def test_statistics_of_another_text_are_left(solved, publish):
    main, _ = solved
    (main / "words.txt").write_text("other words " * 200)
    ran = publish("merge", "../worker/build", "--json", cwd=main)
    assert "statistics: " in ran.refused(3)
    assert "not what variants.yaml asks for" in json.loads(ran.out)["others"][0]
    assert not (main / "build/statistics").exists()
