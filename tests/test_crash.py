"""A sample of `benchmarks/crash.py`: a push that is killed anywhere is finished by the same command, and was never half."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from publisher.localhub import LocalHub

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/crash.py"


@pytest.fixture(scope="module")
def crash() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crash", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["crash"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[str, dict]:
    """What a few kills of two scenarios came to, by scenario."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    out = tmp_path_factory.mktemp("crash") / "crash.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--scenarios", "push,merge over old", "--every", "61", "--offset", "41", "--random", "0",
         "--json", out],
        cwd=ROOT, capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["scenario"]: row for row in json.loads(out.read_text())["scenarios"]}


def test_a_push_that_is_killed_anywhere_ends_as_if_it_were_not(killed):
    row = killed["push"]
    assert row["kills"]["file"]
    assert row["kills"].get("request", 0) + row["kills"].get("answer", 0)
    assert sum(row["kills"].values()) >= 3
    assert row["failures"] == []


def test_a_merge_that_is_killed_anywhere_ends_as_if_it_were_not(killed):
    row = killed["merge over old"]
    assert row["kills"]["file"] >= 2
    assert row["failures"] == []


def test_a_commit_that_is_not_whole_is_seen(tmp_path, crash):
    """The judge of all those kills can say no."""
    with LocalHub(tmp_path / "hub", {crash.TOKEN: "write:demo"}) as hub:
        api = HfApi(hub.url, crash.TOKEN)
        api.create_repo("demo/x")
        before = crash.State({}, crash.remote_state(hub.url))
        api.create_commit("demo/x", [CommitOperationAdd("model.safetensors", b"x")], commit_message="half")
        with pytest.raises(AssertionError, match=r"has files, but no manifest\.json"):
            crash.remote_state(hub.url)
        manifest = json.dumps({"files": [{"path": "model.safetensors", "size": 1, "sha256": "00"}]}).encode()
        api.create_repo("demo/z")
        files = [CommitOperationAdd("manifest.json", manifest), CommitOperationAdd("model.safetensors", b"x")]
        api.delete_repo("demo/x")
        api.create_commit("demo/z", files, commit_message="wrong")
        with pytest.raises(AssertionError, match=r"model\.safetensors is not what its manifest\.json says"):
            crash.remote_state(hub.url)
        api.delete_repo("demo/z")
        after = crash.State({}, crash.remote_state(hub.url))
        assert crash.differences(before, after)
        assert crash.unknown_commits(after, before)
        assert not crash.unknown_commits(before, after)


def test_workers_share_all_kills_and_a_cut_record_is_continued(crash):
    scenario = crash.SCENARIOS[0]
    target = crash.Target(scenario, crash.State({}, {}), ["mkdir"] * 7, crash.Kills(scenario.name, 2.0, 7, 3))
    everything = [kill.key for kill in crash.plan(target, 1, 0, 4, 0, (0, 1))]
    shares = [kill.key for k in range(3) for kill in crash.plan(target, 1, 0, 4, 0, (k, 3))]
    assert len(everything) == 7 + 3 * 2 + 4
    assert sorted(shares) == sorted(everything)

    cut, again = crash.Kills("build", left={"file 1", "file 2"}), crash.Kills("build", left={"file 2"})
    for kills in (cut, again):
        kills.kills["file"] += 1
        kills.failures.append("x")
    other = crash.Kills("push", left={"answer 1"})
    build, push = crash.continued([other.row(), cut.row()], [again.row()])
    assert (build["kills"], build["left"], build["failures"]) == ({"file": 2}, ["file 2"], ["x", "x"])
    assert push["left"] == ["answer 1"]
