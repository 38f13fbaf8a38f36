"""Damaged inputs through the commands as a user runs them: a result, or one line and its exit code; and nothing outside
the output folder is touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import EXAMPLE, PUBLISH, Ran, environment, own_base, run_here, write_ladder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MANY = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
ODD = st.sampled_from(
    [
        None, True, False, 0, -1, 7, 1 << 70, 0.5, float("inf"), float("nan"), "", "x", "N+1", "a\nb", "\x1b[2J", "é" * 300,
        "../../etc", "/", "~nobody", "{base}", "{0.__class__}", "*[", "{a,b}" * 9, [], [[]], {}, {"": 1}, {"a": {"b": []}},
        ["x"] * 3, "2001-01-01", "*", "5 GB", "as uniform 4",
    ]
)  # fmt: skip
PIECES = [
    "&a ", "*a", "!!int ", "!!bool ", "!x ", "- ", ": ", "{", "}", "[", "'", '"', "|", ">", "\t", "\n", "#", "%", "@", "? ",
    "---\n", "\0", "\x85", "1:1", "0x", "<<: ", "~", "\ud7ff",
]  # fmt: skip
LADDER: dict[str, Any] = {
    "base": {"path": "model", "name": "Tiny-1B"},
    "owner": "acme",
    "repo": "{base}-{id}",
    "recipe": "mine",
    "recipes": {"mine": {"extends": "uniform", "rules": [{"match": "*.mlp.*", "bits": 6, "layers": [0], "why": "w"}]}},
    "imatrix": {"path": "imatrix-tiny.gguf"},
    "vision": "drop",
    "card": {"tags": ["a"], "license": "mit"},
    "collection": {"title": "Tiny"},
    "variants": {"Q4": {"bits": 4, "rules": [{"match": "*.lm_head", "bits": 8}]}, "Q8": {"bits": 8, "note": "n"}},
}


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for k, v in items for p in ((*path, k), *nodes(v, (*path, k)))]


def damaged(data: st.DataObject, value: Any) -> Any:
    """A copy with one to three values replaced, removed, or put under another key."""
    value = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, 3))):
        paths = nodes(value)
        if not paths:
            break
        *above, last = data.draw(st.sampled_from(paths))
        inner = value
        for key in above:
            inner = inner[key]
        kind = data.draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if kind == "replace":
            inner[last] = data.draw(ODD)
        elif kind == "remove":
            del inner[last]
        elif isinstance(inner, dict):
            inner[data.draw(st.sampled_from(["", "x", "é\n", "variants", "bits", "../x", "__class__"]))] = inner.pop(
                last
            )
    return value


def check(ran: Ran) -> None:
    assert ran.code in (0, 1, 2, 3, 4, 5), ran.err
    if ran.code:
        ran.refused(ran.code)


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Everything below a folder but what may be written: size and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(("ladder/build/", "ladder/.hf/")):
            found[name] = (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a ladder in it, and things of other people beside it."""
    root = tmp_path_factory.mktemp("place")
    write_ladder(root / "ladder", yaml.safe_dump(LADDER, sort_keys=False))
    own_base(root / "ladder")
    (root / "others").mkdir()
    (root / "others/precious.txt").write_text("keep")
    (root / "etc").mkdir()
    (root / "etc/precious.txt").write_text("keep")
    return root


@pytest.fixture(autouse=True)
def untouched(place):
    """Nothing but the file that a test damages may change, and that is put back."""
    before = listing(place)
    contents = {name: (place / name).read_bytes() for name in before if before[name][0] < 5_000_000}
    yield
    after = listing(place)
    assert after.keys() == before.keys()
    for name in contents:
        if after[name] != before[name]:
            assert name in DAMAGED, f"{name} was changed"
            (place / name).write_bytes(contents[name])


WEIGHTS = "model/model.safetensors-00001-of-00001.safetensors"
DAMAGED = {f"ladder/{n}" for n in ("variants.yaml", "model/config.json", WEIGHTS, "imatrix-tiny.gguf")}


def plan(place: Path) -> Ran:
    return run_here("plan", cwd=place / "ladder")


@MANY
@given(st.data())
def test_a_damaged_ladder_gives_a_plan_or_one_line(place, data):
    value = damaged(data, LADDER)
    (place / "ladder/variants.yaml").write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
    check(plan(place))


@MANY
@given(st.data())
def test_a_ladder_of_damaged_text_gives_a_plan_or_one_line(place, data):
    text = yaml.safe_dump(LADDER, sort_keys=False)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        piece = data.draw(st.sampled_from(PIECES))
        text = text[:at] + piece + text[at + data.draw(st.integers(0, 3)) :]
    (place / "ladder/variants.yaml").write_text(text)
    check(plan(place))


@MANY
@given(st.data())
def test_a_damaged_config_gives_a_plan_or_one_line(place, data):
    path = place / "ladder/model/config.json"
    value = damaged(data, json.loads((EXAMPLE / "model/config.json").read_text()))
    path.write_text(json.dumps(value))
    (place / "ladder/variants.yaml").write_text(yaml.safe_dump(LADDER, sort_keys=False))
    check(plan(place))


@settings(MANY, max_examples=25)
@given(st.data())
def test_a_damaged_header_gives_a_plan_or_one_line(place, data):
    path = place / "ladder/model/model.safetensors-00001-of-00001.safetensors"
    raw = (EXAMPLE / "model/model.safetensors-00001-of-00001.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = damaged(data, json.loads(raw[8 : 8 + length]))
    text = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", data.draw(st.sampled_from([len(text), len(text), 0, 1 << 63]))) + text + raw[8 + length :]
    )
    (place / "ladder/model/config.json").write_bytes((EXAMPLE / "model/config.json").read_bytes())
    check(plan(place))


# -- special files and links ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["variants.yaml", "model/config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, name, kind):
    folder = tmp_path / "ladder"
    write_ladder(folder, yaml.safe_dump(LADDER))
    own_base(folder)
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    run_here("plan", cwd=folder).refused(2)


def test_a_lock_cannot_name_a_folder_elsewhere(tmp_path):
    """The commit of a base names the folder of its headers, which is replaced."""
    folder = tmp_path / "ladder"
    write_ladder(folder, yaml.safe_dump({**LADDER, "base": {"repo": "acme/x"}}))
    (tmp_path / "precious").write_text("keep")
    lock = {
        "schema_version": 1,
        "base": {"repo": "acme/x", "revision": "main", "commit": "/../../../.."},
        "imatrix": [],
    }
    (folder / "variants.lock").write_text(json.dumps(lock))
    assert "base.commit: found" in run_here("plan", cwd=folder).refused(2)
    assert (tmp_path / "precious").exists()


def test_a_template_cannot_be_a_link_out_of_its_folder(ladder):
    (ladder / "secret").write_text("{# a secret #}")
    mine = ladder / "mine"
    mine.mkdir()
    (mine / "card.md.j2").write_text(
        "{% extends 'builtin/card.md.j2' %}{% block intro %}{% include 'x' %}{% endblock %}"
    )
    (mine / "x").symlink_to(ladder / "secret")
    text = (ladder / "variants.yaml").read_text()
    (ladder / "variants.yaml").write_text(
        text + "\ncard: {templates: mine}\n"
        if "\ncard:" not in text
        else text.replace("card:", "card: {templates: mine}\n#")
    )
    assert "links out of" in run_here("card", "--all", cwd=ladder).refused(2)


# -- a disk that takes no more ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_one_line(ladder, monkeypatch, code):
    (ladder / "build/Q4_K_XL/README.md").unlink()
    before = sorted(p.name for p in (ladder / "build/Q4_K_XL").iterdir())

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code), "README.md")

    monkeypatch.setattr("tempfile.mkstemp", full)
    assert os.strerror(code) in run_here("card", "Q4_K_XL", cwd=ladder).refused(2)
    assert sorted(p.name for p in (ladder / "build/Q4_K_XL").iterdir()) == before


def test_a_build_that_cannot_write_its_shards_is_one_line_and_resumes(tmp_path, quick_yaml):
    """RLIMIT_FSIZE: a shard of more than 100 kB fails half-way, as on a full disk."""
    write_ladder(tmp_path, quick_yaml)
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); {PUBLISH}"
    args = ("build", "Q4_K_XL", "--skip", "smoke", "--skip", "bench", "--skip", "card")
    done = subprocess.run(
        [sys.executable, "-c", script, *args], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    Ran(done.returncode, done.stdout, done.stderr).refused(2)
    assert not (tmp_path / "build/Q4_K_XL").exists()
    run_here(*args, cwd=tmp_path).ok()
    run_here("verify", "Q4_K_XL", cwd=tmp_path).ok()


def test_a_machine_without_memory_is_one_line(place, monkeypatch):
    def full(path: Path) -> None:
        raise MemoryError

    monkeypatch.setattr("publisher.variants.load_project", full)
    assert "out of memory" in plan(place).refused(2)
