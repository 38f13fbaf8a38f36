"""A release of several variants: every gate and every plan before the first byte, then one commit a repo.

If one repo fails, the others are finished; the failed one is named, and the same command heals it.
"""

from __future__ import annotations

from collections.abc import Sequence

from inference.errors import GateRefused, PublishError

from .base import resolve_base
from .build import card_texts
from .gate import gate
from .hub import Hub
from .push import PushPlan, execute, plan_push
from .report import Report
from .schema import Receipt
from .store import exclusive
from .variants import Project


def prepare(
    project: Project, ids: Sequence[str], hub: Hub, *, create_pr: bool, private: bool, overwrite: bool
) -> list[PushPlan]:
    """The plan of each variant. Changes nothing anywhere. Raises GateRefused with every refusal, one a line."""
    hub.require_online("push")
    base = resolve_base(project, lambda: hub, weights=False)
    cards = card_texts(project, base.folder, ids)
    refusals = [r for id in ids for r in gate(project, id, expected_card=cards.get(id))]
    if refusals:
        raise GateRefused("\n  ".join(["not ready to leave:", *refusals]) if len(refusals) > 1 else refusals[0])
    return [plan_push(hub, project, id, private=private, create_pr=create_pr, overwrite=overwrite) for id in ids]


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
