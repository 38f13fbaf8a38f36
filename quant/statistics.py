"""Statistics of a base's linears, as `publish calibrate` left them: read lazily, one array at a time.

A folder holds `statistics.json` and safetensors files, one or two a layer. Modules that read the same input share what
is stored of it; what a linear's outputs are worth (`fisher`) is stored a module. For the tokens of the calibration
text, by MLX module path:

    second(m)    E[x²] of every input channel [K]; stacked experts [E, K], over the tokens routed to each
    hessian(m)   E[x xᵀ] [K, K]; of one expert for stacked ones
    tokens(m)    how many tokens that is
    fisher(m)    E[(∂ℓ/∂y)²] of every output channel [N] or [E, N], labels drawn from the model itself, so that a change
                 ΔW of the weights costs about ½ Σ_o fisher_o ΔW_o H ΔW_oᵀ nats of KL divergence a token
    second_g(m), hessian_g(m)   the same means as second and hessian, but with token t weighing Σ_o (∂ℓ/∂y_to)²
    predicted_kld(m, ΔW)        the estimate with these, which also holds where the tokens with the largest inputs
                                (attention sinks) are those with the smallest gradients

A tied embedding has the statistics of the output that it is; an embedding of its own has none.

Few tokens. An expert that saw n tokens has its second moments blended with those of all routed rows of its layer,
(n v_e + κ v) / (n + κ) with κ = 256, and its Hessian likewise; so an expert that saw none is treated as the average
one. `tokens` stays honest, and `second(m, blended=False)` gives what was counted (zeros where nothing was). Where a
layer's Hessians of all experts would take more than EXPERT_HESSIAN_BYTES, one Hessian C of all routed rows is stored,
and an expert's is C scaled to the expert's own second moments, D_e^½ C D_e^½.

A Hessian is stored as its upper triangle in blocks of BLOCK rows, block b as float32 rows [BLOCK, K − b·BLOCK].
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from inference.checkpoint import ITEMSIZE, TensorInfo, count, read_header, read_json
from inference.errors import CheckpointError, InputError

# What the arrays mean; bump it, with the reason, when the same text would give others.
# 1: second moments, Hessians, fisher with sampled labels
# 2: on CUDA all experts of a batch in which one had many more tokens than others had read rows of other tokens; gradients of
#    a token's experts are added in their own order
STATISTICS_VERSION = 2
EMBEDDING = "fisher-embed.safetensors"
BLOCK = 512  # rows of a Hessian stored together
KAPPA = 256  # tokens that the average over a layer's experts counts for, beside an expert's own
EXPERT_HESSIAN_BYTES = 1 << 30  # of one input's experts in one layer, as float32; more is shared
HessianKind = Literal["one", "experts", "shared"]
SHA = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Input:
    """One stored input. columns: K. experts: E, or None. hessian: one matrix, one an expert, or one shared by all."""

    name: str
    file: str
    modules: tuple[str, ...]
    columns: int
    experts: int | None
    hessian: HessianKind


class Statistics:
    """The statistics of one folder. Headers are checked when it is opened, arrays when they are read."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.record = _record(self.folder)
        self.inputs = {i.name: i for i in _inputs(self.folder, self.record)}
        self._input_of = {m: i for i in self.inputs.values() for m in i.modules}
        self._files: dict[str, dict[str, TensorInfo]] = {}
        self._pool: tuple[str, np.ndarray] | None = None  # the last mean over experts, asked for once an expert

    @cached_property
    def digest(self) -> str:
        """sha256 over the version and the contents of all files: what depends on these statistics depends on this."""
        files = sorted([f["path"], f["sha256"]] for f in self.record["files"] if f["path"].endswith(".safetensors"))
        value = {"version": self.record["version"], "files": files}
        return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules with statistics, in the model's order."""
        return tuple(self._input_of)

    def __contains__(self, module: str) -> bool:
        return module in self._input_of

    def input(self, module: str) -> Input:
        """Raises InputError for a module that has none."""
        found = self._input_of.get(module)
        if found is None:
            raise InputError(f"{self.folder.name}: no statistics for {module}")
        return found

    def tokens(self, module: str) -> int | np.ndarray:
        """Tokens that the input saw; int64 [E] for stacked experts."""
        i = self.input(module)
        value = self._read(i.file, f"{i.name}.tokens", "I64", (i.experts or 1,))
        return value if i.experts else int(value[0])

    def second(self, module: str, blended: bool = True) -> np.ndarray:
        """E[x²] float32 [K] or [E, K]. blended: experts with few tokens lean on the layer's mean (see above)."""
        i = self.input(module)
        shape = (i.experts, i.columns) if i.experts else (i.columns,)
        value = self._read(i.file, f"{i.name}.second", "F32", shape)
        if not i.experts or not blended:
            return value
        tokens = np.asarray(self.tokens(module))
        return blend(value, tokens, pooled(value, tokens))

    def hessian(self, module: str, expert: int | None = None) -> np.ndarray:
        """E[x xᵀ] float32 [K, K]; for stacked experts that of one, else of all routed rows."""
        i = self.input(module)
        if not i.experts:
            if expert is not None:
                raise InputError(f"{self.folder.name}: {module}: has no experts, asked for number {expert}")
            return self._hessian(i, 0)
        if expert is not None and not 0 <= expert < i.experts:
            raise InputError(f"{self.folder.name}: {module}: expert {expert}, expected 0 to {i.experts - 1}")
        if i.hessian == "shared":
            common = self._hessian(i, 0)
            return common if expert is None else rescaled(common, self.second(module)[expert])
        common = self._pooled_hessian(i)
        if expert is None:
            return common
        n = int(np.asarray(self.tokens(module))[expert])
        own = self._hessian(i, expert)
        own *= np.float32(n / (n + KAPPA))
        own += common * np.float32(KAPPA / (n + KAPPA))
        return own

    def fisher(self, module: str) -> np.ndarray:
        """Mean squared gradient of every output channel, float32 [N] or [E, N]; see the module's docstring.

        Raises InputError if they were collected without it.
        """
        file = self._gradient_file(module)
        info = self._header(file).get(f"{module}.fisher")
        if info is None:
            raise CheckpointError(f"{self.folder.name}/{file}: tensor {module}.fisher is missing")
        return self._read(file, f"{module}.fisher", "F32", info.shape)

    def second_g(self, module: str) -> np.ndarray:
        """Σ_t ‖g_t‖² x_t² / Σ_t ‖g_t‖² float32 [K], over all experts for stacked ones."""
        return self._read(self._gradient_file(module), f"{module}.second_g", "F32", (self.input(module).columns,))

    def hessian_g(self, module: str) -> np.ndarray:
        """Σ_t ‖g_t‖² x_t x_tᵀ / Σ_t ‖g_t‖² float32 [K, K]. Raises InputError unless collected with them."""
        k, file = self.input(module).columns, self._gradient_file(module)
        if f"{module}.hessian_g" not in self._header(file):
            raise InputError(f"{self.folder.name}: collected without gradient-weighted Hessians")
        return unpack(self._read(file, f"{module}.hessian_g", "F32", (1, packed_size(k)))[0], k)

    def embedding(self) -> tuple[np.ndarray, np.ndarray]:
        """What the rows of the embedding are worth where tokens are looked up: E[g gᵀ] float32 [K, K] of the gradient of
        the first layer's input, and int64 [V], how often each token was looked up. A change ΔW costs about
        ½ Σ_v (n_v / Σ n) ΔW_v E[g gᵀ] ΔW_vᵀ nats a token, beside what it costs as an output.

        Read once and kept, since every band of an embedding asks for it. Raises InputError if they were collected without
        gradients.
        """
        return self._embedding

    @cached_property
    def _embedding(self) -> tuple[np.ndarray, np.ndarray]:
        file = EMBEDDING
        if file not in {f["path"] for f in self.record["files"]}:
            raise InputError(f"{self.folder.name}: collected without gradients")
        found = {name.rpartition(".")[2]: info for name, info in self._header(file).items()}
        if found.keys() != {"column_hessian", "looked_up"}:
            raise CheckpointError(f"{self.folder.name}/{file}: found {sorted(found)[:3]}")
        h, v = found["column_hessian"], found["looked_up"]
        k = round((2 * h.shape[-1]) ** 0.5)  # packed_size(k) is about k² / 2
        k = next((n for n in range(max(k - BLOCK, 1), k + 1) if packed_size(n) == h.shape[-1]), 0)
        hessian = unpack(self._read(file, h.name, "F32", h.shape)[0], k)
        hessian.setflags(write=False)
        return hessian, self._read(file, v.name, "I64", v.shape)

    # What an error of a matrix costs, for solvers and prices. An embedding is looked up: there its rows' errors are weighed
    # by the gradient of the first layer's input, E[g gᵀ], in place of an input's E[x xᵀ], and by how often a token is
    # looked up. A tied embedding has both uses; they are added in units of the output's rows.

    def has_objective(self, module: str) -> bool:
        return module in self or module == self._embedding_name

    def objective_name(self, module: str) -> str:
        """Equal for modules with one objective."""
        return self.input(module).name if module in self and module != self._embedding_name else module

    def objective_hessian(self, module: str, expert: int | None = None) -> np.ndarray:
        """float32 [K, K]"""
        if module not in self:
            return self.embedding()[0]
        own = self.hessian(module, expert)
        return own + self._embedding_weight(module) * self.embedding()[0] if module == self._embedding_name else own

    def objective_second(self, module: str) -> np.ndarray:
        """Its diagonal, float32 [K] or [E, K]."""
        return self._with_embedding(module, self.second)

    def objective_second_g(self, module: str) -> np.ndarray:
        """The diagonal with tokens weighed by their gradients, float32 [K]; one for all experts."""
        return self._with_embedding(module, self.second_g)

    def objective_rows(self, module: str) -> np.ndarray:
        """What a row's error is worth, float32 [N] or [E, N]."""
        return self.fisher(module) if module in self else self._frequencies()

    def objective_tokens(self, module: str) -> float:
        """Tokens that the objective rests on."""
        return float(np.asarray(self.tokens(module)).sum() if module in self else self.record["fisher_tokens"])

    def _with_embedding(self, module: str, own: Callable[[str], np.ndarray]) -> np.ndarray:
        if module not in self:
            return np.diagonal(self.embedding()[0]).copy()
        value = own(module)
        if module != self._embedding_name:
            return value
        return value + self._embedding_weight(module) * np.diagonal(self.embedding()[0])

    def _embedding_weight(self, module: str) -> np.float32:
        return np.float32(self._frequencies().mean() / max(float(self.fisher(module).mean()), 1e-30))

    def _frequencies(self) -> np.ndarray:
        """How often each token is looked up, float32 [V], sums to 1; one that was not seen counts half a time."""
        seen = self.embedding()[1] + 0.5
        return (seen / seen.sum()).astype(np.float32)

    @cached_property
    def _embedding_name(self) -> str | None:
        if EMBEDDING not in {f["path"] for f in self.record["files"]}:
            return None
        return next((n.rpartition(".")[0] for n in self._header(EMBEDDING)), None)

    def coherence(self, module: str) -> float:
        """How much more (or less) an error of the weights adds up over the positions of a window than if the positions
        were independent: Σ ‖Σ_t g_t x_tᵀ‖² over Σ ‖g_t‖² ‖x_t‖². 1 for stacked experts and the output."""
        file, name = self._gradient_file(module), f"{module}.coherence"
        return float(self._read(file, name, "F32", (1,))[0]) if name in self._header(file) else 1.0

    def predicted_kld(self, module: str, delta: np.ndarray) -> float:
        """Nats of KL divergence a token that a change `delta` [N, K] of a linear's weights is expected to cost.

        ½ c Σ_o fisher_o ΔW_o H_g ΔW_oᵀ with the coherence c and the gradient-weighted Hessian. Where that was not kept,
        its diagonal is used, times how much less the error is under the whole Hessian than under its diagonal.
        Stacked experts [E, N, K]: ½ Σ_e Σ_o fisher_eo ΔW_eo H_e ΔW_eoᵀ.
        """
        i, fisher = self.input(module), self.fisher(module)
        if i.experts:
            return float(sum(0.5 * _cost(fisher[e], delta[e], self.hessian(module, e)) for e in range(i.experts)))
        half = 0.5 * self.coherence(module)
        if f"{module}.hessian_g" in self._header(self._gradient_file(module)):
            return half * _cost(fisher, delta, self.hessian_g(module))
        own = half * float(fisher @ (np.square(delta) @ self.second_g(module)))
        apart = float(fisher @ (np.square(delta) @ self.second(module)))
        return own * _cost(fisher, delta, self.hessian(module)) / apart if apart else own

    def verify(self) -> None:
        """Hash every file. Raises CheckpointError naming the first that is not as it was written."""
        for entry in self.record["files"]:
            if sha256_file(self.folder / entry["path"]) != entry["sha256"]:
                raise CheckpointError(f"{self.folder.name}/{entry['path']}: its bytes are not those that were written")

    def _gradient_file(self, module: str) -> str:
        file = "fisher-" + self.input(module).file
        if file not in {f["path"] for f in self.record["files"]}:
            raise InputError(f"{self.folder.name}: collected without gradients")
        return file

    def _pooled_hessian(self, i: Input) -> np.ndarray:
        if self._pool is None or self._pool[0] != i.name:
            tokens = self._read(i.file, f"{i.name}.tokens", "I64", (i.experts or 1,))
            total = np.zeros((i.columns, i.columns), np.float32)
            for e in np.flatnonzero(tokens):
                total += self._hessian(i, int(e)) * np.float32(tokens[e] / tokens.sum())
            self._pool = (i.name, total)
        return self._pool[1].copy()

    def _hessian(self, i: Input, index: int) -> np.ndarray:
        """The stored matrix of that index. Raises CheckpointError if it holds what is no number."""
        n = (i.experts or 1) if i.hessian == "experts" else 1
        size = packed_size(i.columns)
        info = self._info(i.file, f"{i.name}.hessian", "F32", (n, size))
        flat = np.frombuffer(info.read(4 * size * index, 4 * size), "<f4")
        if not np.isfinite(flat).all():
            raise CheckpointError(f"{self.folder.name}/{i.file}: {i.name}.hessian: holds what is not finite")
        return unpack(flat, i.columns)

    def _read(self, file: str, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        info = self._info(file, name, dtype, shape)
        value = np.frombuffer(info.read(), {"F32": "<f4", "I64": "<i8"}[dtype]).reshape(shape)
        if not np.isfinite(value).all() or ((value < 0).any() and not name.endswith(("hessian_g", "column_hessian"))):
            raise CheckpointError(f"{self.folder.name}/{file}: {name}: expected finite numbers of at least 0")
        return value

    def _info(self, file: str, name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self._header(file).get(name)
        if info is None:
            raise CheckpointError(f"{self.folder.name}/{file}: tensor {name} is missing")
        if (info.dtype, info.shape) != (dtype, tuple(shape)):
            raise CheckpointError(
                f"{self.folder.name}/{file}: {name}: found {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}"
            )
        return info

    def _header(self, file: str) -> dict[str, TensorInfo]:
        if file not in self._files:
            self._files[file] = {t.name: t for t in read_header(self.folder / file)[0]}
        return self._files[file]


def _cost(fisher: np.ndarray, delta: np.ndarray, hessian: np.ndarray) -> float:
    """Σ_o fisher_o δ_o H δ_oᵀ"""
    return float(fisher @ ((delta @ hessian) * delta).sum(axis=1))


def pooled(second: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Mean over all routed rows [K] of means [E, K] over `tokens` [E] each."""
    weights = tokens.astype(np.float64)
    return (weights @ second.astype(np.float64) / max(weights.sum(), 1.0)).astype(np.float32)


def blend(second: np.ndarray, tokens: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(n v_e + κ v) / (n + κ) for every expert; second [E, K], tokens [E], mean [K]."""
    n = tokens.astype(np.float64)[:, None]
    return ((n * second + KAPPA * mean) / (n + KAPPA)).astype(np.float32)


def rescaled(hessian: np.ndarray, second: np.ndarray) -> np.ndarray:
    """D^½ C D^½ with the diagonal `second` [K]; channels that C never saw stay uncorrelated."""
    diagonal = np.diagonal(hessian)
    s = np.sqrt(np.divide(second, diagonal, out=np.zeros_like(second), where=diagonal > 0))
    out = hessian * s[:, None] * s[None, :]
    np.fill_diagonal(out, second)
    return out


def packed_size(k: int) -> int:
    """Floats of a stored Hessian [k, k]."""
    return sum((min(k, r + BLOCK) - r) * (k - r) for r in range(0, k, BLOCK))


def blocks(k: int) -> Iterator[tuple[int, int]]:
    """Row ranges [r, s) whose columns r … k are stored."""
    return ((r, min(k, r + BLOCK)) for r in range(0, k, BLOCK))


def unpack(flat: np.ndarray, k: int) -> np.ndarray:
    """The whole symmetric matrix [k, k] of what is stored."""
    out = np.empty((k, k), np.float32)
    at = 0
    for r, s in blocks(k):
        n = (s - r) * (k - r)
        block = flat[at : at + n].reshape(s - r, k - r)
        out[r:s, r:] = block
        out[s:, r:s] = block[:, s - r :].T
        out[r:s, r:s] = np.triu(block[:, : s - r]) + np.triu(block[:, : s - r], 1).T
        at += n
    return out


@dataclass(frozen=True)
class Tensor:
    """One tensor to store: its bytes come in pieces, so that no second copy of it is in memory."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]


def whole(value: np.ndarray) -> Tensor:
    dtype = {"float32": "F32", "int64": "I64"}[str(value.dtype)]
    return Tensor(dtype, value.shape, lambda: (value,))


def write_tensors(handle: Callable[[bytes | memoryview], Any], tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, front to back."""
    header, at = {}, 0
    for name, t in tensors.items():
        n = count(t.shape) * ITEMSIZE[t.dtype]
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    handle(len(text).to_bytes(8, "little") + text)
    for t in tensors.values():
        for piece in t.pieces():
            handle(memoryview(np.ascontiguousarray(piece)).cast("B"))  # type: ignore[arg-type] - an array is a buffer


def sha256_file(path: Path) -> str:
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent.name}/{path.name}: no such file") from None


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "statistics.json"
    record = read_json(path)
    where = f"{folder.name}/{path.name}"
    if record.get("version") != STATISTICS_VERSION:
        raise InputError(f"{where}: version {record.get('version')!r}, expected {STATISTICS_VERSION}; calibrate again")
    files = record.get("files")
    if not isinstance(files, list) or not all(_is_file(f) for f in files):
        raise CheckpointError(f"{where}: files: expected a list of path, size and sha256")
    for entry in files:
        try:
            size = (folder / entry["path"]).stat().st_size
        except OSError:
            raise CheckpointError(f"{folder.name}/{entry['path']}: no such file; calibrate again") from None
        if size != entry["size"]:
            raise CheckpointError(f"{folder.name}/{entry['path']}: {size} bytes, expected {entry['size']}")
    return record


def _is_file(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("path"), str)
        and entry["path"] == Path(entry["path"]).name
        and type(entry.get("size")) is int
        and isinstance(entry.get("sha256"), str)
        and SHA.fullmatch(entry["sha256"]) is not None
    )


def _inputs(folder: Path, record: dict[str, Any]) -> list[Input]:
    files = {f["path"] for f in record["files"]}
    out = []
    for entry in record.get("inputs") or ():
        try:
            i = Input(
                entry["name"], entry["file"], tuple(entry["modules"]), entry["columns"], entry["experts"], entry["hessian"]
            )  # fmt: skip
            good = (
                i.file in files
                and bool(i.modules)
                and all(isinstance(m, str) for m in (i.name, *i.modules))
                and all(type(n) is int and 0 < n < 1 << 24 for n in (i.columns, i.experts or 1))
                and i.hessian in ("one", "experts", "shared")
            )
        except (KeyError, TypeError):
            good = False
        if not good:
            raise CheckpointError(f"{folder.name}/statistics.json: inputs: found {str(entry)[:80]}")
        out.append(i)
    if not out:
        raise CheckpointError(f"{folder.name}/statistics.json: inputs: found none")
    return out
