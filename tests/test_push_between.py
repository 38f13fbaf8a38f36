"""A hub that ignores the parent of a commit: what somebody else committed between plan and commit is told, not lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from pushes import REPO, WRITE, api, commits, connect, edit_card, pulls, push, somebody_commits
from variant_folder import CARD, make_variant

from inference.errors import HubUnavailable, RemoteChanged
from publisher.cli import exit_code
from publisher.hub import Hub
from publisher.localhub import Fault
from publisher.push import execute, plan_push, remote_state
from publisher.schema import Receipt
from publisher.store import read_model

pytestmark = pytest.mark.usefixtures("own_home")
THEIRS = CARD.format(id="Q4").encode() + b"\nWritten by a reader.\n"
BLIND = Fault("commit", "ignore_parent")  # a commit of somebody-else.txt lands first, too


class Meanwhile:
    """A push's progress, during which somebody commits, after the head was read for the last time."""

    def __init__(self, server, revision="main", **files: bytes | None) -> None:
        self.server, self.revision, self.files, self.made = server, revision, files, []

    def __call__(self, what: str, done: int, total: int) -> None:
        if what == "committing" and not self.made:
            for path, text in self.files.items():
                self.made.append(somebody_commits(self.server, path.replace("__", "."), text, self.revision))
            self.server.faults.add(BLIND)


def receipt_of(project):
    return read_model(project.store.receipt("Q4"), Receipt)


def refused(server, project, meanwhile=None, **options) -> str:
    with pytest.raises(RemoteChanged) as e:
        push(server, project, progress=meanwhile, **options)
    assert exit_code(e.value) == 4
    return str(e.value)


@pytest.fixture
def replaced(server, project):
    """A push that replaced what a reader wrote; (the reader's commit, ours, what was told)."""
    push(server, project)
    edit_card(project)
    meanwhile = Meanwhile(server, README__md=THEIRS)
    told = refused(server, project, meanwhile)
    return meanwhile.made[0], api(server).list_repo_commits(REPO)[0].commit_id, told


def test_an_edit_that_a_hub_let_us_replace_is_shown_and_not_committed_over_again(server, project, replaced):
    theirs, ours, told = replaced
    line, *diff = told.splitlines()
    assert f'{REPO}: committed as {ours[:8]}, but the hub put it on top of {theirs[:8]} "by hand: README.md"' in line
    assert '"another push" by somebody-else' in line
    assert "replaced their README.md and kept their somebody-else.txt" in line
    assert "+Written by a reader." in diff
    assert commits(server) == ["Q4: update card", "another push", "by hand: README.md", *commits(server)[3:]]
    assert len(commits(server)) == 5, "no second commit of ours"
    receipt = receipt_of(project)
    assert receipt.commit == ours
    assert [(f.path, f.commit) for f in receipt.replaced] == [("README.md", theirs)]
    assert f"it is still in {theirs[:8]}: take over what is to stay, then push with --overwrite" in line


def test_the_push_after_it_stops_until_it_is_told_to_leave_it_so(server, project, replaced):
    theirs, ours, _ = replaced
    said = f"README.md was changed on the hub in commit {theirs[:8]}, which the last push replaced without knowing it"
    for _ in range(2):
        told = refused(server, project)
        assert said in told
        assert "+Written by a reader." in told
    assert remote_state(connect(server), project, "Q4").state == "drifted"
    edit_card(project, "\nNot theirs.\n")
    assert said in refused(server, project), "nor is another card put on top"
    make_variant(project)
    edit_card(project)
    server.stats.reset()
    receipt = push(server, project, overwrite=True)
    assert (receipt.commit, receipt.replaced, receipt.tag) == (ours, [], "v1")
    assert server.stats.requests["commit"] == 0
    assert push(server, project) == receipt
    assert remote_state(connect(server), project, "Q4").state == "in sync"


def test_what_was_replaced_may_be_taken_over_here(server, project, replaced):
    (project.store.variant("Q4") / "README.md").write_bytes(THEIRS)
    receipt = push(server, project)
    assert receipt.replaced == []
    assert connect(server).read_range(REPO, receipt.commit, "README.md", 0, 10_000) == THEIRS


def test_what_was_replaced_and_put_back_on_the_hub_is_an_edit_like_any_other(server, project, replaced):
    somebody_commits(server, "README.md", THEIRS)
    assert "README.md was edited on the hub since the last push" in refused(server, project)


def test_a_file_of_others_that_was_kept_stops_once(server, project):
    push(server, project)
    edit_card(project)
    server.faults.add(BLIND)
    told = refused(server, project)
    assert "it kept their somebody-else.txt; run push again to go on" in told
    assert receipt_of(project).replaced == []
    server.stats.reset()
    assert push(server, project).tag == "v1"
    assert server.stats.requests["commit"] == 0


def test_new_weights_get_their_tag_from_the_push_that_goes_on(server, project):
    push(server, project)
    make_variant(project, seed=1)
    server.faults.add(BLIND)
    refused(server, project)
    assert set(connect(server).tags(REPO)) == {"v1"}
    receipt = push(server, project)
    assert connect(server).tags(REPO)["v2"] == receipt.commit


def test_a_deletion_that_was_undone_is_told(server, project):
    push(server, project)
    edit_card(project)
    told = refused(server, project, Meanwhile(server, README__md=None))
    assert "replaced their README.md" in told
    assert "-# " in told


@pytest.mark.parametrize("how", ["lost answer", "history"])
def test_a_push_that_ended_before_it_could_look_is_looked_at_by_the_next(server, project, how, monkeypatch):
    push(server, project)
    edit_card(project)
    hub = connect(server, patience_s=0.1)
    plan = plan_push(hub, project, "Q4")
    if how == "history":
        server.faults.add(Fault("commits", "status", status=500, times=99))
        with pytest.raises(HubUnavailable, match="what it landed on is not known: run push again"):
            execute(hub, project, plan, Meanwhile(server, README__md=THEIRS))
    else:  # killed, as by SIGKILL
        monkeypatch.setattr("publisher.push._look", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute(hub, project, plan, Meanwhile(server, README__md=THEIRS))
        monkeypatch.undo()
    server.faults.clear()
    assert receipt_of(project).commit != commits(server)[0]
    assert "replaced their README.md" in refused(server, project)
    assert len(commits(server)) == 5


def test_a_proposal_that_landed_on_somebody_elses_is_told_too(server, project):
    push(server, project)
    edit_card(project)
    told = refused(server, project, Meanwhile(server, "refs/pr/1", README__md=THEIRS), create_pr=True)
    assert "replaced their README.md" in told
    assert receipt_of(project).replaced == []
    server.stats.reset()
    assert push(server, project, create_pr=True).pull_request == 1, "its reviewers see both"
    assert (pulls(server), server.stats.requests["commit"]) == ([1], 0)


def test_an_ordinary_push_reads_one_page_of_history_and_a_repeated_one_none(server, project):
    push(server, project)
    for n in range(3):
        somebody_commits(server, "notes.txt", b"%d" % n)
    edit_card(project)
    server.stats.reset()
    push(server, project)
    assert server.stats.requests["commits"] == 1
    server.stats.reset()
    push(server, project)
    assert server.stats.requests["commits"] == 0
    project.store.receipt("Q4").unlink()
    push(server, project)
    assert len(commits(server)) == 6


def test_commits_of_other_tools_may_say_anything_of_themselves(server, project, monkeypatch):
    """A push does not fail over them."""
    from publisher import hub as module

    pages = module.paginate

    def odd(*args, **kwargs):
        for item in pages(*args, **kwargs):
            yield {"id": item["id"], "title": None, "authors": [None, {"user": 5}], "date": "never"}

    monkeypatch.setattr(module, "paginate", odd)
    assert push(server, project).tag == "v1"
    edit_card(project)
    told = refused(server, project, Meanwhile(server, README__md=THEIRS))
    assert '"" by somebody' in told
    assert "replaced their README.md" in told


def test_on_the_command_line_it_is_one_line_its_difference_and_exit_4(ladder, publish, hub, monkeypatch):
    run = {"cwd": ladder, "env": {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}}
    ids, repos = ("Q2_K_XL", "Q3_K_XL"), "demo/Qwen3.5-tiny-UD-{}-mlx"
    publish("push", *ids, "--yes", **run).ok()
    path = ladder / "variants.yaml"
    path.write_text(path.read_text() + "card: {intro: Another paragraph under the lead.}\n")
    publish("card", "--all", cwd=ladder).ok()
    commit, mine = Hub.commit, repos.format(ids[0])
    card = Path(HfApi(hub.url, WRITE).hf_hub_download(mine, "README.md")).read_bytes()

    def late(self, repo, *args, **kwargs):
        if repo == mine:
            edited = CommitOperationAdd("README.md", card + b"\nWritten by a reader.\n")
            HfApi(hub.url, WRITE).create_commit(repo, [edited], commit_message="a reader's")
        return commit(self, repo, *args, **kwargs)

    monkeypatch.setattr(Hub, "commit", late)
    hub.faults.add(Fault("commit", "ignore_parent", match=ids[0], nth=2))  # the first one is the reader's
    ran = publish("push", *ids, "--yes", **run)
    line = ran.refused(4)
    assert f"{ids[0]}: {mine}: committed as " in line
    assert '"a reader\'s" by demo' in line
    assert "+Written by a reader." in ran.err
    assert f"{ids[1]}: pushed" in ran.err
    monkeypatch.undo()
    assert f"{ids[0]}: {mine}: README.md was changed on the hub in commit" in publish(
        "push", *ids, "-y", **run
    ).refused(4)
    publish("push", *ids, "--yes", "--overwrite", **run).ok()
    publish("push", *ids, "--yes", **run).ok()
