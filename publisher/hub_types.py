"""What goes to the Hub and comes from it, as values; and where the Hub is. Needs no client."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

HUGGING_FACE = "https://huggingface.co"


def default_endpoint() -> str:
    """The hub that commands speak to: HF_ENDPOINT, else the real one."""
    return (os.environ.get("HF_ENDPOINT") or HUGGING_FACE).rstrip("/")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repo. sha256: of an LFS file's bytes, else None; blob: git's sha1, of the pointer for LFS; xet: whether
    its bytes lie in Xet."""

    path: str
    size: int
    sha256: str | None
    blob: str
    xet: bool = False

    @property
    def identity(self) -> str:
        """What changes exactly when the bytes do."""
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Head:
    """What a revision holds."""

    commit: str
    private: bool
    files: dict[str, RemoteFile]


@dataclass(frozen=True)
class Commit:
    """One of a repo's history. title, message and author are what somebody wrote, or empty."""

    id: str
    title: str
    message: str
    author: str


@dataclass(frozen=True)
class Upload:
    """A file to commit. source: bytes for small files, so that what was hashed is what is sent."""

    path: str
    source: Path | bytes
    size: int
    sha256: str


@dataclass(frozen=True)
class Copy:
    """A file to commit whose bytes the hub has. repo None: the same one."""

    path: str
    repo: str | None
    commit: str
    source: str
