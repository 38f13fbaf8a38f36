"""A release of several variants: every gate and every plan before the first byte, then one commit a repo.

If one repo fails, the others are finished; the failed one is named, and the same command heals it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from inference.errors import GateRefused, PublishError

from .build import card_figures, card_texts
from .gate import gate
from .hub import Hub
from .protocol import kld_ceiling
from .push import PushPlan, execute, plan_push
from .report import Report
from .schema import Receipt
from .store import exclusive
from .survey import Rung, survey
from .variants import Project


def prepare(
    project: Project, ids: Sequence[str], hub: Hub, *, create_pr: bool, private: bool, overwrite: bool
) -> list[PushPlan]:
    """The plan of each variant. Changes nothing anywhere. Raises GateRefused with every refusal, one a line.

    The base's weights are not downloaded for this: where they are not here, its commit stands for them.
    """
    hub.require_online("push")
    seen = survey(project, lambda: hub, cards=False, ids=ids)
    cards, figures = card_texts(project, seen.base.folder, ids), card_figures(project, seen.base.folder, ids)
    refusals = [
        r
        for id in ids
        for r in gate(
            project,
            id,
            expected_card=cards.get(id),
            stale=[
                *_stale(project, seen.rungs[id]),
                *(f"{line}; run `publish card {id}`" for line in figures.get(id, ())),
            ],
        )
    ]
    if refusals:
        raise GateRefused("\n  ".join(["not ready to leave:", *refusals]) if len(refusals) > 1 else refusals[0])
    return [plan_push(hub, project, id, private=private, create_pr=create_pr, overwrite=overwrite) for id in ids]


def _stale(project: Project, rung: Rung) -> Iterator[str]:
    """What on disk is not of today's variants.yaml, base and imatrix. A benchmark may be old: then the card says so.

    What is missing altogether is the gate's own to tell.
    """
    state = rung.state
    if rung.manifest and state.weights:
        yield f"weights are stale ({'; '.join(state.weights)}); run `publish build {rung.id}`"
    elif rung.smoke and state.smoke:
        yield f"the smoke test is stale ({'; '.join(state.smoke)}); run `publish smoke {rung.id}`"
    if (
        rung.quality
        and not state.weights
        and state.quality
        and kld_ceiling(project, rung.id, rung.plan.bits) is not None
    ):
        yield f"kld_ceiling is set, but the quality is stale ({'; '.join(state.quality)}); run `publish eval {rung.id}`"


@exclusive
def release(
    project: Project, hub: Hub, plans: Sequence[PushPlan], report: Report
) -> tuple[list[Receipt], dict[str, PublishError]]:
    """Push one after the other; returns the receipts, and the error of each variant that failed."""
    receipts: list[Receipt] = []
    failed: dict[str, PublishError] = {}
    for plan in plans:
        try:
            with report.bar(f"{plan.id}: push") as tick:
                receipt = execute(hub, project, plan, lambda what, done, total, tick=tick: tick(done, total))
        except PublishError as e:
            failed[plan.id] = e
            report.line(f"{plan.id}: not pushed: {str(e).splitlines()[0]}")
            continue
        receipts.append(receipt)
        report.line(
            f"{plan.id}: {'was up to date' if plan.up_to_date else 'pushed'}  {plan.repo} {receipt.commit[:12]}"
        )
    return receipts, failed
