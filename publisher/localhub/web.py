"""What every handler of the hub gets: one call, who makes it, and how to refuse it.

A handler is `async def name(call: Call) -> Response`. It raises `HubError` to refuse; the edge in `app.py` turns
that into one line of JSON plus the `X-Error-Code` / `X-Error-Message` headers the client builds its typed errors
from. All input is untrusted: bodies are bounded before they are read, and every field is checked for its type.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse

from publisher.localhub.store import COMMIT_ID, Commit, File, Repo

if TYPE_CHECKING:
    from publisher.localhub.app import HubApp

JSON_BYTES = 8 << 20  # largest JSON body: a preupload of 256 files is under 1 MiB
LIST_PAGE = 1000  # entries in a page of anything but files
SIGNED_S = 6 * 3600  # life of an upload or download URL; the Hub's are of this order
T = TypeVar("T")


class HubError(Exception):
    """A refusal: HTTP status, one line for people, the Hub's machine code if it has one."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.extra = status, code, extra
        self.message = " ".join(message.split())[:500]

    def response(self) -> JSONResponse:
        # Headers are latin-1 on the wire; a message quotes what the caller sent, so it is reduced to ASCII.
        headers = {"X-Error-Message": self.message.encode("ascii", "replace").decode()}
        if self.code:
            headers["X-Error-Code"] = self.code
        commit = self.extra.pop("x_repo_commit", None)
        if commit:
            headers["X-Repo-Commit"] = commit
        return JSONResponse({"error": self.message, **self.extra}, self.status, headers)


@dataclass(frozen=True)
class User:
    """Who a token speaks for. `namespaces` None: every namespace (a rehearsal with nobody else around)."""

    name: str
    role: str  # read | write
    namespaces: frozenset[str] | None = None

    @classmethod
    def parse(cls, text: str) -> User:
        """`ROLE` or `ROLE:USER[,ORG...]`, e.g. `write:alice,acme`. Raises ValueError."""
        role, _, names = text.partition(":")
        if role not in ("read", "write"):
            raise ValueError(f"token role {role!r}: must be read or write")
        listed = [name for name in names.split(",") if name]
        if not listed:
            return cls("local", role)
        return cls(listed[0], role, frozenset(listed))

    def belongs_to(self, namespace: str) -> bool:
        return self.namespaces is None or namespace in self.namespaces


@dataclass
class Call:
    """One request: its URL arguments (unquoted), the body, and the caller."""

    hub: HubApp
    request: Request
    args: dict[str, str]
    user: User | None

    # -- the body ---------------------------------------------------------------------------------------------

    async def body(self, limit: int) -> bytes:
        """The whole body; 413 as soon as it is known to be longer than `limit` bytes."""
        chunks, nbytes = [], 0
        async for chunk in self.request.stream():
            nbytes += len(chunk)
            if nbytes > limit:
                raise HubError(413, f"body larger than {limit} bytes")
            chunks.append(chunk)
        return b"".join(chunks)

    async def json(self) -> dict[str, Any]:
        """The body as a JSON object. Await it before reading what is to be changed: others are served meanwhile."""
        raw = await self.body(JSON_BYTES)
        return parse_object(raw, "body")

    async def save(self, path: Path, limit: int | None = None) -> str:
        """Stream the body to a file; its sha256. 400 unless it is as long as the signed URL says, 413 above a limit."""
        announced = None if limit else int(self.request.query_params["size"])
        digest, nbytes = hashlib.sha256(), 0
        with path.open("wb") as out:
            async for chunk in self.request.stream():
                nbytes += len(chunk)
                if limit and nbytes > limit:
                    raise HubError(413, f"body larger than {limit} bytes")
                if announced is not None and nbytes > announced:
                    raise HubError(400, f"EntityTooLarge: more than the {announced} bytes announced")
                digest.update(chunk)
                out.write(chunk)
        if announced is not None and nbytes != announced:
            raise HubError(400, f"IncompleteBody: {nbytes} bytes, announced {announced}")
        return digest.hexdigest()

    # -- long lists ---------------------------------------------------------------------------------------------

    def page(self, items: Sequence[T], most: int = LIST_PAGE) -> tuple[list[T], dict[str, str]]:
        """The part of a list that `?limit=` and `?cursor=` ask for; the Link header says where the next one is."""
        query = self.request.query_params
        limit = min(_count(query.get("limit"), most), LIST_PAGE) or most
        start = _count(query.get("cursor"), 0)
        if start + limit >= len(items):
            return list(items[start:]), {}
        following = [(key, value) for key, value in query.multi_items() if key != "cursor"]
        raw = self.request.scope["raw_path"].decode("ascii", "replace")
        url = f"{self.hub.hub_origin}{raw}?{urlencode([*following, ('cursor', str(start + limit))])}"
        return list(items[start : start + limit]), {"Link": f'<{url}>; rel="next"'}

    # -- who may do what --------------------------------------------------------------------------------------

    @property
    def repo_id(self) -> str:
        return f"{self.args['ns']}/{self.args['name']}"

    @property
    def kind(self) -> str:
        return self.args.get("kind") or "models"

    def repo(self, write: bool = False, kind: str | None = None, repo_id: str | None = None) -> Repo:
        """The repository of this call. A private one is as absent as a missing one to those who may not read it."""
        repo = self.hub.store.repo(kind or self.kind, repo_id or self.repo_id)
        if repo is None or not self.may_read(repo):
            # The Hub does not tell a stranger whether a repository exists: 401 without a token, 404 with one.
            status = 404 if self.user else 401
            raise HubError(status, "Repository not found", "RepoNotFound")
        if write:
            self.need_write(repo.namespace)
        return repo

    def may_read(self, repo: Repo) -> bool:
        return not repo.private or (self.user is not None and self.user.belongs_to(repo.namespace))

    def need_download(self, repo: Repo) -> None:
        """A gated repository shows what it has to everyone, and gives it to its own people only."""
        if repo.gated and not (self.user and self.user.belongs_to(repo.namespace)):
            message = f"Access to {repo.kind[:-1]} {repo.id} is restricted. You must have access to it."
            raise HubError(403 if self.user else 401, message, "GatedRepo")

    def need_user(self) -> User:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return self.user

    def need_role(self) -> User:
        """A token that may write at all (enough to open a pull request)."""
        user = self.need_user()
        if user.role != "write":
            raise HubError(403, "You don't have the required permissions to perform this action: read-only token")
        return user

    def need_write(self, namespace: str) -> User:
        user = self.need_role()
        if not user.belongs_to(namespace):
            message = f"You don't have the rights to write under the namespace {namespace!r}"
            raise HubError(403, message)
        return user

    def commit(self, repo: Repo, rev: str | None = None) -> Commit:
        rev = rev or self.args.get("rev") or "main"
        oid = self.hub.store.resolve(repo, rev)
        if oid is None:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return self.hub.store.commit(repo, oid)

    def xet_hash(self, file: File) -> str | None:
        """Of an LFS file that a client with Xet can fetch as such."""
        return self.hub.xet.hash_of(file.sha256) if self.hub.xet and file.sha256 else None

    # -- signed URLs: how the blob origin knows a caller it gets no token from ---------------------------------

    def sign(self, method: str, origin: str, path: str, size: int | None = None) -> str:
        query = {"exp": str(int(time.time()) + SIGNED_S)}
        if size is not None:
            query["size"] = str(size)
        query["sig"] = self.hub.store.mac(_signed_text(method, path, query))
        return f"{origin}{path}?{urlencode(query)}"

    def check_signature(self) -> None:
        query = dict(self.request.query_params)
        given = query.pop("sig", "")
        method = "GET" if self.request.method == "HEAD" else self.request.method
        if not self.hub.store.is_mac(_signed_text(method, self.request.url.path, query), given):
            raise HubError(403, "SignatureDoesNotMatch: this URL was not issued by the hub")
        if int(query["exp"]) < time.time():
            raise HubError(403, "Request has expired: ask the hub for a new URL")


def _count(text: str | None, default: int) -> int:
    return int(text) if text and text.isdecimal() and len(text) < 10 else default


def _signed_text(method: str, path: str, query: dict[str, str]) -> str:
    return "\n".join([method, path, *(f"{key}={query[key]}" for key in sorted(query))])


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object; 400 for anything else, nesting past Python's stack included."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise HubError(400, f"{what}: not JSON") from e
    if not isinstance(value, dict):
        raise HubError(400, f"{what}: must be a JSON object")
    return value


def field(body: dict[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    """body[key] of exactly that type; the default if absent or null; 400 otherwise."""
    value = body.get(key)
    if value is None and default is not None:
        return default
    # bool is an int to Python, not to JSON.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise HubError(400, f'"{key}" must be a {kind.__name__}')
    if isinstance(value, str):
        # JSON can spell half a character (\ud800), which no answer could be encoded with.
        whole = value.isprintable() or (key in FREE_TEXT and value.encode("utf-8", "ignore").decode() == value)
        if not whole:
            raise HubError(400, f'"{key}" has control characters')
    return value


def decoded(text: str, encoding: str) -> bytes:
    """A file's content as JSON carries it; 400 for another encoding."""
    try:
        if encoding == "base64":
            return base64.b64decode(text, validate=True)
        if encoding == "utf-8":
            return text.encode()
    except (binascii.Error, ValueError) as e:
        raise HubError(400, f"content is not {encoding}") from e
    raise HubError(400, '"encoding" must be base64 or utf-8')


FREE_TEXT = {"content", "summary", "description", "message", "note", "comment", "sample", "gitIgnore", "gitAttributes"}


def path_in_repo(text: str) -> str:
    """A path that means the same file on every machine, inside the folder it is downloaded to; 400 otherwise."""
    parts = text.split("/")
    bad = (
        len(text) > 1000
        or not text.isprintable()
        or "\\" in text
        or any(part in ("", ".", "..") or part.lower() == ".git" or len(part.encode()) > 255 for part in parts)
        or re.match(r"[A-Za-z]:", text)
    )
    if bad:
        raise HubError(400, f"invalid path in the repository: {text[:100]!r}")
    return text


def ref_name(text: str, what: str) -> str:
    """A branch or tag name that git would take and that cannot be mistaken for a commit id; 400 otherwise."""
    good = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+/-]{0,199}", text) and not (
        ".." in text or "//" in text or text.endswith(("/", ".lock", ".")) or text.startswith("refs/") or text == "HEAD"
    )
    if not good or COMMIT_ID.fullmatch(text):
        raise HubError(400, f"invalid {what} name: {text[:100]!r}")
    return text
