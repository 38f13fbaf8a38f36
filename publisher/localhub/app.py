"""The hub as an ASGI app: which request goes to which handler, and the one edge all of them leave by.

Routes are matched on the raw, still escaped path: `refs%2Fpr%2F1` is one segment, a revision with slashes in it.

There are two origins on one port. `127.0.0.1` is the hub. `localhost` is the blob store: it knows no tokens of the hub,
and refuses and counts a request that brings one, so that a client which leaks its token is found out. Xet's CAS is there
too, with tokens of its own.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from publisher.localhub import collections, commits, discussions, frontmatter, lfs, pages, refs, repos, xet
from publisher.localhub.faults import Faults, Stats, counted, suffer
from publisher.localhub.store import Store
from publisher.localhub.web import Call, HubError, User, field
from publisher.localhub.xet_store import XetStore

log = logging.getLogger(__name__)
PATH_BYTES = 8192
Handler = Callable[[Call], Awaitable[Response]]


async def validate_yaml(call: Call) -> Response:
    body = await call.json()
    _, errors, warnings = frontmatter.read(field(body, "content", str))
    answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return JSONResponse(answer, 400 if errors else 200)


async def nothing(call: Call) -> Response:
    """Calls of the client that a rehearsal needs no answer to (telemetry, agent registry)."""
    return Response('{"standardEnvVars": [], "harnesses": {}}', media_type="application/json")


@dataclass(frozen=True)
class Route:
    name: str
    methods: frozenset[str]
    path: re.Pattern[str]
    handler: Handler
    blob_origin: bool = False
    takes_xet_token: bool = False


def _routes() -> tuple[Route, ...]:
    api = r"/api/(?P<kind>models|datasets|spaces)/(?P<ns>[^/]+)/(?P<name>[^/]+)"
    web = r"(?:/(?P<kind>datasets|spaces))?/(?P<ns>[^/]+)/(?P<name>[^/]+?)"
    # The npm client does not escape a revision everywhere.
    rev, num, slug = (
        r"/(?P<rev>refs/(?:pr|heads|tags)/[^/]+|[^/]+)",
        r"/(?P<num>\d{1,9})",
        r"/(?P<ns>[^/]+)/(?P<slug>[^/]+)",
    )
    oid = r"/lfs/(?P<oid>[0-9a-f]{64})"
    upload = r"/(?P<upload>[0-9a-f]{16})"
    item = r"/items/(?P<item>[0-9a-f]{24})"

    def route(name: str, methods: str, path: str, handler: Handler, blob_origin: bool = False) -> Route:
        return Route(name, frozenset(methods.split()), re.compile(path), handler, blob_origin)

    def cas(name: str, methods: str, path: str, handler: Handler) -> Route:
        return Route(name, frozenset(methods.split()), re.compile(path), handler, True, True)

    xet_hash, xet_grant = "/(?P<hash>[0-9a-f]{64})", "/(?P<grant>[0-9a-f]{16})"
    return (
        route("lfs_put", "PUT", oid, lfs.put, blob_origin=True),
        route("lfs_part", "PUT", oid + upload + r"/(?P<part>[1-9]\d{0,4})", lfs.put_part, blob_origin=True),
        route("blob", "GET HEAD", oid, lfs.get_blob, blob_origin=True),
        cas("xet_chunk", "GET", "/v1/chunks/default(?:-merkledb)?" + xet_hash, xet.chunk),
        cas("xet_grant", "POST", "/v1/xorb-grants/default" + xet_hash, xet.grant),
        cas("xet_commit", "POST", f"/v1/xorb-commits/default{xet_hash}/grant{xet_grant}", xet.commit_granted),
        route("xet_put", "PUT", "/xorbs" + xet_hash + xet_grant, xet.put_granted, blob_origin=True),
        cas("xet_xorb", "POST", "/v1/xorbs?/default" + xet_hash, xet.put_xorb),
        cas("xet_shard", "POST", "(?:/v1)?/shards", xet.put_shard),
        cas("xet_shard", "POST", "/v2/shards", xet.put_shard_v2),
        cas("xet_reconstruction", "GET", "/v(?P<version>[12])/reconstructions" + xet_hash, xet.reconstruction),
        cas("other", "POST", "/v1/telemetry", nothing),
        route("xet_blob", "GET HEAD", "/xorbs" + xet_hash, xet.get_xorb, blob_origin=True),
        route("lfs_complete", "POST", oid + upload + "/complete", lfs.complete),
        route("lfs_batch", "POST", web + r"\.git/info/lfs/objects/batch", lfs.batch),
        route("lfs_verify", "POST", web + r"\.git/info/lfs/verify", lfs.verify),
        route("whoami", "GET", "/api/whoami-v2", repos.whoami),
        route("repo_create", "POST", "/api/repos/create", repos.create),
        route("repo_delete", "DELETE", "/api/repos/delete", repos.delete),
        route("repo_move", "POST", "/api/repos/move", repos.move),
        route("validate_yaml", "POST", "/api/validate-yaml", validate_yaml),
        route("repo_list", "GET", "/api/(?P<kind>models|datasets|spaces)", repos.list_repos),
        route("settings", "PUT", api + "/settings", repos.settings),
        route("auth_check", "GET", api + "/auth-check(?:/(?P<write>write))?", repos.auth_check),
        route("repo_info", "GET", api + f"(?:/revision{rev})?", repos.info),
        route("tree", "GET", api + f"/tree{rev}(?:/(?P<path>.+))?", repos.tree),
        route("paths_info", "POST", api + f"/paths-info{rev}", repos.paths_info),
        route("refs", "GET", api + "/refs", refs.refs),
        route("commits", "GET", api + f"/commits{rev}", refs.commits),
        route("preupload", "POST", api + f"/preupload{rev}", commits.preupload),
        route("commit", "POST", api + f"/commit{rev}", commits.commit),
        route("tag", "POST", api + f"/tag{rev}", refs.create_tag),
        route("tag", "DELETE", api + f"/tag{rev}", refs.delete_tag),
        route("branch", "POST", api + f"/branch{rev}", refs.create_branch),
        route("branch", "DELETE", api + f"/branch{rev}", refs.delete_branch),
        route("squash", "POST", api + f"/super-squash{rev}", refs.super_squash),
        route("lfs_copy", "POST", api + "/lfs-files/duplicate", lfs.duplicate),
        route("discussions", "GET", api + "/discussions", discussions.listed),
        route("discussions", "POST", api + "/discussions", discussions.create),
        route("discussion", "GET", api + f"/discussions{num}", discussions.details),
        route("discussion", "POST", api + f"/discussions{num}/comment", discussions.comment),
        route("discussion", "POST", api + f"/discussions{num}/status", discussions.status),
        route("merge", "POST", api + f"/discussions{num}/merge", discussions.merge),
        route("xet_token", "GET", api + f"/xet-write-token{rev}", xet.write_token),
        route("xet_token", "GET", api + f"/xet-read-token{rev}", xet.read_token),
        route("collections", "GET", "/api/collections", collections.listed),
        route("collections", "POST", "/api/collections", collections.create),
        route("collection", "GET", f"/api/collections{slug}", collections.get),
        route("collection", "PATCH", f"/api/collections{slug}", collections.update),
        route("collection", "DELETE", f"/api/collections{slug}", collections.delete),
        route("collection_items", "POST", f"/api/collections{slug}/items", collections.add_item),
        route("collection_items", "PATCH", f"/api/collections{slug}{item}", collections.update_item),
        route("collection_items", "DELETE", f"/api/collections{slug}{item}", collections.delete_item),
        route("other", "GET HEAD POST", "/api/agent-harnesses|/api/telemetry/.*|/v1/telemetry", nothing),
        route("resolve", "GET HEAD", web + f"/resolve{rev}/(?P<path>.+)", lfs.resolve),
        route("resolve", "GET HEAD", web + f"/raw{rev}/(?P<path>.+)", lfs.raw),
        route("page", "GET HEAD", "/", pages.index),
        route("page", "GET HEAD", r"/-/(?P<asset>hub\.css|icon\.svg)", pages.asset),
        route(
            "page",
            "GET HEAD",
            f"/-/image/(?P<kind>models|datasets|spaces)/(?P<ns>[^/]+)/(?P<name>[^/]+){rev}/(?P<path>.+)",
            pages.image,
        ),
        route("page", "GET HEAD", f"/collections{slug}", pages.collection),
        route("page", "GET HEAD", web + f"/tree{rev}(?:/(?P<path>.+))?", pages.tree),
        route("page", "GET HEAD", web + f"/blob{rev}/(?P<path>.+)", pages.blob),
        route("page", "GET HEAD", web + f"/commits{rev}", pages.commits),
        route("page", "GET HEAD", web + r"/commit/(?P<rev>[0-9a-f]{40})", pages.one_commit),
        route("page", "GET HEAD", web + "/discussions", pages.talks),
        route("page", "GET HEAD", web + f"/discussions{num}", pages.talk),
        route("page", "GET HEAD", web, pages.repo),
        route("page", "GET HEAD", "/(?P<ns>[^/]+)", pages.owner),
    )


ROUTES = _routes()
ROUTE_NAMES = tuple(dict.fromkeys([*(route.name for route in ROUTES), "unknown"]))


class HubApp:
    """One hub. `port` is set once the socket is bound; until then no request can come."""

    def __init__(
        self,
        store: Store,
        users: dict[str, User],
        faults: Faults,
        stats: Stats,
        multipart_bytes: int,
        part_bytes: int,
        page_size: int,
        xet: bool,
    ) -> None:
        self.xet = XetStore(store) if xet else None
        self.store, self.users, self.faults, self.stats = store, users, faults, stats
        self.multipart_bytes, self.part_bytes, self.page_size = multipart_bytes, part_bytes, page_size
        self.port = 0

    @property
    def hub_origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def blob_origin(self) -> str:
        return f"http://localhost:{self.port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["raw_path"].decode("latin-1")
        route, args = _match(scope["method"], path, self._on_blob_origin(scope))
        name = route.name if route else "unknown"
        self.stats.requests[name] += 1
        receive, send = counted(self.stats, name, receive, send)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                response = await self._answer(route, args, Request(scope, receive))
            except ClientDisconnect:
                return
            for name, value in pages.HEADERS.items():
                response.headers.setdefault(name, value)
            await response(scope, receive, send)

        fault = self.faults.take(name, path)
        if fault:
            await suffer(fault, app, scope, receive, send)
        else:
            await app(scope, receive, send)

    async def _answer(self, route: Route | None, args: dict[str, str], request: Request) -> Response:
        """The response, refusals included. The only place that catches everything: a bug is a 500, and logged."""
        try:
            user = self._admit(request, takes_xet_token=route is not None and route.takes_xet_token)
            if route is None:
                return self._unknown(request)
            return await route.handler(Call(self, request, args, user))
        except HubError as e:
            return pages.refusal(e) if _in_a_browser(route, request) else e.response()
        except ClientDisconnect:
            raise
        except OSError as e:
            full = e.errno in (errno.ENOSPC, errno.EDQUOT)
            log.error("%s %s: %s", request.method, request.url.path, e)
            return HubError(507 if full else 500, f"the hub's disk: {e.strerror}").response()
        except Exception as e:
            self.stats.crashes += 1
            log.exception("%s %s", request.method, request.url.path)
            return HubError(500, f"a bug in the local hub: {type(e).__name__}").response()

    def _unknown(self, request: Request) -> Response:
        """A person may type `localhost` for the hub, too; the blob store has no pages."""
        path = request.scope["raw_path"].decode("latin-1")
        page, _ = _match(request.method, path, blob_origin=False)
        if page and page.name == "page" and self._on_blob_origin(request.scope):
            return RedirectResponse(self.hub_origin + path)
        raise HubError(404, f"this hub does not know {request.method} {request.url.path[:200]!r}")

    def _admit(self, request: Request, takes_xet_token: bool) -> User | None:
        """Whose token this is. Refuses foreign Host headers (DNS rebinding), unknown tokens, tokens for the blobs."""
        if request.headers.get("host") not in (f"127.0.0.1:{self.port}", f"localhost:{self.port}"):
            raise HubError(400, "the Host header must be this hub's own address")
        authorization = request.headers.get("authorization")
        if self._on_blob_origin(request.scope):
            token = (authorization or "").removeprefix("Bearer ")
            if authorization is not None and (token in self.users or not takes_xet_token):
                self.stats.leaks += 1
                raise HubError(400, f"a token was sent to the blob store; the hub itself is {self.hub_origin}")
            return None
        if authorization is None:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _on_blob_origin(self, scope: Scope) -> bool:
        return dict(scope["headers"]).get(b"host", b"") == f"localhost:{self.port}".encode()


def _in_a_browser(route: Route | None, request: Request) -> bool:
    return route.name == "page" if route else "text/html" in request.headers.get("accept", "")


def _match(method: str, path: str, blob_origin: bool) -> tuple[Route | None, dict[str, str]]:
    if len(path) <= PATH_BYTES:
        for route in ROUTES:
            if route.blob_origin == blob_origin and method in route.methods:
                found = route.path.fullmatch(path)
                if found:
                    return route, {key: unquote(text) for key, text in found.groupdict().items() if text}
    return None, {}
