"""Smoke test and benchmark of several variants in one run: the base is loaded once, and is the BF16 row of them all."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from inference.backend import mx
from inference.errors import CheckpointError, ResourceError
from inference.load import Model, load

from .base import ResolvedBase
from .bench import device, measure
from .protocol import BENCH_VERSION, SMOKE_VERSION, bench_settings, ceiling, smoke_settings, smoke_text
from .report import Report
from .schema import Bench, Manifest, Smoke, Speed
from .smoke import Reference, not_loaded, reference, reference_streamed, smoke
from .store import write_model
from .variants import Project


@dataclass(frozen=True)
class Wanted:
    """What to measure of a variant that is built."""

    manifest: Manifest
    smoke: bool
    bench: bool


@dataclass(frozen=True)
class Measured:
    smoke: Smoke | None
    bench: Bench | None


def measure_all(
    project: Project, base: ResolvedBase, wanted: Mapping[str, Wanted], report: Report
) -> dict[str, Measured]:
    """Run what is wanted and write each result as soon as it is there; a killed run keeps the finished ones.

    A variant whose smoke test fails is not benchmarked. A base that does not fit into memory costs the comparison of
    continuations and the BF16 row, each of which says so.
    """
    wanted = {id: w for id, w in wanted.items() if w.smoke or w.bench}
    if not wanted:
        return {}
    now, run, text = datetime.now(UTC).isoformat(timespec="seconds"), uuid.uuid4().hex[:12], smoke_text(project)
    ref, bf16 = _base_row(project, base, wanted, report)
    out: dict[str, Measured] = {}
    for id, want in wanted.items():
        results = project.store.results(want.manifest.weights_hash)
        source_hash = want.manifest.inputs.base.source_hash
        smoked = benched = None
        model, error = _load(project, id)
        if want.smoke:
            limit = ceiling(project, id)
            assert ref is not None
            verdict = (
                smoke(project, model, ref, limit) if model else not_loaded(error or CheckpointError("cannot be loaded"))
            )
            smoked = Smoke(
                version=SMOKE_VERSION, weights_hash=want.manifest.weights_hash, base_hash=source_hash,
                settings=smoke_settings(project), ceiling=limit, passed=verdict.passed, kld=verdict.kld,
                kld_tokens=verdict.kld_tokens, checks=verdict.checks, samples=verdict.samples, device=device(),
                measured_at=now,
            )  # fmt: skip
            write_model(results / "smoke.json", smoked)
            failed = next((c for c in verdict.checks if c.passed is False), None)
            told = f"KL {verdict.kld:.4f}" if verdict.kld is not None else ""
            if failed:
                told = f"{failed.name}: {failed.detail}"
            report.line(f"{id}: smoke {'passed' if verdict.passed else 'FAILED'}  {told}")
        if want.bench and (smoked is None or smoked.passed):
            with report.bar(f"{id}: bench"):
                speed = measure(model, project.ladder.bench, text) if model else Speed(reason=str(error))
            benched = Bench(
                version=BENCH_VERSION, weights_hash=want.manifest.weights_hash, base_hash=source_hash, run=run,
                settings=bench_settings(project), protocol=project.ladder.bench, variant=speed, bf16=bf16, device=device(),
                measured_at=now,
            )  # fmt: skip
            write_model(results / "bench.json", benched)
            report.line(f"{id}: bench  {_speeds(speed, bf16)}")
        del model
        mx.clear_cache()
        out[id] = Measured(smoked, benched)
    return out


def _base_row(
    project: Project, base: ResolvedBase, wanted: Mapping[str, Wanted], report: Report
) -> tuple[Reference | None, Speed]:
    """The reference for smoke tests (None if none is wanted) and the BF16 speeds."""
    smoking, benching = any(w.smoke for w in wanted.values()), any(w.bench for w in wanted.values())
    speed = Speed(reason="bench was not asked for")
    ref = None
    try:
        model = load(base.folder)
    except ResourceError as e:
        report.line(f"BF16: {e}")
        if smoking:
            ref = reference_streamed(project, base.folder, _reason(e))
        return ref, Speed(reason=_reason(e))
    if smoking:
        with report.bar("BF16: reference"):
            ref = reference(project, model)
    if benching:
        with report.bar("BF16: bench"):
            speed = measure(model, project.ladder.bench, smoke_text(project))
        report.line(f"BF16: bench  {_speeds(speed, speed)}")
    del model
    mx.clear_cache()
    return ref, speed


def _load(project: Project, id: str) -> tuple[Model | None, Exception | None]:
    try:
        return load(project.store.variant(id)), None
    except (CheckpointError, ResourceError) as e:
        return None, e


def _reason(error: ResourceError) -> str:
    """The figures without the folder's name, as they may stand on a card."""
    return str(error).split(": ", 1)[-1]


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
