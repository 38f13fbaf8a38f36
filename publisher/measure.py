"""Smoke test and benchmark of several variants in one run: the base is loaded once, and is the BF16 row of them all."""

from __future__ import annotations

import gc
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from inference.backend import compute_dtype, mx
from inference.errors import CheckpointError, ResourceError
from inference.families import names_of
from inference.load import DTYPES, PREFILL_STEP, Model, load

from .base import ResolvedBase
from .bench import context, device, measure
from .protocol import BENCH_VERSION, SMOKE_VERSION, bench_settings, ceiling, smoke_settings, smoke_text
from .report import Report
from .schema import Bench, Device, Manifest, Smoke, Speed
from .smoke import Reference, Verdict, not_loaded, reference, reference_streamed, smoke
from .store import write_model
from .variants import Project

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """What to measure of a variant that is built."""

    manifest: Manifest
    smoke: bool
    bench: bool


@dataclass(frozen=True)
class Measured:
    """What was measured; None: not asked for, or there was not enough memory to tell."""

    smoke: Smoke | None
    bench: Bench | None


def measure_all(
    project: Project,
    base: ResolvedBase,
    wanted: Mapping[str, Wanted],
    report: Report,
    passed: Callable[[str], None] = lambda id: None,
    quiet: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Measured]:
    """Run what is wanted and write each result as soon as it is there; a killed run keeps the finished ones.

    A variant whose smoke test fails is not benchmarked. A base that does not fit into memory costs the comparison of
    continuations and the BF16 row, each of which says so. A variant that does not fit gets no verdict, only a benchmark
    that says what it needs: that is nothing against its weights.

    passed: is told of each variant whose smoke test passes. quiet: a context in which nothing else runs, for benchmarks.
    """
    wanted = {id: w for id, w in wanted.items() if w.smoke or w.bench}
    if not wanted:
        return {}
    run = _Run(uuid.uuid4().hex[:12], datetime.now(UTC).isoformat(timespec="seconds"), device(), _compute(base))
    ref, bf16 = _base_row(project, base, wanted, report, quiet)
    out: dict[str, Measured] = {}
    for id, want in wanted.items():
        smoked = benched = None
        try:
            if want.smoke and ref is not None:
                smoked = _smoke(project, id, want.manifest, ref, run, report)
                if smoked.passed:
                    passed(id)
            if want.bench and (smoked is None or smoked.passed):
                with quiet(), report.bar(f"{id}: bench") as tick:
                    speed = _on(
                        project.store.variant(id),
                        context(project.ladder.bench),
                        lambda model, tick=tick: measure(model, project.ladder.bench, smoke_text(project), tick),
                    )
                benched = _bench(project, want.manifest, speed, bf16, run)
        except CheckpointError as e:
            if not want.smoke:
                raise
            smoked = _verdict(project, id, want.manifest, not_loaded(e), run)
        except (ResourceError, MemoryError) as e:
            report.line(f"{id}: {e}")
            if want.bench:
                benched = _bench(project, want.manifest, Speed(reason=_reason(e)), bf16, run)
        _tell(id, smoked, benched, report)
        out[id] = Measured(smoked, benched)
    return out


@dataclass(frozen=True)
class _Run:
    """What all results of one run share."""

    id: str
    at: str
    device: Device
    compute: str


def _smoke(project: Project, id: str, manifest: Manifest, ref: Reference, run: _Run, report: Report) -> Smoke:
    limit = ceiling(project, id, manifest.inputs.bits)
    with report.bar(f"{id}: smoke"):
        verdict = _on(project.store.variant(id), PREFILL_STEP, lambda model: smoke(project, model, ref, limit))
    return _verdict(project, id, manifest, verdict, run)


def _verdict(project: Project, id: str, manifest: Manifest, verdict: Verdict, run: _Run) -> Smoke:
    result = Smoke(
        version=SMOKE_VERSION,
        weights_hash=manifest.weights_hash,
        base_hash=manifest.inputs.base.source_hash,
        settings=smoke_settings(project),
        ceiling=ceiling(project, id, manifest.inputs.bits),
        passed=verdict.passed,
        kld=verdict.kld,
        kld_tokens=verdict.kld_tokens,
        checks=verdict.checks,
        samples=verdict.samples,
        device=run.device,
        measured_at=run.at,
    )
    write_model(project.store.results(manifest.weights_hash) / "smoke.json", result)
    return result


def _bench(project: Project, manifest: Manifest, speed: Speed, bf16: Speed, run: _Run) -> Bench:
    result = Bench(
        version=BENCH_VERSION,
        weights_hash=manifest.weights_hash,
        base_hash=manifest.inputs.base.source_hash,
        run=run.id,
        compute=run.compute,
        settings=bench_settings(project),
        protocol=project.ladder.bench,
        variant=speed,
        bf16=bf16,
        device=run.device,
        measured_at=run.at,
    )
    write_model(project.store.results(manifest.weights_hash) / "bench.json", result)
    return result


def _base_row(
    project: Project,
    base: ResolvedBase,
    wanted: Mapping[str, Wanted],
    report: Report,
    quiet: Callable[[], AbstractContextManager[None]],
) -> tuple[Reference | None, Speed]:
    """The reference for smoke tests (None if none is wanted) and the BF16 speeds."""
    smoking, benching = any(w.smoke for w in wanted.values()), any(w.bench for w in wanted.values())
    speed = Speed(reason="bench was not asked for")
    ref = None

    def use(model: Model) -> None:
        nonlocal speed, ref
        if benching:
            with quiet(), report.bar("BF16: bench") as tick:
                speed = measure(model, project.ladder.bench, smoke_text(project), tick)
            report.line(f"BF16: bench  {_speeds(speed, speed)}")
        if smoking:
            with report.bar("BF16: reference"):
                ref = reference(project, model)

    try:
        _on(base.folder, context(project.ladder.bench) if benching else PREFILL_STEP, use)
    except (ResourceError, MemoryError) as e:
        report.line(f"BF16: {e}")
        speed = Speed(reason=_reason(e))
        if smoking and ref is None:
            ref = reference_streamed(project, base.folder, _reason(e))
    return ref, speed


def _on(folder: Path, tokens: int, use: Callable[[Model], T]) -> T:
    """What `use` makes of a loaded model, which is gone, buffers and all, when this returns: `use` keeps nothing of it.

    A function, not a context: there the caller's own name would hold the model while the next one is loaded, and count in
    its memory. Raises MemoryError if MLX runs out of memory, ResourceError if it has too little for the model and that
    many tokens.
    """
    _free()  # what an error that was handled meanwhile still held
    try:
        return use(load(folder, context=tokens))
    except RuntimeError as e:  # what MLX raises when an allocation fails, on every backend
        if "alloc" not in str(e).lower() and "memory" not in str(e).lower():
            raise
        raise MemoryError(f"out of memory while running ({str(e).splitlines()[0][:120]})") from None
    finally:
        _free()


def _free() -> None:
    gc.collect()
    mx.clear_cache()


def _compute(base: ResolvedBase) -> str:
    """The type that a run computes in, by name."""
    own = names_of(base.checkpoint.config).read_config(base.checkpoint.config).dtype
    return str(compute_dtype(DTYPES[own])).removeprefix("mlx.core.")


def _reason(error: Exception) -> str:
    """The figures without the folder's name, as they may stand on a card."""
    return str(error).split(": ", 1)[-1]


def _tell(id: str, smoked: Smoke | None, benched: Bench | None, report: Report) -> None:
    if smoked:
        failed = next((c for c in smoked.checks if c.passed is False), None)
        told = f"{failed.name}: {failed.detail}" if failed else f"KL {smoked.kld:.4f}" if smoked.kld is not None else ""
        report.line(f"{id}: smoke {'passed' if smoked.passed else 'FAILED'}  {told}")
    if benched:
        report.line(f"{id}: bench  {_speeds(benched.variant, benched.bf16)}")


def _speeds(speed: Speed, bf16: Speed) -> str:
    if speed.decode_tps is None:
        return f"not measured: {speed.reason}"
    text = f"decode {speed.decode_tps.median:.1f} tok/s"
    if bf16.decode_tps and speed is not bf16:
        text += f" ({speed.decode_tps.median / bf16.decode_tps.median:.2f} × BF16)"
    if speed.prefill_tps:
        length, stat = max(speed.prefill_tps.items())
        text += f", prefill {stat.median:.0f} tok/s at {length}"
    return text
