"""Xet's two wire formats, xorb and shard, and its hashes. Pure: bytes in, values out; memory bounded by one chunk.

A file is cut into chunks; chunks travel compressed in xorbs; a shard says which ranges of which xorbs make a file.
All of it is untrusted: every length is checked before it is used, and what does not fit raises XetFormatError.

A hash is 32 bytes, written as four little-endian 64-bit words in hex (`to_hex`); a sha256 in a shard is packed likewise.

Source: the Xet protocol specification (xorb, shard, hashing), read in mid-2026.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import lz4.frame
from blake3 import blake3

XORB_BYTES = 64 << 20  # the protocol's limit; clients fill it with chunks and do not count their headers
XORB_CHUNKS = 8192
CHUNK_BYTES = 128 << 10  # of data; a compressed chunk that would be larger is stored as it is
MORE_BYTES = 2 << 20  # of headers, and of the footer that older clients write and nobody needs
SHARD_BYTES = 64 << 20
SHARD_TERMS = 100_000  # of all files of a shard; the largest file the Hub takes needs 8,000 xorbs
DEDUP_MODULUS = 1024  # a client asks about a chunk if its hash is a multiple of this, and about each file's first

_CHUNK = struct.Struct("<B3sB3s")  # version, compressed length, scheme, length
_FOOTER_TAG = b"XETBLOB"
_SHARD_TAG = b"HFRepoMetaData\0" + bytes.fromhex("5569 6745 6a7b 8157 83a5 bdd9 5ccd d14a a9")
_SHARD_HEADER = struct.Struct("<32sQQ")  # tag, version, footer's length
_ENTRY = 48  # bytes of every entry of a shard: a hash and 16 more
_WORDS = struct.Struct("<32s4I")
_FOOTER = struct.Struct("<9Q32s2Q48s4Q")
_BOOKEND = b"\xff" * 32
_WITH_CHECKS, _WITH_SHA256 = 1 << 31, 1 << 30  # file flags

_CHUNK_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
_NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
_RANGE_KEY = bytes.fromhex("7f1857d6ce56ed66127ff913e7a5c3f3a4cd26d5b5db49e64124987f28fb94c3")


class XetFormatError(ValueError):
    """Not a xorb or shard as the protocol has it; one line."""


@dataclass(frozen=True)
class Chunk:
    """One chunk of a xorb; `end` is the offset behind it in the serialized xorb."""

    hash: str
    nbytes: int
    end: int


@dataclass(frozen=True)
class Term:
    """Chunks [start, end) of a xorb, `nbytes` of data; `check` is the hash of those chunks' hashes, if given."""

    xorb: str
    start: int
    end: int
    nbytes: int
    check: str | None = None


@dataclass(frozen=True)
class FileInfo:
    """A file as a shard describes it. `sha256` as everyone else writes it."""

    hash: str
    terms: tuple[Term, ...]
    sha256: str | None

    @property
    def nbytes(self) -> int:
        return sum(term.nbytes for term in self.terms)


# -- hashes ---------------------------------------------------------------------------------------------------


def to_hex(raw: bytes) -> str:
    return b"".join(raw[n : n + 8][::-1] for n in range(0, 32, 8)).hex()


def from_hex(text: str) -> bytes:
    return b"".join(bytes.fromhex(text[n : n + 16])[::-1] for n in range(0, 64, 16))


def chunk_hash(data: bytes) -> str:
    return to_hex(blake3(data, key=_CHUNK_KEY).digest())


def xorb_hash(chunks: Sequence[tuple[str, int]]) -> str:
    """Root of the tree over (hash, bytes) of the chunks; a node has 2 to 9 children, cut where a hash says so."""
    nodes = list(chunks)
    while len(nodes) > 1:
        nodes = [_merge(group) for group in _groups(nodes)]
    return nodes[0][0] if nodes else "0" * 64


def file_hash(chunks: Sequence[tuple[str, int]]) -> str:
    return to_hex(blake3(from_hex(xorb_hash(chunks)), key=bytes(32)).digest()) if chunks else "0" * 64


def range_hash(hashes: Sequence[str]) -> str:
    return to_hex(blake3(b"".join(map(from_hex, hashes)), key=_RANGE_KEY).digest())


def asks_about(chunk: str) -> bool:
    """Whether clients ask if this chunk is known, wherever it is in a file."""
    return int(chunk[48:], 16) % DEDUP_MODULUS == 0


def _groups(nodes: list[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    start = 0
    while start < len(nodes):
        last = min(len(nodes), start + 9)
        cut = next((n + 1 for n in range(start + 2, last) if int(nodes[n][0][48:], 16) % 4 == 0), last)
        yield nodes[start:cut]
        start = cut


def _merge(group: list[tuple[str, int]]) -> tuple[str, int]:
    text = "".join(f"{name} : {nbytes}\n" for name, nbytes in group)
    return to_hex(blake3(text.encode(), key=_NODE_KEY).digest()), sum(nbytes for _, nbytes in group)


# -- xorbs ----------------------------------------------------------------------------------------------------


def read_chunks(stream: BinaryIO, nbytes: int) -> Iterator[tuple[bytes, int]]:
    """(data, offset behind the chunk) of each chunk in the next `nbytes` of the stream; stops at a footer."""
    at = 0
    while at < nbytes:
        header = stream.read(_CHUNK.size)
        if header.startswith(_FOOTER_TAG):
            return
        if len(header) < _CHUNK.size:
            raise XetFormatError(f"xorb: chunk header cut short at byte {at}")
        version, packed, scheme, length = _CHUNK.unpack(header)
        packed_bytes, length_bytes = int.from_bytes(packed, "little"), int.from_bytes(length, "little")
        if version != 0:
            raise XetFormatError(f"xorb: chunk version {version} at byte {at}, expected 0")
        if not 0 < length_bytes <= CHUNK_BYTES or not 0 < packed_bytes <= CHUNK_BYTES:
            raise XetFormatError(f"xorb: chunk of {packed_bytes} → {length_bytes} bytes at byte {at}")
        at += _CHUNK.size + packed_bytes
        data = stream.read(packed_bytes)
        if at > nbytes or len(data) < packed_bytes:
            raise XetFormatError(f"xorb: chunk cut short at byte {at - packed_bytes}")
        yield _unpack(data, scheme, length_bytes), at


def _unpack(data: bytes, scheme: int, length: int) -> bytes:
    if scheme not in (0, 1, 2):
        raise XetFormatError(f"xorb: compression scheme {scheme}, expected 0, 1 or 2")
    if scheme:
        decoder = lz4.frame.LZ4FrameDecompressor()
        try:
            # One byte more than announced is enough to know that there are too many.
            data = decoder.decompress(data, max_length=length + 1)
        except (RuntimeError, EOFError) as e:
            raise XetFormatError("xorb: a chunk is not LZ4") from e
    if len(data) != length:
        raise XetFormatError(f"xorb: a chunk has not the {length} bytes it announces")
    return _ungroup(data) if scheme == 2 else data


def _ungroup(data: bytes) -> bytes:
    """Undo the grouping of every 4th byte."""
    out, at = bytearray(len(data)), 0
    for n in range(4):
        size = (len(data) - n + 3) // 4
        out[n::4] = data[at : at + size]
        at += size
    return bytes(out)


def index_xorb(stream: BinaryIO, nbytes: int) -> list[Chunk]:
    """Every chunk of a xorb, decompressed and hashed."""
    chunks = []
    for data, end in read_chunks(stream, nbytes):
        if len(chunks) == XORB_CHUNKS:
            raise XetFormatError(f"xorb: more than {XORB_CHUNKS} chunks")
        chunks.append(Chunk(chunk_hash(data), len(data), end))
    if not chunks:
        raise XetFormatError("xorb: no chunks")
    if chunks[-1].end - _CHUNK.size * len(chunks) > XORB_BYTES:
        raise XetFormatError(f"xorb: more than {XORB_BYTES} bytes")
    return chunks


# -- shards ---------------------------------------------------------------------------------------------------


def read_shard(raw: bytes) -> list[FileInfo]:
    """The files of a shard. What it says of xorbs is not used: the hub has looked at them itself."""
    if len(raw) < _SHARD_HEADER.size or raw[:32] != _SHARD_TAG:
        raise XetFormatError("shard: no header")
    _, version, footer = _SHARD_HEADER.unpack_from(raw)
    if version != 2 or footer not in (0, _FOOTER.size):
        raise XetFormatError(f"shard: version {version} with a footer of {footer} bytes")
    files, at, terms_seen = [], _SHARD_HEADER.size, 0
    while (entry := _entry(raw, at))[0] != _BOOKEND:
        name, flags, count, _, _ = entry
        checks, sha256 = bool(flags & _WITH_CHECKS), bool(flags & _WITH_SHA256)
        size = _ENTRY * (1 + count * (2 if checks else 1) + sha256)
        if at + size > len(raw):
            raise XetFormatError(f"shard: file entry at byte {at} leads past the end")
        terms_seen += count
        if terms_seen > SHARD_TERMS:
            raise XetFormatError(f"shard: more than {SHARD_TERMS} terms")
        terms = tuple(_term(raw, at, n, count, checks) for n in range(count))
        digest = to_hex(raw[at + size - _ENTRY : at + size - _ENTRY + 32]) if sha256 else None
        files.append(FileInfo(to_hex(name), terms, digest))
        at += size
    at += _ENTRY
    while (entry := _entry(raw, at))[0] != _BOOKEND:
        at += _ENTRY * (1 + entry[2])
    return files


def _entry(raw: bytes, at: int) -> tuple[bytes, int, int, int, int]:
    if at + _ENTRY > len(raw):
        raise XetFormatError("shard: a section has no end")
    return _WORDS.unpack_from(raw, at)


def _term(raw: bytes, at: int, n: int, count: int, checks: bool) -> Term:
    name, _, nbytes, start, end = _entry(raw, at + _ENTRY * (1 + n))
    if not start < end <= XORB_CHUNKS or not 0 < nbytes <= (end - start) * CHUNK_BYTES:
        raise XetFormatError(f"shard: chunks {start} to {end} with {nbytes} bytes")
    check = to_hex(_entry(raw, at + _ENTRY * (1 + count + n))[0]) if checks else None
    return Term(to_hex(name), start, end, nbytes, check)


def write_shard(xorb: str, chunks: Sequence[Chunk], created_s: int, expiry_s: int) -> bytes:
    """A shard without files that tells a client what is in one xorb."""
    bookend = _BOOKEND + bytes(16)
    total = sum(chunk.nbytes for chunk in chunks)
    parts = [_SHARD_HEADER.pack(_SHARD_TAG, 2, _FOOTER.size), bookend]
    parts.append(_WORDS.pack(from_hex(xorb), 0, len(chunks), total, chunks[-1].end))
    start = 0
    for chunk in chunks:
        parts.append(_WORDS.pack(from_hex(chunk.hash), start, chunk.nbytes, 0, 0))
        start += chunk.nbytes
    parts.append(bookend)
    files_at, xorbs_at = _SHARD_HEADER.size, _SHARD_HEADER.size + _ENTRY
    end = sum(map(len, parts))
    lookups = (end, 0) * 3  # of files, xorbs and chunks: all empty
    sizes = (chunks[-1].end, total, total)
    footer = (1, files_at, xorbs_at, *lookups, bytes(32), created_s, expiry_s, bytes(48), *sizes, end)
    return b"".join([*parts, _FOOTER.pack(*footer)])
