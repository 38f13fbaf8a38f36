"""Repositories as the client sees them: create, settings, info, files. Their history is in `refs.py`."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, urlencode

from starlette.responses import JSONResponse, Response

from publisher.localhub import frontmatter
from publisher.localhub.attributes import DEFAULT_GITATTRIBUTES
from publisher.localhub.store import KINDS, Commit, File, Repo, Tree, dump, is_repo_id, pointer
from publisher.localhub.web import JSON_BYTES, Call, HubError, decoded, field, parse_object, path_in_repo

README_BYTES = 1 << 20
EXPANDED_PAGE = 50  # entries a page with expand=true; the Hub's number


async def whoami(call: Call) -> Response:
    user = call.need_user()
    namespaces = user.namespaces
    if namespaces is None:
        namespaces = {repo.namespace for kind in KINDS for repo in call.hub.store.repos(kind)}
    orgs = [{"type": "org", "name": name, "roleInOrg": user.role} for name in sorted(namespaces - {user.name})]
    token = {"displayName": "local rehearsal hub", "role": user.role}
    auth = {"type": "access_token", "accessToken": token}
    who = {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "isPro": False}
    return JSONResponse(who | {"orgs": orgs, "auth": auth})


async def create(call: Call) -> Response:
    """POST /api/repos/create. A 409 carries the url too: the client's exist_ok reads it there."""
    body = await call.json()
    user = call.need_user()
    kind = _kind(body)
    repo_id = _repo_id(body, user.name)
    call.need_write(repo_id.split("/")[0])
    private = _private(body)
    url = repo_url(call, kind, repo_id)
    if call.hub.store.repo(kind, repo_id):
        raise HubError(409, f"You already created this {kind[:-1]} repo: {repo_id}", url=url)
    tree = {path: call.hub.store.add_blob(data) for path, data in _first_files(body).items()}
    call.hub.store.create_repo(kind, repo_id, bool(private), user.name, tree)
    return JSONResponse({"url": url, "name": repo_id, "id": _object_id(kind + repo_id)})


def _first_files(body: dict[str, Any]) -> dict[str, bytes]:
    """What a new repository holds: `.gitattributes`, and what the npm client may ask for."""
    files = {".gitattributes": DEFAULT_GITATTRIBUTES.encode()}
    if body.get("license") is not None:
        files["README.md"] = f"---\nlicense: {json.dumps(field(body, 'license', str))}\n---\n".encode()
    for item in field(body, "files", list, default=[]):
        if not isinstance(item, dict):
            raise HubError(400, "a file must be a JSON object")
        files[path_in_repo(field(item, "path", str))] = decoded(field(item, "content", str), "base64")
    return files


async def delete(call: Call) -> Response:
    body = await call.json()
    repo_id = _repo_id(body, call.need_user().name)
    call.hub.store.delete_repo(call.repo(write=True, kind=_kind(body), repo_id=repo_id))
    return JSONResponse({})


async def move(call: Call) -> Response:
    body = await call.json()
    kind = _kind(body)
    repo = call.repo(write=True, kind=kind, repo_id=field(body, "fromRepo", str))
    new_id = _check_id(field(body, "toRepo", str))
    call.need_write(new_id.split("/")[0])
    if call.hub.store.repo(kind, new_id):
        raise HubError(409, f"{new_id} already exists")
    call.hub.store.move_repo(repo, new_id)
    return JSONResponse({})


async def settings(call: Call) -> Response:
    body = await call.json()
    repo = call.repo(write=True)
    private = _private(body)
    if private is not None:
        repo.private = private
    if body.get("gated") is not None:
        if body["gated"] not in ("auto", "manual", False):
            raise HubError(400, '"gated" must be auto, manual or false')
        repo.gated = body["gated"]
    call.hub.store.save(repo)
    return JSONResponse({"private": repo.private, "gated": repo.gated})


async def auth_check(call: Call) -> Response:
    call.need_download(call.repo(write="write" in call.args))
    return JSONResponse({"ok": True})


def _kind(body: dict[str, Any]) -> str:
    kind = field(body, "type", str, default="model") + "s"
    if kind not in KINDS:
        raise HubError(400, "invalid repo type")
    return kind


def _repo_id(body: dict[str, Any], user: str) -> str:
    return _check_id(f"{field(body, 'organization', str, default=user)}/{field(body, 'name', str)}")


def _check_id(repo_id: str) -> str:
    if not is_repo_id(repo_id):
        raise HubError(400, f"invalid repository id {repo_id[:100]!r}")
    return repo_id


def _private(body: dict[str, Any]) -> bool | None:
    """`visibility` is what the client of 2.x sends; `private` is what older ones send."""
    if body.get("visibility") is not None:
        if body["visibility"] not in ("public", "private"):
            raise HubError(400, '"visibility" must be public or private')
        return body["visibility"] == "private"
    return None if body.get("private") is None else field(body, "private", bool)


def repo_url(call: Call, kind: str, repo_id: str) -> str:
    prefix = "" if kind == "models" else f"{kind}/"
    return f"{call.hub.hub_origin}/{prefix}{repo_id}"


def _object_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


# -- info -----------------------------------------------------------------------------------------------------


async def list_repos(call: Call) -> Response:
    """GET /api/models?author=&search=&limit=: newest first."""
    query = call.request.query_params
    found = [
        repo
        for repo in call.hub.store.repos(call.kind)
        if call.may_read(repo)
        and query.get("author", repo.namespace) == repo.namespace
        and query.get("search", "").lower() in repo.id.lower()
    ]
    infos = [_info(call, repo, call.commit(repo), blobs=False) for repo in found]
    infos.sort(key=lambda info: info["lastModified"], reverse=True)
    page, headers = call.page(infos)
    return JSONResponse(page, headers=headers)


async def info(call: Call) -> Response:
    """GET /api/models/R[/revision/REV][?blobs=true][?expand=...]."""
    repo = call.repo()
    query = call.request.query_params
    commit = call.commit(repo)
    if call.request.scope.get("localhub.old_head") and commit.parent:  # a fault: a cache that lags behind
        commit = call.hub.store.commit(repo, commit.parent)
    value = _info(call, repo, commit, blobs=query.get("blobs", "").lower() in ("true", "1"))
    expand = query.getlist("expand") + query.getlist("expand[]")
    if expand:
        value = {key: item for key, item in value.items() if key in ("_id", "id", *expand)}
    return JSONResponse(value, headers={"X-Repo-Commit": commit.oid})


def _info(call: Call, repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    card = _card(call, commit)
    tags = card.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    tags += [f"license:{card['license']}"] if "license" in card else []
    value = {
        "_id": _object_id(repo.kind + repo.id),
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": repo.created_at,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "cardData": card,
        "usedStorage": sum({file.etag: file.size for file in commit.tree.values()}.values()),
        "siblings": [_sibling(path, file, blobs) for path, file in sorted(commit.tree.items())],
    }
    if repo.kind == "models":
        value["modelId"] = repo.id
    for key in ("pipeline_tag", "library_name"):
        if key in card:
            value[key] = card[key]
    return value


def _card(call: Call, commit: Commit) -> dict[str, Any]:
    readme = commit.tree.get("README.md")
    if readme is None or readme.sha256 or readme.size > README_BYTES:
        return {}
    text = call.hub.store.path_of(readme).read_bytes().decode("utf-8", "replace")
    return frontmatter.read(text)[0]


def _sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    value: dict[str, Any] = {"rfilename": path}
    if blobs:
        value |= {"size": file.size, "blobId": file.oid}
        if file.sha256:
            value["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": _pointer_size(file)}
    return value


def _pointer_size(file: File) -> int:
    return len(pointer(file.sha256 or "", file.size))


# -- files ----------------------------------------------------------------------------------------------------


async def tree(call: Call) -> Response:
    """GET .../tree/REV[/PATH]?recursive=&expand=, a page at a time; the next page is in the Link header."""
    repo = call.repo()
    commit = call.commit(repo)
    query = call.request.query_params
    expand = query.get("expand", "").lower() in ("true", "1")
    recursive = query.get("recursive", "").lower() in ("true", "1")
    top = path_in_repo(call.args["path"]) if call.args.get("path") else ""
    entries = _entries(commit.tree, top, recursive)
    if top and not entries:
        raise HubError(404, f"{top} does not exist on {call.args['rev']!r}", "EntryNotFound")
    after = query.get("cursor", "")
    rest = [path for path in entries if path > after]
    page = rest[: min(call.hub.page_size, EXPANDED_PAGE) if expand else call.hub.page_size]
    changes = _last_changes(call, repo, commit, page) if expand else {}
    headers = {"X-Repo-Commit": commit.oid}
    if len(page) < len(rest):
        next_query = urlencode({"recursive": recursive, "expand": expand, "cursor": page[-1]})
        # The raw path: a revision may hold an escaped slash.
        raw = call.request.scope["raw_path"].decode("ascii", "replace")
        headers["Link"] = f'<{call.hub.hub_origin}{raw}?{next_query}>; rel="next"'
    return JSONResponse([_entry(call, path, entries[path], changes.get(path)) for path in page], headers=headers)


async def paths_info(call: Call) -> Response:
    """POST .../paths-info/REV, as a form or, from the npm client, as JSON. Paths that do not exist are left out."""
    repo = call.repo()
    commit = call.commit(repo)
    raw = await call.body(JSON_BYTES)
    if call.request.headers.get("content-type", "").startswith("application/json"):
        body = parse_object(raw, "body")
        wanted, expand = field(body, "paths", list), field(body, "expand", bool, default=False)
    else:
        wanted, expand = _form(raw)
    entries = _entries(commit.tree, "", recursive=True)
    paths = [path for path in wanted if isinstance(path, str) and path in entries]
    changes = _last_changes(call, repo, commit, paths) if expand else {}
    return JSONResponse([_entry(call, path, entries[path], changes.get(path)) for path in paths])


def _form(raw: bytes) -> tuple[list[str], bool]:
    try:
        form = parse_qs(raw.decode(), max_num_fields=10_000)
    except ValueError as e:
        raise HubError(400, "body: not a form") from e
    return form.get("paths", []), form.get("expand", [""])[0].lower() in ("true", "1")


def _entries(files: Tree, top: str, recursive: bool) -> dict[str, File | str]:
    """Path → file, or tree id of a folder; sorted by path, what lies under `top` only."""
    prefix = f"{top}/" if top else ""
    folders: dict[str, Tree] = {}
    found: dict[str, File | str] = {}
    for path, file in files.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        if recursive or len(parts) == 1:
            found[path] = file
        for n in range(1, len(parts) if recursive else min(len(parts), 2)):
            folder = prefix + "/".join(parts[:n])
            folders.setdefault(folder, {})[path] = file
    for folder, inside in folders.items():
        found[folder] = hashlib.sha1(dump([[path, file.oid] for path, file in sorted(inside.items())])).hexdigest()
    return dict(sorted(found.items()))


def _entry(call: Call, path: str, item: File | str, change: Commit | None) -> dict[str, Any]:
    if isinstance(item, str):
        value: dict[str, Any] = {"type": "directory", "oid": item, "size": 0, "path": path}
    else:
        value = {"type": "file", "oid": item.oid, "size": item.size, "path": path}
        if item.sha256:
            value["lfs"] = {"oid": item.sha256, "size": item.size, "pointerSize": _pointer_size(item)}
            if xet_hash := call.xet_hash(item):
                value["xetHash"] = xet_hash
    if change:
        value["lastCommit"] = {"id": change.oid, "title": change.title, "date": change.date}
    return value


def _last_changes(call: Call, repo: Repo, commit: Commit, paths: list[str]) -> dict[str, Commit]:
    """The newest commit in which each path became what it is."""
    history = call.hub.store.history(repo, commit.oid)
    listings = [_entries(at.tree, "", recursive=True) for at in history]
    found = {}
    for path in paths:
        same = 0
        while same + 1 < len(history) and listings[same + 1].get(path) == listings[0][path]:
            same += 1
        found[path] = history[same]
    return found
