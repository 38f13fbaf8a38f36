"""The token is in nothing that a push leaves: output, log, traceback, receipt, file, URL, argument of a process.

Whole pushes by the command line, good ones and each kind of bad one, also with everything logged and with a bug in our
own code. That storage on another host never gets the token is counted by the hub itself (`stats.leaks`).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PUBLISH, Ran, environment
from huggingface_hub import HfApi

from publisher.localhub import Fault, LocalHub
from publisher.localhub.app import HubApp

TOKEN = "hf_" + "sEcReTtOkEn" * 3
READ = "hf_" + "rEaDsEcReT" * 3
WRONG = "hf_" + "wRoNgSeCrEt" * 3
SECRETS = [t.encode() for t in (TOKEN, READ, WRONG)]
PUSH = ("push", "Q2_K_XL", "--yes")
REPO = "demo/Qwen3.5-tiny-UD-Q2_K_XL-mlx"


@pytest.fixture
def seen(monkeypatch) -> list[bytes]:
    """Every URL that the hub is asked for."""
    found: list[bytes] = []
    plain = HubApp.__call__

    async def call(self, scope, receive, send):
        found.append(scope.get("raw_path", b"") + b"?" + scope.get("query_string", b""))
        await plain(self, scope, receive, send)

    monkeypatch.setattr(HubApp, "__call__", call)
    return found


@pytest.fixture
def hub(tmp_path, seen) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub", {TOKEN: "write:demo", READ: "read:demo"}) as hub:
        yield hub
        assert hub.stats.leaks == hub.stats.crashes == 0


@pytest.fixture
def clean(tmp_path, ladder, hub, seen, caplog):
    """clean(ran): asserts that nothing which is there by now holds a token."""
    caplog.set_level(logging.DEBUG)

    def check(ran: Ran) -> Ran:
        texts = [ran.out.encode(), ran.err.encode(), caplog.text.encode(), *seen]
        assert not any(s in text for s in SECRETS for text in texts)
        leaks = [p for p in tmp_path.rglob("*") if p.is_file() and holds(p)]
        assert not leaks
        return ran

    return check


def holds(path: Path) -> bool:
    data = path.read_bytes()
    return any(s in data or s in os.fsencode(path) for s in SECRETS)


FAULTS = {
    "none": [],
    "401": [Fault("commit", "status", status=401)],
    "403": [Fault("auth_check", "status", status=403, times=9), Fault("commit", "status", status=403, times=9)],
    "413": [Fault("commit", "status", status=413)],
    "500": [Fault("commit", "status", status=500)],
    "a page": [Fault("validate_yaml", "status", text="busy")],
    "storage refuses": [Fault("lfs_put", "status", status=403, times=99)],
    "storage breaks": [Fault("lfs_put", "cut", after_bytes=1000)],
    "lost": [Fault("commit", "lose_answer")],
    "somebody else": [Fault("commit", "stale_head")],
    "garbage": [Fault("tree", "corrupt")],
    "redirect": [Fault("whoami", "redirect", times=9)],
    "too long a wait": [Fault("whoami", "status", status=429, retry_after=9999)],
    "teapot": [Fault("whoami", "status", status=418)],
}


@pytest.mark.parametrize("name", FAULTS)
def test_no_push_leaves_the_token_anywhere(ladder, publish, hub, clean, name):
    for fault in FAULTS[name]:
        hub.faults.add(fault)
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    ran = clean(publish(*PUSH, *(["--json"] if len(name) % 2 else []), cwd=ladder, env=env))
    assert (ran.code == 0) == (name in ("none", "500", "a page", "lost", "storage breaks", "garbage")), ran.err
    assert hub.faults.fired or name == "none"
    hub.faults.clear()
    clean(publish(*PUSH, "--overwrite", cwd=ladder, env=env)).ok()


@pytest.mark.parametrize("token", [READ, WRONG])
def test_a_refused_token_is_not_shown(ladder, publish, hub, clean, token):
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token}
    for command in (PUSH, (*PUSH, "--json"), ("status", "--remote"), (*PUSH, "--create-pr")):
        ran = clean(publish(*command, cwd=ladder, env=env))
        assert ran.code == 5 or command[0] == "status"


def test_a_token_from_the_file_of_hf_stays_in_that_file(ladder, publish, hub, clean, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    ran = publish(*PUSH, cwd=ladder, env={"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}).ok()
    (home / "token").unlink()
    clean(ran)


LOUD = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "PYTHONFAULTHANDLER": "1", "PYTHONASYNCIODEBUG": "1"}
LOG = "import logging; logging.basicConfig(level=logging.DEBUG);"
BUG = "import publisher.push as p; p._write_receipt = lambda *a: a[0] + None;"


@pytest.mark.parametrize(("code", "status"), [(LOG, 0), (LOG + BUG, 1)], ids=["logged", "bug"])
def test_a_process_that_logs_everything_shows_no_token(ladder, hub, clean, code, status):
    """As a process of its own, whose arguments, and those of all others, are looked at while it runs. A bug in our code
    keeps its traceback."""
    process = subprocess.Popen(
        [sys.executable, "-c", code + PUBLISH, *PUSH], cwd=ladder, text=True,
        env=environment(ladder, {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, **LOUD}),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    shown: set[bytes] = set()
    ended = threading.Event()
    watcher = threading.Thread(target=watch_arguments, args=(shown, ended))
    watcher.start()
    out, err = process.communicate(timeout=120)
    ended.set()
    watcher.join()
    assert process.returncode == status, err[-2000:]
    assert "Request " in err, "it logged"
    assert ("Traceback" in err) == bool(status)
    assert "TypeError" in err or not status
    assert any(b"Q2_K_XL" in line for line in shown) or sys.platform != "linux"
    assert not any(s in line for s in SECRETS for line in shown)
    clean(Ran(process.returncode, out, err))


def watch_arguments(shown: set[bytes], ended: threading.Event) -> None:
    while not ended.wait(0.1):
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                shown.add(path.read_bytes())
            except OSError:
                continue


def test_what_the_client_keeps_holds_no_token(ladder, publish, hub, clean, tmp_path):
    """A download through the cache of `hf`, after a push."""
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    publish(*PUSH, cwd=ladder, env=env).ok()
    HfApi(hub.url, TOKEN).snapshot_download(REPO, cache_dir=tmp_path / "cache")
    clean(publish("verify", "Q2_K_XL", "--remote", cwd=ladder, env=env)).ok()
