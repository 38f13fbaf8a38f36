"""The built-in hub against released, unmodified clients: installed by scripts/clients.sh, run as programs of their own.

Each client's driver does what a publisher does and says what came of it. What must come of it stands here.
"""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from publisher.localhub import LocalHub

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
INSTALLED = HERE.parents[1] / ".clients"
PYTHON = ("hf-2", "hf-1", "hf-0")
WEIGHTS = hashlib.shake_256(b"weights").digest(400_000) + bytes(200_000) + b"abcd" * 70_001
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# x\n",
    "config.json": b'{"a": 1}\n',
    "model.safetensors": WEIGHTS,
    "sub/empty.txt": b"",
}
TREE = {
    ".gitattributes": [1562, None],
    "README.md": [25, None],
    "config.json": [9, None],
    "model.safetensors": [len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest()],
    "sub/empty.txt": [0, None],
}
REPO, TOKEN, OTHER = "acme/tiny-4bit", "hf_" + "w" * 20, "hf_" + "r" * 20


@pytest.fixture
def hub(tmp_path):
    tokens = {TOKEN: "write:alice,acme", OTHER: "read:bob"}
    with LocalHub(tmp_path / "hub", tokens, multipart_bytes=400_000, part_bytes=150_000, page_size=3) as hub:
        yield hub
        assert (hub.stats.crashes, hub.stats.leaks, hub.stats.requests["unknown"]) == (0, 0, 0)


def drive(hub, tmp_path, client, way):
    folder = tmp_path / "files"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if not (INSTALLED / client).is_dir():
        pytest.skip(f"NOT TESTED: {client} is not installed; see scripts/clients.sh")
    if client in PYTHON:
        command = [str(INSTALLED / client / "bin/python"), str(HERE / "drive_hf.py")]
    else:
        command = ["node", str(HERE / "drive_npm.mjs")]
    # Nothing of this process: what is asked of the client is in its command line.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    env |= {"HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"}
    ran = subprocess.run(
        [*command, hub.url, REPO, way, str(folder), str(INSTALLED / client)],
        env=env, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert TOKEN not in ran.stdout
    return json.loads(ran.stdout.splitlines()[-1])


def check_transfer(hub, way):
    """The bytes went the way that was asked for, and no other."""
    seen = hub.stats.requests
    lfs = [seen[route] for route in ("lfs_put", "lfs_part", "lfs_complete")]
    cas = [seen[route] for route in ("xet_shard", "xet_reconstruction", "xet_blob")]
    cas.append(seen["xet_put"] + seen["xet_xorb"])  # by grant, or the older way
    if way == "xet":
        assert lfs == [0, 0, 0]
        assert min(cas) > 0
    else:
        assert seen["lfs_part"] >= 5
        assert cas == [0, 0, 0, 0]


@pytest.mark.parametrize("way", ["lfs", "xet"])
@pytest.mark.parametrize("client", PYTHON)
def test_huggingface_hub(hub, tmp_path, client, way):
    done = drive(hub, tmp_path, client, way)
    version = done.pop("version")
    assert version.split(".")[0] == client[-1]
    commit = done.pop("commit")
    # 0.36 does not tell a file's Xet hash, but uses it.
    assert done.pop("xet") == (["model.safetensors"] if way == "xet" and client != "hf-0" else [])
    assert done == {
        "again": f"{hub.url}/{REPO}",
        "tree": TREE,
        "info": [commit, True, len(TREE)],
        "snapshot": sorted(FILES),
        "range": [206, True],
        "refs": [["main", "next/one"], ["v1"]],
        "moved head": 412,
        "pr": [1, '{"a": 2}\n'],
        "merged": ["merged", '{"a": 2}\n'],
        "folder": True,
        "gone": True,
        "history": ["less", "folder", "two (#1)", "first", "initial commit"],
        "squashed": ["squashed"],
        "collection": [True, [[REPO, "4 bits", 0]]],
        "public": [REPO],
    }
    check_transfer(hub, way)


@pytest.mark.parametrize("way", ["lfs", "xet"])
def test_npm_hub(hub, tmp_path, way):
    done = drive(hub, tmp_path, "npm-2", way)
    assert done.pop("version").startswith("2.")
    assert len(done.pop("commit")) == 40
    assert done == {
        "again": 409,
        "tree": TREE,
        "xet": ["model.safetensors"] if way == "xet" else [],
        "snapshot": ["README.md", "config.json", "model.safetensors"],
        "range": {"as offered": True, "plain": True},
        "info": [len(WEIGHTS), way == "xet"],
        "paths": ["config.json"],
        "absent": [None, False],
        "branch": "{}\n",
        "moved head": 412,
        "pr": [f"/{REPO}/discussions/1", '{"a": 2}\n'],
        "merged": '{"a": 2}\n',
        "history": ["less", "two (#1)", "first", "initial commit"],
        "count": 4,
        "collection": [True],
        "listed": [REPO],
        "who": "alice",
        "exists": False,
    }
    check_transfer(hub, way)
