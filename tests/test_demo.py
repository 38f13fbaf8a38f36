"""The demo, run once as a stranger would with a careless environment: it works, and nothing leaves this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from publisher.card import check_card
from publisher.localhub.store import Store

ROOT = Path(__file__).parents[1]
SECRET, SAVED = "hf_" + "Secret" * 6, "hf_" + "Saved1" * 6
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
RUNGS = [f"Q{bits}_K_XL" for bits in (2, 3, 4, 5, 6, 8)]
# loaded by every Python that the demo starts: each address that is looked up or connected to, a line each
WATCH = """
import os, sys

def note(event, args):
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto"):
        host = args[1][0] if isinstance(args[1], tuple) else "unix"
    elif event in ("socket.gethostbyname", "socket.gethostbyaddr"):
        host = args[0]
    else:
        return
    out = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(out, f"{event} {host}\\n".encode())
    os.close(out)

sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    """(work folder, output, log of addresses)."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "watch").mkdir()
    (folder / "watch/sitecustomize.py").write_text(WATCH, encoding="utf-8")
    (folder / "cache").mkdir()
    (folder / "cache/token").write_text(SAVED, encoding="utf-8")
    hostile = {
        "HF_TOKEN": SECRET, "HF_ENDPOINT": "http://10.0.0.1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"),
        "HUGGING_FACE_HUB_TOKEN": SECRET, "PUBLISH_HUB_TOKEN": SECRET,
        "HTTPS_PROXY": "http://10.0.0.1:3128", "HTTP_PROXY": "http://10.0.0.1:3128",
        "PYTHONPATH": str(folder / "watch"), "WATCH_LOG": str(folder / "addresses"),
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples/demo.py"), "--quick"], cwd=folder, env=os.environ | hostile,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / "demo-out", run.stdout + run.stderr, folder / "addresses"


def written(out: Path) -> dict[str, bytes]:
    """Every file of the work folder by path."""
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_the_demo_speaks_to_this_machine_alone(demo: tuple[Path, str, Path]):
    seen = set(demo[2].read_text(encoding="utf-8").splitlines())
    assert "socket.connect 127.0.0.1" in seen  # the watch is on
    assert {s for s in seen if s.split()[1] not in ("127.0.0.1", "localhost", "::1", "unix")} == set()


def test_the_demo_leaves_no_token_anywhere(demo: tuple[Path, str, Path]):
    out, output, _ = demo
    assert [name for name, data in written(out).items() if TOKEN.search(data)] == []
    assert not TOKEN.search(output.encode())
    assert (out.parent / "cache/token").read_text(encoding="utf-8") == SAVED
    assert [p.name for p in (out.parent / "cache").iterdir()] == ["token"]


def test_the_demo_pushes_six_repos_and_stops_the_hub(demo: tuple[Path, str, Path]):
    out, output, _ = demo
    store = Store(out / "hub")  # raises FolderInUse while the hub runs
    try:
        assert sorted(r.id for r in store.repos("models")) == [f"demo/Qwen3.5-tiny-UD-{id}-mlx" for id in RUNGS]
    finally:
        store.close()
    status = output.split("$ publish status --remote")[1]
    assert [f"{id}" for id in RUNGS if re.search(rf"^{id} +built .* in sync$", status, re.M)] == RUNGS


def test_the_demo_writes_no_placeholder_and_no_path(demo: tuple[Path, str, Path]):
    out, _, _ = demo
    paths = {str(p).encode() for p in (ROOT, out, out.parent, Path(sys.prefix), Path.home()) if len(p.parts) > 2}
    for name, data in written(out).items():
        if name.startswith("model/") or re.search(r"safetensors$|tokenizer|^hub/", name):
            continue
        assert [p for p in paths if p in data] == [], name
        if not name.endswith("smoke.json"):  # its samples are what the models said
            assert not re.search(rb"\bTBD\b|\bN/A\b|(?<!a )\bNaN\b|\bnan\b|\bInfinity\b", data), name
    for id in RUNGS:
        assert check_card((out / "build" / id / "README.md").read_text(encoding="utf-8")) == []


def test_results_of_the_demo_hold_no_nan(demo: tuple[Path, str, Path]):
    def refuse(value: str) -> None:
        raise AssertionError(value)

    files = sorted((demo[0] / "build").rglob("*.json"))
    assert len(files) > 6 * 5
    for path in files:
        json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_demo_keeps_a_log(demo: tuple[Path, str, Path]):
    out, output, _ = demo
    log = (out / "demo.log").read_text(encoding="utf-8")
    assert log in output
    for command in ("build --all", "card --all --check", "verify", "push --all --yes", "status --remote"):
        assert f"\n$ publish {command}\n" in log


def test_the_example_template_of_the_docs_renders(demo: tuple[Path, str, Path]):
    out = demo[0]
    text = (ROOT / "docs/variants.md").read_text(encoding="utf-8")
    example = re.search(r"^```jinja\n(.*?)^```", text, re.M | re.S)
    assert example
    (out / "own").mkdir()
    (out / "own/card.md.j2").write_text(example[1], encoding="utf-8")
    ladder = (out / "variants.yaml").read_text(encoding="utf-8") + "card: {templates: own}\n"
    (out / "own.yaml").write_text(ladder, encoding="utf-8")
    publish = Path(sys.executable).with_name("publish")
    command = [str(publish), "card", "Q4_K_XL", "--check", "--file", "own.yaml"]
    run = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    assert "+## Support" in run.stdout
    assert "+- Not for use in safety-critical systems." in run.stdout


def test_the_demo_does_not_replace_a_folder_that_is_not_its_own(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear", encoding="utf-8")
    command = [sys.executable, str(ROOT / "examples/demo.py"), "--out", "mine"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "demo: mine is there already and not of an earlier demo; give another with --out\n"
    assert (tmp_path / "mine/letter.txt").read_text(encoding="utf-8") == "dear"
