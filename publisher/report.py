"""How a long step tells where it is: bars on a terminal, plain lines elsewhere, nothing when quiet. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .card_format import size

LINE_EVERY_S = 10.0  # off a terminal, at most one progress line in this time


class Report:
    """Lines and progress for people. `bar` yields a function (done, total) that may be called as often as one likes."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and not quiet
        self._live: Any = None

    def line(self, text: str) -> None:
        if self.quiet:
            return
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)  # noqa: T201 - the one place that talks while a step runs

    def nbytes(self, what: str, done: int, total: int) -> None:
        """A line: how many bytes of a transfer or a pass are done."""
        self.line(f"{what}: {size(done)} of {size(total)}")

    @contextmanager
    def bar(self, label: str) -> Iterator[Any]:
        if self.quiet:
            yield lambda done, total: None
        elif self.terminal:
            from rich.console import Console  # noqa: PLC0415 - 80 ms that `--help` need not pay
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as live:
                task = live.add_task(label, total=None)
                self._live = live
                try:
                    yield lambda done, total: live.update(task, completed=done, total=total)
                finally:
                    self._live = None
        else:
            last = time.monotonic()

            def plain(done: int, total: int) -> None:
                nonlocal last
                if time.monotonic() - last >= LINE_EVERY_S and total:
                    last = time.monotonic()
                    self.line(f"{label}: {100 * done / total:.0f} %")

            yield plain
