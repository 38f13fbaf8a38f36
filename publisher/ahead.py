"""Weights on their way to the hub while other variants are still being made: `publish build --push`.

One thread takes finished variants from a queue and uploads the large files of their manifests, without a commit. A commit
follows only at the end, from `release`, when all cards are final: cards list their siblings, so one that was committed
earlier would describe what is not there yet. Bytes that nobody commits can be seen by nobody.

An error here is a line and no more: the push at the end sends what is missing, and its errors count.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from inference.errors import CheckFailed, PublishError

from .hub import Hub, Upload
from .ladder import LadderBook
from .push_plan import LocalFile, same
from .report import Report
from .schema import Manifest
from .store import read_model
from .variants import Project
from .verify import file_key, is_plain, sha256_of

AHEAD_BYTES = 1 << 20  # smaller files go with the commit


class Ahead:
    """Uploads of one run. As a context it waits at its end until all that was offered is there, or has failed.

    private: of repos that have to be created; staged: these are private until the release makes them public.
    """

    def __init__(self, project: Project, hub: Hub, private: bool, staged: bool, report: Report) -> None:
        self._project, self._hub, self._report = project, hub, report
        self._private, self._staged = private, staged
        self._offered: set[str] = set()
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._busy, self._may = threading.Lock(), threading.Event()
        self._may.set()
        self._stop = False
        self._bug: BaseException | None = None
        # a daemon: an interrupted build ends at once, and what was sent is found by the next one
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)

    def __enter__(self) -> Ahead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = error is not None
        self._queue.put(None)
        if self._stop:
            return
        self._thread.join()
        if self._bug is not None:
            raise self._bug

    def offer(self, id: str) -> None:
        """A variant whose weights are final and passed their smoke test."""
        if id not in self._offered:
            self._offered.add(id)
            self._queue.put(id)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing is hashed or sent meanwhile: for benchmarks, whose figures it would change. Waits for the file under way."""
        self._may.clear()
        try:
            with self._busy:
                yield
        finally:
            self._may.set()

    def _work(self) -> None:
        while (id := self._queue.get()) is not None:
            try:
                sent = self._send(id)
                if sent:
                    self._report.line(f"{id}: uploaded ahead  {sent / 1e9:.3f} GB")
            except PublishError as e:
                line = str(e).splitlines()[0]
                self._report.line(f"{id}: not uploaded ahead: {line}; the push at the end tries again")
            except BaseException as e:  # noqa: BLE001 - a bug: kept for the main thread, which raises it
                self._bug = e
                return

    def _send(self, id: str) -> int:
        """Upload what the manifest lists and the repo's head does not hold; returns its bytes."""
        repo = self._project.repo(id)
        manifest = read_model(self._project.store.manifest(id), Manifest)
        assert manifest is not None
        with self._hub.lock(repo):
            head = self._hub.head(repo)
            there = head.files if head else {}
            files = [f for f in self._files(manifest) if f.path not in there or not same(f, there[f.path])]
            if not files:
                return 0
            if head is None:
                LadderBook(self._project, self._hub.endpoint).mark(id, self._staged)
                self._hub.create_repo(repo, self._private or self._staged)
            self._hub.check_write(repo)
            for f in files:
                if self._stop:
                    return 0
                self._may.wait()
                with self._busy:
                    self._upload(repo, f)
        return sum(f.size for f in files)

    def _files(self, manifest: Manifest) -> Iterator[LocalFile]:
        folder = self._project.store.variant(manifest.id)
        for entry in manifest.files:
            path = folder / entry.path
            if entry.size >= AHEAD_BYTES and is_plain(entry.path) and path.is_file() and not path.is_symlink():
                yield LocalFile(entry.path, path, entry.size, entry.sha256, file_key(path))

    def _upload(self, repo: str, file: LocalFile) -> None:
        """Only bytes that are the manifest's, before and after: Xet believes the hash that it is told."""
        if sha256_of(file.source) == file.sha256:
            self._hub.upload_ahead(repo, Upload(file.path, file.source, file.size, file.sha256))
            if file_key(file.source) == file.key:
                return
            self._hub.forget_ahead(repo)
        raise CheckFailed(f"{file.path} is not what manifest.json says")
