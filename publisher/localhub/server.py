"""Run the hub: in the foreground (`run`) or in a thread (`LocalHub`). Loopback only."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from publisher.localhub.app import ROUTE_NAMES, HubApp
from publisher.localhub.faults import Fault, Faults, Stats
from publisher.localhub.store import Store
from publisher.localhub.web import User

LOOPBACK = ("127.0.0.1", "localhost")
MULTIPART_BYTES = 1 << 30  # LFS files above this go up in parts
PART_BYTES = 64 << 20
PAGE_SIZE = 1000  # entries in a page of a file listing; the Hub's number
START_S = 10  # a bound socket needs well under a second
TICK_S = 0.1  # between two looks of the server at its date and at Ctrl-C; uvicorn's
CUT_S = 0.1  # for requests under way when the hub is stopped, before they are cut


class LocalHub:
    """A hub in a thread of this process.

    tokens: token → `ROLE[:USER[,ORG...]]` with ROLE read or write, e.g. {"hf_x": "write:alice,acme"}. Without
    names the user is `local` and every namespace is theirs.
    faults, stats: live; see `faults.py`.
    xet: offer Xet to clients that have it. Without it, they must be told HF_HUB_DISABLE_XET=1.

    Raises ValueError (host not loopback, bad token or fault), FolderInUse, OSError (port taken).
    """

    def __init__(
        self,
        folder: Path | str,
        tokens: dict[str, str],
        faults: Iterable[Fault] = (),
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        multipart_bytes: int = MULTIPART_BYTES,
        part_bytes: int = PART_BYTES,
        page_size: int = PAGE_SIZE,
        xet: bool = True,
    ) -> None:
        if host not in LOOPBACK:
            raise ValueError(f"host {host!r}: the local hub listens on {' or '.join(LOOPBACK)} only")
        users = {token: User.parse(text) for token, text in tokens.items()}
        self.faults = Faults(faults, ROUTE_NAMES)
        self.stats = Stats()
        self._store = Store(Path(folder))
        try:
            self._socket = _bind(port)
        except OSError:
            self._store.close()
            raise
        self._app = HubApp(self._store, users, self.faults, self.stats, multipart_bytes, part_bytes, page_size, xet)
        self._app.port = self._socket.getsockname()[1]
        self._server = _server(self._app)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return self._app.hub_origin

    def start(self) -> LocalHub:
        """Returns once requests are answered."""
        self._thread = threading.Thread(target=self.serve, name="localhub", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the local hub did not start")
            time.sleep(0.005)
        return self

    def serve(self) -> None:
        """Serve in this thread until `stop`, or until Ctrl-C if it is the main one."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()
            self._store.close()

    def stop(self) -> None:
        """At once: requests under way are cut. Idempotent. The folder can be opened again when this returns."""
        self._server.end()
        if self._thread:
            self._thread.join()
        else:
            self._socket.close()
            self._store.close()

    def __enter__(self) -> LocalHub:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_in_thread(folder: Path | str, tokens: dict[str, str], faults: Iterable[Fault] = ()) -> LocalHub:
    """A running hub on a free port; the caller stops it."""
    return LocalHub(folder, tokens, faults).start()


def run(
    folder: Path, host: str, port: int, tokens: dict[str, str], faults: Iterable[Fault] = (), xet: bool = True
) -> None:
    """Serve until Ctrl-C. Prints one line with the URL when requests can be sent; raises as `LocalHub` does."""
    logging.basicConfig(format="hub: %(message)s", level=logging.WARNING)
    hub = LocalHub(folder, tokens, faults, host=host, port=port, xet=xet)
    # The socket is bound and listening: a request sent from now on waits for the loop instead of being refused.
    sys.stdout.write(f"local rehearsal hub (not the Hugging Face Hub) at {hub.url} on {folder}\n")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how it ends
        hub.serve()


def _bind(port: int) -> socket.socket:
    """Always 127.0.0.1: `localhost` is the blob store's name for the same socket."""
    # The protocol is named because asyncio turns Nagle's delay (40 ms an answer) off only for sockets that name it.
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", port))
        bound.listen(256)
    except OSError:
        bound.close()
        raise
    return bound


def _server(app: HubApp) -> _Server:
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # the app logs its own bugs; a cut request is none
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """uvicorn's server, which looks every 0.1 s whether it is to stop and then waits for 0.1 s more: here `end` wakes it,
    and it waits only for requests that are under way."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()

    def end(self) -> None:
        """From any thread, at any time."""
        self.should_exit = self.force_exit = True
        if self._loop:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(self._ended.set)

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        ticks = 0
        while not await self.on_tick(ticks):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), TICK_S)
            ticks += 1

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if not self.force_exit:  # Ctrl-C
            await super().shutdown(sockets)
            return
        for server in self.servers:
            server.close()
        for bound in sockets or ():
            bound.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=CUT_S)


class _Connection(H11Protocol):
    """uvicorn's connection, which lets the app hang up: what the faults need and ASGI has no word for."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        inner = self.app

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope["localhub.drop"] = transport.close
            await inner(scope, receive, send)  # type: ignore[arg-type]

        self.app = app  # type: ignore[assignment]
