"""Other people's recipes in the same harness: what a variant of this ladder has to be better than.

mlx-lm's uniform 4 and 8 bits (`uniform` with round-to-nearest gives its bytes), and `unsloth` as it was published, for
every N that the ladder has. Each is built from the same base, measured, and its weights deleted; the result stays under
its weights hash, and out/baselines.json says which is which.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inference.errors import InputError
from quant.awq import folds
from quant.builtin import BUILTIN
from quant.convert import Job, convert
from quant.imatrix import read_imatrix
from quant.recipe import TensorPlan, resolve
from quant.tables import scalable
from quant.version import QUANT_VERSION

from .base import fetch_imatrix, fingerprint
from .evaluate import Session, Subject
from .plan import assignment, quant_table
from .schema import Baseline, Baselines, ImatrixInput
from .store import digest, read_result, write_model
from .survey import quality_state, read_quality
from .variants import Project

if TYPE_CHECKING:
    from .hub import Hub

UNIFORM_BITS = (4, 8)
GROUP_SIZE = 64  # mlx-lm's default, and that of the published recipe
SOLVER = "rtn"  # theirs, whatever this ladder uses


@dataclass(frozen=True)
class Wanted:
    name: str
    recipe: str
    bits: int


def wanted(project: Project) -> list[Wanted]:
    """The baselines of a ladder."""
    out = [Wanted(f"mlx-lm uniform {b}-bit", "uniform", b) for b in UNIFORM_BITS]
    return out + [Wanted(f"unsloth {n} as published", "unsloth", n) for n in sorted(_ladder_bits(project))]


def _ladder_bits(project: Project) -> set[int]:
    out = set()
    for id in project.ladder.variants:
        size = project.size(id)
        bits = project.variant(id).bits or (size.bits if size else 0)
        if bits:
            out.add(bits)
    return out or {4}


def measure_baselines(session: Session, hub: Callable[[], Hub], force: bool) -> list[str]:
    """Measure those that are not current; returns their names."""
    project, base = session.project, session.base
    known = read_result(project.store.baselines, Baselines)
    entries = {b.name: b for b in known.baselines} if known else {}
    measured = []
    chosen = wanted(project)
    for want in chosen:
        plans, imatrix, job = _job(session, want, hub)
        inputs = digest(
            {
                "base": session.reference.identity,
                "files": base.files_hash,
                "assignment": assignment(plans),
                "imatrix": imatrix.sha256 if imatrix else None,
                "solver": SOLVER,
                "version": QUANT_VERSION,
            }
        )
        entry = entries.get(want.name)
        if entry and entry.inputs == inputs and not force:
            quality = read_quality(project, entry.weights_hash)
            if quality and not quality_state(project, quality, quality.base_hash):
                continue
        entries[want.name] = _measure(session, want, plans, imatrix, job, inputs, force)
        measured.append(want.name)
        ordered = [entries[w.name] for w in chosen if w.name in entries]
        write_model(project.store.baselines, Baselines(baselines=ordered))
    return measured


def _job(session: Session, want: Wanted, hub: Callable[[], Hub]) -> tuple[list[TensorPlan], ImatrixInput | None, dict]:
    """Plans, the imatrix that scales them, and arguments of a `quant.convert.Job`."""
    project, base = session.project, session.base
    table = quant_table(base.checkpoint.config)
    drop = {part for part in ("mtp", "vision") if getattr(project.ladder, part) == "drop"}
    targets = [t for t in base.targets if t.part not in drop]
    source = next((s for id in project.ladder.variants if (s := project.imatrix(id))), project.ladder.imatrix)
    recipe = BUILTIN[want.recipe]
    plans = resolve(
        recipe, want.bits, GROUP_SIZE, targets, table.CLASSES, scalable(table.AWQ_GROUPS), source is not None
    )  # fmt: skip
    scales, imatrix = {}, None
    if source and any(p.awq for p in plans) and recipe.awq_exponent != "search":
        path, imatrix = fetch_imatrix(project, source, hub)
        scales = folds(plans, read_imatrix(path, base.checkpoint.config), recipe.awq_exponent, table.AWQ_GROUPS)
        bare = next((p.target.module for p in plans if p.awq and p.target.name not in scales), None)
        if bare:
            raise InputError(f"{imatrix.name}: holds nothing for {bare}; take a complete imatrix for the baselines")
    job = {"plans": plans, "base": base.folder, "config": base.checkpoint.config, "folds": scales}
    return plans, imatrix, job | {"mtp": project.ladder.mtp, "solver": SOLVER}


def _measure(
    session: Session,
    want: Wanted,
    plans: list[TensorPlan],
    imatrix: ImatrixInput | None,
    job: dict,
    inputs: str,
    force: bool,
) -> Baseline:
    project = session.project
    key = digest({"inputs": inputs, "files": fingerprint(session.base.checkpoint)})
    staging = project.store.staging(f"baseline-{want.recipe}-{want.bits}", key)
    session.report.line(f"{want.name}: building it to be measured")
    with session.report.bar(f"{want.name}: quantize") as tick:
        (done,) = convert(
            [Job(variant=want.name, staging=staging, inputs={"key": key}, **job)],
            lambda p: tick(p.bytes_done, p.bytes_total),
        )
    text = [p for p in plans if p.target.part == "text"]
    subject = Subject(
        want.name, done.folder, done.weights_hash, done.source_hash, sum(p.nbytes for p in plans),
        sum(p.nbytes for p in text), sum(p.target.params for p in text),
    )  # fmt: skip
    quality = read_quality(project, done.weights_hash)  # a variant of this ladder may have the same bytes
    if force or quality_state(project, quality, done.source_hash):
        session.measure(subject)
    shutil.rmtree(staging)
    return Baseline(
        name=want.name,
        recipe=want.recipe,
        bits=want.bits,
        group_size=GROUP_SIZE,
        imatrix=imatrix.name if imatrix else None,
        inputs=inputs,
        weights_hash=done.weights_hash,
        nbytes=subject.nbytes,
        text_nbytes=subject.text_nbytes,
        text_params=subject.text_params,
    )
