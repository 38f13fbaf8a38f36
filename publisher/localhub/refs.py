"""A repository's history: branches, tags, commits; squashing it."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from publisher.localhub.attributes import DEFAULT_GITATTRIBUTES
from publisher.localhub.web import Call, HubError, field, ref_name

COMMITS_PAGE = 100


async def refs(call: Call) -> Response:
    repo = call.repo()

    def listed(prefix: str, names: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in names.items()]

    value = {
        "branches": listed("refs/heads/", repo.heads),
        "converts": [],
        "tags": listed("refs/tags/", repo.tags),
    }
    if call.request.query_params.get("include_prs") == "1":
        pulls = {str(d["num"]): d["head"] for d in repo.discussions if d["isPullRequest"]}
        value["pullRequests"] = listed("refs/pr/", pulls)
    return JSONResponse(value)


async def commits(call: Call) -> Response:
    """GET .../commits/REV?limit=: newest first."""
    repo = call.repo()
    history = call.hub.store.history(repo, call.commit(repo).oid)
    page, headers = call.page(history, COMMITS_PAGE)
    value = [
        {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
        for c in page
    ]
    return JSONResponse(value, headers=headers | {"X-Total-Count": str(len(history))})


async def create_tag(call: Call) -> Response:
    body = await call.json()
    repo = call.repo(write=True)
    tag = ref_name(field(body, "tag", str), "tag")
    target = call.commit(repo).oid
    if tag in repo.tags:
        raise HubError(409, f"Tag {tag!r} already exists")
    repo.tags[tag] = target
    call.hub.store.save(repo)
    return JSONResponse({"tag": tag, "targetCommit": target})


async def delete_tag(call: Call) -> Response:
    repo = call.repo(write=True)
    if repo.tags.pop(call.args["rev"], None) is None:
        raise HubError(404, f"Tag {call.args['rev']!r} does not exist", "RevisionNotFound")
    call.hub.store.save(repo)
    return JSONResponse({})


async def create_branch(call: Call) -> Response:
    body = await call.json()
    repo = call.repo(write=True)
    user = call.need_user()
    name = ref_name(call.args["rev"], "branch")
    if name in repo.heads and not field(body, "overwrite", bool, default=False):
        raise HubError(409, f"Reference already exists: refs/heads/{name}")
    if field(body, "emptyBranch", bool, default=False):
        tree = {".gitattributes": call.hub.store.add_blob(DEFAULT_GITATTRIBUTES.encode())}
        start = call.hub.store.add_commit(repo, None, tree, "initial commit", "", user.name).oid
    else:
        start = call.commit(repo, field(body, "startingPoint", str, default="main")).oid
    repo.heads[name] = start
    call.hub.store.save(repo)
    return JSONResponse({})


async def delete_branch(call: Call) -> Response:
    repo = call.repo(write=True)
    name = call.args["rev"]
    if name == "main":
        raise HubError(403, "main cannot be deleted")
    if repo.heads.pop(name, None) is None:
        raise HubError(404, f"Branch {name!r} does not exist", "RevisionNotFound")
    call.hub.store.save(repo)
    return JSONResponse({})


async def super_squash(call: Call) -> Response:
    """POST .../super-squash/BRANCH: the branch becomes one commit without a parent. The old ones stay, unnamed."""
    body = await call.json()
    repo = call.repo(write=True)
    user, name = call.need_user(), call.args["rev"].removeprefix("refs/heads/")
    if name not in repo.heads:
        raise HubError(404, f"Branch {name!r} does not exist", "RevisionNotFound")
    message = field(body, "message", str, default="") or f"Super-squash branch '{name}'"
    tree = call.commit(repo, f"refs/heads/{name}").tree
    repo.heads[name] = call.hub.store.add_commit(repo, None, tree, message[:1000], "", user.name).oid
    call.hub.store.save(repo)
    return JSONResponse({})
