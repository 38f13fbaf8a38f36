"""The hub in a browser: what there is, as plain HTML. Everything pushed is untrusted and escaped."""

from __future__ import annotations

from html import escape
from urllib.parse import quote

from starlette.responses import HTMLResponse, Response

from publisher.localhub.store import KINDS
from publisher.localhub.web import Call, HubError

BANNER = "This is a local rehearsal hub, not the Hugging Face Hub."
README_BYTES = 1 << 20
STYLE = "body{font:16px/1.5 system-ui;max-width:60em;margin:2em auto;padding:0 1em}pre{white-space:pre-wrap}"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


async def index(call: Call) -> Response:
    repos = [repo for kind in KINDS for repo in call.hub.store.repos(kind) if call.may_read(repo)]
    rows = "".join(f'<li><a href="/{escape(_url(r.kind, r.id))}">{escape(r.id)}</a></li>' for r in repos)
    return _page("Local rehearsal hub", f"<ul>{rows}</ul>" if rows else "<p>No repositories yet.</p>")


async def repo(call: Call) -> Response:
    """GET /NS/NAME: files of main and the README as text. Private repositories need the token here too."""
    repo = call.repo()
    commit = call.commit(repo)
    base = f"/{_url(repo.kind, repo.id)}/resolve/main/"
    rows = "".join(
        f'<li><a href="{escape(base + quote(path))}">{escape(path)}</a> {file.size:,} bytes</li>'
        for path, file in sorted(commit.tree.items())
    )
    readme = commit.tree.get("README.md")
    text = ""
    if readme and not readme.sha256 and readme.size <= README_BYTES:
        text = call.hub.store.path_of(readme).read_bytes().decode("utf-8", "replace")
    head = f"<p>main is {commit.oid}: {escape(commit.title)}</p>"
    return _page(repo.id, f"{head}<h2>Files</h2><ul>{rows}</ul><h2>README.md</h2><pre>{escape(text)}</pre>")


async def nothing(call: Call) -> Response:
    """Calls of the client that a rehearsal needs no answer to (telemetry, agent registry)."""
    return Response('{"standardEnvVars": [], "harnesses": {}}', media_type="application/json")


async def no_xet(call: Call) -> Response:
    call.repo()
    raise HubError(404, "this hub has no Xet storage: set HF_HUB_DISABLE_XET=1")


def _url(kind: str, repo_id: str) -> str:
    return repo_id if kind == "models" else f"{kind}/{repo_id}"


def _page(title: str, body: str) -> Response:
    html = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style><p><strong>{BANNER}</strong></p><h1>{escape(title)}</h1>{body}</html>"
    )
    return HTMLResponse(html, headers=HEADERS)
