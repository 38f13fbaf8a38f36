"""Preupload and commit: how a push changes a repository.

`preupload` says for each file whether it goes to LFS and what is there now (so that the client can leave out what
has not changed). `commit` takes newline-delimited JSON: a header, then one operation a line, all applied or none.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from publisher.localhub import discussions, frontmatter
from publisher.localhub.attributes import REGULAR_BYTES, cover, is_ignored, upload_mode
from publisher.localhub.repos import repo_url
from publisher.localhub.store import COMMIT_ID, PR_REF, SHA256, Commit, File, Repo, Store, Tree
from publisher.localhub.web import Call, HubError, User, decoded, field, parse_object, path_in_repo

COMMIT_BYTES = 256 << 20  # of one commit's body; its regular files come in it as base64
COMMIT_OPERATIONS = 25_000  # the Hub's advice is to stay far below this
PREUPLOAD_FILES = 1000
CONFLICT = "A commit has happened since. Please refresh and try again."


async def preupload(call: Call) -> Response:
    repo = call.repo()
    commit = call.commit(repo)
    need_push_right(call, repo, wants_pr(call))
    body = await call.json()
    gitattributes = field(body, "gitAttributes", str, default=_text(call.hub.store, commit.tree, ".gitattributes"))
    gitignore = field(body, "gitIgnore", str, default=_text(call.hub.store, commit.tree, ".gitignore"))
    files = field(body, "files", list)
    if len(files) > PREUPLOAD_FILES:
        raise HubError(413, f"more than {PREUPLOAD_FILES} files")
    answers = []
    for item in files:
        if not isinstance(item, dict):
            raise HubError(400, "a file must be a JSON object")
        path = path_in_repo(field(item, "path", str))
        sample = decoded(field(item, "sample", str, default=""), "base64")
        mode = upload_mode(path, field(item, "size", int), sample, gitattributes)
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": is_ignored(path, gitignore)}
        if path in commit.tree:
            answer["oid"] = commit.tree[path].etag
        answers.append(answer)
    return JSONResponse({"files": answers, "commitOid": commit.oid})


async def commit(call: Call) -> Response:
    repo = call.repo()
    user = need_push_right(call, repo, wants_pr(call))
    raw = await call.body(COMMIT_BYTES)
    # Read the repository again: others were served while the body came in. From here to the save nothing awaits.
    repo = call.repo()
    rev = call.args["rev"]
    ignores_parent = call.request.scope.get("localhub.ignore_parent", False)
    if ignores_parent or call.request.scope.get("localhub.stale_head"):
        _somebody_else_pushes(call, repo, rev)
    head = call.commit(repo)
    header, operations = _parse(raw)
    parent = header.get("parentCommit")
    if parent is not None:
        if not isinstance(parent, str) or not COMMIT_ID.fullmatch(parent):
            raise HubError(400, '"parentCommit" must be a full commit id')
        if parent != head.oid and not ignores_parent:
            raise HubError(412, CONFLICT)
    title = field(header, "summary", str)
    message = field(header, "description", str, default="")
    if not title.strip() or len(title) > 1000 or len(message) > 64_000:
        raise HubError(400, '"summary" must have 1 to 1000 characters, "description" at most 64000')
    if not wants_pr(call):
        _need_open_ref(repo, rev)
    elif rev not in repo.heads:
        raise HubError(400, "a pull request must be based on a branch")

    tree = apply(call.hub.store, head.tree, operations)
    new = call.hub.store.add_commit(repo, head.oid, tree, title, message, user.name)
    url = repo_url(call, repo.kind, repo.id)
    answer = {"success": True, "commitUrl": f"{url}/commit/{new.oid}", "commitOid": new.oid, "hookOutput": ""}
    if wants_pr(call):
        opened = discussions.open_pull(repo, title, message, user.name, base=rev, base_oid=head.oid, status="open")
        discussions.pushed(opened, new)
        answer["pullRequestUrl"] = f"{url}/discussions/{opened['num']}"
    else:
        _advance(repo, rev, new)
    call.hub.store.save(repo)
    return JSONResponse(answer)


def apply(store: Store, old: Tree, operations: list[tuple[str, dict[str, Any]]]) -> Tree:
    """The tree after all operations. Raises HubError for the first one that cannot be done."""
    tree = dict(old)
    for kind, value in operations:
        path = path_in_repo(
            field(value, "path", str).rstrip("/") if kind == "deletedFolder" else field(value, "path", str)
        )
        if kind == "file":
            data = decoded(field(value, "content", str), field(value, "encoding", str, default="utf-8"))
            if len(data) > REGULAR_BYTES:
                raise HubError(400, f"{path}: larger than {REGULAR_BYTES} bytes, must be uploaded as LFS")
            tree[path] = store.add_blob(data)
        elif kind == "lfsFile":
            tree[path] = _stored(store, path, value)
        elif kind == "deletedFile":
            if tree.pop(path, None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif kind == "deletedFolder":
            inside = [name for name in tree if name.startswith(f"{path}/")]
            if not inside:
                raise HubError(404, f"A file with this name doesn't exist: {path}/", "EntryNotFound")
            for name in inside:
                del tree[name]
        else:
            raise HubError(400, f"unknown operation {kind[:50]!r}")
    _check(store, old, tree)
    covered = cover(tree, _text(store, tree, ".gitattributes"))
    if covered:
        tree[".gitattributes"] = store.add_blob(covered.encode())
    return tree


def _stored(store: Store, path: str, value: dict[str, Any]) -> File:
    oid = field(value, "oid", str)
    if field(value, "algo", str, default="sha256") != "sha256" or not SHA256.fullmatch(oid):
        raise HubError(400, f"{path}: an LFS file needs a sha256")
    file = store.lfs_file(oid)
    if file is None:
        raise HubError(400, f"{path}: LFS object {oid} has not been uploaded")
    if value.get("size") is not None and field(value, "size", int) != file.size:
        raise HubError(400, f"{path}: LFS object {oid} has {file.size} bytes, not {value['size']}")
    return file


def _check(store: Store, old: Tree, tree: Tree) -> None:
    """No file may also be a folder, and a changed README must have metadata the Hub accepts."""
    for path in tree:
        parts = path.split("/")
        for n in range(1, len(parts)):
            if "/".join(parts[:n]) in tree:
                raise HubError(400, f"{path}: {'/'.join(parts[:n])} is a file")
    if tree.get("README.md") != old.get("README.md"):
        errors = frontmatter.read(_text(store, tree, "README.md"))[1]
        if errors:
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")


def _parse(raw: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """The header's value, and (kind, value) of each operation."""
    lines = [line for line in raw.split(b"\n") if line.strip()]
    if len(lines) > COMMIT_OPERATIONS:
        raise HubError(413, f"more than {COMMIT_OPERATIONS} operations in one commit")
    items = []
    for n, line in enumerate(lines, start=1):
        item = parse_object(line, f"line {n}")
        items.append((field(item, "key", str), field(item, "value", dict)))
    if not items or items[0][0] != "header":
        raise HubError(400, "the first line must be the header")
    return items[0][1], items[1:]


def _text(store: Store, tree: Tree, path: str) -> str:
    file = tree.get(path)
    if file is None or file.sha256:
        return ""
    return store.path_of(file).read_bytes().decode("utf-8", "replace")


def wants_pr(call: Call) -> bool:
    return call.request.query_params.get("create_pr", "") in ("1", "true", "True")


def need_push_right(call: Call, repo: Repo, create_pr: bool) -> User:
    """Anyone with a write token may open a pull request and push to their own; a branch needs its namespace."""
    user = call.need_role()
    pull = discussions.pull_of(repo, call.args["rev"])
    if create_pr or (pull and pull["author"]["name"] == user.name):
        return user
    return call.need_write(repo.namespace)


def _need_open_ref(repo: Repo, rev: str) -> None:
    """Only a branch or an open pull request moves; a tag or a commit id is a fixed point."""
    pull = discussions.pull_of(repo, rev)
    if pull and pull["status"] not in ("open", "draft"):
        raise HubError(403, f"pull request {pull['num']} is {pull['status']}")
    if pull is None and _branch(rev) not in repo.heads:
        raise HubError(400, f"{rev}: commits go to a branch or a pull request")


def _advance(repo: Repo, rev: str, new: Commit) -> None:
    pull = discussions.pull_of(repo, rev)
    if pull:
        discussions.pushed(pull, new)
    else:
        repo.heads[_branch(rev)] = new.oid


def _branch(rev: str) -> str:
    return rev.removeprefix("refs/heads/")


def _somebody_else_pushes(call: Call, repo: Repo, rev: str) -> None:
    """Faults `stale_head` and `ignore_parent`: a small file lands first."""
    head = call.commit(repo)
    file = call.hub.store.add_blob(f"pushed by somebody else on top of {head.oid}\n".encode())
    tree = head.tree | {"somebody-else.txt": file}
    if PR_REF.fullmatch(rev) or _branch(rev) in repo.heads:
        _advance(repo, rev, call.hub.store.add_commit(repo, head.oid, tree, "another push", "", "somebody-else"))
        call.hub.store.save(repo)
