"""The two streamed passes that make statistics: forwards for what every linear reads, backwards for what it is worth.

Forwards, layer by layer: all windows go through layer i before layer i + 1 is read, and while they do, the second
moments and the Hessian of every distinct input are summed (products in float32, one batch at a time). What leaves a
layer lies in files, so that memory holds one layer, one batch and the sums of one layer: at 9B 0.4 GB of weights, 0.8 GB
of sums and as much again for the largest product.

Backwards, over the windows chosen for it: labels are drawn from the model's own predictions, one a position, and the
gradient of Σ −log p(label) runs from the last layer to the first, each recomputed from its kept input. Of every linear's
output y the mean square of ∂ℓ/∂y is kept, by channel. Labels of different positions are independent, so that the
gradients of all positions can be taken at once: their cross terms vanish in expectation. For the output matrix the
expectation over labels is exact: p (1 − p).

A pass is a sequence of steps (embedding, layers, head, and backwards head, layers, embedding), each of which commits its files
with a line in a journal. A killed run verifies what the journal names and goes on after it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np

from inference.backend import BACKEND, mx
from inference.blocks import rms_norm
from inference.errors import InputError
from inference.families import names_of
from inference.linear import Dense
from inference.load import Weights
from inference.taps import Reading, Recorder, Tapped, TappedWeights, output_gradients

from .statistics import EXPERT_HESSIAN_BYTES, HessianKind, Tensor, sha256_file, whole, write_tensors
from .sums import Gradients, Moments, Sums, triangles

BATCH_TOKENS = 2048 if BACKEND == "cpu" else 8192  # that pass through a layer at once
LOGIT_BYTES = 64 << 20  # of float32 logits at once
HEAD_ROWS = 16384  # rows of the output matrix multiplied at once on the way back
NUMPY = {mx.float32: np.float32, mx.bfloat16: np.uint16, mx.float16: np.float16}  # bfloat16 as its bits
JOURNAL = "journal.jsonl"
Progress = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True)
class Plan:
    """What to collect. windows: token ids; fisher_windows: how many of them, spread evenly, also run backwards."""

    windows: Sequence[Sequence[int]]
    fisher_windows: int
    gradient_hessian: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Stored:
    """A finished file."""

    path: str
    size: int
    sha256: str


@dataclass
class Collected:
    """What a finished collection holds: `inputs` as in statistics.json, the files, and tokens that ran backwards."""

    inputs: list[dict[str, Any]] = field(default_factory=list)
    files: list[Stored] = field(default_factory=list)
    fisher_tokens: int = 0
    resumed: int = 0  # steps that earlier runs had done


def collect(
    weights: Weights, family: ModuleType, plan: Plan, folder: Path, identity: str, progress: Progress | None = None
) -> Collected:
    """Fill `folder` with the files of both passes, going on where an earlier run of the same `identity` stopped."""
    run = _Run(weights, family, plan, folder, identity)
    return run.all(progress or (lambda done, total: None))


def discard_work(folder: Path) -> None:
    """Remove the states and the journal, once the record of what they led to is written."""
    for left in (*folder.glob("*.state"), folder / JOURNAL, *folder.glob(".*.part")):
        left.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Batch:
    """Windows of one length that pass together. offset: of their first token in its part's state file."""

    tokens: np.ndarray  # [B, T]
    offset: int

    @property
    def size(self) -> int:
        return self.tokens.size


def _batches(windows: Sequence[Sequence[int]]) -> list[_Batch]:
    """Windows by length, in batches of at most BATCH_TOKENS (one window at least)."""
    out: list[_Batch] = []
    offset = 0
    ordered = sorted(windows, key=len)
    start = 0
    while start < len(ordered):
        length = len(ordered[start])
        stop = start
        while (
            stop < len(ordered)
            and len(ordered[stop]) == length
            and (stop - start + 1) * length <= max(BATCH_TOKENS, length)
        ):
            stop += 1
        tokens = np.array(ordered[start:stop], np.int32)
        out.append(_Batch(tokens, offset))
        offset += tokens.size
        start = stop
    return out


class _Run:
    def __init__(self, weights: Weights, family: ModuleType, plan: Plan, folder: Path, identity: str) -> None:
        self.weights, self.family, self.plan, self.folder = weights, family, plan, folder
        self.cfg = weights.config
        self.identity = identity
        self.recorder = Recorder()
        self.tapped = TappedWeights(weights, self.recorder)
        self.layers: int = self.cfg.num_hidden_layers
        n, chosen = len(plan.windows), min(plan.fisher_windows, len(plan.windows))
        picked = {int(i) for i in np.linspace(0, n - 1, chosen).round()} if chosen else set()
        self.parts = {
            "fisher": _batches([w for i, w in enumerate(plan.windows) if i in picked]),
            "rest": _batches([w for i, w in enumerate(plan.windows) if i not in picked]),
        }
        self.shapes: dict[str, tuple[int, ...]] = names_of(weights.raw_config).text_shapes(self.cfg)
        self.dtype = weights.dtype
        self.journal = folder / JOURNAL

    # ------------------------------------------------------------------------------------------ steps

    def steps(self) -> list[tuple[str, int]]:
        out = [("embed", 0), *(("layer", i) for i in range(self.layers)), ("head", 0)]
        if self.parts["fisher"]:
            backwards = [("fisher-layer", i) for i in reversed(range(self.layers))]
            out += [("fisher-head", 0), *backwards, ("fisher-embed", 0)]
        return out

    def needed(self, step: tuple[str, int]) -> list[str]:
        """State files that a step reads or that later ones will."""
        kind, i = step
        back = bool(self.parts["fisher"])
        if kind == "embed":
            return []
        if kind == "layer":
            return [f"rest-{i:04}", *(f"fisher-{j:04}" for j in range(i + 1) if back)]
        if kind == "head":
            return [f"rest-{self.layers:04}", *(f"fisher-{j:04}" for j in range(self.layers + 1) if back)]
        if kind == "fisher-head":
            return [f"fisher-{j:04}" for j in range(self.layers + 1)]
        if kind == "fisher-embed":
            return ["gradient-0000"]
        return [f"gradient-{i + 1:04}", *(f"fisher-{j:04}" for j in range(i + 1))]

    def all(self, progress: Progress) -> Collected:
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = self.steps()
        entries = self._resume(steps)
        out = Collected(fisher_tokens=sum(b.tokens.size for b in self.parts["fisher"]), resumed=len(entries))
        if not entries:
            self._restart()
        for n, step in enumerate(steps):
            if n >= len(entries):
                self.results: list[Stored] = []
                self.states: list[Stored] = []
                self.inputs: list[dict[str, Any]] = []
                getattr(self, "_" + step[0].replace("-", "_"))(step[1])
                mx.clear_cache()
                entry = {
                    "step": list(step),
                    "results": [[s.path, s.size, s.sha256] for s in self.results],
                    "states": [[s.path, s.size, s.sha256] for s in self.states],
                    "inputs": self.inputs,
                }
                self._commit(entry)
                entries.append(entry)
                keep = set(self.needed(steps[n + 1])) if n + 1 < len(steps) else set()
                self._drop_states(keep)
            out.inputs += entries[n]["inputs"]
            out.files += [Stored(*r) for r in entries[n]["results"]]
            progress(n + 1, len(steps))
        return out

    def _embed(self, _: int) -> None:
        embed = self.weights.linear(self.family.PREFIX + "embed_tokens")
        for part, batches in self.parts.items():
            with self._writer(f"{part}-0000") as write:
                for b in batches:
                    write(embed.rows(mx.array(b.tokens)))

    def _layer(self, i: int) -> None:
        layer = self.family.Layer(self.cfg, i, self.tapped)
        sums: dict[str, Sums] = {}
        for part, batches in self.parts.items():
            with self._writer(f"{part}-{i + 1:04}") as write:
                for _b, x in self._states(f"{part}-{i:04}", batches):
                    self.recorder.reset()
                    y = layer(x, self._cache(i))
                    mx.async_eval(y)
                    for reading in self.recorder.readings:
                        self._add(sums, reading)
                    write(y)
        self.recorder.reset()
        del layer
        self._store(f"layer-{i:04}.safetensors", sums)

    def _head(self, _: int) -> None:
        module = self._head_module()
        sums = {module: Sums([module], self.cfg.hidden_size, None, "one")}
        norm = self.weights.array(self.family.PREFIX + "norm.weight")
        for part, batches in self.parts.items():
            for _b, x in self._states(f"{part}-{self.layers:04}", batches):
                sums[module].add(Reading(rms_norm(x, norm, self.cfg.rms_norm_eps), None, [module]))
        self._store("head.safetensors", sums)

    def _fisher_head(self, _: int) -> None:
        module = self._head_module()
        head = self.family.TextModel.head(self.cfg, self.weights)
        norm = self.weights.array(self.family.PREFIX + "norm.weight")

        def final(x: mx.array) -> mx.array:
            return rms_norm(x, norm, self.cfg.rms_norm_eps)

        if not isinstance(head, Dense):
            raise InputError(f"{self.weights.folder.name}: is quantized already; statistics are those of the BF16 base")
        matrix = head.weight
        vocab = matrix.shape[0]
        rows = max(1, LOGIT_BYTES // (4 * vocab))
        moments = Moments(self.cfg.hidden_size, self.plan.gradient_hessian)
        fisher = mx.zeros((vocab,), mx.float32)
        position = 0
        with self._writer(f"gradient-{self.layers:04}") as write:
            for _b, x in self._states(f"fisher-{self.layers:04}", self.parts["fisher"]):
                hidden = final(x).reshape(-1, x.shape[-1])
                back = []
                for r in range(0, hidden.shape[0], rows):
                    h = hidden[r : r + rows]
                    logits = head(h).astype(mx.float32)
                    p = mx.softmax(logits, axis=-1, precise=True)
                    key = mx.random.key(self.plan.seed * 1_000_003 + position)
                    labels = mx.random.categorical(logits, key=key)
                    position += 1
                    fisher = fisher + (p * (1 - p)).sum(axis=0)
                    g = p - (mx.arange(vocab)[None] == labels[:, None]).astype(mx.float32)
                    moments.add(h.astype(mx.float32), g.square().sum(axis=-1))
                    back.append(_times(g, matrix, x.dtype))
                    mx.eval(fisher, back[-1], moments.arrays())
                cotangent = mx.concatenate(back).reshape(x.shape)
                _same, grads = mx.vjp(lambda x: [final(x)], [x], [cotangent])
                write(grads[0])
        tokens = sum(b.size for b in self.parts["fisher"])
        tensors = {f"{module}.fisher": whole(np.array(fisher / tokens))} | moments.tensors(module)
        self._store_tensors("fisher-head.safetensors", tensors)

    def _fisher_layer(self, i: int) -> None:
        layer = self.family.Layer(self.cfg, i, self.tapped)

        def call(x: mx.array) -> mx.array:
            return layer(x, self._cache(i))

        sums: dict[str, Gradients] = {}
        cotangents = self._states(f"gradient-{i + 1:04}", self.parts["fisher"])
        with self._writer(f"gradient-{i:04}") as write:
            for (_b, x), (_, cotangent) in zip(
                self._states(f"fisher-{i:04}", self.parts["fisher"]), cotangents, strict=True
            ):
                g = output_gradients(call, self.recorder, x, cotangent)
                mx.async_eval(g.x)
                for reading in g.readings:
                    for module in reading.modules:
                        if module not in sums:
                            experts = self._experts_of(reading, module)
                            sums[module] = Gradients(experts, self.plan.gradient_hessian)
                        sums[module].add(reading, g.outputs[module], x.shape[0])
                write(g.x)
        tokens = sum(b.size for b in self.parts["fisher"])
        tensors: dict[str, Tensor] = {}
        for module, s in sums.items():
            tensors |= s.tensors(module, tokens)
        self._store_tensors(f"fisher-layer-{i:04}.safetensors", tensors)

    def _fisher_embed(self, _: int) -> None:
        module = self.family.PREFIX + "embed_tokens"
        k = self.cfg.hidden_size
        total = mx.zeros((k, k), mx.float32)
        for _b, g in self._states("gradient-0000", self.parts["fisher"]):
            flat = g.astype(mx.float32).reshape(-1, k)
            total = total + flat.T @ flat
            mx.eval(total)
        seen = np.zeros(self.cfg.vocab_size, np.int64)
        for b in (*self.parts["fisher"], *self.parts["rest"]):
            seen += np.bincount(b.tokens.reshape(-1), minlength=len(seen))
        tokens = sum(b.size for b in self.parts["fisher"])
        tensors = {
            f"{module}.looked_up": whole(seen),
            f"{module}.column_hessian": triangles([total], [float(tokens)]),
        }
        self._store_tensors("fisher-embed.safetensors", tensors)

    # ------------------------------------------------------------------------------------------ parts of steps

    def _cache(self, i: int) -> Any:
        return self.family.make_cache(self.cfg).layers[i]

    def _head_module(self) -> str:
        recorder = Recorder()
        head = self.family.TextModel.head(self.cfg, _Named(recorder))
        return head.module

    def _experts_of(self, reading: Reading, module: str) -> int | None:
        if reading.experts is None:
            return None
        return self.shapes[f"{module}.weight"][0]

    def _add(self, sums: dict[str, Sums], reading: Reading) -> None:
        if reading.name not in sums:
            k, experts = reading.x.shape[-1], self._experts_of(reading, reading.name)
            kind: HessianKind = "one"
            if experts:
                kind = "experts" if experts * k * k * 4 <= EXPERT_HESSIAN_BYTES else "shared"
            sums[reading.name] = Sums(reading.modules, k, experts, kind)
        sums[reading.name].add(reading)

    def _store(self, file: str, sums: dict[str, Sums]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, s in sums.items():
            tensors |= s.tensors(name)
            self.inputs.append(
                {
                    "name": name, "file": file, "modules": s.modules, "columns": s.columns, "experts": s.experts,
                    "hessian": s.kind,
                }
            )  # fmt: skip
        self._store_tensors(file, tensors)

    # ------------------------------------------------------------------------------------------ files

    def _store_tensors(self, file: str, tensors: dict[str, Tensor]) -> None:
        with _Atomic(self.folder / file) as out:
            write_tensors(out.write, tensors)
        self.results.append(out.stored)

    def _writer(self, name: str) -> _StateWriter:
        return _StateWriter(self, name)

    def _states(self, name: str, batches: list[_Batch]) -> Iterator[tuple[_Batch, mx.array]]:
        """Batches with their states [B, T, H]."""
        width, kind = self.cfg.hidden_size, np.dtype(NUMPY[self.dtype])
        if not batches:
            return
        with open(self._state_path(name), "rb", buffering=0) as f:
            for b in batches:
                f.seek(b.offset * width * kind.itemsize)
                data = np.fromfile(f, kind, b.size * width).reshape(*b.tokens.shape, width)
                x = mx.array(data)
                yield b, x.view(mx.bfloat16) if self.dtype == mx.bfloat16 else x

    def _state_path(self, name: str) -> Path:
        return self.folder / f"{name}.state"

    def _drop_states(self, keep: set[str]) -> None:
        for path in self.folder.glob("*.state"):
            if path.stem not in keep:
                path.unlink()

    def _commit(self, entry: dict[str, Any]) -> None:
        with open(self.journal, "ab", buffering=0) as f:
            f.write(_line(entry))
            os.fsync(f.fileno())

    def _restart(self) -> None:
        for path in self.folder.iterdir():
            if path.is_file():
                path.unlink()
        with open(self.journal, "wb") as f:
            f.write(_line({"identity": self.identity}))

    def _resume(self, steps: list[tuple[str, int]]) -> list[dict[str, Any]]:
        """Journal entries that hold: their results, and the states that the next step needs, are as they were written."""
        try:
            lines = self.journal.read_bytes().splitlines(keepends=True)
            if not lines or json.loads(lines[0]) != {"identity": self.identity}:
                return []
            entries = []
            for step, line in zip(steps, lines[1:], strict=False):
                if not line.endswith(b"\n"):
                    break  # torn by the kill
                entry = json.loads(line)
                if entry["step"] != list(step):
                    break
                entries.append(entry)
            if not entries:
                return []
            wanted = {f"{s}.state" for s in self.needed(steps[len(entries)])} if len(entries) < len(steps) else set()
            written = {path: (size, sha) for e in entries for path, size, sha in e["states"]}
            checks = [(path, size, sha) for e in entries for path, size, sha in e["results"]]
            checks += [(path, *written[path]) for path in wanted]
            for path, size, sha in checks:
                file = self.folder / path
                if file.stat().st_size != size or sha256_file(file) != sha:
                    return []
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return []
        with open(self.journal, "wb") as f:
            f.write(_line({"identity": self.identity}))
            for entry in entries:
                f.write(_line(entry))
        self._drop_states({Path(w).stem for w in wanted})
        return entries


class _Named:
    """Weights that hold nothing: what a linear is called, without reading it."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def linear(self, module: str) -> Any:
        return Tapped(module, None, self.recorder)  # type: ignore[arg-type] - never called


class _Atomic:
    """A file that has its name only when it is whole; hashed on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Atomic:
        self._temp = self.path.with_name(f".{self.path.name}.part")
        self._file: IO[bytes] = open(self._temp, "wb", buffering=0)
        self._sha, self._size = hashlib.sha256(), 0
        return self

    def write(self, data: bytes | memoryview) -> None:
        self._sha.update(data)
        view = memoryview(data)
        self._size += len(view)
        while view:
            view = view[self._file.write(view) :]

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            os.replace(self._temp, self.path)
            self.stored = Stored(self.path.name, self._size, self._sha.hexdigest())
        else:
            self._temp.unlink(missing_ok=True)


class _StateWriter:
    """States of all batches, one after another."""

    def __init__(self, run: _Run, name: str) -> None:
        self.run, self._out = run, _Atomic(run._state_path(name))

    def __enter__(self) -> Callable[[mx.array], None]:
        self._out.__enter__()
        return self._write

    def _write(self, x: mx.array) -> None:
        x = x.astype(self.run.dtype)
        data = np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)
        self._out.write(memoryview(data).cast("B"))  # type: ignore[arg-type] - an array is a buffer

    def __exit__(self, *args: Any) -> None:
        self._out.__exit__(*args)
        if args[0] is None:
            self.run.states.append(self._out.stored)


def _times(g: mx.array, matrix: mx.array, dtype: mx.Dtype) -> mx.array:
    """g @ matrix in the type of the model, HEAD_ROWS of the vocabulary at a time."""
    out = mx.zeros((g.shape[0], matrix.shape[1]), mx.float32)
    for r in range(0, matrix.shape[0], HEAD_ROWS):
        out = out + g[:, r : r + HEAD_ROWS] @ matrix[r : r + HEAD_ROWS].astype(mx.float32)
    return out.astype(dtype)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
