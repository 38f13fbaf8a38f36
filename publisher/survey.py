"""A look at the whole ladder: the plan of every variant, what lies on disk, and what of it is not current.

Reads headers, results and hashes; needs no MLX; writes only what it found out (variants.lock, base.json). `status`,
`plan`, `build`, `card` and `push` start here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from inference.checkpoint import read_checkpoint
from inference.errors import CheckpointError, InputError
from inference.layout import Target
from quant.source import source_hash_of
from quant.version import QUANT_VERSION

from .allocation import UNKNOWN, freeze, sources
from .base import ResolvedBase, known_imatrix, known_source_hash, remember_source_hash, resolve_base
from .plan import VariantPlan, build_inputs, plan_variant, select_targets
from .protocol import (
    BENCH_VERSION,
    QUALITY_VERSION,
    SMOKE_VERSION,
    bench_settings,
    calibration_hash,
    ceiling,
    quality_settings,
    smoke_settings,
)
from .prune import Pruned, described, pruned
from .schema import BaseInput, Bench, BuildInputs, ImatrixInput, Manifest, Quality, Smoke
from .staleness import State, bench_reasons, quality_reasons, smoke_reasons, weights_reasons
from .store import REDO, read_model, read_result
from .variants import Project

if TYPE_CHECKING:
    from .hub import Hub, Progress


NOT_CALIBRATED = "its solver needs statistics: run publish calibrate"


@dataclass(frozen=True)
class Rung:
    """One variant: its plan, today's inputs, and what is on disk for it. inputs None: the imatrix is not here yet, or the
    variant is not allocated yet."""

    id: str
    plan: VariantPlan
    inputs: BuildInputs | None
    manifest: Manifest | None
    smoke: Smoke | None
    bench: Bench | None
    state: State
    quality: Quality | None = None


@dataclass(frozen=True)
class Survey:
    project: Project
    base: ResolvedBase
    rungs: dict[str, Rung]


def survey(
    project: Project,
    hub: Callable[[], Hub],
    weights: bool = False,
    cards: bool = True,
    ids: Sequence[str] | None = None,
    read: bool = True,
    progress: Progress | None = None,
) -> Survey:
    """weights: download the base if need be. cards: also compare every built variant's card with what would be rendered.
    ids: look at these variants only. read: hash the weights of a base whose files changed; else only say that they did."""
    base = resolve_base(project, hub, weights, progress)
    rungs = {id: _rung(project, base, id, read) for id in ids or project.ladder.variants}
    if cards:
        rungs = {rung.id: _with_card(rung, reasons) for rung, reasons in _cards(project, base, rungs)}
    return Survey(project, base, rungs)


def allocate(
    project: Project, ids: Sequence[str], named: bool, hub: Callable[[], Hub], write: bool
) -> tuple[Survey, dict[str, Path]]:
    """What the allocator chooses for those of `ids` that are made by size, and the files it was written to.

    named: the ids were asked for by name, so that one without a size is a mistake. write: choose again, whatever is frozen,
    and freeze it. Raises InputError where nothing was measured yet.
    """
    sized = [id for id in ids if project.size(id)]
    if named and len(sized) < len(ids):
        raise InputError(f"{project.at('variants', next(i for i in ids if i not in sized))}: names bits, not a size")
    if not sized:
        raise InputError(f"{project.path.name}: no variant has a size")
    base = resolve_base(project, hub, False)
    seen = Survey(project, base, {id: _rung(project, base, id, False, frozen=not write) for id in sized})
    if not write:
        return seen, {}
    found = {id: r.plan.sized.allocation for id, r in seen.rungs.items() if r.plan.sized}
    if missing := [id for id, allocation in found.items() if allocation is None]:
        raise InputError(f"{', '.join(missing)}: {UNKNOWN}")
    return seen, {id: freeze(project, id, a) for id, a in found.items() if a}


def _rung(project: Project, base: ResolvedBase, id: str, read: bool, frozen: bool = True) -> Rung:
    manifest = read_manifest(project, id)
    plan, inputs, missing = todays_inputs(project, base, id, manifest, read, frozen)
    smoke = bench = quality = None
    if manifest:
        results = project.store.results(manifest.weights_hash)
        smoke, bench = read_result(results / "smoke.json", Smoke), read_result(results / "bench.json", Bench)
        smoke = smoke if smoke and smoke.weights_hash == manifest.weights_hash else None
        bench = bench if bench and bench.weights_hash == manifest.weights_hash else None
        quality = read_quality(project, manifest.weights_hash)
    weights = weights_reasons(manifest, inputs, missing)
    gone = pruned(project, manifest) if manifest else None
    if manifest and not weights:
        weights = damage(project.store.variant(id), manifest, gone)
    base_hash = manifest.inputs.base.source_hash if manifest else ""
    state = State(
        id,
        weights=weights,
        smoke=smoke_reasons(smoke, SMOKE_VERSION, smoke_settings(project), base_hash, ceiling(project, id, plan.bits))
        if not weights
        else ["weights are stale"],
        bench=bench_reasons(bench, BENCH_VERSION, bench_settings(project), base_hash)
        if not weights
        else ["weights are stale"],
        quality=quality_state(project, quality, base_hash) if not weights else ["weights are stale"],
        card=[] if manifest else ["not rendered"],
        failed=failure(smoke),
        pruned=gone.where if gone else None,
    )
    return Rung(id, plan, inputs, manifest, smoke, bench, state, quality)


def todays_inputs(
    project: Project, base: ResolvedBase, id: str, manifest: Manifest | None, read: bool = True, frozen: bool = True
) -> tuple[VariantPlan, BuildInputs | None, str | None]:
    """(plan, inputs, why there are none) that a build of now would have; to compare with `manifest`, wherever it lies.

    read, frozen: as for `survey` and `allocate`.
    """
    found = sources(project, id, base, manifest, read, frozen)
    plan = plan_variant(project, id, base.checkpoint, base.targets, found)
    source = project.imatrix(id)
    imatrix: ImatrixInput | None = known_imatrix(project, source) if source else None
    inputs, missing = None, None if plan.applied else UNKNOWN
    statistics = known_statistics(project, base, id, manifest, read)
    if project.solves_by_statistics(id) and statistics is None:
        missing = missing or NOT_CALIBRATED
    elif plan.applied and (imatrix or not needs_imatrix(project, plan)):
        inputs = build_inputs(
            project, plan, base_input(project, base, id, manifest, read), imatrix, statistics, QUANT_VERSION
        )
    return plan, inputs, missing


def needs_imatrix(project: Project, plan: VariantPlan) -> bool:
    """Whether the imatrix that the file names has a part in this variant's weights."""
    source = project.imatrix(plan.id)
    return source is not None and (any(p.awq for p in plan.plans) or project.solves_by_imatrix(plan.id))


def known_statistics(
    project: Project, base: ResolvedBase, id: str, manifest: Manifest | None, read: bool
) -> str | None:
    """Key of the statistics that this variant is solved with, whether they were collected yet or not.

    None: it uses none, or they cannot be told, since nobody has read the base's weights. Where only that is missing, what
    was built is taken to have been built from the same.
    """
    if not project.solves_by_statistics(id):
        return None
    from .calibrate import key_of  # noqa: PLC0415 - tokenizers, only where there is something to find

    key = key_of(project, base, read and manifest is not None)
    return key or (manifest.inputs.statistics if manifest else None)


def read_quality(project: Project, weights_hash: str) -> Quality | None:
    """The quality on record for these weights."""
    found = read_result(project.store.results(weights_hash) / "quality.json", Quality)
    return found if found and found.weights_hash == weights_hash else None


def quality_state(project: Project, quality: Quality | None, base_hash: str) -> list[str]:
    """Why it is not current."""
    return quality_reasons(quality, QUALITY_VERSION, quality_settings(project), base_hash, calibration_hash(project))


def damage(folder: Path, manifest: Manifest, gone: Pruned | None) -> list[str]:
    """What is wrong with a built folder at a glance: files and sizes, headers, index, config. `verify` reads every byte.

    gone: weights that were pruned, which is no damage.
    """
    for entry in manifest.files:
        if gone and entry.path in gone.files:
            continue
        try:
            found = (folder / entry.path).stat().st_size
        except OSError:
            return [f"its folder is damaged: {entry.path} is missing"]
        if found != entry.size:
            return [f"its folder is damaged: {entry.path} has {found} bytes, not {entry.size}"]
    try:
        if gone:
            described(folder, manifest)
        else:
            read_checkpoint(folder)
    except CheckpointError as e:
        return [f"its folder is damaged: {e}"]
    return []


def failure(smoke: Smoke | None) -> str | None:
    """The first check that failed, in words; None if the test passed or did not run."""
    if smoke is None or smoke.passed:
        return None
    bad = next((c for c in smoke.checks if not c.passed), None)
    return f"{bad.name}: {bad.detail}" if bad else "failed"


def read_manifest(project: Project, id: str) -> Manifest | None:
    """The manifest, or None. Raises InputError if it is of another variant."""
    try:
        manifest = read_model(project.store.manifest(id), Manifest)
    except InputError as e:
        # without it nothing proves that the folder is ours, so a build would refuse to replace it
        step = "delete the folder to build it again (notes of your own stand in its README.md)"
        raise InputError(f"{str(e).removesuffix(REDO)}; {step}") from None
    if manifest and manifest.id != id:
        raise InputError(f"{id}/manifest.json: is of variant {manifest.id}; delete the folder to build it again")
    return manifest


def base_input(
    project: Project, base: ResolvedBase, id: str, manifest: Manifest | None, read: bool = True
) -> BaseInput:
    """Identity of the base as this variant uses it. Its weights are read only if there is something to compare with and
    its files are not those whose hash is remembered; never with `read` False."""
    targets: list[Target] = select_targets(project, id, base.targets)
    known = known_source_hash(project, base, targets)
    if known is None and manifest is not None:
        if base.commit and base.commit == manifest.inputs.base.commit:
            known = manifest.inputs.base.source_hash  # a commit fixes the bytes
        elif base.weights and read:
            known = source_hash_of(targets)
            remember_source_hash(project, base, targets, known)
    return BaseInput(name=base.name, commit=base.commit, source_hash=known or "", files_hash=base.files_hash)


def _cards(project: Project, base: ResolvedBase, rungs: dict[str, Rung]) -> list[tuple[Rung, list[str]]]:
    from . import provenance  # noqa: PLC0415
    from .card import figure, gather, render  # noqa: PLC0415 - jinja2 only where cards are looked at
    from .card_figure import faults  # noqa: PLC0415
    from .card_notes import CardFault, read_card  # noqa: PLC0415

    templates = card_templates(project)
    facts = gather(project, base.folder)
    out = []
    for id, rung in rungs.items():
        reasons = list(rung.state.card)
        if rung.manifest:
            folder = project.store.variant(id)
            try:
                if facts.variant(id).error:
                    reasons = ["weights are stale"]
                elif (text := read_card(folder / "README.md")) is None:
                    reasons = ["not rendered"]
                elif text != render(facts, id, templates):
                    reasons = ["differs from what would be rendered"]
                else:
                    reasons = faults(folder, figure(facts, id))
                    reasons += provenance.faults(folder, provenance.expected(project, rung.manifest))
            except CardFault as e:
                reasons = [str(e)]
        out.append((rung, reasons))
    return out


def card_templates(project: Project) -> Path | None:
    return project.local(project.ladder.card.templates) if project.ladder.card.templates else None


def _with_card(rung: Rung, reasons: list[str]) -> Rung:
    return replace(rung, state=replace(rung.state, card=reasons))
