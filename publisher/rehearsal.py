"""`publish hub`: the built-in hub with one user, as a command."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from inference.errors import InputError

from .localhub import Fault, FolderInUse, run

DEFAULT_TOKEN = "rehearsal"  # noqa: S105 - guards nothing but a folder on this machine; set PUBLISH_HUB_TOKEN for a secret one


def serve(folder: Path, port: int, user: str, faults: Sequence[str] = (), xet: bool = True) -> None:
    """Serve until interrupted. faults: see `localhub.faults`. Raises InputError if the folder or the port is taken, or for
    a fault that is none."""
    token = os.environ.get("PUBLISH_HUB_TOKEN") or DEFAULT_TOKEN
    try:
        run(folder, "127.0.0.1", port, {token: f"write:{user}"}, [Fault.parse(f) for f in faults], xet)
    except (ValueError, FolderInUse) as e:
        raise InputError(str(e)) from None
    except OSError as e:
        if e.filename is not None:  # a socket has none
            raise InputError(f"{folder}: cannot be the hub's folder: {e.strerror}") from None
        raise InputError(f"cannot serve on port {port}: {e.strerror}; --port 0 takes a free one") from None
