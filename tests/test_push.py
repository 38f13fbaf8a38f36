"""Pushing with the unmodified huggingface_hub client against the built-in hub, over real HTTP."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from unittest.mock import Mock

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, constants
from pushes import (
    READ,
    REPO,
    STRANGER,
    TOKENS,
    UNKNOWN,
    WRITE,
    api,
    commits,
    connect,
    edit_card,
    pulls,
    push,
    somebody_commits,
)
from variant_folder import CARD, MODULES, make_variant, quantization, tensors

from inference.checkpoint import read_checkpoint
from inference.errors import (
    AuthError,
    CheckFailed,
    GateRefused,
    HubUnavailable,
    InputError,
    PublishError,
    RemoteChanged,
    ResourceError,
)
from publisher import fetch
from publisher.hub import Hub, cached_snapshot, check_disk, download_base, download_file, download_size, remote_headers
from publisher.hub_watch import Limits
from publisher.localhub import Fault, LocalHub
from publisher.push import execute, plan_push, remote_state, verify_remote
from publisher.schema import Receipt
from publisher.show import push_text
from publisher.store import read_model

pytestmark = pytest.mark.usefixtures("own_home")
INDEX = "model.safetensors.index.json"
FILES = {
    ".gitattributes", "LICENSE", "README.md", "config.json", "manifest.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
}  # fmt: skip


# -- what a push does -----------------------------------------------------------------------------------------


def test_a_first_push_is_one_commit_with_all_files(server, project):
    hub = connect(server)
    plan = plan_push(hub, project, "Q4")
    assert not plan.exists
    assert not plan.up_to_date
    assert server.stats.requests["repo_create"] == 0  # planning changes nothing
    assert plan.bytes_to_send == sum(f.size for f in plan.add)
    receipt = execute(hub, project, plan)
    assert len(commits(server)) == 2  # the hub's own, and ours
    assert server.stats.requests["commit"] == 1
    tree = hub.tree(REPO, receipt.commit)
    assert set(tree) == FILES
    shards = {f.path: f.sha256 for f in plan.files if f.path.endswith(".safetensors")}
    assert {p: tree[p].sha256 for p in shards} == shards
    assert receipt == read_model(project.store.receipt("Q4"), Receipt)
    assert (receipt.repo, receipt.tag, receipt.endpoint) == (REPO, "v1", server.url)
    assert hub.tags(REPO) == {"v1": receipt.commit}


def test_odd_names_arrive_as_they_are(server, project):
    names = ["images/a b.png", "images/é #1%20.png", "images/図.png"]
    (project.store.variant("Q4") / "images").mkdir()
    for i, name in enumerate(names):
        (project.store.variant("Q4") / name).write_bytes(b"%d" % i)
    receipt = push(server, project)
    hub = connect(server)
    assert {p for p in hub.tree(REPO, receipt.commit) if p.startswith("images/")} == set(names)
    assert [hub.read_range(REPO, receipt.commit, name, 0, 9) for name in names] == [b"0", b"1", b"2"]
    assert plan_push(hub, project, "Q4").up_to_date


def test_a_second_push_commits_nothing_and_sends_no_weights(server, project):
    first = push(server, project)
    server.stats.reset()
    hub = connect(server)
    plan = plan_push(hub, project, "Q4")
    assert plan.up_to_date
    assert plan.reasons == ()
    assert execute(hub, project, plan) == first
    assert server.stats.requests["commit"] == server.stats.requests["lfs_batch"] == 0
    assert server.stats.received["lfs_put"] == 0


def test_a_changed_card_is_one_small_commit_that_moves_no_tag(server, project):
    first = push(server, project)
    edit_card(project)
    server.stats.reset()
    second = push(server, project)
    assert commits(server)[0] == "Q4: update card"
    assert server.stats.requests["commit"] == 1
    assert server.stats.received["lfs_put"] == 0
    assert server.stats.received["commit"] < 5000
    assert second.tag == first.tag == "v1"
    assert connect(server).tags(REPO) == {"v1": first.commit}


def test_new_weights_get_the_next_tag_and_stale_shards_go(server, project):
    push(server, project)
    make_variant(project, seed=1, shards=3)
    hub = connect(server)
    plan = plan_push(hub, project, "Q4")
    assert plan.delete == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    receipt = execute(hub, project, plan)
    tree = hub.tree(REPO, receipt.commit)
    assert sorted(p for p in tree if p.endswith(".safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert len(commits(server)) == 3
    assert receipt.tag == "v2"
    assert set(hub.tags(REPO)) == {"v1", "v2"}


def test_files_that_no_push_from_here_knows_are_kept(server, project):
    push(server, project)
    somebody_commits(server, "notes/extra.txt", b"keep me")
    edit_card(project)
    hub = connect(server)
    plan = plan_push(hub, project, "Q4")
    assert plan.kept == ("notes/extra.txt",)
    receipt = execute(hub, project, plan)
    assert "notes/extra.txt" in hub.tree(REPO, receipt.commit)


def test_images_of_the_card_are_pushed(server, project):
    images = project.store.variant("Q4") / "images"
    images.mkdir()
    (images / "kld.svg").write_text("<svg/>")
    receipt = push(server, project)
    assert "images/kld.svg" in connect(server).tree(REPO, receipt.commit)


def test_a_private_repo_is_created_private_and_the_setting_is_left_alone_later(server, project):
    push(server, project, private=True)
    hub = connect(server)
    assert plan_push(hub, project, "Q4").private
    assert connect(server, STRANGER).head(REPO) is None
    with pytest.raises(InputError, match="not found"):
        connect(server, STRANGER).resolve_commit(REPO, "main")


# -- other people ---------------------------------------------------------------------------------------------


def test_a_card_edited_on_the_hub_stops_the_push_with_a_diff(server, project):
    push(server, project)
    somebody_commits(server, "README.md", CARD.format(id="Q4").encode() + b"\nEdited by hand.\n")
    edit_card(project)
    server.stats.reset()
    with pytest.raises(RemoteChanged) as e:
        push(server, project)
    assert "README.md was edited on the hub" in str(e.value)
    assert "\n+Edited by hand." in str(e.value)
    assert "better sentence" not in str(e.value)  # the diff is theirs, not ours
    assert server.stats.requests["preupload"] == 0
    receipt = push(server, project, overwrite=True)
    assert commits(server)[0] == "Q4: update card"
    assert b"better sentence" in connect(server).read_range(REPO, receipt.commit, "README.md", 0, 10_000)
    assert plan_push(connect(server), project, "Q4").up_to_date


def test_another_file_edited_on_the_hub_stops_the_push(server, project):
    push(server, project)
    somebody_commits(server, "tokenizer.json", b"{}")
    with pytest.raises(RemoteChanged, match=r"tokenizer\.json was edited on the hub"):
        push(server, project)


def test_weights_replaced_on_the_hub_stop_the_push(server, project):
    push(server, project)
    somebody_commits(server, "model-00001-of-00002.safetensors", b"\0" * 100)
    with pytest.raises(RemoteChanged, match=r"model-00001-of-00002\.safetensors was edited"):
        push(server, project)


def test_a_repo_that_is_not_from_here_is_not_taken_over(server, project):
    api(server).create_repo(REPO)
    somebody_commits(server, "README.md", b"# Mine\n")
    with pytest.raises(RemoteChanged, match=r"README\.md on the hub is not from here(.|\n)*\+# Mine"):
        push(server, project)


def test_weights_of_others_in_the_repo_refuse_even_with_overwrite(server, project):
    push(server, project)
    somebody_commits(server, "model-00009-of-00009.safetensors", b"\0" * 100)
    with pytest.raises(RemoteChanged, match=r"model-00009-of-00009\.safetensors on the hub is no file of Q4"):
        push(server, project, overwrite=True)


@pytest.mark.parametrize("path", ["LICENSE", "README.md", "model-00001-of-00002.safetensors"])
def test_a_file_deleted_on_the_hub_comes_back_only_if_that_is_asked_for(path, server, project):
    push(server, project)
    somebody_commits(server, "notes.txt", b"before")
    commit = somebody_commits(server, path, None)
    somebody_commits(server, "notes.txt", b"after")
    hub = connect(server)
    plan = plan_push(hub, project, "Q4")
    assert [f.path for f in plan.add] == [path]
    what = f"{path} was deleted on the hub in commit {commit[:8]} since the last push"
    assert plan.refusal == f"{REPO}: {what}; push with --overwrite to put it back, or propose with --create-pr"
    assert f"Q4: {what}\n" in push_text([plan], server.url)
    assert f"{path}: was deleted on the hub in commit {commit[:8]} since the last push" in (
        remote_state(hub, project, "Q4").differences
    )
    with pytest.raises(RemoteChanged, match="was deleted on the hub"):
        execute(hub, project, plan)
    plan = plan_push(hub, project, "Q4", overwrite=True)
    assert f"Q4: {what}; would be put back\n" in push_text([plan], server.url)
    assert path in hub.tree(REPO, execute(hub, project, plan).commit)
    assert plan_push(hub, project, "Q4").up_to_date


def test_a_repo_that_was_made_anew_is_filled_without_being_asked(server, project):
    push(server, project)
    api(server).delete_repo(REPO)
    api(server).create_repo(REPO)  # as by a push that was killed before its commit
    plan = plan_push(connect(server), project, "Q4")
    assert not plan.foreign
    assert plan.refusal is None
    push(server, project)


def test_a_head_that_moved_after_planning_is_found_before_anything_is_sent(server, project):
    push(server, project)
    make_variant(project, seed=1)
    hub = connect(server)
    plan = plan_push(hub, project, "Q4")
    somebody_commits(server, "notes.txt", b"x")
    server.stats.reset()
    with pytest.raises(RemoteChanged, match="the head moved"):
        execute(hub, project, plan)
    assert server.stats.requests["lfs_put"] == server.stats.requests["commit"] == 0


def test_somebody_elses_commit_just_before_ours_is_told_and_the_next_push_works(server, project):
    push(server, project)
    edit_card(project)
    server.faults.add(Fault("commit", "stale_head"))
    with pytest.raises(RemoteChanged, match="somebody else committed"):
        push(server, project)
    push(server, project)
    assert commits(server)[:2] == ["Q4: update card", "another push"]


def test_two_creators_of_a_repo_do_not_mix(server, project):
    hub = connect(server)
    plan = plan_push(hub, project, "Q4")
    api(server).create_repo(REPO)
    somebody_commits(server, "README.md", b"# Mine\n")
    with pytest.raises(RemoteChanged, match="somebody created it meanwhile"):
        execute(hub, project, plan)


# -- faults ---------------------------------------------------------------------------------------------------


def test_a_lost_answer_to_the_commit_is_success_and_one_commit(server, project):
    server.faults.add(Fault("commit", "lose_answer"))
    receipt = push(server, project)
    assert len(commits(server)) == 2
    assert server.stats.requests["commit"] == 1
    assert receipt.tag == "v1"


def test_a_500_for_a_commit_that_landed_is_success_and_one_commit(server, project):
    server.faults.add(Fault("commit", "late_status", status=500))
    receipt = push(server, project)
    assert len(commits(server)) == 2
    assert server.stats.requests["commit"] == 1
    assert receipt.tag == "v1"


def test_a_500_on_the_commit_is_tried_again_and_is_one_commit(server, project):
    server.faults.add(Fault("commit", "status", status=500))
    push(server, project)
    assert len(commits(server)) == 2
    assert server.stats.requests["commit"] == 2
    assert server.stats.requests["lfs_put"] == 2  # the weights went up once


def test_a_commit_that_never_lands_ends_after_a_few_tries(server, project):
    server.faults.add(Fault("commit", "status", status=503, times=99))
    with pytest.raises(HubUnavailable, match="503"):
        push(server, project)
    assert server.stats.requests["commit"] == 3
    assert not project.store.receipt("Q4").exists()


def test_if_nothing_can_be_known_after_the_commit_it_is_said(server, project):
    server.faults.add(Fault("commit", "lose_answer"))
    server.faults.add(Fault("repo_info", "status", status=500, nth=3, times=99))
    hub = connect(server, patience_s=0.2)
    plan = plan_push(hub, project, "Q4")
    with pytest.raises(HubUnavailable, match="whether the commit arrived is not known"):
        execute(hub, project, plan)
    server.faults.clear()
    receipt = push(server, project)
    assert len(commits(server)) == 2
    assert receipt.tag == "v1"


@pytest.mark.parametrize(
    ("route", "status"),
    [
        ("whoami", 503),
        ("repo_info", 502),
        ("repo_create", 500),
        ("tree", 504),
        ("tag", 503),
        ("auth_check", 429),
    ],
)
def test_idempotent_calls_are_repeated(server, project, route, status):
    server.faults.add(Fault(route, "status", status=status))
    assert push(server, project).tag == "v1"
    assert [f.route for f in server.faults.fired] == [route]
    assert len(commits(server)) == 2


@pytest.mark.parametrize("status", [400, 403, 413])
def test_a_refused_upload_url_is_asked_for_again(server, project, status):
    server.faults.add(Fault("lfs_put", "status", status=status))
    push(server, project)
    assert server.stats.requests["lfs_batch"] == 2
    assert len(commits(server)) == 2


def test_a_wait_that_is_too_long_is_not_waited(server, project):
    server.faults.add(Fault("tree", "status", status=429, retry_after=3600))
    start = time.monotonic()
    api(server).create_repo(REPO)
    with pytest.raises(HubUnavailable, match="asks to wait 3600 s"):
        push(server, project)
    assert time.monotonic() - start < 3


def test_a_silent_hub_ends_in_an_error(server, project):
    server.faults.add(Fault("whoami", "delay", seconds=2, times=9))
    hub = connect(server, patience_s=0.3, limits=Limits(answer_s=0.2))
    with pytest.raises(HubUnavailable, match="does not answer"):
        execute(hub, project, plan_push(hub, project, "Q4"))


def test_a_hub_that_is_down_is_one_line(project):
    hub = Hub("http://127.0.0.1:9", WRITE, patience_s=0.1, pause_s=0.01)
    with pytest.raises(HubUnavailable, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        plan_push(hub, project, "Q4")


def test_a_push_that_failed_after_the_commit_is_finished_by_the_next(server, project):
    server.faults.add(Fault("tag", "status", status=403))
    with pytest.raises(AuthError, match="tagging"):
        push(server, project)
    assert read_model(project.store.receipt("Q4"), Receipt).tag is None
    receipt = push(server, project)
    assert receipt.tag == "v1"
    assert read_model(project.store.receipt("Q4"), Receipt) == receipt
    assert len(commits(server)) == 2


def test_a_lost_receipt_is_written_again_without_a_commit(server, project):
    first = push(server, project)
    project.store.receipt("Q4").unlink()
    second = push(server, project)
    assert (second.commit, second.tag, second.files) == (first.commit, first.tag, first.files)
    assert len(commits(server)) == 2


def test_without_a_receipt_the_hubs_manifest_tells_which_shards_are_stale(server, project):
    push(server, project)
    project.store.receipt("Q4").unlink()
    make_variant(project, seed=1, shards=3)
    plan = plan_push(connect(server), project, "Q4", overwrite=True)
    assert plan.delete == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert plan.foreign  # this machine cannot tell who wrote the rest
    with pytest.raises(RemoteChanged):
        push(server, project)
    assert push(server, project, overwrite=True).tag == "v2"


def test_a_receipt_of_another_hub_says_nothing(server, project, tmp_path):
    push(server, project)
    with LocalHub(tmp_path / "other", TOKENS) as other:
        assert not plan_push(connect(other), project, "Q4").exists
        assert push(other, project).endpoint == other.url


@pytest.mark.parametrize("inline", [10 << 20, 0])  # sent as bytes, or by path as large files are
@pytest.mark.parametrize("when", ["uploading", "uploaded"])
@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "config.json", "README.md"])
def test_a_file_that_changes_during_the_push_is_never_committed(server, project, file, when, inline, monkeypatch):
    monkeypatch.setattr("publisher.push.INLINE_BYTES", inline)
    path = project.store.variant("Q4") / file

    def meddle(what, done, total):
        if what == when:
            data = bytearray(path.read_bytes())
            data[-3] ^= 1  # same size
            path.write_bytes(data)

    with pytest.raises(CheckFailed, match=f"{file} changed while it was being pushed"):
        push(server, project, progress=meddle)
    assert len(commits(server)) == 1


def test_a_folder_that_is_not_its_manifest_is_not_planned(server, project):
    (project.store.variant("Q4") / "tokenizer.json").write_text("{}")
    with pytest.raises(GateRefused, match=r"tokenizer\.json is not what manifest\.json says"):
        plan_push(connect(server), project, "Q4")
    with pytest.raises(GateRefused, match="Q8: not built"):
        plan_push(connect(server), project, "Q8")


def test_a_link_is_not_followed_to_the_hub(server, project, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(CARD)
    card = project.store.variant("Q4") / "README.md"
    card.unlink()
    card.symlink_to(secret)
    with pytest.raises(GateRefused, match=r"README\.md leads out of the folder"):
        plan_push(connect(server), project, "Q4")


def test_large_files_go_up_one_by_one_with_progress(server, project, monkeypatch):
    monkeypatch.setattr("publisher.push.INLINE_BYTES", 0)
    monkeypatch.setattr("publisher.hub.ALONE_BYTES", 2000)
    told = []
    push(server, project, progress=lambda what, done, total: told.append((what, done)))
    uploads = [(w, d) for w, d in told if w.startswith("upload")]
    assert [w for w, _ in uploads] == [
        "uploading",
        "uploading manifest.json",
        "uploading model-00001-of-00002.safetensors",
        "uploading model-00002-of-00002.safetensors",
        "uploaded",
    ]
    assert [d for _, d in uploads] == sorted(d for _, d in uploads)
    assert len(commits(server)) == 2


def test_a_card_that_the_hub_would_refuse_stops_before_the_weights(server, project):
    card = project.store.variant("Q4") / "README.md"
    card.write_text(card.read_text().replace("base_model_relation: quantized", "base_model_relation: cousin"))
    with pytest.raises(InputError, match=r"README\.md: the hub refuses its metadata"):
        push(server, project)
    assert server.stats.requests["lfs_put"] == 0


def test_more_than_256_files_are_one_commit(server, project):
    images = project.store.variant("Q4") / "images"
    images.mkdir()
    for i in range(300):
        (images / f"{i}.txt").write_text(str(i))
    push(server, project)
    assert len(commits(server)) == 2


# -- pull requests --------------------------------------------------------------------------------------------


def test_a_pull_request_is_opened_once_and_resumed(server, project):
    push(server, project)
    make_variant(project, seed=1)
    first = push(server, project, create_pr=True)
    again = push(server, project, create_pr=True)
    assert pulls(server) == [first.pull_request] == [again.pull_request]
    assert again.commit == first.commit
    edit_card(project)
    third = push(server, project, create_pr=True)
    assert pulls(server) == [third.pull_request]
    assert third.commit != first.commit
    assert len(commits(server)) == 2  # main is as it was
    assert read_model(project.store.receipt("Q4"), Receipt).pull_request is None


def test_a_merged_pull_request_is_known_on_main(server, project):
    push(server, project)
    make_variant(project, seed=1)
    receipt = push(server, project, create_pr=True)
    assert api(server).get_discussion_details(REPO, receipt.pull_request).status == "open"
    api(server).merge_pull_request(REPO, receipt.pull_request)
    assert plan_push(connect(server), project, "Q4").up_to_date
    assert push(server, project).tag == "v2"
    edit_card(project)
    assert plan_push(connect(server), project, "Q4").foreign == ()
    assert push(server, project, create_pr=True).pull_request != receipt.pull_request


@pytest.mark.parametrize("route", ["discussions", "commit"])
def test_a_lost_answer_opens_no_second_pull_request(server, project, route):
    push(server, project)
    edit_card(project)
    server.faults.add(Fault(route, "lose_answer", nth=2 if route == "discussions" else 1))
    receipt = push(server, project, create_pr=True)
    assert pulls(server) == [receipt.pull_request]
    assert push(server, project, create_pr=True).pull_request == receipt.pull_request
    assert pulls(server) == [receipt.pull_request]


def test_a_pull_request_may_come_from_outside_and_over_foreign_edits(server, project):
    push(server, project)
    somebody_commits(server, "README.md", CARD.format(id="Q4").encode() + b"\nEdited by hand.\n")
    edit_card(project)
    receipt = push(server, project, token=STRANGER, create_pr=True)
    assert receipt.pull_request


# -- tokens ---------------------------------------------------------------------------------------------------


def test_a_read_token_is_refused_with_what_is_needed(server, project):
    with pytest.raises(AuthError, match="the token of alice can only read; take one with write access"):
        push(server, project, token=READ)


def test_a_strangers_token_is_refused(server, project):
    with pytest.raises(AuthError, match="403"):
        push(server, project, token=STRANGER)
    push(server, project)
    edit_card(project)
    with pytest.raises(AuthError, match="checking write access"):
        push(server, project, token=STRANGER)


def test_an_unknown_token_is_refused(server, project):
    with pytest.raises(AuthError, match="does not know this token"):
        push(server, project, token=UNKNOWN)


def test_no_token_is_one_line(server, project):
    hub = Hub(server.url)
    with pytest.raises(AuthError, match="needs a token with write access: run `hf auth login`, or set HF_TOKEN"):
        execute(hub, project, plan_push(hub, project, "Q4"))


@pytest.mark.parametrize("token", ["", "  ", "\n"])
def test_an_empty_token_is_refused(server, token):
    with pytest.raises(AuthError, match="the token is empty"):
        Hub(server.url, token)


def test_a_token_with_a_line_break_inside_is_refused_without_being_shown(server):
    with pytest.raises(AuthError) as e:
        Hub(server.url, "hf_a\nb")
    assert "hf_a" not in str(e.value)


def test_the_token_comes_from_the_environment_as_with_hf(server, project, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f" {WRITE}\n")
    hub = Hub(server.url)
    assert execute(hub, project, plan_push(hub, project, "Q4")).tag == "v1"


def test_a_proxy_is_not_asked_for_loopback(server, project, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert push(server, project).tag == "v1"


def test_xet_is_off_for_loopback_only(server, project, monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert push(server, project).tag == "v1"
    assert constants.HF_HUB_DISABLE_XET
    Hub("https://huggingface.co", WRITE)
    assert not constants.HF_HUB_DISABLE_XET


def test_offline_a_push_fails_at_once(server, project, monkeypatch):
    hub = connect(server)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailable, match="push needs the hub, and HF_HUB_OFFLINE is set"):
        plan_push(hub, project, "Q4")
    assert sum(server.stats.requests.values()) == 0


def test_the_token_appears_nowhere(server, project, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    errors = []
    for token in (WRITE, READ, STRANGER, UNKNOWN):
        hub = connect(server, token)
        shown = [repr(hub)]
        faults = [
            None,
            Fault("commit", "status", status=400),
            Fault("lfs_put", "status", status=403, times=9),
            Fault("whoami", "status", status=418),
            Fault("tree", "corrupt"),
            Fault("tag", "cut"),
        ]
        for fault in faults:
            if fault:
                server.faults.add(fault)
            try:
                make_variant(project, seed=len(errors))
                plan = plan_push(hub, project, "Q4", overwrite=True)
                shown.append(repr(plan))
                execute(hub, project, plan)
            except PublishError as e:
                errors.append(e)
                shown += ["".join(traceback.format_exception(e)), repr(e.__context__), repr(e.__cause__)]
            server.faults.clear()
        assert not any(token in text for text in shown)
    assert len(errors) > 10
    assert all("\n" not in str(e) and len(str(e)) < 600 for e in errors)
    out = capfd.readouterr()
    for token in (WRITE, READ, STRANGER, UNKNOWN):
        assert token not in out.out + out.err + caplog.text
        for path in (p for p in (tmp_path / "project").rglob("*") if p.is_file()):
            assert token.encode() not in path.read_bytes()


def test_an_endpoint_with_a_password_is_refused():
    with pytest.raises(InputError, match="endpoint"):
        Hub("https://user:secret@example.org", WRITE)


# -- looking --------------------------------------------------------------------------------------------------


def test_the_remote_state_says_what_drifted(server, project):
    hub = connect(server)
    assert remote_state(hub, project, "Q4").state == "not pushed"
    assert remote_state(hub, project, "Q8").state == "not built"
    push(server, project)
    hub = connect(server)
    assert remote_state(hub, project, "Q4").state == "in sync"
    edit_card(project)
    found = remote_state(hub, project, "Q4")
    assert (found.state, found.differences) == ("drifted", ("README.md: differs on the hub",))
    somebody_commits(server, "README.md", b"# Mine\n")
    assert remote_state(hub, project, "Q4").differences == ("README.md: was edited on the hub since the last push",)


def test_the_remote_is_verified_by_hash(server, project):
    assert [c.passed for c in verify_remote(connect(server), project, "Q4")] == [False]
    push(server, project)
    assert all(c.passed for c in verify_remote(connect(server), project, "Q4"))
    somebody_commits(server, "model-00002-of-00002.safetensors", b"\0" * 2536)
    somebody_commits(server, "LICENSE", None)
    somebody_commits(server, "model-extra.safetensors", b"\0" * 10)
    failed = {c.name: c.detail for c in verify_remote(connect(server), project, "Q4") if c.passed is False}
    assert failed == {
        "files present": "LICENSE is missing",
        "files equal": "model-00002-of-00002.safetensors has other content",
        "no other weights": "model-extra.safetensors is not ours",
    }


# -- answers and bugs -----------------------------------------------------------------------------------------


@pytest.fixture
def nonsense():
    """The address of a server that answers every request with an empty JSON object."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("ask", [lambda hub: hub.head(REPO), lambda hub: hub.account(), lambda hub: hub.tags(REPO)])
def test_an_answer_that_is_none_of_a_hub_is_one_line(nonsense, ask):
    with pytest.raises(HubUnavailable, match="gave an answer that is none of a hub"):
        ask(Hub(nonsense, WRITE, patience_s=0.05, pause_s=0.01))


@pytest.mark.parametrize("kind", [KeyError, TypeError, AttributeError, AssertionError, ValueError, RuntimeError])
def test_a_bug_of_ours_is_no_answer_of_the_hub_and_keeps_its_traceback(server, kind, monkeypatch):
    tries = []

    def buggy(*args):
        tries.append(args)
        raise kind("ours")

    hub = connect(server)
    monkeypatch.setitem(buggy.__globals__, "__name__", "publisher.hub")  # a closure of that file
    with pytest.raises(kind, match="ours"):
        hub._call("asking", buggy)
    with pytest.raises(kind, match="ours"):
        hub._call("asking", lambda: (hub._api.whoami(), buggy()))
    assert len(tries) == 2


def test_a_call_of_the_client_with_a_wrong_argument_is_a_bug(server):
    hub = connect(server)
    with pytest.raises(TypeError, match="no_such_argument"):
        hub._call("asking", hub._api.model_info, REPO, no_such_argument=1)


@pytest.mark.parametrize("body", [b"[]", b'{"errors": "x"}', b'{"errors": [1]}'])
def test_a_refused_card_without_a_reason_is_one_line(server, body, monkeypatch):
    answer = httpx2.Response(400, content=body, request=httpx2.Request("POST", server.url))
    monkeypatch.setattr("publisher.hub.get_session", lambda: SimpleNamespace(post=lambda *a, **k: answer))
    with pytest.raises(InputError, match="refuses its metadata: no reason given"):
        connect(server).check_card("---\n---\n")


# -- downloads ------------------------------------------------------------------------------------------------


@pytest.fixture
def base(server, project):
    """A base model on the hub: (hub, commit)."""
    receipt = push(server, project)
    somebody_commits(server, "evil.py", b"print()")
    return connect(server), connect(server).resolve_commit(REPO, "main"), receipt


def test_a_base_is_downloaded_hashed_and_then_found_offline(base, monkeypatch):
    hub, commit, _ = base
    assert cached_snapshot(REPO, commit) is None
    folder = download_base(hub, REPO, commit)
    assert {p.name for p in folder.iterdir()} == FILES - {".gitattributes", "manifest.json"}
    assert set(read_checkpoint(folder).tensors) == set(tensors())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cached_snapshot(REPO, commit) == folder
    assert download_file(hub, REPO, "config.json", commit).name == "config.json"
    with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE"):
        download_base(hub, REPO, commit)


@pytest.mark.parametrize("dangling", [False, True])
def test_half_a_snapshot_is_none(dangling, base):
    hub, commit, _ = base
    folder = download_base(hub, REPO, commit)
    link = folder / "model-00002-of-00002.safetensors"
    (link.resolve() if dangling else link).unlink()
    assert link.is_symlink() == dangling
    assert cached_snapshot(REPO, commit) is None
    assert download_base(hub, REPO, commit) == cached_snapshot(REPO, commit)


def test_a_damaged_download_is_found_and_does_not_stay(server, base):
    hub, commit, _ = base
    server.faults.add(Fault("blob", "corrupt"))
    with pytest.raises(CheckFailed, match="is not what the hub holds; it was removed"):
        download_base(hub, REPO, commit)
    assert cached_snapshot(REPO, commit) is None
    assert download_base(hub, REPO, commit) == cached_snapshot(REPO, commit)


def test_a_download_that_was_killed_before_its_check_is_checked_by_the_next_run(server, base, monkeypatch):
    hub, commit, _ = base
    server.faults.add(Fault("blob", "corrupt"))
    with monkeypatch.context() as patch:
        patch.setattr("publisher.fetch.check_snapshot", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            download_base(hub, REPO, commit)
    assert cached_snapshot(REPO, commit) is None
    assert download_base(hub, REPO, commit) == cached_snapshot(REPO, commit)


def test_a_snapshot_is_hashed_once_and_again_only_when_a_file_was_touched(base, monkeypatch):
    hub, commit, _ = base
    folder = download_base(hub, REPO, commit)
    hashed = []
    check = fetch._check_blob
    monkeypatch.setattr("publisher.fetch._check_blob", lambda path: (hashed.append(path.name), check(path)))
    assert cached_snapshot(REPO, commit) == folder
    assert hashed == []
    blob = (folder / "model-00001-of-00002.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert cached_snapshot(REPO, commit) is None
    assert hashed
    assert not blob.exists()


def test_a_blob_in_the_store_that_repos_share_is_hashed_too(base):
    hub, commit, _ = base
    folder = download_base(hub, REPO, commit)
    blob = (folder / "model-00001-of-00002.safetensors").resolve()
    shared = hub.cache / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    shared.write_bytes(blob.read_bytes())
    blob.unlink()
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    assert cached_snapshot(REPO, commit) == folder
    shared.write_bytes(b"\0" * shared.stat().st_size)
    assert cached_snapshot(REPO, commit) is None
    assert not shared.exists()


def test_a_download_draws_no_bars_of_the_client_and_tells_our_progress(base, monkeypatch, capfd):
    hub, commit, _ = base
    # as if HF_HUB_DISABLE_PROGRESS_BARS were not set, which it is for all tests
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr("publisher.fetch.LARGE_BYTES", 2000)
    told = []
    download_base(hub, REPO, commit, lambda what, done, total: told.append((what, done, total)))
    assert capfd.readouterr().err == ""
    size = sum(
        f.size for path, f in hub.tree(REPO, commit).items() if path in FILES - {".gitattributes", "manifest.json"}
    )
    assert [(w, t) for w, _, t in told] == [
        ("downloading LICENSE and 4 more", size),
        ("downloading model-00001-of-00002.safetensors and 1 more", size),
        ("checking what arrived", size),
    ]
    assert [d for _, d, _ in told] == sorted(d for _, d, _ in told)


def test_a_download_that_does_not_fit_the_disk_does_not_start(server, base, monkeypatch):
    hub, commit, _ = base
    need = download_size(hub, REPO, commit)
    assert need == sum(
        f.size for p, f in hub.tree(REPO, commit).items() if p in FILES - {".gitattributes", "manifest.json"}
    )
    free = SimpleNamespace(free=need - 1)
    monkeypatch.setattr("publisher.fetch.shutil.disk_usage", lambda path: free)
    server.stats.reset()
    with pytest.raises(ResourceError, match=r"disk: \S+ kB needed at .*, \S+ kB free"):
        download_base(hub, REPO, commit)
    assert server.stats.requests["blob"] == 0
    free.free = need
    download_base(hub, REPO, commit)
    assert download_size(hub, REPO, commit) == 0


def test_what_a_build_needs_is_added_up_by_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("publisher.fetch.shutil.disk_usage", lambda path: SimpleNamespace(free=int(5e9)))
    check_disk({tmp_path / "cache": int(3e9), tmp_path / "out" / "staging": int(2e9)})
    with pytest.raises(ResourceError, match=r"disk: 6\.00 GB needed at .*, 5\.00 GB free"):
        check_disk({tmp_path / "cache": int(3e9), tmp_path / "out" / "staging": int(3e9)})


def test_a_file_that_is_not_there_is_one_line(base):
    hub, commit, _ = base
    with pytest.raises(InputError, match=r"downloading imatrix\.gguf of .* not found"):
        download_file(hub, REPO, "imatrix.gguf", commit)
    with pytest.raises(InputError, match="not found"):
        hub.resolve_commit(REPO, "no-such-branch")


def test_headers_alone_read_like_the_checkpoint(server, base, tmp_path):
    hub, commit, _ = base
    server.stats.reset()
    folder = remote_headers(hub, REPO, commit, tmp_path / "headers" / "x")
    found = read_checkpoint(folder)
    assert {n: (t.dtype, t.shape) for n, t in found.tensors.items()} == {
        n: (d, a.shape) for n, (d, a) in tensors().items()
    }
    assert json.loads((folder / "config.json").read_text())["quantization"] == quantization()
    assert (folder / "README.md").is_file()
    assert set(MODULES) <= {n.rsplit(".", 1)[0] for n in found.tensors}


def test_headers_of_a_large_shard_cost_only_the_header(server, tmp_path):
    header = json.dumps({"w": {"dtype": "U8", "shape": [4_000_000], "data_offsets": [0, 4_000_000]}}).encode()
    client = api(server)
    client.create_repo("acme/big")
    files = {"config.json": b"{}", "model.safetensors": len(header).to_bytes(8, "little") + header + bytes(4_000_000)}
    client.create_commit("acme/big", [CommitOperationAdd(p, d) for p, d in files.items()], commit_message="x")
    hub = connect(server)
    server.stats.reset()
    folder = remote_headers(hub, "acme/big", hub.resolve_commit("acme/big", "main"), tmp_path / "headers")
    assert read_checkpoint(folder).tensors["w"].shape == (4_000_000,)
    assert server.stats.sent["blob"] <= 256 << 10
    assert (folder / "model.safetensors").stat().st_blocks * 512 < 100_000


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.txt": b"x"}, "no config.json"),
        ({"config.json": b"{}"}, "0 safetensors files"),
        ({"config.json": b"{}", "model.safetensors": b"\xff" * 64}, "does not fit the file"),
        ({"config.json": b"{}", "model.safetensors": b"\xff" * 5}, "expected a safetensors file"),
        ({"config.json": b"{}", INDEX: b'{"weight_map": {"a": "../x.safetensors"}}'}, "is no name of"),
        ({"config.json": b"{}", INDEX: b'{"weight_map": {"a": "y.safetensors"}}'}, "does not hold"),
        ({"config.json": b"{}", INDEX: b"[]"}, "holds no weight_map"),
    ],
)  # fmt: skip
def test_a_repo_that_is_no_checkpoint_is_refused(server, tmp_path, files, message):
    client = api(server)
    client.create_repo("acme/odd")
    client.create_commit("acme/odd", [CommitOperationAdd(p, d) for p, d in files.items()], commit_message="x")
    hub = connect(server)
    with pytest.raises(InputError, match=message):
        remote_headers(hub, "acme/odd", hub.resolve_commit("acme/odd", "main"), tmp_path / "h" / "x")
    assert list((tmp_path / "h").iterdir()) == [] if (tmp_path / "h").exists() else True
