"""The example's six variants on the command line: build and push in one go, card-only pushes by bytes, pruned weights."""

from __future__ import annotations

import json
import threading

import pytest
from conftest import edit
from huggingface_hub import HfApi
from pushes import STRANGER, WRITE

from publisher.ahead import Ahead
from publisher.hub import Hub
from publisher.localhub import Fault

REPOS = "demo/Qwen3.5-tiny-UD-{}-mlx"
ID = "Q2_K_XL"
PRUNED = (ID, "Q3_K_XL")
SOME = (*PRUNED, "Q8_K_XL")


@pytest.fixture
def run(ladder, publish, hub):
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}
    return lambda *args: publish(*args, cwd=ladder, env=env)


def ids(ladder):
    from publisher.variants import load_project

    return list(load_project(ladder / "variants.yaml").ladder.variants)


def shards(ladder, *ids):
    return [p for id in ids for p in (ladder / "build" / id).glob("*.safetensors")]


def weights_hash(ladder, id):
    return json.loads((ladder / "build" / id / "manifest.json").read_text())["weights_hash"]


def public(hub):
    return {m.id for m in HfApi(hub.url, STRANGER).list_models(author="demo")}


def commits(hub, id):
    return [c.title for c in HfApi(hub.url, WRITE).list_repo_commits(REPOS.format(id))][:-1]


# -- build and push -------------------------------------------------------------------------------------------


def test_six_variants_are_built_and_pushed_then_their_cards_in_200_kb_then_nothing(ladder, hub, run, monkeypatch):
    order = []
    upload_ahead, commit = Hub.upload_ahead, Hub.commit
    with monkeypatch.context() as patch:
        patch.setattr(Hub, "upload_ahead", lambda *a: (order.append("ahead"), upload_ahead(*a))[1])
        patch.setattr(Hub, "commit", lambda *a, **k: (order.append("commit"), commit(*a, **k))[1])
        told = json.loads(run("build", "--all", "--push", "--json").ok().out)
    assert order == ["ahead"] * order.count("ahead") + ["commit"] * 6, "no card is there before all are final"
    assert told["failed"] == {}
    assert sorted(told["published"]) == sorted(ids(ladder))
    assert public(hub) == {REPOS.format(id) for id in ids(ladder)}
    sizes = sum(p.stat().st_size for p in shards(ladder, *ids(ladder)))
    assert sizes <= hub.stats.received["lfs_put"] < 1.2 * sizes, "no shard went up twice"

    path = ladder / "variants.yaml"
    path.write_text(path.read_text() + "card: {intro: Another paragraph under the lead.}\n")
    run("card", "--all").ok()
    hub.stats.reset()
    run("push", "--all", "--yes").ok()
    assert [commits(hub, id) for id in ids(ladder)] == [
        [f"{id}: update card", f"{id}: weights {weights_hash(ladder, id)[:12]}"] for id in ids(ladder)
    ]
    sent = sum(hub.stats.received.values())
    assert 6 * 1000 < sent < 200_000, sent
    assert hub.stats.requests["commit"] == 6
    assert hub.stats.received["lfs_put"] == 0

    hub.stats.reset()
    run("push", "--all", "--yes").ok()
    content = ("commit", "lfs_put", "lfs_part", "lfs_batch", "preupload", "validate_yaml")
    assert [hub.stats.requests[route] for route in content] == [0] * len(content)
    assert sum(hub.stats.received.values()) < 200, "the collection's title"


def test_a_variant_that_fails_stays_here_and_the_others_are_pushed_but_wait(ladder, hub, run):
    run("push", "Q8_K_XL", "--yes").ok()
    edit(ladder, "note: smallest", "note: smallest, smoke_kld: 0.000001")
    ran = run("build", *SOME, "--push")
    assert f"{ID}: the smoke test failed" in ran.refused(3)
    assert HfApi(hub.url, WRITE).repo_exists(REPOS.format(ID)) is False, "nothing of it was sent"
    assert public(hub) == {REPOS.format("Q8_K_XL")}
    assert all(commits(hub, id) for id in SOME if id != ID)
    assert "private until all repos of a push are good" in ran.out
    assert "private until all are good" in run("status", "Q3_K_XL").ok().out

    edit(ladder, ", smoke_kld: 0.000001", "")
    ran = run("build", *SOME, "--push").ok()
    assert public(hub) == {REPOS.format(id) for id in SOME}


def test_an_upload_that_fails_ahead_is_made_good_at_the_end(ladder, hub, run):
    hub.faults.add(Fault("preupload", "status", status=403))
    ran = run("build", ID, "--push").ok()
    assert f"{ID}: not uploaded ahead: " in ran.err
    assert len(commits(hub, ID)) == 1
    assert public(hub) == {REPOS.format(ID)}


def test_a_token_that_cannot_push_is_told_before_anything_is_built(ladder, publish, hub, monkeypatch):
    monkeypatch.setattr("publisher.release.build_held", None)
    ran = publish("build", "--all", "--push", cwd=ladder, env={"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_nobody"})
    assert "does not know this token" in ran.refused(5)
    ran = publish("build", "--all", "--push", cwd=ladder, env={"HF_ENDPOINT": hub.url})
    assert "needs a token with write access" in ran.refused(5)
    assert "only with --push" in publish("build", "--all", "--prune", cwd=ladder).refused(2)


def test_a_bug_in_the_upload_thread_is_not_swallowed(ladder, run, monkeypatch):
    monkeypatch.setattr(Hub, "upload_ahead", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("build", ID, "--push")


def test_nothing_is_sent_while_a_benchmark_runs(ladder, hub, monkeypatch):
    from publisher.report import Report
    from publisher.variants import load_project

    project = load_project(ladder / "variants.yaml")
    begun = threading.Event()
    monkeypatch.setattr(Ahead, "_upload", lambda self, repo, file: begun.set())
    connection = Hub(hub.url, WRITE)
    with Ahead(project, connection, False, True, Report(quiet=True)) as ahead:
        with ahead.quiet():
            ahead.offer(ID)
            assert not begun.wait(0.3)
        assert begun.wait(5)


# -- pruned ---------------------------------------------------------------------------------------------------


def test_a_pruned_ladder_is_described_pushed_and_built_again(ladder, hub, run):
    cards = {id: (ladder / "build" / id / "README.md").read_bytes() for id in ids(ladder)}
    ran = run("push", *PRUNED, "--yes", "--prune").ok()
    assert "pruned " in ran.out
    assert not shards(ladder, *PRUNED)

    rows = json.loads(run("status", *PRUNED, "--json", "--remote").ok().out)["variants"]
    assert {r["id"]: (r["current"], r["pruned"][: len(r["repo"])], r["remote"]["state"]) for r in rows} == {
        id: (True, REPOS.format(id), "in sync") for id in PRUNED
    }
    text = run("status", ID).ok().out
    assert "pruned" in text
    assert f"weights are in {REPOS.format(ID)}" in text
    assert {r["state"] for r in rows} == {"pruned"}
    bench = ladder / "build/results" / weights_hash(ladder, ID) / "bench.json"
    bench.rename(bench.with_suffix(".aside"))
    row = json.loads(run("status", ID, "--json").ok().out)["variants"][0]
    assert (row["state"], row["current"]) == ("pruned", False)
    text = " ".join(run("status", ID).ok().out.split())
    assert f"{ID} pruned weights are in {REPOS.format(ID)}" in text
    assert "bench: not run on these weights" in text
    bench.with_suffix(".aside").rename(bench)
    run("card", "--check").ok()
    assert {id: (ladder / "build" / id / "README.md").read_bytes() for id in ids(ladder)} == cards
    assert "not checked" in run("verify", ID).ok().out
    run("verify", ID, "--remote").ok()
    hub.stats.reset()
    assert "was up to date" in run("push", *PRUNED, "--yes").ok().err
    assert hub.stats.requests["commit"] == 0
    for args in (("smoke", ID), ("bench", ID), ("eval", ID), ("chat", ID, "--prompt", "Hi")):
        assert run(*args).refused(3) == f"{ID}: its weights are pruned; run: publish build {ID}"

    run("build", *PRUNED, "--push", "--prune").ok()
    assert not shards(ladder, *PRUNED), "with --prune, what the hub holds is left there"
    before = weights_hash(ladder, ID)
    run("build", ID).ok()
    assert weights_hash(ladder, ID) == before
    assert json.loads(run("status", ID, "--json").ok().out)["variants"][0]["pruned"] is None
    run("verify", ID).ok()
    hub.stats.reset()
    run("push", ID, "--yes").ok()
    assert hub.stats.requests["commit"] == 0
