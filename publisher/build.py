"""quantize → smoke → bench → card, for whatever is not current. Every step leaves its own file and can be resumed."""

from __future__ import annotations

import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.errors import GateRefused, InputError
from inference.families import names_of
from quant.folder import finish, replaced

from . import __version__, card_figure, provenance
from .allocation import UNKNOWN
from .base import ResolvedBase, fetch_imatrix, fingerprint, remember_source_hash
from .card import Facts, figure, gather, render
from .card_format import size
from .card_notes import CardFault, Notes, read_card, read_notes
from .plan import build_inputs, disk_needed, quant_table, select_targets
from .prune import require_weights
from .report import Report
from .schema import (
    BaseInput,
    BuildInputs,
    BuildRecord,
    CalibrationInput,
    CalibrationRecord,
    Costs,
    FileEntry,
    ImatrixInput,
    Manifest,
    Smoke,
    TensorEntry,
)
from .store import PART, digest, discard_leftovers, exclusive, read_model, read_result, write_model, write_text
from .survey import NOT_CALIBRATED, Rung, Survey, card_templates, failure, needs_imatrix, read_manifest, survey
from .variants import Project
from .verify import SIGNATURE

if TYPE_CHECKING:
    from quant.awq import Exponents
    from quant.convert import Converted
    from quant.moments import MomentSource

    from .ahead import Ahead
    from .hub import Hub

SHARD = re.compile(r"(model(-\d{5}-of-\d{5})?|mtp)\.safetensors")  # of an earlier build, whatever its manifest says


@dataclass(frozen=True)
class Outcome:
    """What a build did to one variant. failed: its smoke test said no."""

    id: str
    rebuilt: bool
    smoked: bool
    benched: bool
    card: bool  # its card changed on disk
    failed: str | None
    card_fault: str | None = None  # why its card could not be rendered


@dataclass(frozen=True)
class Cards:
    """What became of cards. changed: those of which something on disk changed; faults: why one could not be rendered, a line
    each, by variant."""

    changed: frozenset[str]
    faults: dict[str, str]


def refuse_faults(faults: Mapping[str, str]) -> None:
    """Raises GateRefused, a line for each card that could not be rendered; nothing if there is none."""
    if faults:
        lines = list(faults.values())
        raise GateRefused("\n  ".join(["cards with a fault:", *lines]) if len(lines) > 1 else lines[0])


def build_held(
    project: Project,
    ids: Sequence[str],
    hub: Callable[[], Hub],
    report: Report,
    force: bool = False,
    skip: Collection[str] = (),
    evaluate: bool = False,
    ahead: Ahead | None = None,
    keep_pruned: bool = False,
    jobs: int | None = None,
) -> list[Outcome]:
    """Bring variants up to date; cards of all built siblings follow, since they list each other. For a caller that holds
    the lock.

    ahead: is offered each variant as soon as its weights passed their smoke test. keep_pruned: weights that the hub holds
    are not made again, unless a step needs them. jobs: bands of the base to quantize at once; None: by the cores.
    Raises what the steps raise; a failed smoke test or a faulty card is not an exception but in an Outcome.
    """
    seen = survey(project, hub, cards=False)
    _require_allocated(seen, ids)
    if _fetch_imatrices(project, seen, ids, hub):
        seen = survey(project, hub, cards=False)
    stale = [id for id in ids if force or _needs_weights(seen.rungs[id], skip, evaluate, keep_pruned)]
    if stale or any(_needs_base(seen.rungs[id], skip) for id in ids):
        seen = _with_weights(project, seen, ids, stale, hub, report)
    for id in stale:
        state = seen.rungs[id].state
        report.line(f"{id}: weights: {'; '.join(state.weights) or ('pruned' if state.pruned else 'forced')}")
    for id in set(ids) - set(stale):
        _offer(ahead, seen.rungs[id])
    for id in set(ids) - set(stale):
        sweep(project, id)
    if stale:
        if "smoke" not in skip or "bench" not in skip:
            from inference.tokenizer import Tokenizer  # noqa: PLC0415 - cards and pushes need no tokenizer

            Tokenizer.load(seen.base.folder)  # better refused now than after hours of quantizing
        quantize(project, seen, stale, hub, report, jobs)
        seen = survey(project, hub, weights=True, cards=False)
    for id in stale:
        _offer(ahead, seen.rungs[id])
    smoked, benched = measure_stale(project, seen, ids, report, force, skip, ahead)
    if evaluate:
        from .evaluate import evaluate_held  # noqa: PLC0415 - it needs this module

        evaluate_held(project, [id for id in ids if not _failed(project, id)], hub, report, force, cards=False)
    cards = render_cards(project, seen.base) if "card" not in skip else Cards(frozenset(), {})
    changed, faults = cards.changed, cards.faults
    for id in sorted(changed, key=list(seen.rungs).index):
        report.line(f"{id}: card written")
    outcomes = [
        Outcome(id, id in stale, id in smoked, id in benched, id in changed, _failed(project, id), faults.get(id))
        for id in seen.rungs
        if id in ids or id in changed or id in faults
    ]
    if not (stale or smoked or benched or changed or faults):
        report.line("nothing to do: all is current")
    return outcomes


build = exclusive("build")(build_held)


def _needs_weights(rung: Rung, skip: Collection[str], evaluate: bool, keep_pruned: bool) -> bool:
    """Whether weights have to be made: they are stale, or were pruned and somebody wants them."""
    state = rung.state
    return bool(
        state.weights or (state.pruned and (not keep_pruned or _needs_base(rung, skip) or (evaluate and state.quality)))
    )


def _offer(ahead: Ahead | None, rung: Rung) -> None:
    """Only weights that passed their smoke test as it is today may leave."""
    if ahead and rung.manifest and not (rung.state.weights or rung.state.smoke or rung.state.failed):
        ahead.offer(rung.id)


def _require_allocated(seen: Survey, ids: Sequence[str]) -> None:
    open_ids = [id for id in ids if seen.rungs[id].plan.applied is None]
    if open_ids:
        raise InputError(f"{', '.join(open_ids)}: {UNKNOWN}")


def _with_weights(
    project: Project, seen: Survey, ids: Sequence[str], stale: Collection[str], hub: Callable[[], Hub], report: Report
) -> Survey:
    """The survey with the base downloaded, once it is sure that the disk holds it and what is built from it."""
    if seen.base.weights:
        return seen
    from .hub import check_disk, download_size  # noqa: PLC0415 - the client only for Hub bases

    connection, repo, commit = hub(), project.ladder.base.repo or "", seen.base.commit or ""
    plans = [seen.rungs[id].plan for id in ids if id in stale]
    check_disk({connection.cache: download_size(connection, repo, commit), project.store.root: disk_needed(plans)})

    return survey(project, hub, weights=True, cards=False, progress=report.nbytes)


def _fetch_imatrices(project: Project, seen: Survey, ids: Sequence[str], hub: Callable[[], Hub]) -> bool:
    """Download what the lock does not name yet: whether a variant is stale cannot be known before."""
    sources = [project.imatrix(id) for id in ids if seen.rungs[id].inputs is None]
    for source in dict.fromkeys(s for s in sources if s):
        fetch_imatrix(project, source, hub)
    return bool(sources)


def _needs_base(rung: Rung, skip: Collection[str]) -> bool:
    """Whether a step of this variant reads the base's weights."""
    state = rung.state
    return bool(state.weights or ("smoke" not in skip and state.smoke) or ("bench" not in skip and state.bench))


def _failed(project: Project, id: str) -> str | None:
    """What the smoke test on record says against the weights that are in place."""
    manifest = read_manifest(project, id)
    return (
        failure(read_result(project.store.results(manifest.weights_hash) / "smoke.json", Smoke)) if manifest else None
    )


def quantize(
    project: Project,
    seen: Survey,
    ids: Sequence[str],
    hub: Callable[[], Hub],
    report: Report,
    at_once: int | None = None,
) -> None:
    """Convert variants in one pass over the source and move each into place with its manifest."""
    from quant.convert import Job, convert  # noqa: PLC0415 - MLX only when there is something to quantize

    started = time.perf_counter()
    check_places(project, seen.base, ids)
    jobs, inputs, exponents = [], {}, {}
    shared: dict[str, MomentSource] = {}
    for id in ids:
        job, inputs[id], exponents[id] = _job(project, seen, seen.rungs[id], hub, shared)
        sweep(project, id, keep=job["staging"])
        jobs.append(Job(**job))
    report.line(f"quantizing {', '.join(ids)} in one pass over {seen.base.name}")
    with report.bar("quantize") as tick:
        converted = convert(jobs, lambda p: tick(p.bytes_done, p.bytes_total), at_once=at_once)
    wall = time.perf_counter() - started
    for job, done in zip(jobs, converted, strict=True):
        remember_source_hash(
            project, seen.base, select_targets(project, done.variant, seen.base.targets), done.source_hash
        )
        manifest = _manifest(project, seen.rungs[done.variant], inputs[done.variant], exponents[done.variant], done)
        write_model(done.folder / "manifest.json", manifest)
        keep_own(project.store.variant(done.variant), done.folder)
        # before the folder is in place: from then on nothing comes back here
        if not _as_pruned(seen.rungs[done.variant], manifest):
            _record(project, manifest, ids, done, wall)
        finish(job.staging, project.store.variant(done.variant))
        report.line(
            f"{done.variant}: {size(manifest.nbytes)}, {8 * manifest.text_nbytes / manifest.text_params:.2f} bits a "
            f"weight, weights {manifest.weights_hash[:12]}"
        )


def _job(
    project: Project, seen: Survey, rung: Rung, hub: Callable[[], Hub], shared: dict[str, MomentSource]
) -> tuple[dict[str, Any], BuildInputs, Exponents]:
    """Arguments of a `quant.convert.Job`; for the manifest the inputs (source hash still open), and the AWQ exponents
    that were searched. shared: statistics that other jobs of this run use, by folder."""
    from quant.awq import folds  # noqa: PLC0415
    from quant.awq_search import search  # noqa: PLC0415
    from quant.folding import round_together, undo_rounded_norms  # noqa: PLC0415
    from quant.imatrix import read_imatrix  # noqa: PLC0415
    from quant.moments import FromImportance, FromStatistics  # noqa: PLC0415
    from quant.version import QUANT_VERSION  # noqa: PLC0415

    from .calibrate import find, key_of  # noqa: PLC0415

    imatrix, scales, searched, statistics_key = None, {}, {}, None
    table = quant_table(seen.base.checkpoint.config)
    moments: MomentSource | None = None
    source = project.imatrix(rung.id)
    if source and needs_imatrix(project, rung.plan):
        path, imatrix = fetch_imatrix(project, source, hub)
        statistics = read_imatrix(path, seen.base.checkpoint.config)
        exponent = project.recipe(rung.id).awq_exponent
        if exponent == "search":
            exponent = searched = search(rung.plan.plans, statistics, table.AWQ_GROUPS, project.solver(rung.id))
        scales = folds(rung.plan.plans, statistics, exponent, table.AWQ_GROUPS)
        # the plan and the card say that these are scaled: a hole in the statistics must not make that untrue
        bare = next((p.target.module for p in rung.plan.plans if p.awq and p.target.name not in scales), None)
        if bare:
            raise InputError(
                f"{imatrix.name}: holds nothing for {bare}; take a complete imatrix, or a rule with awq: false"
            )
        if project.solves_by_imatrix(rung.id):
            moments = FromImportance(statistics.importance)
    if project.solves_by_statistics(rung.id):
        found = find(project, seen.base, read=True)
        if found is None:
            raise InputError(f"{rung.id}: {NOT_CALIBRATED}")
        # one for all variants: what it prepares of a Hessian serves every format
        moments = shared.setdefault(str(found.folder), FromStatistics(found))
        statistics_key = key_of(project, seen.base)
    if project.solver(rung.id) != "rtn":  # whose bytes are those of mlx_lm.convert
        scales = undo_rounded_norms(rung.plan.plans, scales, table.READERS)
        if table.PAIRED_NORMS:
            config = seen.base.checkpoint.config
            rotary = names_of(config).read_config(config).rotary_dim
            scales |= round_together(rung.plan.plans, table.PAIRED_NORMS, rotary)
    inputs = _inputs(project, seen.base, rung, imatrix, statistics_key, QUANT_VERSION)
    key = digest({"inputs": inputs.model_dump(mode="json"), "files": fingerprint(seen.base.checkpoint)})
    job = {
        "variant": rung.id,
        "plans": rung.plan.plans,
        "staging": project.store.staging(rung.id, key),
        "base": seen.base.folder,
        "config": seen.base.checkpoint.config,
        "folds": scales,
        "mtp": project.mtp(rung.id),
        "solver": project.solver(rung.id),
        "moments": moments,
        "inputs": {"key": key},
    }
    return job, inputs, searched


def check_places(project: Project, base: ResolvedBase, ids: Sequence[str]) -> None:
    """A build replaces whole folders: only such as an earlier build left, and never the base or anything around it."""
    out, source = project.store.root.resolve(), base.folder.resolve()
    if out == source or source in out.parents:
        raise InputError(f"output: {out} lies in the base model's folder; choose another")
    for id in ids:
        final = project.store.variant(id)
        if not final.exists() and not final.is_symlink():
            continue
        if final.is_symlink() or not final.is_dir() or final.resolve() == source or final.resolve() in source.parents:
            raise InputError(
                f"{final}: is no folder of an earlier build; move it, or change output: or the variant's id"
            )
        foreign = _foreign(final)
        if foreign:
            raise InputError(f"{final}: holds {foreign}, which no build put there and a rebuild would delete; move it")


def _foreign(folder: Path) -> str | None:
    """A file that the folder's own manifest does not list; leftovers of a killed write do not count."""
    manifest = read_model(folder / "manifest.json", Manifest)
    known = {f.path for f in manifest.files} if manifest else set()
    known |= {"manifest.json", "README.md", "images", provenance.FOLDER, SIGNATURE}
    left = (p.name for p in sorted(folder.iterdir()) if p.name not in known and not SHARD.fullmatch(p.name))
    return next((n for n in left if not (n.startswith(".") and n.endswith(PART))), None)


def _as_pruned(rung: Rung, manifest: Manifest) -> bool:
    """Whether these are the bytes that were pruned: brought back, they are what was built and released then, and the record
    of that, which is released with them, stays."""
    return bool(rung.state.pruned and rung.manifest and rung.manifest.weights_hash == manifest.weights_hash)


def keep_own(old: Path, new: Path) -> None:
    """Pictures and notes of the publisher's own stay when weights are built again."""
    if read_notes(old / "README.md") not in (None, Notes()):
        shutil.copyfile(
            old / "README.md", new / "README.md"
        )  # of other weights until it is rendered, so it cannot leave
    if (old / "images").is_dir():
        shutil.copytree(old / "images", new / "images", dirs_exist_ok=True)


def sweep(project: Project, id: str, keep: Path | None = None) -> None:
    """Remove what killed builds of a variant left and no later one can use: staging under other inputs, which can never
    be finished, and the folder that was being replaced. keep: the staging of the build that is about to go on."""
    staging, final = project.store.staging(id, "0" * 16).parent, project.store.variant(id)
    for left in staging.iterdir() if staging.is_dir() else ():
        if left != keep and re.fullmatch(re.escape(id) + "-[0-9a-f]{16}", left.name):
            shutil.rmtree(left)
    aside = replaced(final)
    if aside.exists() and final.exists():
        shutil.rmtree(aside)


def _inputs(
    project: Project, base: ResolvedBase, rung: Rung, imatrix: ImatrixInput | None, statistics: str | None, version: int
) -> BuildInputs:
    open_base = BaseInput(name=base.name, commit=base.commit, source_hash="", files_hash=base.files_hash)
    return build_inputs(project, rung.plan, open_base, imatrix, statistics, version)


def _manifest(project: Project, rung: Rung, inputs: BuildInputs, exponents: Exponents, done: Converted) -> Manifest:
    plan = rung.plan
    base = inputs.base.model_copy(update={"source_hash": done.source_hash})
    return Manifest(
        tool=f"mlx-publish {__version__}",
        id=rung.id,
        inputs=inputs.model_copy(update={"base": base}),
        weights_hash=done.weights_hash,
        params=plan.params,
        text_params=plan.text_params,
        nbytes=plan.nbytes,
        text_nbytes=plan.text_nbytes,
        files=[FileEntry(path=p, size=s, sha256=h) for p, s, h in done.files],
        tensors=[TensorEntry(name=n, dtype=d, shape=list(s), blake3=h) for n, d, s, h in done.tensors],
        allocation=plan.sized.allocation if plan.sized else None,
        awq_exponents=_by_group(exponents),
        calibration=_calibration(project, inputs.statistics),
    )


def _calibration(project: Project, key: str | None) -> CalibrationInput | None:
    """What statistics were collected over, as their record says; local paths are cut to file names."""
    from .calibrate import RECORD  # noqa: PLC0415

    record = read_result(project.store.statistics / key[:16] / RECORD, CalibrationRecord) if key else None
    if record is None or record.key != key:
        return None
    spec = project.ladder.calibration
    names = {k: Path(v).name for k in ("text", "chat") if isinstance(v := getattr(spec, k), str)}
    return CalibrationInput(texts=record.texts, tokens=record.tokens, settings=spec.model_copy(update=names))


def _costs(project: Project, manifest: Manifest) -> Costs | None:
    """The costs that lie beside the statistics that these weights were solved or allocated with, if they are there."""
    from .costing import COSTS  # noqa: PLC0415

    key = manifest.inputs.statistics
    if key:
        return read_result(project.store.statistics / key[:16] / COSTS, Costs)
    if manifest.allocation:
        found = (read_result(p, Costs) for p in sorted(project.store.statistics.glob(f"*/{COSTS}")))
        return next((c for c in found if c and c.statistics == manifest.allocation.statistics), None)
    return None


def _by_group(exponents: Exponents) -> dict[str, dict[str, float]]:
    """Group → layer → exponent, for the manifest."""
    out: dict[str, dict[str, float]] = {}
    for (layer, label), exponent in exponents.items():
        out.setdefault(label, {})[layer] = exponent
    return {label: out[label] for label in sorted(out)}


def _record(project: Project, manifest: Manifest, ids: Sequence[str], done: Converted, wall: float) -> None:
    from .bench import device  # noqa: PLC0415

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    costs = _costs(project, manifest)
    record = BuildRecord(
        weights_hash=manifest.weights_hash,
        built_at=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=round(wall, 3),
        variants=list(ids),
        bytes_read=done.bytes_read,
        bytes_written=done.bytes_written,
        peak_gb=round(peak / 1e9, 3),
        device=device(),
        probes=costs.probes if costs else [],
        probe_tokens=costs.probe_tokens if costs else 0,
        versions=provenance.versions(),
    )
    write_model(project.store.results(manifest.weights_hash) / "build.json", record)


def measure_stale(
    project: Project,
    seen: Survey,
    ids: Sequence[str],
    report: Report,
    force: bool,
    skip: Collection[str],
    ahead: Ahead | None = None,
) -> tuple[set[str], set[str]]:
    """Smoke and bench what needs it; returns the variants that were smoked and benched. ahead: as for a build."""
    wanted = {}
    for id in ids:
        rung = seen.rungs[id]
        if rung.manifest is None:
            continue
        smoke = "smoke" not in skip and (force or bool(rung.state.smoke))
        bench = "bench" not in skip and (force or bool(rung.state.bench))
        if rung.state.failed and not smoke:
            bench = False  # these bytes failed already; `publish smoke` asks them again
        if smoke or bench:
            wanted[id] = (rung.manifest, smoke, bench)
    if not wanted:
        return set(), set()
    from .measure import Wanted, measure_all  # noqa: PLC0415 - MLX only when there is something to measure

    found = {id: Wanted(*w) for id, w in wanted.items()}
    if ahead:
        done = measure_all(project, seen.base, found, report, ahead.offer, ahead.quiet)
    else:
        done = measure_all(project, seen.base, found, report)
    return {id for id, m in done.items() if m.smoke}, {id for id, m in done.items() if m.bench}


@exclusive("smoke or bench")
def remeasure(project: Project, ids: Sequence[str], step: str, hub: Callable[[], Hub], report: Report) -> list[Outcome]:
    """Run one step again on built variants, whatever is on record, and bring the cards after it."""
    seen = survey(project, hub, weights=True, cards=False)
    for id in ids:
        require_weights(project, require_built(project, id))
    from .measure import Wanted, measure_all  # noqa: PLC0415

    wanted = {id: Wanted(m, step == "smoke", step == "bench") for id in ids if (m := seen.rungs[id].manifest)}
    done = measure_all(project, seen.base, wanted, report)
    try:
        cards = render_cards(project, seen.base)
    except InputError as e:
        if not any(failure(m.smoke) for m in done.values()):
            raise
        report.line(f"cards not rendered: {e}")  # what cannot be loaded cannot be described; the verdict is the answer
        cards = Cards(frozenset(), {})
    return [
        Outcome(id, False, bool(m.smoke), bool(m.bench), id in cards.changed, failure(m.smoke), cards.faults.get(id))
        for id, m in done.items()
    ]


def require_built(project: Project, id: str) -> Manifest:
    manifest = read_manifest(project, id)
    if manifest is None:
        raise GateRefused(f"{id}: not built; run: publish build {id}")
    return manifest


def card_texts(
    project: Project, facts: Facts, ids: Sequence[str] | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """The card of every built variant, as it would be rendered now; why, in one line, of those that cannot be."""
    templates = card_templates(project)
    built = [id for id in ids or project.ladder.variants if read_manifest(project, id) and not facts.variant(id).error]
    texts, faults = {}, {}
    for id in built:
        try:
            texts[id] = render(facts, id, templates)
        except CardFault as e:
            faults[id] = str(e)
    return texts, faults


def card_figures(project: Project, facts: Facts, ids: Sequence[str] | None = None) -> dict[str, list[str]]:
    """What beside the text of every built variant's card, its pictures and the provenance, is not what it would be now."""
    built = [id for id in ids or project.ladder.variants if facts.variant(id).contents]
    return {
        id: [
            *card_figure.faults(project.store.variant(id), figure(facts, id)),
            *provenance.faults(project.store.variant(id), provenance.expected(project, found.manifest)),
        ]
        for id in built
        if (found := facts.variant(id).contents)
    }


def render_cards(project: Project, base: ResolvedBase, ids: Sequence[str] | None = None) -> Cards:
    """Write the cards, pictures and provenance that differ from what is on disk. One that cannot be rendered without a loss
    stays as it is, and does not keep the others from it."""
    changed, faults = set(), {}
    facts, templates = gather(project, base.folder), card_templates(project)
    for id in ids or project.ladder.variants:
        manifest = read_manifest(project, id)
        if not manifest or facts.variant(id).error:
            continue
        path = project.store.variant(id) / "README.md"
        discard_leftovers(path)
        try:
            text, old = render(facts, id, templates), read_card(path)
        except CardFault as e:
            faults[id] = str(e)
            continue
        # the picture first: a card never shows one that is not there yet
        if card_figure.write(project.store.variant(id), figure(facts, id)):
            changed.add(id)
        if old != text:
            write_text(path, text)
            changed.add(id)
        if provenance.write(project.store.variant(id), provenance.expected(project, manifest)):
            changed.add(id)
    return Cards(frozenset(changed), faults)
