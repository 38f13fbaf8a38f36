"""Discussions and pull requests. Kept in `repo.json`, so that a push to a pull request is one replacement too."""

from __future__ import annotations

import hashlib
from typing import Any

from starlette.responses import JSONResponse, Response

from publisher.localhub.store import PR_REF, Commit, Repo, Store, Tree, now
from publisher.localhub.web import JSON_BYTES, Call, HubError, field, parse_object

TITLE_CHARS = (3, 200)
TEXT_CHARS = 64_000
PAGE = 50


async def create(call: Call) -> Response:
    """POST .../discussions. A pull request starts as a draft on main, with no commit of its own."""
    body = await call.json()
    repo = call.repo()
    user = call.need_role()
    title, text = _title(body), _text(body, "description")
    if field(body, "pullRequest", bool, default=False):
        opened = open_pull(repo, title, text, user.name, "main", repo.heads["main"], status="draft")
    else:
        opened = _open(repo, title, text, user.name, {"isPullRequest": False, "status": "open"})
    call.hub.store.save(repo)
    return JSONResponse({"num": opened["num"], "pullRequest": opened["isPullRequest"]})


async def listed(call: Call) -> Response:
    """GET .../discussions?p=&type=&status=&author=."""
    repo = call.repo()
    query = call.request.query_params
    kind, status, author = query.get("type", "all"), query.get("status", "all"), query.get("author")
    found = [
        _head(repo, d)
        for d in reversed(repo.discussions)
        if (kind == "all" or d["isPullRequest"] == (kind == "pull_request"))
        and (status == "all" or (d["status"] in ("open", "draft")) == (status == "open"))
        and author in (None, d["author"]["name"])
    ]
    page = query.get("p", "0")
    start = PAGE * (int(page) if page.isdecimal() and len(page) < 9 else 0)
    return JSONResponse({"discussions": found[start : start + PAGE], "count": len(found), "start": start})


async def details(call: Call) -> Response:
    """GET .../discussions/N?diff=1. The diff names the changed files only."""
    repo, discussion = _find(call)
    value = _head(repo, discussion) | {"events": discussion["events"]}
    if discussion["isPullRequest"]:
        value["changes"] = {
            "base": f"refs/heads/{discussion['base']}",
            "mergeCommitId": discussion["mergeCommitId"],
        }
        changed, conflicts = _compare(call.hub.store, repo, discussion)
        value["filesWithConflicts"] = conflicts
        value["diff"] = "".join(f"diff --git a/{path} b/{path}\n" for path in changed)
    return JSONResponse(value)


async def comment(call: Call) -> Response:
    body = await call.json()
    repo, discussion = _find(call)
    user = call.need_role()
    event = _comment(discussion, user.name, _text(body, "comment"))
    call.hub.store.save(repo)
    return JSONResponse({"newMessage": event})


async def status(call: Call) -> Response:
    body = await call.json()
    repo, discussion = _find(call)
    user = call.need_write(repo.namespace)
    new = field(body, "status", str)
    if new not in ("open", "closed"):
        raise HubError(400, '"status" must be open or closed')
    if discussion["status"] == "merged":
        raise HubError(403, "a merged pull request cannot be reopened or closed")
    event = _change_status(discussion, user.name, new)
    call.hub.store.save(repo)
    return JSONResponse({"newStatus": event})


async def merge(call: Call) -> Response:
    """POST .../discussions/N/merge: one commit on the base branch with what the pull request changed."""
    raw = await call.body(JSON_BYTES)
    body = parse_object(raw, "body") if raw.strip() else {}
    repo, pull = _find(call)
    user = call.need_write(repo.namespace)
    if not pull["isPullRequest"] or pull["status"] not in ("open", "draft"):
        raise HubError(
            403,
            f"nothing to merge: {'pull request' if pull['isPullRequest'] else 'discussion'} "
            f"{pull['num']} is {pull['status']}",
        )
    changed, conflicts = _compare(call.hub.store, repo, pull)
    if conflicts:
        raise HubError(409, f"conflicts with {pull['base']}: {', '.join(conflicts[:5])}")
    base = call.commit(repo, f"refs/heads/{pull['base']}")
    tree = _merged(base.tree, call.commit(repo, pull["head"]).tree, changed)
    title = f"{pull['title']} (#{pull['num']})"
    new = call.hub.store.add_commit(repo, base.oid, tree, title, "", user.name)
    repo.heads[pull["base"]] = new.oid
    pull["mergeCommitId"] = new.oid
    if body.get("comment"):
        _comment(pull, user.name, _text(body, "comment"))
    _change_status(pull, user.name, "merged")
    call.hub.store.save(repo)
    return JSONResponse({"mergeCommitId": new.oid})


# -- used by commits ------------------------------------------------------------------------------------------


def open_pull(repo: Repo, title: str, text: str, author: str, base: str, base_oid: str, status: str) -> dict[str, Any]:
    """A new pull request whose head is still its base. The caller saves the repo."""
    pull = {"isPullRequest": True, "status": status, "base": base, "base_oid": base_oid, "head": base_oid}
    return _open(repo, title[: TITLE_CHARS[1]], text, author, pull | {"mergeCommitId": None})


def pushed(pull: dict[str, Any], commit: Commit) -> None:
    pull["head"] = commit.oid
    _add_event(pull, "commit", commit.author, {"subject": commit.title, "oid": commit.oid})


def pull_of(repo: Repo, rev: str) -> dict[str, Any] | None:
    """The pull request that `refs/pr/N` is the head of."""
    match = PR_REF.fullmatch(rev)
    discussion = repo.discussion(int(match[1])) if match else None
    return discussion if discussion and discussion["isPullRequest"] else None


# -- parts ----------------------------------------------------------------------------------------------------


def _open(repo: Repo, title: str, text: str, author: str, rest: dict[str, Any]) -> dict[str, Any]:
    num = len(repo.discussions) + 1
    head = {"num": num, "title": title, "author": {"name": author}, "createdAt": now(), "events": []}
    discussion = head | rest
    _comment(discussion, author, text)
    repo.discussions.append(discussion)
    return discussion


def _find(call: Call) -> tuple[Repo, dict[str, Any]]:
    repo = call.repo()
    discussion = repo.discussion(int(call.args["num"]))
    if discussion is None:
        raise HubError(404, f"Discussion {call.args['num']} not found")
    return repo, discussion


def _head(repo: Repo, discussion: dict[str, Any]) -> dict[str, Any]:
    keys = ("num", "title", "author", "createdAt", "status", "isPullRequest")
    return {key: discussion[key] for key in keys} | {"repo": {"name": repo.id, "type": repo.kind[:-1]}}


def _title(body: dict[str, Any]) -> str:
    title = field(body, "title", str).strip()
    if not TITLE_CHARS[0] <= len(title) <= TITLE_CHARS[1]:
        raise HubError(400, f"a title has {TITLE_CHARS[0]} to {TITLE_CHARS[1]} characters")
    return title


def _text(body: dict[str, Any], key: str) -> str:
    text = field(body, key, str, default="")
    if len(text) > TEXT_CHARS:
        raise HubError(400, f'"{key}" is longer than {TEXT_CHARS} characters')
    return text


def _comment(discussion: dict[str, Any], author: str, text: str) -> dict[str, Any]:
    latest = {"raw": text, "html": "", "updatedAt": now(), "author": {"name": author}}
    return _add_event(discussion, "comment", author, {"edited": False, "hidden": False, "latest": latest})


def _change_status(discussion: dict[str, Any], author: str, new: str) -> dict[str, Any]:
    discussion["status"] = new
    return _add_event(discussion, "status-change", author, {"status": new})


def _add_event(discussion: dict[str, Any], kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
    event_id = hashlib.sha1(f"{discussion['createdAt']}/{len(discussion['events'])}".encode()).hexdigest()[:24]
    event = {"id": event_id, "type": kind, "author": {"name": author}, "createdAt": now(), "data": data}
    discussion["events"].append(event)
    return event


def _compare(store: Store, repo: Repo, pull: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(paths the pull request changed, those of them its base branch has changed otherwise since)."""
    start = store.commit(repo, pull["base_oid"]).tree
    ours = store.commit(repo, pull["head"]).tree
    # After the merge, or with the base branch gone, there is nothing left to conflict with.
    base_oid = repo.heads.get(pull["base"]) if pull["status"] in ("open", "draft") else None
    base = store.commit(repo, base_oid).tree if base_oid else start
    changed = sorted(path for path in start.keys() | ours.keys() if start.get(path) != ours.get(path))
    conflicts = [path for path in changed if base.get(path) not in (start.get(path), ours.get(path))]
    return changed, conflicts


def _merged(base: Tree, ours: Tree, changed: list[str]) -> Tree:
    tree = {path: file for path, file in base.items() if path not in set(changed)}
    return tree | {path: ours[path] for path in changed if path in ours}
