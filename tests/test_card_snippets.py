"""Every snippet of a card is run as it is printed, by a stranger who has nothing but the repo on the hub.

Only the number of tokens is another one: 512 of them say no more than a few, and take half a minute without a fast BLAS.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment, run_here

from publisher.localhub import LocalHub

TOKEN = "hf_snippets"
ID = "Q6_K_XL"
PORT = 8080  # as printed
MAX_TOKENS = re.compile(r"(?<=max_tokens)(=|\": )512\b")
FEW = 24


def snippets(card: str) -> dict[str, str]:
    return dict(re.findall(r"<!-- snippet: (\S+) -->\n```\w+\n(.*?)```", card, re.S))


def shorter(snippet: str) -> str:
    assert len(MAX_TOKENS.findall(snippet)) == 1
    return MAX_TOKENS.sub(rf"\g<1>{FEW}", snippet)


@pytest.fixture(scope="module")
def shelf(built, tmp_path_factory):
    """The pushed variant's snippets, and the environment of a stranger: an empty folder, no token."""
    folder = tmp_path_factory.mktemp("snippets")
    shutil.copytree(built, folder / "ladder", symlinks=True)
    with LocalHub(folder / "hub", {TOKEN: "write:demo"}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        run_here("push", ID, "--yes", cwd=folder / "ladder", env=env).ok()
        card = (folder / "ladder/build" / ID / "README.md").read_text()
        stranger = folder / "stranger"
        stranger.mkdir()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        yield snippets(card), stranger, environment(stranger, {"HF_ENDPOINT": hub.url, "PATH": path})


def listening() -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", PORT)) == 0


def run(shelf, command: list[str], timeout: float = 300) -> str:
    _, cwd, env = shelf
    done = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_snippet_is_left_untested(shelf):
    assert set(shelf[0]) == {"mlx-lm", "publish", "server", "request"}


def test_the_mlx_lm_snippet_answers(shelf):
    assert len(run(shelf, [sys.executable, "-c", shorter(shelf[0]["mlx-lm"])]).strip()) > 5


def test_the_publish_snippet_downloads_and_answers(shelf):
    assert "hf download" in shelf[0]["publish"]
    few, n = re.subn(r"(?m)^publish chat .*", rf"\g<0> --max-tokens {FEW}", shelf[0]["publish"])
    assert n == 1
    out = run(shelf, ["bash", "-euo", "pipefail", "-c", few])
    assert len(out.strip().splitlines()[-1]) > 5
    (folder,) = (p for p in shelf[1].iterdir() if (p / "model.safetensors").is_file())
    assert (folder / "README.md").is_file()


def test_the_server_snippet_answers_the_request_snippet(shelf):
    if listening():
        pytest.skip(f"port {PORT} is taken")
    found, cwd, env = shelf
    assert f"--port {PORT}" in found["server"]
    with open(cwd / "server.log", "w") as log:
        server = subprocess.Popen(["bash", "-c", f"exec {found['server']}"], cwd=cwd, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while not listening():
            assert server.poll() is None, (cwd / "server.log").read_text()
            assert time.monotonic() < deadline, (cwd / "server.log").read_text()
            time.sleep(0.2)
        answer = json.loads(run(shelf, ["bash", "-euo", "pipefail", "-c", shorter(found["request"])]))
        (choice,) = answer["choices"]
        assert choice["message"]["role"] == "assistant"
        assert 0 < answer["usage"]["completion_tokens"] <= FEW
    finally:
        server.kill()
        server.wait()
