"""Activation statistics from llama.cpp's importance matrix (GGUF), as E[x²] by MLX module path.

llama-imatrix stores, for every matrix, `<gguf name>.in_sum2` [nmat, K] (sums of squared activations of each input
channel) and `<gguf name>.counts` [nmat] (tokens summed), both float32; nmat is the number of experts for `*_exps`, else
1. A file says nothing of the model it came from, so that everything it can contradict is checked: number of blocks,
length of every vector, classes of tensors that have to be there.

Two things do not carry over as they are. `ssm_out` is in llama.cpp's tiled order of value heads ([r, nk, hd] for r
value heads a key head) and is put back into the original's ([nk, r, hd]). An expert that saw no token (count 0) takes
the mean over the experts of its matrix, weighted by their tokens; `Imatrix.counts` keeps the honest 0.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from inference.errors import InputError
from inference.families import family_of, names_of

from .gguf_file import read_gguf
from .statistics import Statistics, sha256_file
from .tables import Entry

# Tokens counted for one matrix. Published files stay below 1e8; float32 counts lose single tokens past 1.7e7.
MAX_COUNT = 1e12
BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Imatrix:
    """Statistics by module path.

    importance: E[x²] float32, [K] (stacked experts: [E, K]). counts: tokens counted, one number a matrix (stacked
    experts: one an expert). missing: modules of required classes for which the file holds nothing.
    """

    importance: dict[str, np.ndarray] = field(repr=False)
    counts: dict[str, np.ndarray] = field(repr=False)
    sha256: str
    datasets: tuple[str, ...]
    chunks: int | None
    chunk_size: int | None
    missing: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Largest number of tokens counted for any matrix."""
        return int(max(float(c.max()) for c in self.counts.values()))


def read_imatrix(path: Path, config: dict[str, Any]) -> Imatrix:
    """The statistics of an imatrix GGUF for the model of this config.json.

    Raises InputError, naming the file and the tensor, if the file is no imatrix, was made from another model, lacks a
    class of tensors, or holds counts or sums that cannot be.
    """
    fields, tensors = read_gguf(path, (".in_sum2", ".counts"))
    if fields.get("general.type") != "imatrix":
        raise InputError(f"{path.name}: general.type is {str(fields.get('general.type'))[:60]!r}, expected 'imatrix'")
    datasets, chunks, chunk_size = _origin(path, fields)
    family = importlib.import_module(f"quant.{family_of(config)}")
    names = names_of(config)
    cfg = names.read_config(config)
    shapes = {n.removesuffix(".weight"): s for n, s in names.text_shapes(cfg).items() if n.endswith(".weight")}
    stems = sorted({n.removesuffix(".in_sum2") for n in tensors if n.endswith(".in_sum2")})
    if not stems:
        raise InputError(f"{path.name}: holds no .in_sum2 tensor, expected one a matrix")
    _check_blocks(path, stems, cfg.num_hidden_layers, _mtp_layers(config))

    entries = {e.gguf: e for e in family.IMATRIX_NAMES}
    importance: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for stem in stems:
        entry, prefix = _entry(stem, entries, cfg.num_hidden_layers, family.LAYERS)
        if entry is None:
            continue
        for module in entry.modules:
            shape = shapes.get(prefix + module)
            if shape is None:
                continue  # of another kind of layer, or an output that this model ties to its embedding
            where = f"{path.name}: {stem}"
            mean, count = _mean_square(where, tensors[f"{stem}.in_sum2"], tensors.get(f"{stem}.counts"), shape)
            if entry.tiled:
                mean = untile(mean, cfg.linear_num_value_heads // cfg.linear_num_key_heads, cfg.linear_num_key_heads)
            importance[prefix + module], counts[prefix + module] = mean, count
    if not importance:
        raise InputError(f"{path.name}: none of its {len(stems)} matrices belongs to this model, e.g. {stems[0]}")
    missing = _missing(path, family.IMATRIX_NAMES, family.LAYERS, shapes, importance)
    return Imatrix(importance, counts, sha256_file(path), datasets, chunks, chunk_size, missing)


def _origin(path: Path, fields: Mapping[str, Any]) -> tuple[tuple[str, ...], int | None, int | None]:
    """What a file says of how it was made: texts, chunks, tokens a chunk."""
    datasets = fields.get("imatrix.datasets", [])
    if not isinstance(datasets, list) or not all(isinstance(d, str) for d in datasets):
        raise InputError(f"{path.name}: imatrix.datasets: found {str(datasets)[:60]}, expected strings")
    numbers = [fields.get(f"imatrix.{key}") for key in ("chunk_count", "chunk_size")]
    for key, value in zip(("chunk_count", "chunk_size"), numbers, strict=True):
        if value is not None and type(value) is not int:
            raise InputError(f"{path.name}: imatrix.{key}: found {str(value)[:60]}, expected a number")
    return tuple(datasets), numbers[0], numbers[1]


def untile(vector: np.ndarray, r: int, key_heads: int) -> np.ndarray:
    """Value-head channels from llama.cpp's order [r, nk, hd] to the original's [nk, r, hd]; r = 1 changes nothing."""
    return np.ascontiguousarray(vector.reshape(r, key_heads, -1).swapaxes(0, 1)).reshape(vector.shape)


def tile(vector: np.ndarray, r: int, key_heads: int) -> np.ndarray:
    """Inverse of `untile`."""
    return np.ascontiguousarray(vector.reshape(key_heads, r, -1).swapaxes(0, 1)).reshape(vector.shape)


def write_imatrix(
    path: Path,
    sums: Mapping[str, tuple[np.ndarray, np.ndarray]],
    datasets: Sequence[str] = (),
    chunks: int = 1,
    chunk_size: int = 512,
) -> None:
    """Write an imatrix as llama-imatrix does: `sums` maps a gguf weight name to (in_sum2 [nmat, K], counts [nmat])."""
    from gguf import GGUFWriter  # noqa: PLC0415 - half a second to import, and few commands need it

    writer = GGUFWriter(path, "")
    for fields in writer.kv_data:
        fields.pop("general.architecture", None)  # the writer's own; an imatrix has none
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(datasets) or ["none"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name, (total, count) in sums.items():
        nmat = np.size(count)
        writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(total, np.float32).reshape(nmat, -1))
        writer.add_tensor(f"{name}.counts", np.ascontiguousarray(count, np.float32).reshape(nmat, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def imatrix_sums(statistics: Statistics, config: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What `write_imatrix` writes, of statistics of our own: every matrix that llama.cpp has a name for, in its order.

    A tied embedding stands under `token_embd.weight`, which is the name under which llama.cpp quantizes it.
    """
    family, names = importlib.import_module(f"quant.{family_of(config)}"), names_of(config)
    cfg = names.read_config(config)
    found = {f"{e.gguf}.weight": (e, e.modules[0]) for e in family.IMATRIX_NAMES if not e.layered}
    for i in range(cfg.num_hidden_layers):
        for e in family.IMATRIX_NAMES:
            if e.layered and len(e.modules) == 1:
                found[f"blk.{i}.{e.gguf}.weight"] = (e, f"{family.LAYERS}.{i}.{e.modules[0]}")
    out: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, (entry, module) in found.items():
        if module not in statistics:
            continue  # of another kind of layer, or an embedding that is no output
        mean = statistics.second(module, blended=False).astype(np.float64)
        counts = np.atleast_1d(np.asarray(statistics.tokens(module)))
        if entry.tiled:
            mean = tile(mean, cfg.linear_num_value_heads // cfg.linear_num_key_heads, cfg.linear_num_key_heads)
        total = mean * (counts[:, None] if mean.ndim == 2 else counts[0])
        out[name] = (total.astype(np.float32), counts.astype(np.float32))
    return out


def gguf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(nmat, K) by gguf weight name: the matrices that an imatrix of this model holds."""
    family, names = importlib.import_module(f"quant.{family_of(config)}"), names_of(config)
    cfg = names.read_config(config)
    shapes = names.text_shapes(cfg)
    out: dict[str, tuple[int, int]] = {}
    for i in range(cfg.num_hidden_layers):
        for e in family.IMATRIX_NAMES:
            shape = shapes.get(f"{family.LAYERS}.{i}.{e.modules[0]}.weight")
            if e.layered and len(e.modules) == 1 and shape is not None:
                out[f"blk.{i}.{e.gguf}.weight"] = (shape[0] if len(shape) == 3 else 1, shape[-1])
    return out


def _mtp_layers(config: dict[str, Any]) -> int:
    n = config.get("text_config", config).get("mtp_num_hidden_layers", 0)
    return n if type(n) is int else 0


def _check_blocks(path: Path, stems: list[str], layers: int, mtp: int) -> None:
    """Blocks 0 … layers-1 are there; llama.cpp appends the MTP layers, which are accepted and not used."""
    found = {int(m[1]) for s in stems if (m := BLOCK.fullmatch(s))}
    blocks = {i for i in found if not layers <= i < layers + mtp}
    if blocks and blocks != set(range(layers)):
        odd = min(blocks ^ set(range(layers)))
        raise InputError(
            f"{path.name}: is of another model: {'has' if odd in blocks else 'lacks'} block {odd}, "
            f"the model has {layers} blocks"
        )


def _entry(stem: str, entries: dict[str, Entry], layers: int, prefix: str) -> tuple[Entry | None, str]:
    if block := BLOCK.fullmatch(stem):
        entry = entries.get(block[2])
        inside = int(block[1]) < layers
        return (entry if entry and entry.layered and inside else None), f"{prefix}.{block[1]}."
    entry = entries.get(stem.removesuffix(".weight"))
    return (entry if entry and not entry.layered else None), ""


def _mean_square(
    where: str, total: np.ndarray, count: np.ndarray | None, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """E[x²] [K] or [E, K] and tokens [1] or [E]."""
    nmat, k = (shape[0] if len(shape) == 3 else 1), shape[-1]
    if total.shape[1] != k:
        raise InputError(f"{where}: is of another model: {total.shape[1]} columns, the model has {k}")
    if total.shape[0] != nmat:
        raise InputError(f"{where}: is of another model: {total.shape[0]} matrices, the model has {nmat}")
    if count is None or count.size != nmat:
        raise InputError(f"{where}: {'no' if count is None else count.size} counts, expected {nmat}")
    tokens = count.reshape(-1).astype(np.float64)
    bad = ~np.isfinite(tokens) | (tokens < 0) | (tokens > MAX_COUNT) | (tokens != np.floor(tokens))
    if bad.any():
        raise InputError(
            f"{where}.counts: found {tokens[bad][0]:g}, expected whole numbers of tokens up to {MAX_COUNT:g}"
        )
    bad = ~np.isfinite(total) | (total < 0)
    if bad.any():
        raise InputError(f"{where}.in_sum2: found {total[bad][0]:g}, expected finite sums of squares")
    if not tokens.any():
        raise InputError(f"{where}.counts: no token was counted")
    sums = total.astype(np.float64)
    seen = tokens > 0
    mean = np.empty_like(sums)
    mean[seen] = sums[seen] / tokens[seen, None]
    mean[~seen] = sums[seen].sum(0) / tokens[seen].sum()
    mean = mean.astype(np.float32)
    return (mean if len(shape) == 3 else mean[0]), tokens


def _missing(
    path: Path, entries: Sequence[Entry], prefix: str, shapes: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[str, ...]:
    """Modules without statistics; raises InputError if a whole required class has none."""
    missing: list[str] = []
    for suffix in dict.fromkeys(m for e in entries if e.required for m in e.modules):
        wanted = [m for m in shapes if m.startswith(f"{prefix}.") and m[len(prefix) + 1 :].partition(".")[2] == suffix]
        lacking = [m for m in wanted if m not in found]
        if wanted and len(lacking) == len(wanted):
            gguf = next(e.gguf for e in entries if suffix in e.modules)
            raise InputError(
                f"{path.name}: no statistics for any {suffix} (blk.N.{gguf}.weight); the model has {len(wanted)}"
            )
        missing += lacking
    return tuple(sorted(missing))
