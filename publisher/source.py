"""Texts that a measurement or a calibration runs over: the package's own in publisher/data, or a user's file. No MLX."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from inference.errors import InputError

MAX_TEXT_BYTES = 32 << 20


@dataclass(frozen=True)
class Source:
    """A text as it was read: where it is named, and its bytes' hash."""

    where: str
    text: str
    sha256: str


def read_source(path: Path | None, where: str, packaged: str) -> Source:
    """The user's file, or the package's own. where: the key that names it, for messages. Raises InputError."""
    try:
        if path is None:
            data = files("publisher").joinpath("data", packaged).read_bytes()
        else:
            if path.stat().st_size > MAX_TEXT_BYTES:
                raise InputError(f"{where}: {path.name} is larger than {MAX_TEXT_BYTES} bytes")
            data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        name = path.name if path else packaged
        raise InputError(f"{where}: {name}:{line}: found byte {e.object[e.start]:#x}, expected UTF-8") from None
    except OSError as e:
        raise InputError(f"{where}: {path or packaged}: {e.strerror}") from None
    return Source(where, text, sha256(data).hexdigest())
