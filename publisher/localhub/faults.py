"""What can be made to go wrong, and what has been counted.

A fault names a route (see `app.ROUTES`), which request of that route it hits, and what happens. Kinds:

    lose_answer    the request is carried out in full, then the connection is dropped without a byte of answer
    status         the body is read, nothing is done, `status` is answered (`retry_after`: that header, in seconds;
                   `retry_date`: the same as a date so many seconds from now; `text`: an HTML page with it, not JSON)
    late_status    the request is carried out in full, then `status` is answered as if it had failed
    delay          `seconds` pass first, then all is well
    trickle        the answer comes byte by byte, one every `seconds`
    redirect       nothing is done; the client is sent to the same path on the blob store's origin
    cut            the connection is dropped once `after_bytes` of body went either way
    corrupt        one byte of the answer's body is wrong; its length is right
    stale_head     commit only: somebody else's commit lands on the branch just before this one
    ignore_parent  commit only: as stale_head, and this one is taken on top of it, whatever parent it names
    old_head       repo_info only: answered as if the last commit of the branch were not there yet
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from email.utils import formatdate

from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

KINDS = (
    "lose_answer",
    "status",
    "late_status",
    "delay",
    "trickle",
    "redirect",
    "cut",
    "corrupt",
    "stale_head",
    "ignore_parent",
    "old_head",
)
ONLY = {"stale_head": "commit", "ignore_parent": "commit", "old_head": "repo_info"}  # kinds that one route knows


@dataclass(frozen=True)
class Fault:
    """Hits requests nth .. nth+times-1 of `route` whose URL path contains `match`, counted from when it was added."""

    route: str
    kind: str
    nth: int = 1
    times: int = 1
    status: int = 503
    seconds: float = 1.0
    after_bytes: int = 0
    retry_after: int | None = None
    retry_date: int | None = None
    text: str = ""
    match: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault kind {self.kind!r}: must be one of {', '.join(KINDS)}")
        if self.route != ONLY.get(self.kind, self.route):
            raise ValueError(f"fault kind {self.kind}: for the route {ONLY[self.kind]} only")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """`ROUTE:KIND[:KEY=VALUE]...`, e.g. `commit:lose_answer` or `lfs_put:status:nth=2:status=429`.

        Raises ValueError.
        """
        route, _, rest = text.partition(":")
        kind, *pairs = rest.split(":")
        types = {"nth": int, "times": int, "status": int, "seconds": float, "after_bytes": int}
        types |= {"retry_after": int, "retry_date": int, "text": str, "match": str}
        options = {}
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key not in types:
                raise ValueError(f"fault {text!r}: unknown option {key!r}")
            try:
                options[key] = types[key](value)
            except ValueError:
                raise ValueError(f"fault {text!r}: {key} must be a number, found {value!r}") from None
        return cls(route, kind, **options)


class Faults:
    """The faults still to come, and those that happened (`fired`)."""

    def __init__(self, faults: Iterable[Fault], routes: Iterable[str]) -> None:
        self._routes = frozenset(routes)
        self._waiting: list[list] = []  # [fault, requests seen]
        self.fired: list[Fault] = []
        for fault in faults:
            self.add(fault)

    def add(self, fault: Fault) -> None:
        """Raises ValueError for a route the hub does not have."""
        if fault.route not in self._routes:
            raise ValueError(f"fault route {fault.route!r}: must be one of {', '.join(sorted(self._routes))}")
        self._waiting.append([fault, 0])

    def clear(self) -> None:
        self._waiting.clear()

    def take(self, route: str, path: str) -> Fault | None:
        """The fault this request suffers. Counts the request for all that could match it; the first due one wins."""
        due = None
        for entry in self._waiting:
            fault = entry[0]
            if fault.route == route and fault.match in path:
                entry[1] += 1
                if due is None and fault.nth <= entry[1] < fault.nth + fault.times:
                    due = fault
        if due:
            self.fired.append(due)
        return due


@dataclass
class Stats:
    """Counts since the start or the last `reset`, per route."""

    requests: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)  # bytes of request bodies
    sent: Counter[str] = field(default_factory=Counter)  # bytes of answer bodies
    leaks: int = 0  # requests that brought a token to the blob origin
    crashes: int = 0  # answers 500 because of a bug in the hub

    def reset(self) -> None:
        for counter in (self.requests, self.received, self.sent):
            counter.clear()
        self.leaks = self.crashes = 0


def counted(stats: Stats, route: str, receive: Receive, send: Send) -> tuple[Receive, Send]:
    async def counting_receive() -> Message:
        message = await receive()
        stats.received[route] += len(message.get("body", b""))
        return message

    async def counting_send(message: Message) -> None:
        await send(message)
        stats.sent[route] += len(message.get("body", b""))

    return counting_receive, counting_send


async def suffer(fault: Fault, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the app on a request that `fault` hits. `scope["localhub.drop"]` closes the connection."""
    if fault.kind == "delay":
        await asyncio.sleep(fault.seconds)
        await app(scope, receive, send)
    elif fault.kind == "status":
        await _drain(receive)
        await _refusal(fault)(scope, receive, send)
    elif fault.kind == "trickle":
        await app(scope, receive, _trickling(send, fault.seconds))
    elif fault.kind == "redirect":
        await _drain(receive)
        host = dict(scope["headers"])[b"host"].decode("latin-1").replace("127.0.0.1", "localhost")
        await RedirectResponse(f"http://{host}{scope['raw_path'].decode('latin-1')}")(scope, receive, send)
    elif fault.kind == "lose_answer":
        await app(scope, receive, _swallow)
        await _hang_up(scope, receive)
    elif fault.kind == "late_status":
        await app(scope, receive, _swallow)
        await _refusal(fault)(scope, receive, send)
    elif fault.kind == "cut":
        await _cut(fault.after_bytes, app, scope, receive, send)
    elif fault.kind == "corrupt":
        await app(scope, receive, _corrupting(send))
    else:
        scope[f"localhub.{fault.kind}"] = True
        await app(scope, receive, send)


def _refusal(fault: Fault) -> Response:
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    if fault.retry_date is not None:
        headers["Retry-After"] = formatdate(time.time() + fault.retry_date, usegmt=True)
    if fault.text:
        return HTMLResponse(f"<html><body>{fault.text}</body></html>", fault.status, headers)
    return JSONResponse({"error": f"fault: {fault.status}"}, fault.status, headers)


async def _cut(after_bytes: int, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """The app sees a client that went away (upload) or goes on writing into the void (download)."""
    left, cut = after_bytes, False

    async def cut_receive() -> Message:
        nonlocal left, cut
        message = {"type": "http.disconnect"} if cut else await receive()
        body = message.get("body", b"")
        if body or after_bytes == 0:
            cut = cut or len(body) >= left
            left -= len(body)
        return {"type": "http.disconnect"} if cut else message

    async def cut_send(message: Message) -> None:
        nonlocal left, cut
        if cut:
            return
        body = message.get("body", b"")
        if message["type"] == "http.response.body" and len(body) >= left:
            cut = True
            if left:
                await send({**message, "body": body[:left], "more_body": True})
            scope["localhub.drop"]()
            return
        left -= len(body)
        await send(message)

    await app(scope, cut_receive, cut_send)
    await _hang_up(scope, receive)


def _trickling(send: Send, seconds: float) -> Send:
    async def trickle(message: Message) -> None:
        body, more = message.get("body", b""), message.get("more_body", False)
        for i in range(len(body)):
            await send({**message, "body": body[i : i + 1], "more_body": more or i + 1 < len(body)})
            await asyncio.sleep(seconds)
        if not body:
            await send(message)

    return trickle


def _corrupting(send: Send) -> Send:
    done = False

    async def corrupt(message: Message) -> None:
        nonlocal done
        body = message.get("body", b"")
        if body and not done:
            done = True
            message = {**message, "body": bytes([body[0] ^ 1]) + body[1:]}
        await send(message)

    return corrupt


async def _drain(receive: Receive) -> None:
    more = True
    while more:
        message = await receive()
        more = message.get("more_body", False)


async def _swallow(message: Message) -> None:
    pass


async def _hang_up(scope: Scope, receive: Receive) -> None:
    """Close, and wait until the server knows: it would answer 500 for an app that returned without answering."""
    scope["localhub.drop"]()
    while (await receive())["type"] != "http.disconnect":
        pass
