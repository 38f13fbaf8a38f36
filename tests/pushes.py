"""The built-in hub's accounts, and pushes of the variant of `variant_folder` to it."""

from __future__ import annotations

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from publisher.hub import Hub
from publisher.push import execute, plan_push

WRITE, READ, STRANGER, UNKNOWN = "hf_writeTOKENwrite", "hf_readTOKENread", "hf_strangerTOKEN", "hf_unknownTOKEN"
TOKENS = {WRITE: "write:alice,acme", READ: "read:alice,acme", STRANGER: "write:bob"}
DEMO = {WRITE: "write:demo", STRANGER: "write:bob"}  # of the example's ladder
REPO = "acme/Tiny-1B-UD-Q4-mlx"


def connect(server, token=WRITE, **options):
    return Hub(server.url, token, **{"patience_s": 5, "pause_s": 0.01, **options})


def api(server, token=WRITE):
    return HfApi(endpoint=server.url, token=token)


def push(server, project, id="Q4", token=WRITE, progress=None, **options):
    hub = connect(server, token)
    return execute(hub, project, plan_push(hub, project, id, **options), progress)


def commits(server, revision="main"):
    return [c.title for c in api(server).list_repo_commits(REPO, revision=revision)]


def somebody_commits(server, path, content, revision="main"):
    operation = CommitOperationAdd(path, content) if content is not None else CommitOperationDelete(path)
    return api(server).create_commit(REPO, [operation], commit_message=f"by hand: {path}", revision=revision).oid


def edit_card(project, text="\nA better sentence.\n", id="Q4"):
    with open(project.store.variant(id) / "README.md", "a") as f:
        f.write(text)


def pulls(server):
    return [d.num for d in api(server).get_repo_discussions(REPO) if d.is_pull_request]
