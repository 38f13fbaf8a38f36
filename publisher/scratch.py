"""A folder for work that leaves nothing behind: what was built or downloaded only to be compared.

It is removed whatever happens; what a killed run left is removed by the next one of its kind in the same place. The kernel
lets go of a folder's lock when its process ends, so a run that is still at work is never disturbed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inference.errors import ResourceError

from .locks import NoLocks, take

LOCK = ".lock"
PREFIX = "publish"


@contextmanager
def scratch(kind: str, parent: Path | None = None) -> Iterator[Path]:
    """An empty folder below `parent`, or where this system keeps temporary files (TMPDIR). Raises ResourceError if it cannot
    be made."""
    parent = parent or Path(tempfile.gettempdir())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, kind)
        root = Path(tempfile.mkdtemp(dir=parent, prefix=f"{PREFIX}-{kind}-"))
    except OSError as e:
        raise ResourceError(f"{parent}: cannot be written to ({e.strerror})") from None
    try:
        with open(root / LOCK, "w") as lock:
            with suppress(NoLocks):  # then no other run takes it either, so none removes this folder
                take(lock, wait=True)
            (root / "work").mkdir()
            yield root / "work"
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _sweep(parent: Path, kind: str) -> None:
    """Remove what killed runs left here, of this user."""
    for left in parent.glob(f"{PREFIX}-{kind}-*"):
        with suppress(OSError, NoLocks):
            if left.is_symlink() or left.stat().st_uid != os.getuid():
                continue
            with open(left / LOCK) as lock:
                if take(lock):
                    shutil.rmtree(left, ignore_errors=True)
