"""Safetensors checkpoints without MLX: headers, index, config, byte ranges, and the formats of packed weights.

Planning, verifying and streaming all start here. Headers are read and checked, tensors are read by byte range with
`pread` (never mapped, so resident memory is what the caller asked for). Nothing is trusted: a header that overlaps,
points outside its file or names a tensor twice is one `CheckpointError`.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .strict import parse_json, read_file

MAX_HEADER_BYTES = 25 << 20  # the Hub's own limit; the safetensors library takes 100 MB
MAX_JSON_BYTES = 50_000_000  # config.json and index of the largest published models are below 10 MB

# bytes of one element; the names are those of the safetensors format
ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
FLOATS = ("F16", "BF16", "F32")
CONFIG_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # as a config.json names them
MAX_LAYERS = 10_000  # far above any model; bounds what a hostile config can make us build
INDEX = "model.safetensors.index.json"
MAX_NAME = 1000  # characters of a tensor's name
MAX_RANK = 16  # axes of a tensor; published ones have 5 at most

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
# MLX's float formats: mode -> (bits, group size); scales are one byte a group, there are no biases
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
MODES = ("affine", *FLOAT_MODES)


@dataclass(frozen=True, order=True)
class QuantSpec:
    """The stored format of one quantized matrix, as `mx.quantize` takes it.

    bits per code, group_size in weights of one row, mode one of MODES. Raises CheckpointError for a combination
    that MLX has no kernel for.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise CheckpointError(f"quantization mode {self.mode!r} is unknown; allowed: {', '.join(MODES)}")
        if self.mode in FLOAT_MODES:
            if (self.bits, self.group_size) != FLOAT_MODES[self.mode]:
                bits, group = FLOAT_MODES[self.mode]
                raise CheckpointError(
                    f"{self.mode} has {bits} bits in groups of {group}, not {self.bits} in groups of {self.group_size}"
                )
        elif self.bits not in AFFINE_BITS:
            raise CheckpointError(f"{self.bits} bits: allowed are {', '.join(map(str, AFFINE_BITS))}")
        elif self.group_size not in AFFINE_GROUPS:
            raise CheckpointError(f"group size {self.group_size}: allowed are {', '.join(map(str, AFFINE_GROUPS))}")

    def parts(self, name: str, shape: tuple[int, ...], dtype: str = "BF16") -> list[tuple[str, str, tuple[int, ...]]]:
        """The stored tensors of a weight: (name, dtype, shape), in the order weight, scales, biases.

        name ends in `.weight`; shape [..., K] is the unpacked one; dtype is that of affine scales and biases.
        Raises CheckpointError if K is no multiple of the group size.
        """
        *lead, k = shape
        if k % self.group_size:
            raise CheckpointError(f"{name}: {k} columns are no multiple of the group size {self.group_size}")
        stem = name.removesuffix(".weight")
        packed = (*lead, k * self.bits // 32)
        groups = (*lead, k // self.group_size)
        if self.mode != "affine":
            return [(name, "U32", packed), (f"{stem}.scales", "U8", groups)]
        return [(name, "U32", packed), (f"{stem}.scales", dtype, groups), (f"{stem}.biases", dtype, groups)]

    def nbytes(self, shape: tuple[int, ...], dtype: str = "BF16") -> int:
        """Stored bytes of a weight of this (unpacked) shape."""
        return sum(ITEMSIZE[d] * count(s) for _, d, s in self.parts("x.weight", shape, dtype))

    def label(self) -> str:
        return f"{self.bits}-bit" if self.mode == "affine" else self.mode


def count(shape: Iterable[int]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `file`, absolute byte range [start, end), dtype as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path = field(repr=False)
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def read(self, offset: int = 0, nbytes: int | None = None) -> bytearray:
        """Raw little-endian bytes of [offset, offset + nbytes) within the tensor.

        Raises CheckpointError if the file is shorter than its header said.
        """
        out = bytearray(self.nbytes - offset if nbytes is None else nbytes)
        view, done = memoryview(out), 0
        with open(self.file, "rb", buffering=0) as f:
            f.seek(self.start + offset)
            while done < len(out):
                got = f.readinto(view[done:])
                if not got:
                    raise CheckpointError(f"{self.file.name}: file ends inside tensor {self.name}")
                done += got
        return out


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files: config, tensors by name (from all shards), and whether they are in MLX layout."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    mlx: bool  # the shards declare `format: mlx`; decided by that declaration, never from a tensor's shape or values


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises CheckpointError."""
    data = read_file(path, MAX_JSON_BYTES)
    try:
        value = parse_json(data)
    except ValueError as e:
        raise CheckpointError(f"{path.name}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: found a {type(value).__name__}, expected an object")
    return value


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Tensors of one safetensors file, in file order, and its `__metadata__`. Raises CheckpointError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path.name}: is no regular file")
        size = status.st_size
        with open(path, "rb") as f:
            head = f.read(8)
            if len(head) < 8:
                raise CheckpointError(f"{path.name}: {size} bytes is too short for a safetensors file")
            (length,) = struct.unpack("<Q", head)
            if length > MAX_HEADER_BYTES or length + 8 > size:
                raise CheckpointError(f"{path.name}: header length {length} does not fit the file ({size} bytes)")
            blob = f.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from None
    try:
        header = parse_json(blob)
    except ValueError as e:
        raise CheckpointError(f"{path.name}: header is not valid JSON ({e})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path.name}: __metadata__ must map strings to strings")
    base = 8 + length
    tensors = [_tensor(path, name, entry, base, size) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.start, t.end))
    position = base
    for t in tensors:  # the format allows neither holes nor overlaps
        if t.start != position:
            raise CheckpointError(f"{path.name}: tensor {t.name} starts at {t.start}, expected {position}")
        position = t.end
    if position != size:
        raise CheckpointError(f"{path.name}: {size - position} bytes belong to no tensor")
    return tensors, metadata


def _tensor(path: Path, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    where = f"{path.name}: tensor {name}"
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise CheckpointError(f"{path.name}: tensor {name[:60]!r}: expected a name of printable characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise CheckpointError(f"{where}: dtype {str(dtype)[:40]!r} is unknown")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        good = isinstance(value, list) and len(value) <= MAX_RANK
        if not good or not all(type(d) is int and 0 <= d < 1 << 62 for d in value):
            raise CheckpointError(f"{where}: {key} must be a list of sizes, at most {MAX_RANK}")
    if len(offsets) != 2 or offsets[0] > offsets[1] or base + offsets[1] > size:
        raise CheckpointError(f"{where}: data_offsets {offsets} lie outside the file ({size} bytes)")
    if count(shape) * ITEMSIZE[dtype] != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {dtype} {shape} needs {count(shape) * ITEMSIZE[dtype]} bytes, found {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, base + offsets[0], base + offsets[1])


def read_checkpoint(folder: Path) -> Checkpoint:
    """Config and all tensors of a checkpoint folder, index and shards agreeing. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    check_links(folder, [folder / "config.json", folder / INDEX])
    config = read_json(folder / "config.json")
    tensors: dict[str, TensorInfo] = {}
    formats: set[str] = set()
    files = shard_files(folder)
    check_links(folder, files)
    for file in files:
        infos, metadata = read_header(file)
        formats.add(metadata.get("format", ""))
        for t in infos:
            if t.name in tensors:
                raise CheckpointError(f"{file.name}: tensor {t.name} is also in {tensors[t.name].file.name}")
            tensors[t.name] = t
    if "mlx" in formats and len(formats) > 1:
        raise CheckpointError(f"{folder.name}: some shards declare `format: mlx` and some do not")
    _check_index(folder, tensors)
    return Checkpoint(folder, config, tensors, formats == {"mlx"})


def check_links(folder: Path, files: Iterable[Path]) -> None:
    """Raises CheckpointError for a file of the folder that is a link out of it: it would be read, quantized and shipped.

    In a snapshot of the Hugging Face cache every file is a link into `blobs`, of the repo or of the whole cache.
    """
    roots = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":  # models--X/snapshots/COMMIT
        roots += [(parent / "blobs").resolve() for parent in folder.absolute().parents[1:3]]
    for path in files:
        try:
            real = path.resolve()
        except (OSError, RuntimeError, ValueError):  # a link to itself, a NUL in the name
            raise CheckpointError(f"{folder.name}/{path.name}: a link that leads nowhere") from None
        if not any(real.is_relative_to(root) for root in roots):
            raise CheckpointError(
                f"{folder.name}/{path.name}: links to {real}, outside the folder; copy the file itself"
            )


def shard_files(folder: Path) -> list[Path]:
    """The weight files: those the index names, else `model*.safetensors`. Raises CheckpointError."""
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index.name}: weight_map is missing or empty")
        names = sorted({str(v) for v in weight_map.values()})
        for name in names:
            if (
                name != os.path.basename(name)
                or name in ("", ".", "..")
                or "\\" in name
                or not name.isprintable()
                or not name.endswith(".safetensors")
            ):
                raise CheckpointError(
                    f"{index.name}: weight_map names {name!r}; expected a .safetensors file beside it"
                )
        return [folder / n for n in names]
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no model*.safetensors")
    return files


def _check_index(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    index = folder / INDEX
    if not index.is_file():
        return
    weight_map = read_json(index)["weight_map"]
    for name in sorted(weight_map.keys() | tensors.keys()):
        if name not in tensors:
            raise CheckpointError(f"{index.name}: {name} is in no shard")
        if name not in weight_map:
            raise CheckpointError(f"{tensors[name].file.name}: {name} is not in the index")
        if weight_map[name] != tensors[name].file.name:
            raise CheckpointError(f"{index.name}: {name} lies in {tensors[name].file.name}, not {weight_map[name]}")


def read_quantization(config: dict[str, Any]) -> tuple[QuantSpec | None, dict[str, QuantSpec | None]]:
    """The `quantization` block of an MLX config: (default format or None, format by module path).

    A module mapped to false is stored unquantized. Raises CheckpointError if the block is malformed or if
    `quantization_config`, where present, differs from it.
    """
    block = config.get("quantization")
    if block is None:
        return None, {}
    if not isinstance(block, dict):
        raise CheckpointError("config.json: quantization must be an object")
    if "quantization_config" in config and config["quantization_config"] != block:
        raise CheckpointError("config.json: quantization and quantization_config differ")
    modules: dict[str, QuantSpec | None] = {}
    for key, value in block.items():
        if isinstance(value, dict):
            modules[key] = _spec(key, value)
        elif value is False:
            modules[key] = None
    return _spec("quantization", block), modules


def _spec(where: str, entry: dict[str, Any]) -> QuantSpec:
    bits, group, mode = entry.get("bits"), entry.get("group_size"), entry.get("mode", "affine")
    if type(bits) is not int or type(group) is not int or not isinstance(mode, str):
        raise CheckpointError(f"config.json: {where}: bits and group_size must be integers, found {bits!r}, {group!r}")
    return QuantSpec(bits, group, mode)


def row_bands(info: TensorInfo, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges [r0, r1) over the leading axis, each of at most max_bytes (at least one row)."""
    rows = info.shape[0] if info.shape else 1
    per = max(1, info.nbytes // max(1, rows))
    step = max(1, max_bytes // per)
    for r in range(0, rows, step):
        yield r, min(rows, r + step)
