"""What ends a call that would never end: the client's timeouts bound silence alone, and one byte every few seconds is none.

Every connection of the client is watched where bytes come and go, whatever the request:

    opening it                      at most `connect_s`
    silence before and in an answer at most `answer_s`: the Hub's gateway gives up on a commit after about 60
    a request or answer under way   at least `rate` bytes a second over every `window_s` seconds of waiting for bytes

and a call that is not a transfer has a `Budget` of time for all its tries. A transfer has none: how long it may take
depends on its size, and its rate bounds it. Only time spent waiting counts, not what is done between two reads. How large
an answer may be is for `hub_bounds`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import httpcore2
import httpx2

from inference.errors import HubUnavailable

PIECE = 64 << 10  # bytes written at once, so that a slow reader is seen

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """See above. Seconds, and bytes a second."""

    connect_s: float = 15.0
    answer_s: float = 120.0
    window_s: float = 60.0
    rate: float = 1024.0


class Budget:
    """Seconds that one call may take, waits that the hub asks for not counted. `left` raises HubUnavailable once they are
    used up."""

    def __init__(self, doing: str, endpoint: str, seconds: float) -> None:
        self._what, self._seconds = f"{doing}: {endpoint}", seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds. Raises HubUnavailable where none are."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise HubUnavailable(f"{self._what} gave no whole answer within {self._seconds:.0f} s; run again later")
        return left

    def extend(self, seconds: float) -> None:
        self._end += seconds


_budget: ContextVar[Budget | None] = ContextVar("_budget", default=None)


@contextmanager
def budget(of: Budget | None) -> Iterator[None]:
    """For the requests of this thread; None: of a transfer."""
    before = _budget.set(of)
    try:
        yield
    finally:
        _budget.reset(before)


def extend(seconds: float) -> None:
    """The call under way waits because the hub asked it to."""
    held = _budget.get()
    if held:
        held.extend(seconds)


def watch(client: httpx2.Client, limits: Limits) -> httpx2.Client:
    """The client with its timeouts set and every connection it will open watched, through a proxy or not."""
    client.timeout = httpx2.Timeout(limits.answer_s, connect=limits.connect_s)
    # Neither httpx2 nor the client of the Hub lets a caller name a network backend, and a client made by hand would lose
    # the Hub's hooks and the proxies of the environment.
    for transport in (client._transport, *client._mounts.values()):
        if transport is not None:
            pool: Any = transport._pool  # type: ignore[attr-defined]
            pool._network_backend = _Backend(pool._network_backend, limits)
    return client


class _Backend(httpcore2.NetworkBackend):
    """Opens watched connections."""

    def __init__(self, inner: httpcore2.NetworkBackend, limits: Limits) -> None:
        self._inner, self._limits = inner, limits

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        stream = self._inner.connect_tcp(host, port, _bounded(timeout), local_address, socket_options)
        return _Stream(stream, self._limits)


class _Stream(httpcore2.NetworkStream):
    """One connection. `_waited`, `_moved`: seconds and bytes of the window under way, of a request or of an answer."""

    def __init__(self, inner: httpcore2.NetworkStream, limits: Limits) -> None:
        self._inner, self._limits = inner, limits
        self._answering = False
        self._waited, self._moved = 0.0, 0

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._answering:  # a new request
            self._answering = False
            self._waited, self._moved = 0.0, 0
        view = memoryview(buffer)
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            self._timed(lambda left, piece=piece: self._inner.write(piece, left), timeout)  # type: ignore[arg-type]
            self._count(len(piece), httpcore2.WriteTimeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._timed(lambda left: self._inner.read(max_bytes, left), timeout)
        if not self._answering:  # the wait for the first byte is the hub's to work in
            self._answering = True
            self._waited, self._moved = 0.0, 0
        self._count(len(data), httpcore2.ReadTimeout)
        return data

    def _timed(self, act: Callable[[float | None], T], timeout: float | None) -> T:
        started = time.monotonic()
        try:
            return act(_bounded(timeout))
        except httpcore2.TimeoutException:
            _bounded(None)  # if the call's time is up, that is what it is told
            raise
        finally:
            self._waited += time.monotonic() - started

    def _count(self, nbytes: int, error: type[Exception]) -> None:
        self._moved += nbytes
        if self._waited < self._limits.window_s:
            return
        if self._moved < self._limits.rate * self._waited:
            raise error(f"{self._moved} bytes in {self._waited:.0f} s")
        self._waited, self._moved = 0.0, 0

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, _bounded(timeout)), self._limits)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _bounded(timeout: float | None) -> float | None:
    """The timeout, or what is left of the call's budget if that is less. Raises HubUnavailable if nothing is."""
    held = _budget.get()
    if held is None:
        return timeout
    left = held.left()
    return left if timeout is None else min(timeout, left)
