"""One pass over the source: read a band, fold it, solve every format that any variant wants of it, hash and write.

Threads: one reads the source, one checks and hashes it, `jobs` solve (on a GPU one: it feeds the device), two hash stored
tensors, one a variant writes and hashes its files. Every queue is in source order, so what is written does not depend
on timing.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import local
from typing import Any

import numpy as np
from blake3 import blake3

from inference.backend import BACKEND, mx
from inference.checkpoint import ITEMSIZE, row_bands
from inference.errors import CheckpointError, InputError
from inference.layout import Target, read_band
from inference.load import DTYPES, decoded

from .awq import Fold
from .folding import changes, exact
from .job import Key, Lane, disk_order
from .moments import MomentSource
from .recipe import TensorPlan
from .solve import SOLVERS, nearest_together, solve, solve_together

MOST_JOBS = 8  # unless asked for more: by then a disk is slower
CHECK_BYTES = 512 << 10  # of the source, hashed and looked at while a core's cache holds them
EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00}  # all ones: infinite or not a number


@dataclass(frozen=True)
class Progress:
    """How far the pass over the source is, in source bytes."""

    target: str
    bytes_done: int
    bytes_total: int


class SourceChanged(Exception):
    """What an earlier run kept was made from other source bytes."""


def default_jobs() -> int:
    """Bands to solve at once when nobody says how many: one a core, MOST_JOBS at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_JOBS, cores)


def run_pass(lanes: Sequence[Lane], progress: Callable[[Progress], None] | None, band_bytes: int, jobs: int) -> int:
    """One pass; returns the bytes read. All threads have ended when it returns or raises.

    jobs: solver threads on a CPU. At most jobs + 1 bands are being read or solved, and as many hashed and written.
    """
    pass_ = Pass(lanes, band_bytes, jobs)
    try:
        return pass_.run(progress)
    finally:
        pass_.shut()


class _Product:
    """One result in the making, shared by the lanes that want it."""

    def __init__(self, key: Key, plan: TensorPlan, fold: Fold | None, moments: MomentSource | None) -> None:
        self.key, self.plan, self.fold, self.moments = key, plan, fold, moments
        self.lanes: list[Lane] = []
        self.hashers = [blake3() for _ in plan.stored()]
        self.rest: list[list[memoryview]] = [[] for _ in plan.stored()[1:]]  # bands of scales, of biases

    def hash(self, parts: list[list[memoryview]]) -> tuple[str, ...]:
        """Take in the next bytes of each stored tensor; returns the hashes so far."""
        for hasher, pieces in zip(self.hashers, parts, strict=False):
            for piece in pieces:
                hasher.update(piece)
        return tuple(h.hexdigest() for h in self.hashers)


@dataclass
class _Band:
    """Rows [start, stop) of a target in flight; `source` of the last one is BLAKE3 of the target's source bytes.

    solved: products that were solved in one task, with the bytes of each (as `_solve` returns them).
    """

    target: Target
    start: int
    stop: int
    last: bool
    products: list[_Product]
    raw: Future[np.ndarray]
    source: Future[str]
    prepared: dict[tuple[str, str, bool], Future[mx.array]] = field(default_factory=dict)
    solved: list[tuple[list[_Product], Future[list[list[memoryview]]]]] = field(default_factory=list)


class Pass:
    """Threads and queues of one pass over the source."""

    def __init__(self, lanes: Sequence[Lane], band_bytes: int, jobs: int) -> None:
        self.lanes, self.band_bytes, self.ahead = lanes, band_bytes, jobs + 1
        self._streams = local()
        self.reader = ThreadPoolExecutor(1, "read")
        self.checker = ThreadPoolExecutor(1, "check")
        self.solvers = ThreadPoolExecutor(jobs if BACKEND == "cpu" else 1, "solve", self._own_stream)
        self.hashers = [ThreadPoolExecutor(1, f"hash{i}") for i in range(2)]
        self.writers = {id(lane): ThreadPoolExecutor(1, f"write-{lane.job.variant}") for lane in lanes}
        self.source_hasher: Any = None
        self.read = 0

    def _own_stream(self) -> None:
        self._streams.stream = mx.new_stream(mx.default_device())

    def shut(self) -> None:
        pools = [self.reader, self.checker, self.solvers, *self.hashers, *self.writers.values()]
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown(wait=True)
        for lane in self.lanes:
            lane.writer.close()

    def run(self, progress: Callable[[Progress], None] | None) -> int:
        for future in [self.writers[id(lane)].submit(lane.writer.resume) for lane in self.lanes]:
            future.result()
        for lane in self.lanes:
            lane.resumed = len(lane.writer.records)
        kept = self._kept_sources()
        fingerprint = _fingerprint(self.lanes)
        trusted = all(_read_fingerprint(lane) == fingerprint for lane in self.lanes if lane.resumed)
        for lane in self.lanes:
            if not lane.resumed:
                _write_fingerprint(lane, fingerprint)
        todo = deque(self._todo(kept, trusted))
        total, done = sum(_source_bytes(t) for t, _ in todo), 0

        flying: deque[_Band] = deque()
        writing: deque[list[Future[Any]]] = deque()

        def land() -> None:
            nonlocal done
            band = flying.popleft()
            writing.append(self._land(band, kept))
            if len(writing) >= self.ahead:
                _wait(writing.popleft())
            done += band.raw.result().nbytes
            if progress:
                progress(Progress(band.target.name, done, total))

        while todo:
            target, products = todo.popleft()  # taken out, so that its scales and biases do not outlive it
            for band in self._bands(target, products):
                if flying:
                    self._solve_all(flying[-1])  # after this band's reading and folding, so that no solver waits for it
                flying.append(band)
                if len(flying) > self.ahead:
                    land()
        if flying:
            self._solve_all(flying[-1])
        while flying:
            land()
        while writing:
            _wait(writing.popleft())
        for lane in self.lanes:
            _write_fingerprint(lane, fingerprint)
        return self.read

    def _kept_sources(self) -> dict[str, str]:
        """BLAKE3 of the source by target, as the journals have it. Raises SourceChanged if two of them differ."""
        kept: dict[str, str] = {}
        for lane in self.lanes:
            for record in lane.writer.records:
                if kept.setdefault(record.target, record.source) != record.source:
                    raise SourceChanged
        return kept

    def _todo(self, kept: Mapping[str, str], trusted: bool) -> list[tuple[Target, list[_Product]]]:
        """Targets to read, in disk order, each with the distinct results wanted of it (none: only to be checked)."""
        first: dict[str, TensorPlan] = {}
        for lane in self.lanes:
            for plan in lane.plans:
                known = first.setdefault(plan.target.name, plan).target
                if replace(known, dtype="") != replace(plan.target, dtype=""):
                    raise InputError(f"{plan.target.name}: the variants of one run must have one source")
        out: list[tuple[Target, list[_Product]]] = []
        for plan in sorted(first.values(), key=disk_order):
            name = plan.target.name
            products: dict[Key, _Product] = {}
            for lane in self.lanes:
                index = lane.position.get(name)
                if index is None or index < lane.resumed:
                    continue
                mine = lane.plans[index]
                key = lane.key(mine)
                if key not in products:
                    moments = lane.job.moments if key.moments else None
                    products[key] = _Product(key, mine, lane.job.folds.get(name), moments)
                products[key].lanes.append(lane)
            if products or not (trusted and name in kept):
                out.append((plan.target, list(products.values())))
        return out

    def _bands(self, target: Target, products: list[_Product]) -> Iterator[_Band]:
        """Start reading and folding, band after band."""
        rows = target.shape[0] if target.shape else 1
        for start, stop in row_bands(target.source, self.band_bytes):
            raw = self.reader.submit(self._read, target, start, stop)
            source = self.checker.submit(self._check, raw, target, start == 0, stop == rows)
            band = _Band(target, start, stop, stop == rows, products, raw, source)
            for p in products:
                form = _form(p)
                if not _as_it_is(p) and form not in band.prepared:
                    band.prepared[form] = self.solvers.submit(
                        self._prepare, raw, p.plan.target, p.fold, start, stop, form[-1]
                    )
            yield band

    def _solve_all(self, band: _Band) -> None:
        together: dict[tuple[str, str, int], list[_Product]] = {}
        for p in band.products:
            if _copies(p):
                band.solved.append(([p], self.solvers.submit(_copy, band.raw)))
            elif p.key.spec and _together(p):
                together.setdefault((p.key.dtype, p.key.fold, p.key.spec.group_size), []).append(p)
            else:
                prepared = band.prepared[_form(p)]
                band.solved.append(([p], self.solvers.submit(self._solve, prepared, p, band.start, band.stop)))
        for (dtype, fold, _), products in together.items():
            weights = band.prepared.get((dtype, fold, False), band.raw)
            band.solved.append((products, self.solvers.submit(self._solve_together, weights, products)))

    def _read(self, target: Target, start: int, stop: int) -> np.ndarray:
        raw = read_band(target, start, stop)
        self.read += raw.nbytes
        return raw

    def _check(self, raw: Future[np.ndarray], target: Target, first: bool, last: bool) -> str:
        """Hash a band of the source; refuse values that are not finite. On the checker's thread, in order."""
        if first:
            self.source_hasher = blake3()
        values = np.ascontiguousarray(raw.result()).reshape(-1)
        step = CHECK_BYTES // values.itemsize
        for begin in range(0, values.size, step):
            block = values[begin : begin + step]
            self.source_hasher.update(block.data.cast("B"))
            if not _finite(block, target.source.dtype):
                raise CheckpointError(
                    f"{target.source.file.name}: {target.source.name} holds values that are not finite"
                )
        return self.source_hasher.hexdigest() if last else ""

    def _prepare(
        self, raw: Future[np.ndarray], target: Target, fold: Fold | None, start: int, stop: int, unrounded: bool
    ) -> mx.array:
        """A band as it is to be stored or solved: 1 + w and the fold in float32, rounded once to the stored type unless
        `unrounded`."""
        with mx.stream(self._streams.stream):
            if unrounded:
                x = exact(raw.result(), target, fold, start, stop)
            elif changes(target, fold):
                x = exact(raw.result(), target, fold, start, stop).astype(DTYPES[target.dtype])
                if target.dtype == "F16" and not mx.isfinite(x).all().item():
                    raise CheckpointError(f"{target.name}: exceeds the range of float16")
            else:
                x = decoded(raw.result(), target)
            mx.eval(x)
            return x

    def _solve(self, prepared: Future[mx.array], product: _Product, start: int, stop: int) -> list[list[memoryview]]:
        """Bytes of one band, of one product: [values], or [codes, scales] and, if affine, biases."""
        x = prepared.result()
        with mx.stream(self._streams.stream):
            if product.key.spec is None:
                return [[_view(x)]]
            known = None
            if product.moments is not None:
                columns = product.fold.columns if product.fold is not None else None
                rows = slice(start, stop) if x.ndim == 3 else None
                hessian = SOLVERS[product.key.solver].uses_hessian
                known = product.moments.moments(product.plan.target.module, rows, columns, hessian)
            dtype = DTYPES[product.plan.target.dtype]
            packed = solve(x, known, product.key.spec, product.key.solver, dtype=dtype)
            return [[_view(p) for p in (packed.codes, packed.scales, packed.biases) if p is not None]]

    def _solve_together(self, weights: Future[Any], products: Sequence[_Product]) -> list[list[memoryview]]:
        """Bytes of one band for each of the products, which differ in width alone. weights: as for `solve_together`."""
        x, specs = weights.result(), [p.key.spec for p in products if p.key.spec]
        with mx.stream(self._streams.stream):
            return [[_view(part) for part in packed] for packed in solve_together(x, specs)]

    def _land(self, band: _Band, kept: dict[str, str]) -> list[Future[Any]]:
        """Hand one solved band to the threads that hash and write it."""
        source = band.source.result()
        if band.last and kept.setdefault(band.target.name, source) != source:
            raise SourceChanged
        batch: list[Future[Any]] = []
        solved = [
            (p, parts) for products, done in band.solved for p, parts in zip(products, done.result(), strict=True)
        ]
        for i, (product, (codes, *rest)) in enumerate(solved):
            for pieces, piece in zip(product.rest, rest, strict=True):
                pieces.append(piece)
            parts = [[codes], *(product.rest if band.last else [])]
            if _copies(product):  # its bytes are the source's
                digests: Future[tuple[str, ...]] = Future()
                digests.set_result((source,))
            else:
                digests = self.hashers[i % len(self.hashers)].submit(product.hash, parts)
                batch.append(digests)
            for lane in product.lanes:
                writer = self.writers[id(lane)]
                batch.append(writer.submit(lane.write, band.target, parts))
                if band.last:
                    batch.append(writer.submit(lane.commit, band.target, source, digests))
        return batch


def _changed(product: _Product) -> bool:
    return changes(product.plan.target, product.fold)


def _form(product: _Product) -> tuple[str, str, bool]:
    """Of what a product is solved: stored type, fold, and whether in float32. A solver that weighs errors sees a folded
    weight as it is; one that rounds to nearest gets what would be stored, as the tools do that fold."""
    key = product.key
    unrounded = bool(key.fold) and key.spec is not None and SOLVERS[key.solver].uses_second
    return key.dtype, key.fold, unrounded


def _copies(product: _Product) -> bool:
    return product.key.spec is None and not _changed(product)


def _copy(raw: Future[np.ndarray]) -> list[list[memoryview]]:
    return [[_bytes(raw.result())]]


def _together(product: _Product) -> bool:
    spec = product.key.spec
    return spec is not None and nearest_together(product.key.dtype, spec, product.key.solver)


def _as_it_is(product: _Product) -> bool:
    """Whether a product is made of the source's bytes, and needs no array of MLX."""
    return _copies(product) or (BACKEND == "cpu" and _together(product) and not _changed(product))


def _bytes(x: np.ndarray) -> memoryview:
    return np.ascontiguousarray(x).data.cast("B")


def _view(x: mx.array | np.ndarray) -> memoryview:
    """The bytes of an array, without a copy; the view keeps the array alive."""
    bits: Any = x.view(mx.uint16) if isinstance(x, mx.array) and x.dtype == mx.bfloat16 else x
    return memoryview(bits).cast("B")


def _finite(x: np.ndarray, dtype: str) -> bool:
    if dtype in EXPONENT:
        mask = np.uint16(EXPONENT[dtype])
        return not x.size or int((x.view(np.uint16) & mask).max()) != mask
    return bool(np.isfinite(x).all())


def _wait(batch: list[Future[Any]]) -> None:
    for future in batch:
        future.result()


def _source_bytes(target: Target) -> int:
    return target.params * ITEMSIZE[target.source.dtype]


def _fingerprint(lanes: Sequence[Lane]) -> dict[str, Any]:
    """Size and time of the source files: as long as they stand, what was kept needs no second reading."""
    files = {p.target.source.file for lane in lanes for p in lane.plans}
    return {str(f): [s.st_size, s.st_mtime_ns] for f in sorted(files) for s in [f.stat()]}


def _read_fingerprint(lane: Lane) -> Any:
    try:
        return json.loads((lane.job.staging / "source.json").read_text())
    except (OSError, ValueError):
        return None


def _write_fingerprint(lane: Lane, fingerprint: dict[str, Any]) -> None:
    (lane.job.staging / "source.json").write_text(json.dumps(fingerprint))
