"""The receipt of a release, receipts/ladder.json: written before the first repo is made, and after each that is done.

It alone remembers which private repos were made by a push that is to end with them public: a run that was killed between
leaves it, and the next one goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from .schema import LadderEntry, LadderReceipt, Receipt
from .store import read_result, write_model
from .variants import Project


class LadderBook:
    """What is known of every repo of a ladder at one endpoint. Each change is on disk when the call returns."""

    def __init__(self, project: Project, endpoint: str) -> None:
        self._project, self._endpoint = project, endpoint
        found = read_result(project.store.ladder_receipt, LadderReceipt)
        self._found = found if found and found.endpoint == endpoint else None
        known = {e.id: e for e in self._found.repos} if self._found else {}
        self._entries = {
            id: e for id, e in known.items() if id in project.ladder.variants and e.repo == project.repo(id)
        }
        self._collections = list(self._found.collections) if self._found else []
        self._errors: dict[str, str] = {}

    def waits(self, id: str) -> bool:
        """Whether a push made this repo private, to make it public later."""
        entry = self._entries.get(id)
        return bool(entry and entry.waiting)

    @property
    def waiting(self) -> list[str]:
        """Ids of the repos that wait, in ladder order."""
        return [id for id in self._project.ladder.variants if self.waits(id)]

    def mark(self, id: str, waiting: bool) -> None:
        """Before a repo is created, and when it has become public."""
        if self.waits(id) != waiting:
            self._set(id, waiting=waiting)

    def done(self, receipt: Receipt) -> None:
        """A repo holds what its receipt says; an error of an earlier push is forgotten."""
        self._set(receipt.id, commit=receipt.commit, tag=receipt.tag, weights_hash=receipt.weights_hash, error=None)

    def failed(self, id: str, error: str) -> None:
        """Why a repo is not at the new state, as one line; what it held before stays on record."""
        self._set(id, error=error)

    def close(self, collections: Iterable[str], errors: dict[str, str]) -> None:
        """The end of a push. errors: of what is no repo."""
        self._collections = sorted({*self._collections, *collections})
        self._errors = errors
        self._write()

    def _set(self, id: str, **values: object) -> None:
        old = self._entries.get(id) or LadderEntry(id=id, repo=self._project.repo(id))
        self._entries[id] = old.model_copy(update=values)
        self._write()

    def _write(self) -> None:
        """Nothing if all is as it was: a push that changed nothing leaves the time alone, too."""
        order = [id for id in self._project.ladder.variants if id in self._entries]
        now = LadderReceipt(
            endpoint=self._endpoint,
            repos=[self._entries[id] for id in order],
            collections=self._collections,
            errors=self._errors,
            pushed_at=self._found.pushed_at if self._found else "",
        )
        if now != self._found:
            self._found = now.model_copy(update={"pushed_at": datetime.now(UTC).isoformat(timespec="seconds")})
            write_model(self._project.store.ladder_receipt, self._found)
