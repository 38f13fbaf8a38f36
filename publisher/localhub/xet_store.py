"""What Xet adds to the hub's folder: xorbs as they came, and how files are put together from them.

    FOLDER/xet/xorbs/ab/<xorb hash>           the serialized xorb, moved into place last
    FOLDER/xet/xorbs/ab/<xorb hash>.json      its chunks: [[hash, bytes, end]]
    FOLDER/xet/files/ab/<file hash>.json      {"sha256", "nbytes", "terms": [[xorb, start, end, bytes]]}
    FOLDER/xet/sha256/ab/<sha256>             the file hash
    FOLDER/xet/chunks/ab/<chunk hash>         the xorb that holds it; only chunks that clients ask about

A file is put together when its shard comes: so its sha256 is known and not believed, and from then on it is an LFS
file like any other, for clients with and without Xet. (It takes its size twice; a rehearsal can afford that.)
Killed at any moment, the folder holds a xorb or file whole or not at all, as `store.py` has it.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from publisher.localhub.store import Store, dump
from publisher.localhub.xet_format import (
    Chunk,
    FileInfo,
    Term,
    XetFormatError,
    asks_about,
    file_hash,
    index_xorb,
    range_hash,
    read_chunks,
    xorb_hash,
)


@dataclass(frozen=True)
class XetFile:
    sha256: str
    nbytes: int
    terms: tuple[Term, ...]


class XetStore:
    """Calls block and are safe from several threads: all a file ever holds is what its name says."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = store.folder / "xet"
        self._index = functools.lru_cache(maxsize=64)(self._read_index)  # a xorb never changes

    # -- xorbs --------------------------------------------------------------------------------------------------

    def xorb_path(self, xorb: str) -> Path:
        return self._path("xorbs", xorb)

    def chunks(self, xorb: str) -> list[Chunk]:
        """Raises XetFormatError if the xorb is not here."""
        if not self.xorb_path(xorb).exists():
            raise XetFormatError(f"xorb {xorb} has not been uploaded")
        return self._index(xorb)

    def keep_xorb(self, temp: Path, xorb: str) -> bool:
        """Check a received xorb and move it into place; False if it is there already."""
        if self.xorb_path(xorb).exists():
            return False
        with temp.open("rb") as stream:
            chunks = index_xorb(stream, temp.stat().st_size)
        found = xorb_hash([(chunk.hash, chunk.nbytes) for chunk in chunks])
        if found != xorb:
            raise XetFormatError(f"xorb: its hash is {found}, announced {xorb}")
        self._store.write(self._index_path(xorb), dump([[c.hash, c.nbytes, c.end] for c in chunks]))
        path = self.xorb_path(xorb)
        temp.replace(path)
        for chunk in chunks:
            if asks_about(chunk.hash):
                self._store.write(self._path("chunks", chunk.hash), xorb.encode())
        return True

    def xorb_with(self, chunk: str) -> str | None:
        """A xorb that holds this chunk, if it is one that clients ask about."""
        xorb = self._read("chunks", chunk)
        return xorb if xorb and self.xorb_path(xorb).exists() else None

    def _read_index(self, xorb: str) -> list[Chunk]:
        return [Chunk(*item) for item in json.loads(self._index_path(xorb).read_bytes())]

    def _index_path(self, xorb: str) -> Path:
        path = self.xorb_path(xorb)
        return path.with_name(path.name + ".json")

    # -- files --------------------------------------------------------------------------------------------------

    def hash_of(self, sha256: str) -> str | None:
        """The file hash of an LFS file that came through Xet."""
        return self._read("sha256", sha256)

    def file(self, name: str) -> XetFile | None:
        try:
            value: dict[str, Any] = json.loads(self._file_path(name).read_bytes())
        except FileNotFoundError:
            return None
        terms = tuple(Term(*item) for item in value["terms"])
        return XetFile(value["sha256"], value["nbytes"], terms)

    def keep_file(self, info: FileInfo) -> None:
        """Put a file together from its xorbs, check it against all that the shard says of it, and keep it.

        Raises XetFormatError for what does not fit, OSError if the disk is full.
        """
        known = self.file(info.hash)
        if known and info.sha256 in (None, known.sha256) and self._store.lfs_file(known.sha256):
            self._remember(info, known.sha256)
            return
        # A shard of a few kilobytes can name a file of many terabytes.
        if info.nbytes > shutil.disk_usage(self._store.folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temp = self._store.temp()
        try:
            with temp.open("wb") as out:
                sha256 = self._write(info, out)
            if info.sha256 not in (None, sha256):
                raise XetFormatError(f"file {info.hash}: sha256 is {sha256}, announced {info.sha256}")
            self._store.keep_lfs(temp, sha256)
        finally:
            temp.unlink(missing_ok=True)
        self._remember(info, sha256)

    def _write(self, info: FileInfo, out: BinaryIO) -> str:
        """Its sha256."""
        digest, leaves = hashlib.sha256(), []
        for term in info.terms:
            chunks = self.chunks(term.xorb)[term.start : term.end]
            if len(chunks) != term.end - term.start or sum(chunk.nbytes for chunk in chunks) != term.nbytes:
                raise XetFormatError(f"file {info.hash}: xorb {term.xorb} has no such chunks")
            if term.check and term.check != range_hash([chunk.hash for chunk in chunks]):
                raise XetFormatError(f"file {info.hash}: other chunks in xorb {term.xorb} than announced")
            leaves += [(chunk.hash, chunk.nbytes) for chunk in chunks]
            for data in self._data(term):
                digest.update(data)
                out.write(data)
        if file_hash(leaves) != info.hash:
            raise XetFormatError(f"file {info.hash}: its hash is {file_hash(leaves)}")
        return digest.hexdigest()

    def _data(self, term: Term) -> Iterator[bytes]:
        start, end = self.byte_range(term)
        with self.xorb_path(term.xorb).open("rb") as stream:
            stream.seek(start)
            for data, _ in read_chunks(stream, end - start):
                yield data

    def byte_range(self, term: Term) -> tuple[int, int]:
        """Where the chunks of a term are in the serialized xorb: [start, end)."""
        chunks = self.chunks(term.xorb)
        return (chunks[term.start - 1].end if term.start else 0), chunks[term.end - 1].end

    def _remember(self, info: FileInfo, sha256: str) -> None:
        terms = [[term.xorb, term.start, term.end, term.nbytes] for term in info.terms]
        value = {"sha256": sha256, "nbytes": info.nbytes, "terms": terms}
        self._store.write(self._file_path(info.hash), dump(value))
        self._store.write(self._path("sha256", sha256), info.hash.encode())
        for term in info.terms[:1]:
            self._store.write(self._path("chunks", self.chunks(term.xorb)[term.start].hash), term.xorb.encode())

    def _file_path(self, name: str) -> Path:
        path = self._path("files", name)
        return path.with_name(path.name + ".json")

    # -- parts --------------------------------------------------------------------------------------------------

    def _read(self, kind: str, name: str) -> str | None:
        try:
            return self._path(kind, name).read_text()
        except FileNotFoundError:
            return None

    def _path(self, kind: str, name: str) -> Path:
        """No name leads outside the folder: it is 64 hex digits."""
        assert len(name) == 64
        assert set(name) <= set("0123456789abcdef")
        return self._folder / kind / name[:2] / name
