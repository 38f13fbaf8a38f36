"""Safetensors shards written strictly front to back, with a journal that survives being killed.

Every stored tensor's size is known before the first weight is read, so that names, headers and offsets of all shards
are fixed up front and writing is appending: bytes go into the file, into its sha256 and nowhere else. After each weight
the journal gets one line with the hashes of what was written. A file's hash is the sha256 that the Hub knows it by; a
tensor's is only ours and is BLAKE3, several times as fast. `ShardWriter.resume` re-hashes what an earlier run left,
keeps the longest prefix that agrees with the journal and cuts off the rest, so that a run that was killed and one that
was not leave the same bytes.

    staging/journal.jsonl      first line: identity of the run; then one line a weight
    staging/files/             what becomes the variant's folder
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from blake3 import blake3

from inference.checkpoint import ITEMSIZE, count

SHARD_BYTES = 5_000_000_000  # header included; mlx-lm cuts at 5 << 30
READ_BYTES = 8 << 20  # a block when re-hashing
MTP_FILE = "mtp.safetensors"

Part = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape


@dataclass(frozen=True)
class Stored:
    """One stored tensor: its shard (index into the layout) and absolute byte range."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One file of the layout: header bytes (length prefix included) and whole size."""

    name: str
    header: bytes
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """All files of a variant. groups: the stored tensors of each weight, consecutive in one file."""

    shards: tuple[Shard, ...]
    groups: tuple[tuple[Stored, ...], ...]

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.shards)


@dataclass(frozen=True)
class Record:
    """A journal line: a weight that is complete, BLAKE3 of its source bytes and of each stored tensor, in hex."""

    target: str
    source: str
    blake3: tuple[str, ...]


def plan_layout(groups: Sequence[Sequence[Part]], max_bytes: int = SHARD_BYTES, sidecar: Iterable[int] = ()) -> Layout:
    """Place weights into shards in the order given, greedily; a group that exceeds max_bytes gets a shard of its own.

    sidecar: indices of groups that go into MTP_FILE instead.
    """
    aside = set(sidecar)
    bins: list[list[int]] = []
    room = 0
    for i, group in enumerate(groups):
        if i in aside:
            continue
        nbytes = sum(_nbytes(p) + len(p[0]) + 160 for p in group)  # 160: bound of a header entry without its name
        if not bins or nbytes > room:
            bins.append([])
            room = max_bytes - 64
        bins[-1].append(i)
        room -= nbytes
    n = len(bins)
    names = ["model.safetensors"] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    if aside:
        bins.append(sorted(aside))
        names.append(MTP_FILE)
    shards: list[Shard] = []
    placed: dict[int, tuple[Stored, ...]] = {}
    for name, members in zip(names, bins, strict=True):
        header, offset = _header([p for i in members for p in groups[i]]), 0
        for i in members:
            stored = []
            for part in groups[i]:
                start = len(header) + offset
                stored.append(Stored(*part, len(shards), start, start + _nbytes(part)))
                offset += _nbytes(part)
            placed[i] = tuple(stored)
        shards.append(Shard(name, header, len(header) + offset))
    return Layout(tuple(shards), tuple(placed[i] for i in range(len(groups))))


def _nbytes(part: Part) -> int:
    return ITEMSIZE[part[1]] * count(part[2])


def _header(parts: Iterable[Part]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for part in parts:
        name, dtype, shape = part
        end = offset + _nbytes(part)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    blob = json.dumps(entries, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    return len(blob).to_bytes(8, "little") + blob


class ShardWriter:
    """Appends the stored tensors of one variant, in layout order, into staging/files.

    `resume` first; then for each weight `append` its bytes (weight, scales, biases) and `commit` its record; then
    `close`. Not for more than one thread at a time.
    """

    def __init__(self, staging: Path, layout: Layout, targets: Sequence[str], identity: dict[str, Any]) -> None:
        """targets: one name a group of the layout. identity: whatever the bytes depend on; another one starts over."""
        self.staging, self.layout, self.targets, self.identity = staging, layout, targets, identity
        self.folder, self.journal = staging / "files", staging / "journal.jsonl"
        self.records: list[Record] = []
        self.written = 0
        self._sha = [hashlib.sha256() for _ in layout.shards]
        self._position = [0] * len(layout.shards)
        self._open: dict[int, IO[bytes]] = {}
        self._log: IO[bytes] | None = None

    def resume(self) -> int:
        """Keep what an earlier run with the same identity completed; returns the number of weights kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for record, group, target in zip(self._read_journal(), self.layout.groups, self.targets, strict=False):
            if record.target != target or not self._keep(record, group):
                break
            self.records.append(record)
        self._close_all()
        wanted = {self.layout.shards[i].name for i, n in enumerate(self._position) if n}
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in wanted:
                path.unlink()
        for i, n in enumerate(self._position):
            if n:
                os.truncate(self.folder / self.layout.shards[i].name, n)
        self._rewrite_journal()
        return len(self.records)

    def append(self, shard: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        handle = self._handle(shard)
        self._sha[shard].update(view)
        self._write(handle, view)
        self._position[shard] += len(view)
        self.written += len(view)

    def commit(self, record: Record) -> None:
        """Note a weight as complete, once all of its bytes are in the file. (Not on the disk: a journal is believed only
        as far as the file's bytes hash as it says.)"""
        group = self.layout.groups[len(self.records)]
        shard = group[0].shard
        if record.target != self.targets[len(self.records)] or self._position[shard] != group[-1].end:
            raise AssertionError(f"{record.target}: at {self._position[shard]}, layout says {group[-1].end}")
        if self._position[shard] == self.layout.shards[shard].nbytes:
            self._open.pop(shard).close()
        if self._log is None:
            self._log = open(self.journal, "ab", buffering=0)  # noqa: SIM115 - open across calls
        self._log.write(_line({"target": record.target, "source": record.source, "blake3": list(record.blake3)}))
        self.records.append(record)

    def close(self) -> None:
        self._close_all()
        if self._log is not None:
            self._log.close()
            self._log = None

    def shard_hashes(self) -> list[tuple[str, int, str]]:
        """(name, bytes, sha256) of every shard, once all weights are written."""
        return [(s.name, s.nbytes, h.hexdigest()) for s, h in zip(self.layout.shards, self._sha, strict=True)]

    def _handle(self, shard: int) -> IO[bytes]:
        if shard not in self._open:
            self._open[shard] = handle = open(self.folder / self.layout.shards[shard].name, "ab", buffering=0)  # noqa: SIM115 - open across calls
            if not self._position[shard]:
                header = self.layout.shards[shard].header
                self._write(handle, memoryview(header))
                self._sha[shard].update(header)
                self._position[shard] = len(header)
        return self._open[shard]

    @staticmethod
    def _write(handle: IO[bytes], view: memoryview) -> None:
        while view:
            view = view[handle.write(view) :]

    def _keep(self, record: Record, group: tuple[Stored, ...]) -> bool:
        """Whether the group's bytes are in the file and hash as recorded; if so the file's own hash moves past them."""
        shard = group[0].shard
        sha, position = self._sha[shard].copy(), self._position[shard]
        try:
            if shard not in self._open:
                self._open[shard] = open(self.folder / self.layout.shards[shard].name, "rb", buffering=0)  # noqa: SIM115
            handle = self._open[shard]
            if position == 0:
                header = self.layout.shards[shard].header
                if handle.read(len(header)) != header:
                    return False
                sha.update(header)
            if len(record.blake3) != len(group):
                return False
            for stored, expected in zip(group, record.blake3, strict=True):
                own, left = blake3(), stored.end - stored.start
                while left:
                    block = handle.read(min(left, READ_BYTES))
                    if not block:
                        return False
                    own.update(block)
                    sha.update(block)
                    left -= len(block)
                if own.hexdigest() != expected:
                    return False
        except FileNotFoundError:
            return False
        self._sha[shard], self._position[shard] = sha, group[-1].end
        return True

    def _read_journal(self) -> list[Record]:
        try:
            lines = self.journal.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        records: list[Record] = []
        try:
            if not lines or json.loads(lines[0]) != json.loads(_line(self.identity)):
                return []
            for line in lines[1:]:
                if not line.endswith(b"\n"):
                    break  # torn by the kill
                entry = json.loads(line)
                records.append(Record(entry["target"], entry["source"], tuple(entry["blake3"])))
        except (ValueError, KeyError, TypeError):
            pass  # keep what was read: every record is checked against the bytes anyway
        return records

    def _rewrite_journal(self) -> None:
        temp = self.journal.with_suffix(".tmp")
        with open(temp, "wb") as f:
            f.write(_line(self.identity))
            for r in self.records:
                f.write(_line({"target": r.target, "source": r.source, "blake3": list(r.blake3)}))
        os.replace(temp, self.journal)

    def _close_all(self) -> None:
        for handle in self._open.values():
            handle.close()
        self._open.clear()


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
