"""`publish push` on a built ladder: what is stale stays here, and what a dry run or a question shows."""

from __future__ import annotations

import json

import pytest
from conftest import edit
from huggingface_hub import HfApi
from pushes import WRITE

ID = "Q2_K_XL"
REPO = f"demo/Qwen3.5-tiny-UD-{ID}-mlx"
NOTE = "note: smallest"
PLAN = f"{ID}: add: LICENSE, README.md, chat_template.jinja, config.json"


@pytest.fixture
def push(ladder, publish, hub):
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}
    return lambda *args, stdin="": publish("push", *args, cwd=ladder, env=env, stdin=stdin)


def somebody_commits(hub, path, content):
    HfApi(hub.url, WRITE).upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=REPO)


def theirs(hub):
    """Somebody's edits of the card: their text added, ours kept."""
    card = HfApi(hub.url, WRITE).hf_hub_download(REPO, "README.md", force_download=True)
    with open(card, "rb") as f:
        somebody_commits(hub, "README.md", f.read() + b"\nAdded \x1b[31mby hand.\n")


# -- stale ----------------------------------------------------------------------------------------------------


def test_weights_of_another_recipe_do_not_leave_however_current_their_card_is(ladder, publish, hub, push):
    edit(ladder, NOTE, NOTE + ", rules: [{match: '*.mlp.down_proj', bits: 8, awq: true}]")
    publish("card", "--all", cwd=ladder).ok()
    said = push(ID, "--yes").refused(3)
    assert said.startswith(f"{ID}: weights are stale (rules[*.mlp.down_proj].bits: 3 → 8)")
    assert said.endswith(f"run `publish build {ID}`")
    assert not hub.stats.requests["repo_create"]


def test_a_smoke_test_under_another_ceiling_does_not_count(ladder, publish, hub, push):
    edit(ladder, NOTE, NOTE + ", smoke_kld: 0.000001")
    publish("card", "--all", cwd=ladder).ok()
    said = push(ID, "--yes").refused(3)
    assert said.startswith(f"{ID}: the smoke test is stale (smoke_kld: ")
    assert "1e-06" in said
    assert said.endswith(f"run `publish smoke {ID}`")
    assert not hub.stats.requests["repo_create"]


def test_a_stale_benchmark_is_the_cards_to_tell(ladder, publish, push):
    edit(ladder, "turn_tokens: 6", "turn_tokens: 7")
    publish("card", "--all", cwd=ladder).ok()
    push(ID, "--yes").ok()


# -- what is shown --------------------------------------------------------------------------------------------


def test_a_dry_run_names_the_files(push):
    ran = push(ID, "--dry-run").ok()
    assert PLAN in ran.out
    assert "model.safetensors" in ran.out


def test_a_dry_run_tells_foreign_edits_and_exits_as_the_push_would(hub, push):
    push(ID, "--yes").ok()
    theirs(hub)
    somebody_commits(hub, "notes/theirs.txt", b"keep me")
    ran = push(ID, "--dry-run")
    assert "README.md was edited on the hub since the last push" in ran.refused(4)
    assert f"{ID}: update: README.md" in ran.out
    assert f"{ID}: not from here, kept: notes/theirs.txt" in ran.out
    assert "    +Added \ufffd[31mby hand." in ran.out
    assert "\x1b" not in ran.out + ran.err
    assert push(ID, "--yes").code == 4

    ran = push(ID, "--dry-run", "--json")
    assert ran.code == 4
    (plan,) = json.loads(ran.out)["plans"]
    (foreign,) = plan["foreign"]
    assert (foreign["path"], foreign["what"]) == ("README.md", "was edited on the hub since the last push")
    assert "by hand." in foreign["diff"]
    assert plan["kept"] == ["notes/theirs.txt"]
    assert "--overwrite" in plan["refused"]

    for option in ("--overwrite", "--create-pr"):
        ran = push(ID, "--dry-run", "--json", option).ok()
        assert json.loads(ran.out)["plans"][0]["refused"] is None
    assert "would be replaced" in push(ID, "--dry-run", "--overwrite").ok().out


def test_a_dry_run_is_refused_for_weights_of_others_even_with_overwrite(hub, push):
    push(ID, "--yes").ok()
    somebody_commits(hub, "model-00009-of-00009.safetensors", b"\0" * 100)
    ran = push(ID, "--dry-run", "--overwrite")
    assert "model-00009-of-00009.safetensors on the hub is no file of" in ran.refused(4)
    assert f"{ID}: weights not from here: model-00009-of-00009.safetensors" in ran.out


def test_a_person_is_asked_after_the_plan_was_shown_also_with_json(hub, push, monkeypatch):
    monkeypatch.setattr("publisher.cli._on_terminal", lambda: True)
    ran = push(ID, "--json", stdin="n\n")
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err.index(PLAN) < ran.err.index("Push?")
    assert not hub.stats.requests["repo_create"]
    ran = push(ID, "--json", stdin="y\n").ok()
    assert json.loads(ran.out)["receipts"][0]["id"] == ID


def test_nobody_is_asked_about_a_push_that_would_be_refused(hub, push, monkeypatch):
    push(ID, "--yes").ok()
    theirs(hub)
    monkeypatch.setattr("publisher.cli._on_terminal", lambda: True)
    ran = push(ID)
    assert ran.code == 4
    assert "Push?" not in ran.err
    assert ran.out.count("by hand.") == 1, "the difference is told once"
    assert "by hand." not in ran.err
