"""The commands as a user meets them: exit codes, stdout and stderr, and a release to the built-in hub."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
from conftest import EXAMPLE, edit, environment, sound_hub, write_ladder
from huggingface_hub import HfApi

from inference import errors
from publisher.cli import EXIT_CODES, exit_code, main
from publisher.hub import Hub
from publisher.localhub import Fault, LocalHub
from publisher.variants import load_project

WRITE, READ = "hf_secretWRITEtoken", "hf_secretREADtoken"
IDS = ["Q2_K_XL", "Q3_K_XL", "Q4_K_XL", "Q5_K_XL", "Q6_K_XL", "Q8_K_XL"]
Q4 = "  Q4_K_XL: {bits: 4}"
BASE = "acme/Qwen3.5-tiny"


@pytest.fixture
def hub(tmp_path):
    with sound_hub(tmp_path / "hub", {WRITE: "write:demo,acme", READ: "read:demo"}) as hub:
        yield hub


@pytest.fixture
def online(hub):
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}


def commits(hub: LocalHub, id: str) -> list[str]:
    repo = f"demo/Qwen3.5-tiny-UD-{id}-mlx"
    return [c.title for c in HfApi(hub.url, WRITE).list_repo_commits(repo)]


# ------------------------------------------------------------------------------------------------ exit codes


def test_every_kind_of_error_has_its_exit_code():
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.PublishError)]
    assert {e.__name__: exit_code(e("x")) for e in kinds} == {
        "PublishError": 1, "CheckFailed": 1, "HubUnavailable": 1, "InputError": 2, "CheckpointError": 2, "ResourceError": 2,
        "GateRefused": 3, "RemoteChanged": 4, "AuthError": 5,
    }  # fmt: skip
    assert set(EXIT_CODES) <= set(kinds)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("plan",), 0, ""),
        (("plan", "Q4"), 2, "no variant 'Q4'; known: Q2_K_XL"),
        (("build",), 2, "name at least one variant, or give --all"),
        (("push",), 2, "name at least one variant, or give --all"),
        (("smoke",), 2, "name at least one variant, or give --all"),
        (("bench",), 2, "name at least one variant, or give --all"),
        (("chat", "nothing"), 2, "no variant 'nothing'"),
        (("plan", "--file", "other.yaml"), 2, "other.yaml: no such file"),
        (("init", "./model"), 2, "variants.yaml: exists already; give --force"),
        (("status", "--remote"), 1, "cannot be reached"),
        (("push", "Q4_K_XL", "--yes"), 5, "needs a token with write access"),
        (("verify", "Q4_K_XL"), 0, ""),
        (("card", "--check"), 0, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_exit_codes_and_words(args, code, words, built, publish, monkeypatch):
    monkeypatch.setitem(Hub.__init__.__kwdefaults__, "patience_s", 0.1)
    ran = publish(*args, cwd=built)
    assert ran.code == code, ran.err
    if code:
        assert words in ran.refused(code)


def test_variants_beside_all_are_refused_by_every_command_that_takes_both(built, publish):
    both = [name for name, c in main.commands.items() if {"ids", "all_variants"} <= {p.name for p in c.params}]
    assert set(both) >= {"allocate", "build", "smoke", "bench", "eval", "card", "verify", "push"}
    for name in both:
        assert "name some, or give --all" in publish(name, "Q4_K_XL", "--all", cwd=built).refused(2)


def test_click_refuses_what_is_no_option_with_code_2(built, publish):
    for args in (("plan", "--nope"), ("nope",), ("build", "--skip", "everything"), ("chat", "Q4_K_XL", "--top-p", "2")):
        ran = publish(*args, cwd=built)
        assert ran.code == 2
        assert "Usage: " in ran.err


def test_an_unknown_id_suggests_the_nearest(built, publish):
    assert publish("build", "Q4-K-XL", cwd=built).refused(2).endswith("did you mean Q4_K_XL?")
    assert publish("status", "q5_k_xl", cwd=built).refused(2).endswith("did you mean Q5_K_XL?")


def test_nothing_built_is_refused_with_the_command_that_builds(tmp_path, publish, quick_yaml):
    write_ladder(tmp_path, quick_yaml)
    assert "publish build --all" in publish("verify", cwd=tmp_path).refused(3)
    for command in ("smoke", "bench", "card", "verify"):
        assert "Q4_K_XL: not built; run: publish build Q4_K_XL" in publish(command, "Q4_K_XL", cwd=tmp_path).refused(3)
    assert "publish build Q4_K_XL" in publish("chat", "Q4_K_XL", "--prompt", "x", cwd=tmp_path).refused(2)


# ------------------------------------------------------------------------------------------------ stdout and stderr


@pytest.mark.parametrize(
    "args",
    [
        ("plan",), ("status",), ("verify",), ("card", "--all"), ("card", "--check"), ("build", "--all"), ("smoke", "Q2_K_XL"),
        ("bench", "Q2_K_XL"), ("push", "--all", "--dry-run"), ("push", "Q2_K_XL", "--yes"), ("status", "--remote"),
        ("chat", "Q2_K_XL", "--prompt", "hello", "--max-tokens", "4"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_json_is_all_that_stands_on_stdout(args, ladder, publish, online):
    ran = publish(*args, "--json", cwd=ladder, env=online).ok()
    assert isinstance(json.loads(ran.out), dict)
    assert not ran.err.lstrip().startswith("{")


def test_quiet_leaves_stderr_empty(ladder, publish):
    for args in (("build", "--all"), ("card", "--all"), ("status",)):
        assert publish(*args, "--quiet", cwd=ladder).ok().err == ""


def test_json_of_init_is_all_that_stands_on_stdout(tmp_path, publish):
    shutil.copytree(EXAMPLE / "model", tmp_path / "model")
    assert json.loads(publish("init", "./model", "--json", cwd=tmp_path).ok().out) == {"written": "variants.yaml"}


def test_progress_is_on_stderr_and_the_result_on_stdout(ladder, publish):
    ran = publish("smoke", "Q2_K_XL", cwd=ladder).ok()
    assert "Q2_K_XL: smoke passed" in ran.err
    assert "divergence from BF16" in ran.out
    assert "divergence" not in ran.err


def test_an_error_with_json_leaves_stdout_empty(built, publish):
    ran = publish("plan", "nope", "--json", cwd=built)
    assert (ran.code, ran.out) == (2, "")


def test_a_failed_check_with_json_still_gives_the_checks(ladder, publish):
    (ladder / "build/Q4_K_XL/config.json").write_text("{}")
    ran = publish("verify", "Q4_K_XL", "--json", cwd=ladder)
    assert ran.code == 1
    assert any(c["passed"] is False for c in json.loads(ran.out)["Q4_K_XL"])


def test_card_check_shows_the_difference_and_exits_1(ladder, publish):
    path = ladder / "build/Q4_K_XL/README.md"
    path.write_text(path.read_text().replace("## Usage", "## Use it"))
    ran = publish("card", "--check", cwd=ladder)
    assert ran.refused(1) == "cards not current: Q4_K_XL; run: publish card --all"
    assert "-## Use it\n+## Usage" in ran.out
    assert "## Use it" in path.read_text()  # --check writes nothing
    assert "Q4_K_XL: card written" in publish("card", "--all", cwd=ladder).ok().out
    publish("card", "--check", cwd=ladder).ok()
    assert publish("card", "Q4_K_XL", "--check", cwd=ladder).ok().out == "1 card is current\n"


def test_one_faulty_card_stops_no_other_and_is_told_in_one_line(ladder, publish, hub, online):
    out = ladder / "build"
    ids = sorted(p.parent.name for p in out.glob("*/manifest.json"))
    bad, other, *_ = ids
    card = out / bad / "README.md"
    card.write_text(card.read_text().replace("<!-- notes:end -->\n", ""))
    kept = card.read_bytes()
    whole = (out / other / "README.md").read_text()
    (out / other / "README.md").write_text("gone")
    fault = (
        rf"{bad}/README\.md: line \d+: notes:begin without a notes:end; add the line <!-- notes:end --> after the notes"
    )
    checked = publish("card", "--all", "--check", "--json", cwd=ladder)
    assert re.fullmatch(fault, checked.refused(3))
    assert list(json.loads(checked.out)["stale"]) == [other]
    ran = publish("card", "--all", cwd=ladder)
    assert re.fullmatch(fault, ran.refused(3))
    assert f"{bad}: card not rendered" in ran.out
    assert f"{other}: card written" in ran.out
    assert card.read_bytes() == kept
    assert (out / other / "README.md").read_text() == whole
    assert re.fullmatch(fault, publish("push", *ids, "--yes", cwd=ladder, env=online).refused(3))
    assert publish("build", bad, "--skip", "bench", cwd=ladder).refused(3).startswith(f"{bad}/README.md: ")
    (out / other / "README.md").write_text("<!-- notes:end -->\n")
    ran = publish("push", *ids, "--yes", cwd=ladder, env=online)
    assert ran.code == 3
    told = ran.err.splitlines()[-2:]
    assert [line.split("/")[0].strip() for line in told] == [bad, other]


def test_every_command_explains_itself(tmp_path, publish):
    listed = publish("--help", cwd=tmp_path).ok().out
    for name, command in main.commands.items():
        assert re.search(rf"^  {name} ", listed, re.M)
        told = publish(name, "--help", cwd=tmp_path).ok().out
        assert command.help.splitlines()[0].split(".")[0][:40] in " ".join(told.split())


# ------------------------------------------------------------------------------------------------ chat and init


def test_chat_answers_one_prompt(built, publish):
    args = ("chat", "Q8_K_XL", "--prompt", "The package manager", "--max-tokens", "12", "--temperature", "0")
    first, again = publish(*args, cwd=built).ok(), publish(*args, cwd=built).ok()
    assert first.out.strip()
    assert first.out == again.out
    assert json.loads(publish(*args, "--json", cwd=built).ok().out)["turns"][0]["answer"] == first.out[:-1]


@pytest.mark.parametrize(
    ("asked", "told"),
    [(("--prompt", "x"), "prompt tokens and 100000000 new ones exceed"), ((), "--max-tokens 100000000 exceeds")],
)
def test_chat_names_the_context_that_an_answer_would_exceed(asked, told, publish, tmp_path):
    refused = publish("chat", str(EXAMPLE / "model"), *asked, "--max-tokens", "100000000", cwd=tmp_path).refused(2)
    assert told in refused
    assert refused.strip().endswith("the context of 4096")


def test_chat_asks_memory_for_the_real_question_and_its_answer(monkeypatch, publish, tmp_path):
    asked = []
    monkeypatch.setattr("inference.load.memory.need", lambda _, context, *rest: asked.append(context) or _Nothing)
    for words in (1, 900):
        question = " ".join(["word"] * words)
        publish("chat", str(EXAMPLE / "model"), "--prompt", question, "--max-tokens", "2", cwd=tmp_path).ok()
    assert 4 <= asked[0] < 100
    assert 900 + 2 < asked[1] < 4096


class _Nothing:
    total = 0


def test_chat_reads_questions_from_stdin_and_remembers(built, publish):
    args = ("chat", "Q8_K_XL", "--max-tokens", "6", "--temperature", "0", "--json")
    turns = json.loads(publish(*args, cwd=built, stdin="one\n\ntwo\n/new\ntwo\n").ok().out)["turns"]
    assert [t["question"] for t in turns] == ["one", "two", "two"]
    alone = json.loads(publish(*args, cwd=built, stdin="two\n").ok().out)["turns"]
    assert turns[2] == alone[0]  # /new forgot the first
    plain = publish(*args[:-1], cwd=built, stdin="two\n").ok()
    assert plain.out == alone[0]["answer"] + "\n"


def test_chat_takes_any_folder_with_a_variant_or_the_base(built, publish, tmp_path):
    for folder in (built / "build/Q2_K_XL", EXAMPLE / "model"):
        assert publish("chat", str(folder), "--prompt", "x", "--max-tokens", "3", cwd=tmp_path).ok().out.strip()


def test_chat_with_a_folder_that_holds_no_model_says_so(built, publish, tmp_path):
    (tmp_path / "empty").mkdir()
    told = publish("chat", str(tmp_path), cwd=tmp_path).refused(2)
    assert told.startswith(f"{tmp_path}: no config.json in it; expected a variant's id")
    assert publish("chat", "./nowhere", cwd=tmp_path).refused(2).startswith("./nowhere: no such folder; ")
    told = publish("chat", "build", cwd=built).refused(2)
    assert told.startswith("build: no variant of variants.yaml, and no config.json in the folder; ")
    assert "did you mean Q4_K_XL?" in publish("chat", "Q4_K_X", cwd=built).refused(2)


def test_init_then_build_works_as_it_stands_for_a_local_base(tmp_path, publish):
    shutil.copytree(EXAMPLE / "model", tmp_path / "Qwen3.5-tiny")
    publish(
        "init", "./Qwen3.5-tiny", "--imatrix", str(EXAMPLE / "imatrix-tiny.gguf"), "--owner", "demo", cwd=tmp_path
    ).ok()
    plan = json.loads(publish("plan", "--json", cwd=tmp_path).ok().out)
    assert [v["id"] for v in plan["variants"]] == IDS
    assert any(c["awq"] for c in plan["variants"][0]["classes"])
    publish("build", "Q2_K_XL", "--skip", "bench", "--skip", "smoke", cwd=tmp_path).ok()
    assert (tmp_path / "build/Q2_K_XL/README.md").is_file()


def test_init_refuses_to_overwrite_and_force_replaces(tmp_path, publish):
    shutil.copytree(EXAMPLE / "model", tmp_path / "model")
    (tmp_path / "variants.yaml").write_text("mine")
    assert "exists already" in publish("init", "./model", cwd=tmp_path).refused(2)
    assert (tmp_path / "variants.yaml").read_text() == "mine"
    publish("init", "./model", "--force", cwd=tmp_path).ok()
    publish("plan", cwd=tmp_path).ok()


@pytest.mark.parametrize("base", ["./nowhere", "one/two/three", ".", "Qwen", "-x/y z"])
def test_init_refuses_what_is_no_base(base, tmp_path, publish):
    publish("init", "--", base, cwd=tmp_path).refused(2)
    assert not (tmp_path / "variants.yaml").exists()


def test_the_schema_accepts_what_init_writes_and_the_example(tmp_path, publish):
    schema = json.loads(publish("schema", cwd=tmp_path).ok().out)
    assert schema["title"] == "variants.yaml"
    assert {"base", "variants"} <= set(schema["required"])
    assert schema["additionalProperties"] is False


# ------------------------------------------------------------------------------------------------ push


def test_push_off_a_terminal_without_yes_changes_nothing(ladder, publish, hub, online):
    ran = publish("push", "Q2_K_XL", cwd=ladder, env=online)
    assert "--yes" in ran.refused(2)
    assert "demo/Qwen3.5-tiny-UD-Q2_K_XL-mlx" in ran.out  # the plan was shown
    assert not hub.stats.requests["commit"]
    assert not hub.stats.requests["repo_create"]


def test_a_dry_run_shows_the_plan_and_sends_nothing(ladder, publish, hub, online):
    ran = publish("push", "--all", "--dry-run", "--json", cwd=ladder, env=online).ok()
    plans = json.loads(ran.out)["plans"]
    assert [p["id"] for p in plans] == IDS
    assert all(p["exists"] is False and "model.safetensors" in p["add"] for p in plans)
    assert not hub.stats.requests["commit"]
    assert not hub.stats.requests["repo_create"]


def test_a_dry_run_says_what_prune_would_delete(ladder, publish, hub, online):
    sizes = {id: (ladder / f"build/{id}/model.safetensors").stat().st_size for id in ("Q2_K_XL", "Q3_K_XL")}
    args = ("push", *sizes, "--dry-run", "--prune")
    text = publish(*args, cwd=ladder, env=online).ok().out
    assert "Q2_K_XL: delete here, once the hub is proven to hold them: model.safetensors (" in text
    assert f", {sum(sizes.values()) / 1e6:.2f} MB to prune here" in text
    plans = json.loads(publish(*args, "--json", cwd=ladder, env=online).ok().out)["plans"]
    assert {p["id"]: p["prune"] for p in plans} == {id: {"model.safetensors": n} for id, n in sizes.items()}
    assert all((ladder / f"build/{id}/model.safetensors").exists() for id in sizes)
    assert "prune here" not in publish("push", *sizes, "--dry-run", cwd=ladder, env=online).ok().out


def test_a_push_during_a_build_says_that_one_is_at_work_and_whose(ladder, publish, hub, online):
    shutil.rmtree(ladder / "build/Q4_K_XL")  # as while it is built
    with load_project(ladder / "variants.yaml").store.lock("build"):
        told = publish("push", "Q4_K_XL", "--yes", cwd=ladder, env=online).refused(2)
    assert f"another publish is at work there (build, process {os.getpid()} on {platform.node()})" in told
    assert told.endswith("wait for it to end, then run this again")
    assert not hub.stats.requests["repo_create"]
    assert "not built" in publish("push", "Q4_K_XL", "--yes", cwd=ladder, env=online).refused(3)


def test_a_ladder_is_pushed_once_and_a_second_push_sends_nothing(ladder, publish, hub, online):
    publish("push", "--all", "--yes", cwd=ladder, env=online).ok()
    assert all(len(commits(hub, id)) == 2 for id in IDS)  # the hub's first commit, and one of ours
    publish("verify", "--remote", cwd=ladder, env=online).ok()
    rows = json.loads(publish("status", "--remote", "--json", cwd=ladder, env=online).ok().out)["variants"]
    assert all(r["remote"]["state"] == "in sync" and r["pushed"]["card_current"] for r in rows)
    hub.stats.reset()
    assert "up to date" in publish("push", "--all", cwd=ladder, env=online).ok().out  # nobody needs to be asked
    assert not hub.stats.requests["commit"]
    assert hub.stats.received["lfs_put"] == 0


def test_after_an_edit_one_push_changes_one_repo_and_the_cards_of_the_others_follow(ladder, publish, hub, online):
    publish("push", "--all", "--yes", cwd=ladder, env=online).ok()
    edit(ladder, Q4, '  Q4_K_XL: {bits: 4, rules: [{match: "*.mlp.down_proj", bits: 8, awq: true}]}')
    publish("build", "--all", cwd=ladder, env=online).ok()
    rows = {
        r["id"]: r
        for r in json.loads(publish("status", "--remote", "--json", cwd=ladder, env=online).ok().out)["variants"]
    }
    assert all(r["remote"]["state"] == "drifted" for r in rows.values())
    assert [id for id, r in rows.items() if not r["pushed"]["weights_current"]] == ["Q4_K_XL"]

    publish("push", "Q4_K_XL", "--yes", cwd=ladder, env=online).ok()
    assert {id: len(commits(hub, id)) for id in IDS} == dict.fromkeys(IDS, 2) | {"Q4_K_XL": 3}
    hub.stats.reset()
    publish("push", "--all", "--yes", cwd=ladder, env=online).ok()
    assert {id: len(commits(hub, id)) for id in IDS} == dict.fromkeys(IDS, 3)
    assert commits(hub, "Q8_K_XL")[0] == "Q8_K_XL: update card"
    assert hub.stats.received["lfs_put"] == 0, "no byte of weights is sent again"
    publish("verify", "--remote", cwd=ladder, env=online).ok()


def test_create_pr_leaves_main_alone(ladder, publish, hub, online):
    publish("push", "Q2_K_XL", "--yes", cwd=ladder, env=online).ok()
    edit(ladder, "note: smallest", "note: smallest, rules: [{match: '*.lm_head', bits: 5, why: because}]")
    publish("card", "--all", cwd=ladder).ok()
    before = commits(hub, "Q2_K_XL")
    ran = publish("push", "Q2_K_XL", "--create-pr", "--yes", "--json", cwd=ladder, env=online).ok()
    (receipt,) = json.loads(ran.out)["receipts"]
    assert receipt["pull_request"] == 1
    assert commits(hub, "Q2_K_XL") == before


def test_private_repos_are_created_private(ladder, publish, hub, online):
    publish("push", "Q2_K_XL", "--private", "--yes", cwd=ladder, env=online).ok()
    assert HfApi(hub.url, WRITE).model_info("demo/Qwen3.5-tiny-UD-Q2_K_XL-mlx").private is True


def test_an_edit_on_the_hub_stops_a_push_with_code_4_and_overwrite_replaces_it(ladder, publish, hub, online):
    publish("push", "Q2_K_XL", "--yes", cwd=ladder, env=online).ok()
    repo = "demo/Qwen3.5-tiny-UD-Q2_K_XL-mlx"
    api = HfApi(hub.url, WRITE)
    api.upload_file(path_or_fileobj=b"---\nlicense: mit\n---\n# theirs\n", path_in_repo="README.md", repo_id=repo)
    (row,) = json.loads(publish("status", "Q2_K_XL", "--remote", "--json", cwd=ladder, env=online).ok().out)["variants"]
    assert row["remote"]["state"] == "drifted"
    assert "README.md" in publish("verify", "Q2_K_XL", "--remote", cwd=ladder, env=online).refused(1)
    ran = publish("push", "Q2_K_XL", "--yes", cwd=ladder, env=online)
    assert ran.code == 4
    assert "README.md" in ran.err
    publish("push", "Q2_K_XL", "--yes", "--overwrite", cwd=ladder, env=online).ok()
    publish("verify", "Q2_K_XL", "--remote", cwd=ladder, env=online).ok()


@pytest.mark.parametrize(
    ("token", "words"), [(READ, "read"), ("hf_unknownTOKEN", "does not know this token"), (None, "token")]
)
def test_a_token_that_may_not_write_exits_5_and_is_in_no_output(token, words, ladder, publish, hub):
    env = {"HF_ENDPOINT": hub.url} | ({"HF_TOKEN": token} if token else {})
    ran = publish("push", "Q2_K_XL", "--yes", cwd=ladder, env=env)
    assert ran.code == 5, ran.err
    assert words in ran.err
    assert not token or token not in ran.out + ran.err


def test_no_output_and_no_file_holds_the_token(ladder, publish, hub, online):
    hub.faults.add(Fault("commit", "status", status=400))
    failed = publish("push", "Q2_K_XL", "--yes", cwd=ladder, env=online)
    assert failed.code
    ran = publish("push", "Q2_K_XL", "--yes", cwd=ladder, env=online).ok()
    assert WRITE not in failed.out + failed.err + ran.out + ran.err
    for path in ladder.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".md", ".yaml", ".lock"):
            assert WRITE not in path.read_text(encoding="utf-8"), path


def test_of_several_repos_the_failed_one_is_named_and_the_others_are_finished(ladder, publish, hub, online):
    hub.faults.add(Fault("commit", "status", status=403, match="Q3_K_XL"))
    ran = publish("push", "Q2_K_XL", "Q3_K_XL", "Q4_K_XL", "--yes", cwd=ladder, env=online)
    assert ran.code == 5
    assert ran.err.splitlines()[-1].startswith("Error: Q3_K_XL: ")
    assert len(commits(hub, "Q4_K_XL")) == 2
    publish("push", "Q2_K_XL", "Q3_K_XL", "Q4_K_XL", "--yes", cwd=ladder, env=online).ok()
    assert [len(commits(hub, id)) for id in ("Q2_K_XL", "Q3_K_XL", "Q4_K_XL")] == [2, 2, 2]


def test_offline_everything_but_the_hub_works(ladder, publish, hub, online):
    env = online | {"HF_HUB_OFFLINE": "1"}
    for args in (("plan",), ("status",), ("build", "--all"), ("verify",), ("card", "--all")):
        publish(*args, cwd=ladder, env=env).ok()
    for args in (("push", "Q2_K_XL", "--yes"), ("verify", "--remote"), ("status", "--remote")):
        assert "HF_HUB_OFFLINE" in publish(*args, cwd=ladder, env=env).refused(1)
    assert not hub.stats.requests


# ------------------------------------------------------------------------------------------------ a base on the Hub


@pytest.fixture
def from_hub(tmp_path, hub, quick_yaml):
    """A folder with nothing but variants.yaml, whose base and imatrix are repos on the hub."""
    api = HfApi(hub.url, WRITE)
    for repo, folder, patterns in ((BASE, EXAMPLE / "model", None), ("acme/statistics", EXAMPLE, ["*.gguf"])):
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=patterns)
    folder = tmp_path / "project"
    folder.mkdir()
    text = re.sub(r"(?m)^base:\n(?:  .*\n)+", f"base: {{repo: {BASE}, revision: main}}\n", quick_yaml)
    text = text.replace("imatrix: ./imatrix-tiny.gguf", "imatrix: {repo: acme/statistics, file: imatrix-tiny.gguf}")
    (folder / "variants.yaml").write_text(text.partition("  Q5_K_XL")[0])
    hub.stats.reset()
    return folder


def test_a_base_on_the_hub_is_planned_from_headers_downloaded_once_locked_and_then_used_offline(
    from_hub, publish, hub, online
):
    commit = HfApi(hub.url, WRITE).model_info(BASE).sha
    weights = next((EXAMPLE / "model").glob("*.safetensors")).stat().st_size
    plan = json.loads(publish("plan", "--json", cwd=from_hub, env=online).ok().out)
    assert plan["base"] == {"name": BASE, "commit": commit, "downloaded": False}
    assert sum(hub.stats.sent.values()) < weights / 20
    lock = json.loads((from_hub / "variants.lock").read_text())
    assert lock["base"] == {"repo": BASE, "revision": "main", "commit": commit}
    hub.stats.reset()
    publish("plan", cwd=from_hub, env=online).ok()
    assert sum(hub.stats.sent.values()) == 0, "headers are kept"

    publish("build", "Q4_K_XL", "--skip", "bench", cwd=from_hub, env=online).ok()
    assert weights < sum(hub.stats.sent.values()) < weights * 1.1
    hub.stats.reset()
    (statistics,) = json.loads((from_hub / "variants.lock").read_text())["imatrix"]
    assert statistics["file"] == "imatrix-tiny.gguf"
    manifest = json.loads((from_hub / "build/Q4_K_XL/manifest.json").read_text())
    assert manifest["inputs"]["base"] == {"name": BASE, "commit": commit} | {
        key: manifest["inputs"]["base"][key] for key in ("source_hash", "files_hash")
    }
    assert f"base_model: {BASE}" in (from_hub / "build/Q4_K_XL/README.md").read_text()

    offline = {"HF_HUB_OFFLINE": "1"}  # and no endpoint that answers
    assert "nothing to do" in publish("build", "Q4_K_XL", "--skip", "bench", cwd=from_hub, env=offline).ok().err
    publish("build", "Q2_K_XL", "--skip", "bench", cwd=from_hub, env=offline).ok()
    publish("verify", cwd=from_hub, env=offline).ok()
    assert not hub.stats.requests


def test_a_floating_revision_stays_where_the_lock_holds_it(from_hub, publish, hub, online):
    publish("plan", cwd=from_hub, env=online).ok()
    locked = (from_hub / "variants.lock").read_text()
    HfApi(hub.url, WRITE).upload_file(path_or_fileobj=b"news\n", path_in_repo="NEWS", repo_id=BASE)
    publish("plan", cwd=from_hub, env=online).ok()
    assert (from_hub / "variants.lock").read_text() == locked


@pytest.mark.parametrize("base", ["acme/nothing-of-that-name", "acme/statistics"])
def test_a_base_that_is_not_there_or_no_model_is_one_line(base, from_hub, publish, online):
    edit(from_hub, f"repo: {BASE}", f"repo: {base}")
    assert base in publish("plan", cwd=from_hub, env=online).refused(2)


def test_a_base_on_the_hub_without_a_network_is_one_line(from_hub, publish, tmp_path):
    told = publish("plan", cwd=from_hub, env={"HF_HUB_OFFLINE": "1"}).refused(1)
    assert "HF_HUB_OFFLINE" in told
    (from_hub / "variants.lock").write_text("{")
    assert "variants.lock" in publish("plan", cwd=from_hub).refused(2)


def test_the_environment_of_these_tests_reaches_no_real_hub(tmp_path):
    assert environment(tmp_path)["HF_ENDPOINT"].startswith("http://127.0.0.1")
    assert "HF_TOKEN" not in environment(tmp_path)


@pytest.mark.parametrize("module", ["click", "pydantic"])
def test_ctrl_c_while_it_imports_is_one_line(module):
    code = f"""
import sys

class Finger:
    def find_spec(self, name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finger())
sys.argv = ["publish", "plan"]
from publisher.entry import main
main()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (130, "")
    assert run.stderr == "interrupted; the same command goes on where this one stopped\n"
