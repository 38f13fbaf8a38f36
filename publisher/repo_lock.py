"""One publisher on this machine at a time for a repo of the Hub, from whatever output folder.

The lock of an output folder (`store.Store.lock`) cannot see a second folder that pushes to the same repo. Between machines the
parent of a commit decides, and so it does here where no lock file can be written.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from inference.errors import InputError


@contextmanager
def repo_lock(cache: Path, endpoint: str, repo: str) -> Iterator[None]:
    """cache: of `hf`, which all projects of a user share. The kernel lets go of the lock when the process ends.

    Raises InputError if another process holds it.
    """
    name = hashlib.sha256(f"{endpoint} {repo.lower()}".encode()).hexdigest()[:32]
    path = cache / ".locks" / "publish" / f"{name}.lock"
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a"))
        except OSError:
            file = None
        if file is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(
                    f"{repo}: another publish on this machine is pushing to it; wait for it to end"
                ) from None
        yield
