"""Locks between processes, by `flock`: the kernel lets go of one when its process ends, however it ends.

Three kinds use this: an output folder (`store.Store.lock`), a repo of the Hub on this machine (`repo_lock`), and a folder of
temporary work (`scratch`). A locked file says who holds it, for the message that others get.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from inference.errors import InputError, PublishError

HOLDER_BYTES = 300


class NoLocks(InputError):
    """A file system that has no `flock`, as some network and FUSE mounts."""


def take(file: IO[Any], wait: bool = False, shared: bool = False) -> bool:
    """Whether an open file's lock is ours now; it stays so until the file is closed. False: another process holds it.

    shared: beside others that share it. Raises NoLocks where the file system has none.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as e:
        raise NoLocks(
            f"{file.name}: this file system has no locks ({e.strerror}); choose an output on one that has"
        ) from None
    return True


@contextmanager
def hold(file: IO[Any], doing: str, busy: Callable[[str], PublishError]) -> Iterator[None]:
    """Hold the lock of a file that is open for reading and writing, which says what is done meanwhile, and by whom.

    busy: makes the error to raise if another process holds it, of what that one is doing, "" if it did not say yet.
    Raises NoLocks as `take` does.
    """
    handle = file.fileno()
    if not take(file):
        said = os.pread(handle, HOLDER_BYTES, 0).decode(errors="replace")
        raise busy("".join(c for c in said if c.isprintable()))
    with suppress(OSError):  # a full disk is no reason to stop here
        os.ftruncate(handle, 0)
        os.write(handle, f"{doing}, process {os.getpid()} on {platform.node()}".encode())
    try:
        yield
    finally:
        with suppress(OSError):
            os.ftruncate(handle, 0)


@contextmanager
def repo_lock(cache: Path, endpoint: str, repo: str) -> Iterator[None]:
    """One publisher on this machine at a time for a repo of the Hub, from whatever output folder: the lock of an output
    folder cannot see another one. Between machines the parent of a commit decides, and so it does here where no lock file
    can be written, or none be locked.

    cache: of `hf`, which all projects of a user share. Raises InputError if another process holds it.
    """
    name = hashlib.sha256(f"{endpoint} {repo.lower()}".encode()).hexdigest()[:32]
    path = cache / ".locks" / "publish" / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - closed below
    except OSError:
        yield
        return

    def busy(who: str) -> InputError:
        told = f" ({who})" if who else ""
        return InputError(f"{repo}: another publish on this machine is pushing to it{told}; wait for it to end")

    with file, ExitStack() as held:
        with suppress(NoLocks):
            held.enter_context(hold(file, "push", busy))
        yield
