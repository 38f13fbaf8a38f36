"""The hub in a browser, so that a rehearsed release can be looked at before the real one.

Addresses are the Hub's own: /NS/NAME is the card, and tree, blob, commits, commit and discussions are below it. What is
pushed is untrusted: templates escape all of it, a card is sanitised (`pages_card.py`), and the policy below lets a page
load nothing but this hub's images and its one style sheet, and run nothing at all. There are no cookies and no forms.

A private repository is on no page for a caller without its token, and browsers send none: it is absent, as in the API. A
gated one shows its card and what it holds, and nothing of its other files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, HTMLResponse, Response

from publisher.localhub import collections, frontmatter, pages_view
from publisher.localhub.pages_card import Rendered, render
from publisher.localhub.pages_links import Links, image_type, view_path
from publisher.localhub.store import NAME, Commit, Repo
from publisher.localhub.web import Call, HubError, path_in_repo

NOTICE = "This is a rehearsal hub on this machine, not huggingface.co."
HTML = Path(__file__).parent / "html"
ASSETS = {"hub.css": "text/css", "icon.svg": "image/svg+xml"}
PAGE_POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "sandbox allow-same-origin allow-downloads allow-popups allow-popups-to-escape-sandbox "
    "allow-top-navigation-by-user-activation"
)
# For all that is not a page. An SVG may be opened by itself: it has its styles, and runs and loads nothing.
FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"
# Of every answer: another site's page can neither read nor show what is here.
HEADERS = {
    "Content-Security-Policy": FILE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
TEXT_BYTES = 256 << 10  # of a file shown as text
TEMPLATES = Environment(
    loader=FileSystemLoader(HTML), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
TEMPLATES.filters |= {"size": pages_view.size, "date": pages_view.date, "quoted": lambda text: quote(text, safe="")}


async def index(call: Call) -> Response:
    rows = pages_view.repos(call)
    return _page(
        "index.html.j2",
        "All repositories",
        rows=rows,
        collections=collections.readable(call),
        owner=None,
        url=call.hub.hub_origin,
    )


async def owner(call: Call) -> Response:
    name = call.args["ns"]
    rows = pages_view.repos(call, name)
    owned = [c for c in collections.readable(call) if c["owner"] == name]
    if not NAME.fullmatch(name) or not (rows or owned):
        raise HubError(404, "nobody of this name has anything here that is not private")
    return _page("index.html.j2", name, rows=rows, collections=owned, owner=name, url=call.hub.hub_origin)


async def repo(call: Call) -> Response:
    """GET /NS/NAME: the card, with what the Hub has around it."""
    repo = call.repo()
    return await _card_page(call, repo, "main", call.commit(repo, "main"))


async def tree(call: Call) -> Response:
    """GET /NS/NAME/tree/REV[/PATH]: files, and the card of that revision below them."""
    repo = call.repo()
    commit, rev = call.commit(repo), call.args["rev"]
    under = path_in_repo(call.args["path"]) if call.args.get("path") else ""
    rows = pages_view.files(repo, rev, commit.tree, under)
    if under and not rows:
        raise HubError(404, f"there is no folder {under} in this revision")
    card = None if under else await _card(call, repo, rev, commit)
    return _page(
        "files.html.j2", f"{repo.id}: files", tab="files", under=under, rows=rows[: pages_view.LISTED], count=len(rows),
        total=pages_view.total(commit.tree.values()), card=card, refs=pages_view.refs(repo),
        **pages_view.frame(call, repo, rev, commit),
    )  # fmt: skip


async def blob(call: Call) -> Response:
    """GET /NS/NAME/blob/REV/PATH: one file, as an image, as rendered Markdown or as text."""
    repo = call.repo()
    commit, rev, path = call.commit(repo), call.args["rev"], call.args["path"]
    file = commit.tree.get(path)
    if file is None:
        raise HubError(404, f"there is no file {path} in this revision")
    if path != "README.md":
        call.need_download(repo)
    text = None if image_type(path) else pages_view.text_of(call, file, TEXT_BYTES)
    card = None
    if text is not None and path.endswith(".md"):
        card = await _card(call, repo, rev, commit, path)
    return _page(
        "file.html.j2", f"{repo.id}: {path}", tab="files", file=file, file_path=path, text=text, card=card,
        image=bool(image_type(path)), download=view_path(repo.kind, repo.id, "resolve", rev, path),
        **pages_view.frame(call, repo, rev, commit),
    )  # fmt: skip


async def commits(call: Call) -> Response:
    repo = call.repo()
    commit, rev = call.commit(repo), call.args["rev"]
    history = call.hub.store.history(repo, commit.oid)
    return _commits_page(call, repo, rev, commit, history, f"{repo.id}: commits")


async def one_commit(call: Call) -> Response:
    """GET /NS/NAME/commit/OID: what it changed."""
    repo = call.repo()
    commit = call.commit(repo)
    return _commits_page(call, repo, call.args["rev"], commit, [commit], f"{repo.id}: {commit.title}")


async def talks(call: Call) -> Response:
    """GET /NS/NAME/discussions: pull requests and discussions, newest first."""
    repo = call.repo()
    commit = call.commit(repo, "main")
    rows = list(reversed(repo.discussions))
    frame = pages_view.frame(call, repo, "main", commit)
    return _page("talks.html.j2", f"{repo.id}: pull requests", tab="talks", rows=rows, **frame)


async def talk(call: Call) -> Response:
    """GET /NS/NAME/discussions/N: what was said, and what a pull request would change."""
    repo = call.repo()
    found = repo.discussion(int(call.args["num"]))
    if found is None:
        raise HubError(404, f"there is no pull request or discussion {call.args['num']}")
    store, commit, changes, rev = call.hub.store, call.commit(repo, "main"), [], "main"
    if found["isPullRequest"]:
        rev = f"refs/pr/{found['num']}"
        changes = pages_view.changes(store.commit(repo, found["base_oid"]).tree, store.commit(repo, found["head"]).tree)
    told = []
    for event in found["events"]:
        if event["type"] == "comment" and event["data"]["latest"]["raw"].strip():
            shown = await run_in_threadpool(render, event["data"]["latest"]["raw"], _links(call, repo, rev, commit, ""))
            told.append((event, Markup(shown.html)))
        elif event["type"] != "comment":
            told.append((event, None))
    return _page(
        "talk.html.j2", f"{repo.id}: {found['title']}", tab="talks", talk=found, told=told, changes=changes,
        card_path=view_path(repo.kind, repo.id, "tree", rev), **pages_view.frame(call, repo, "main", commit),
    )  # fmt: skip


async def collection(call: Call) -> Response:
    slug = f"{call.args['ns']}/{call.args['slug']}"
    # Only the id at the end counts, the title may change.
    found = [c for c in collections.readable(call) if c["owner"] == call.args["ns"] and c["slug"][-25:] == slug[-25:]]
    if not found:
        raise HubError(404, "there is no such collection here, or it is private")
    rows = pages_view.collection_rows(call, found[0])
    return _page("collection.html.j2", found[0]["title"], collection=found[0], rows=rows)


async def asset(call: Call) -> Response:
    name = call.args["asset"]
    return FileResponse(HTML / name, media_type=ASSETS[name], headers={"Cache-Control": "no-cache"})


async def image(call: Call) -> Response:
    """GET /-/image/KIND/NS/NAME/REV/PATH: an image of a repository, wherever it is stored, for the pages.

    Not /resolve: what is in LFS is at the blob store's origin and has no name there, so no type either.
    """
    repo = call.repo()
    call.need_download(repo)
    commit = call.commit(repo)
    file, kind = commit.tree.get(call.args["path"]), image_type(call.args["path"])
    if file is None or kind is None:
        raise HubError(404, "Entry not found", "EntryNotFound")
    return FileResponse(call.hub.store.path_of(file), media_type=kind, headers={"Cache-Control": "no-cache"})


def refusal(error: HubError) -> Response:
    """A refusal as a page."""
    status, message = error.status, error.message
    if error.code == "RepoNotFound":
        status, message = 404, "There is no such repository here, or it is private: a browser sends no token."
    return _page("refusal.html.j2", str(status), status=status, message=message)


# -- parts ----------------------------------------------------------------------------------------------------


async def _card_page(call: Call, repo: Repo, rev: str, commit: Commit) -> Response:
    card = await _card(call, repo, rev, commit)
    data = card["data"] if card else {}
    return _page(
        "repo.html.j2", repo.id, tab="card", card=card, labels=pages_view.labels(data),
        rows=pages_view.metadata(call, repo, rev, data, commit.tree), model_tree=pages_view.model_tree(call, repo, data),
        files=pages_view.files(repo, rev, commit.tree), total=pages_view.total(commit.tree.values()),
        refs=pages_view.refs(repo), collections=pages_view.collections_of(call, repo), aside=pages_view.ASIDE,
        **pages_view.frame(call, repo, rev, commit),
    )  # fmt: skip


async def _card(call: Call, repo: Repo, rev: str, commit: Commit, path: str = "README.md") -> dict[str, Any] | None:
    """A Markdown file: safe HTML, its metadata, what is wrong with both. None: there is none that could be shown."""
    text = pages_view.text_of(call, commit.tree.get(path))
    if text is None:
        return None
    data, errors, warnings = frontmatter.read(text)
    links = _links(call, repo, rev, commit, path.rpartition("/")[0])
    # Another thread: a long text takes a second, and clients are served meanwhile.
    shown: Rendered = await run_in_threadpool(render, frontmatter.BLOCK.sub("", text, count=1), links)
    card = {"html": Markup(shown.html), "problems": shown.problems, "outside": shown.outside}
    return card | {"data": data, "errors": errors, "warnings": warnings if path == "README.md" else []}


def _links(call: Call, repo: Repo, rev: str, commit: Commit, folder: str) -> Links:
    return Links(repo.kind, repo.id, rev, commit.tree.keys(), folder, lambda kind, id: pages_view.held(call, kind, id))


def _commits_page(call: Call, repo: Repo, rev: str, at: Commit, shown: list[Commit], title: str) -> Response:
    rows = []
    for commit in shown[: pages_view.LISTED]:
        before = call.hub.store.commit(repo, commit.parent).tree if commit.parent else {}
        tags = [name for name, oid in repo.tags.items() if oid == commit.oid]
        rows.append((commit, pages_view.changes(before, commit.tree), tags))
    frame = pages_view.frame(call, repo, rev, at)
    return _page("commits.html.j2", title, tab="commits", rows=rows, count=len(shown), **frame)


def _page(template: str, title: str, *, status: int = 200, **values: Any) -> Response:
    html = TEMPLATES.get_template(template).render(title=title, notice=NOTICE, status=status, **values)
    headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
    return HTMLResponse(html, status, headers)
