"""Reading GGUF as llama-imatrix writes it: fields and float32 tensors, of a file that may lie about all of it.

The gguf package follows whatever counts and lengths a file names: an array of 2^60 bytes in a file of 100 makes it
append empty items until memory is gone. Here everything is bounded by the file's own size before it is read, names and
keys may not appear twice, and tensors lie inside the file without overlapping.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little-endian, versions 2 and 3).
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from inference.errors import InputError

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_HEAD_BYTES = 64 << 20  # of fields and tensor infos together
MAX_KEYS = 4096  # an imatrix has 5, a whole model about 40
MAX_TENSORS = 200_000  # two a matrix: 100 layers hold about 3000
MAX_ITEMS = 1_000_000  # of one array
MAX_NAME_BYTES = 1 << 10  # of a key or a tensor's name; the format says 64 KiB and 64 B
MAX_AXES = 4  # GGML_MAX_DIMS
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
F32 = 0
TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 8: "Q8_0", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}


@dataclass(frozen=True)
class _Tensor:
    name: str
    axes: tuple[int, ...]  # the fastest first, as stored
    type: int
    offset: int  # within the data


def read_gguf(path: Path, suffixes: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Key/value fields (arrays as lists), and the float32 tensors whose names end so, as [rows, fastest axis].

    Memory: the head, and the tensors that are returned. Raises InputError, naming the file and the place.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: is no regular file")
        with open(path, "rb") as f:
            return _read(f, os.fstat(f.fileno()).st_size, path.name, suffixes)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None


def _read(f: BinaryIO, size: int, file: str, suffixes: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    head = _Head(f, size, file)
    if head.take(4, "magic") != MAGIC:
        raise head.fault("it does not begin with GGUF")
    if (version := head.number("I", "version")) not in VERSIONS:
        raise head.fault(f"version {version}, expected 2 or 3, little-endian")
    tensors, keys = head.count(MAX_TENSORS, "tensors"), head.count(MAX_KEYS, "keys")
    fields: dict[str, Any] = {}
    for _ in range(keys):
        key = head.text("key", MAX_NAME_BYTES)
        if key in fields:
            raise head.fault(f"key {key!r} appears twice")
        fields[key] = head.value(key)
    infos: dict[str, _Tensor] = {}
    for _ in range(tensors):
        info = _info(head)
        if info.name in infos:
            raise head.fault(f"tensor {info.name!r} appears twice")
        infos[info.name] = info
    align = fields.get("general.alignment", 32)
    if type(align) is not int or not 8 <= align <= 1 << 16 or align % 8:
        raise head.fault(f"general.alignment: found {align!r}, expected a multiple of 8")
    data = -(-head.position // align) * align
    wanted = [t for t in infos.values() if t.name.endswith(suffixes)]
    for t in wanted:
        if t.type != F32:
            raise InputError(f"{file}: {t.name}: type {TYPES.get(t.type, t.type)}, expected F32")
    _check_places(head, wanted, size - data, align)
    return fields, {t.name: _array(f, data, t, head) for t in wanted}


def _info(head: _Head) -> _Tensor:
    name = head.text("tensor name", MAX_NAME_BYTES)
    axes = head.number("I", name)
    if not 1 <= axes <= MAX_AXES:
        raise head.fault(f"{name!r}: {axes} axes, expected 1 to {MAX_AXES}")
    shape = tuple(head.number("Q", name) for _ in range(axes))
    kind, offset = head.number("I", name), head.number("Q", name)
    return _Tensor(name, shape, kind, offset)


def _check_places(head: _Head, tensors: Iterable[_Tensor], size: int, align: int) -> None:
    """Every tensor inside the data, none over another."""
    end, before = 0, ""
    for t in sorted(tensors, key=lambda t: (t.offset, t.name)):
        if not all(t.axes):
            raise head.fault(f"{t.name!r}: shape {list(t.axes)} holds nothing")
        nbytes = 4 * math.prod(t.axes)
        if t.offset % align or t.offset + nbytes > size:
            raise head.fault(f"{t.name!r}: {nbytes} bytes at {t.offset} lie outside the data ({max(size, 0)} bytes)")
        if t.offset < end:
            raise head.fault(f"{t.name!r} lies over {before!r}")
        end, before = t.offset + nbytes, t.name


def _array(f: BinaryIO, data: int, t: _Tensor, head: _Head) -> np.ndarray:
    f.seek(data + t.offset)
    raw = f.read(4 * math.prod(t.axes))
    if len(raw) != 4 * math.prod(t.axes):
        raise head.fault(f"ends inside {t.name!r}")  # it became shorter while it was read
    return np.frombuffer(raw, "<f4").astype(np.float32).reshape(-1, t.axes[0])


class _Head:
    """Reads forward over the head; every read is checked against the file and MAX_HEAD_BYTES before it is done."""

    def __init__(self, f: BinaryIO, size: int, file: str) -> None:
        self._f, self._file = f, file
        self._end = min(size, MAX_HEAD_BYTES)
        self.position = 0

    def fault(self, what: str) -> InputError:
        return InputError(f"{self._file}: no readable GGUF file ({what[:300]})")

    def take(self, nbytes: int, what: str) -> bytes:
        if nbytes > self._end - self.position:
            raise self.fault(f"{what}: {nbytes} bytes at {self.position}, the head ends at {self._end}")
        data = self._f.read(nbytes)
        if len(data) != nbytes:
            raise self.fault(f"ends inside {what}")
        self.position += nbytes
        return data

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}"), what))[0]

    def count(self, limit: int, what: str) -> int:
        n = self.number("Q", what)
        if n > limit:
            raise self.fault(f"{n} {what}, expected at most {limit}")
        return n

    def text(self, what: str, limit: int) -> str:
        n = self.number("Q", what)
        if n > limit:
            raise self.fault(f"{what}: {n} bytes at {self.position}, expected at most {limit}")
        try:
            return self.take(n, what).decode()
        except UnicodeDecodeError:
            raise self.fault(f"{what}: not UTF-8 at {self.position}") from None

    def value(self, key: str) -> Any:
        return self._value(self.number("I", key), key)

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.text(key, MAX_HEAD_BYTES)
        if kind == ARRAY:
            inner, n = self.number("I", key), self.number("Q", key)
            if n > MAX_ITEMS:
                raise self.fault(f"{key}: an array of {n} items, expected at most {MAX_ITEMS}")
            if inner in SCALARS:
                item = f"<{n}{SCALARS[inner]}"
                return list(struct.unpack(item, self.take(struct.calcsize(item), key)))
            if inner == STRING:
                return [self.text(key, MAX_HEAD_BYTES) for _ in range(n)]
            raise self.fault(f"{key}: an array of type {inner}, expected numbers or strings")
        if kind in SCALARS:
            return self.number(SCALARS[kind], key)
        raise self.fault(f"{key}: type {kind} is unknown")
