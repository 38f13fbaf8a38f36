"""A release of several variants as a unit: every gate and every plan before the first byte, then one commit a repo.

    repos       one after the other: upload, one commit, proof by hash, tag, receipt; a new repo is made private
    collection  the ladder in order, with the notes
    visibility  last: if nothing failed, the new repos are made public, all in one step
    prune       if asked for: weights here are deleted once the hub is proven to hold them

If one repo fails, the others are finished all the same, and the failed one is named. Repos that were public before have
then moved on; the new ones stay private, so that a ladder appears as a whole or not at all. The same command heals it:
which repos wait to become public stands in receipts/ladder.json (`ladder`), not in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from inference.errors import GateRefused, InputError, PublishError

from .ahead import Ahead
from .build import Outcome, build_held, card_figures, card_texts
from .card import gather
from .gate import gate
from .hub import Hub, RemoteFile
from .hub_collections import Item
from .ladder import LadderBook
from .preflight import before_building, check, together
from .protocol import kld_ceiling
from .prune import delete_weights
from .push import PushPlan, execute, plan_push
from .push_plan import local_files
from .report import Report
from .schema import Manifest, Receipt
from .signing import make_signature, stale
from .store import exclusive, read_model
from .survey import Rung, survey
from .variants import Project
from .verify import SIGNATURE

COLLECTION = "collection"  # what its failure is named


@dataclass(frozen=True)
class Choices:
    """How to push. private: new repos stay so; at_once: new repos are public from the start; prune: delete local weights."""

    create_pr: bool = False
    private: bool = False
    at_once: bool = False
    overwrite: bool = False
    prune: bool = False

    def check(self) -> None:
        """Raises InputError for options that contradict each other."""
        if self.private and self.at_once:
            raise InputError("--private and --public: give one of them")
        if self.prune and self.create_pr:
            raise InputError("--prune: only what is on main is proven to stay; leave out --create-pr")

    @property
    def staged(self) -> bool:
        return not (self.private or self.at_once or self.create_pr)


@dataclass(frozen=True)
class Released:
    """What a release did. failed: the error by variant, or of the `collection`; waiting: new repos that stay private until
    the same command is good for all; freed: bytes of pruned weights by variant."""

    receipts: list[Receipt] = field(default_factory=list)
    failed: dict[str, PublishError] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    published: list[str] = field(default_factory=list)
    collections: list[str] = field(default_factory=list)
    freed: dict[str, int] = field(default_factory=dict)


@exclusive("push")
def prepare(project: Project, ids: Sequence[str], hub: Hub, choices: Choices = Choices()) -> list[PushPlan]:
    """The plan of each variant. Changes nothing here, signatures included, but puts on record what weights the hub
    holds (`card_history`). Raises GateRefused, or what stands against it on the hub (`preflight`), every refusal on its line.

    The base's weights are not downloaded for this: where they are not here, its commit stands for them.
    """
    choices.check()
    hub.require_write("push")
    refusals = [r for found in refused(project, ids, hub).values() for r in found]
    if refusals:
        raise GateRefused("\n  ".join(["not ready to leave:", *refusals]) if len(refusals) > 1 else refusals[0])
    plans, errors = check(project, hub, [_plan(project, id, hub, choices) for id in ids])
    if errors:
        raise together(errors)
    return plans


def refused(project: Project, ids: Sequence[str], hub: Hub) -> dict[str, list[str]]:
    """What the gate says against each variant."""
    seen = survey(project, lambda: hub, cards=False, ids=ids)
    facts = gather(project, seen.base.folder)
    (cards, faults), figures = card_texts(project, facts, ids), card_figures(project, facts, ids)
    return {
        id: gate(
            project,
            id,
            expected_card=cards.get(id),
            card_fault=faults.get(id),
            stale=[
                *_stale(project, seen.rungs[id]),
                *(f"{line}; run `publish card {id}`" for line in figures.get(id, ())),
            ],
        )
        for id in ids
    }


def _plan(project: Project, id: str, hub: Hub, choices: Choices) -> PushPlan:
    plan = plan_push(
        hub, project, id, private=choices.private, create_pr=choices.create_pr, overwrite=choices.overwrite,
        staged=choices.staged, signature=_sign(project, id),
    )  # fmt: skip
    if plan.breaks:
        raise GateRefused(plan.breaks)
    return plan


def _sign(project: Project, id: str) -> bytes | None:
    """Sign what passed the gate, where there is a key. A signature of something else never leaves."""
    files = {f.path: f.sha256 for f in local_files(project, id)[1]}
    made = make_signature(project, id, files)
    if made is None and (fault := stale(project.store.variant(id), files)):
        raise GateRefused(f"{id}: {fault}; sign it again with --sign-key, or delete {SIGNATURE}")
    return made


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


def release_held(
    project: Project,
    hub: Hub,
    plans: Sequence[PushPlan],
    report: Report,
    choices: Choices = Choices(),
    failed: dict[str, PublishError] | None = None,
) -> Released:
    """Carry out the plans. failed: variants of this run that failed already. For a caller that holds the lock."""
    done = Released(failed=dict(failed or {}))
    book = LadderBook(project, hub.endpoint)
    if not choices.create_pr:
        for id, error in done.failed.items():
            book.failed(id, _line(error))
        for plan in plans:
            _mark(book, plan, choices)
    for plan in plans:
        try:
            with hub.lock(plan.repo), report.bar(f"{plan.id}: push") as tick:
                receipt = execute(hub, project, plan, lambda what, done, total, tick=tick: tick(done, total))
        except PublishError as e:
            done.failed[plan.id] = e
            report.line(f"{plan.id}: push stopped: {_told(e, plan)}")
            if not choices.create_pr:
                book.failed(plan.id, _line(e))
            continue
        done.receipts.append(receipt)
        if not choices.create_pr:
            book.done(receipt)
        report.line(
            f"{plan.id}: {'was up to date' if plan.up_to_date else 'pushed'}  {plan.repo} {receipt.commit[:12]}"
        )
    if choices.create_pr:
        return done
    _collect(project, hub, done, report)
    _publish(hub, book, done, choices, report)
    if choices.prune:
        _prune(project, hub, done, report)
    book.close(done.collections, {COLLECTION: _line(e)} if (e := done.failed.get(COLLECTION)) else {})
    done.waiting.extend(id for id in book.waiting if id not in done.waiting)
    return done


release = exclusive("push")(release_held)


def _mark(book: LadderBook, plan: PushPlan, choices: Choices) -> None:
    """On disk before the repo is made: one that is found private later is known as waiting, or as meant to be so."""
    if not plan.exists:
        book.mark(plan.id, choices.staged)
    elif choices.private or not plan.private:
        book.mark(plan.id, False)


def _line(error: PublishError) -> str:
    return str(error).splitlines()[0]


def _told(error: PublishError, plan: PushPlan) -> str:
    """The error; of one that the plan foresaw the difference was shown with it."""
    return _line(error) if plan.refusal else str(error)


def _collect(project: Project, hub: Hub, done: Released, report: Report) -> None:
    """One collection an owner: most ladders have one."""
    spec = project.ladder.collection
    if spec is None or not done.receipts:
        return
    ladder = [Item(project.repo(id), project.variant(id).note) for id in project.ladder.variants]
    for owner in dict.fromkeys(r.repo.split("/")[0] for r in done.receipts):
        mine = [i for i in ladder if i.repo.startswith(f"{owner}/")]
        add = [r.repo for r in done.receipts if r.repo.startswith(f"{owner}/")]
        try:
            done.collections.append(hub.arrange(owner, spec.title, spec.description, mine, add))
        except PublishError as e:
            done.failed[COLLECTION] = e
            report.line(f"collection {spec.title!r}: {_line(e)}")


def _publish(hub: Hub, book: LadderBook, done: Released, choices: Choices, report: Report) -> None:
    """The last step: new repos of this run become public, unless one failed."""
    if done.failed and not choices.at_once:
        return
    for receipt in done.receipts:
        if not book.waits(receipt.id):
            continue
        try:
            hub.make_public(receipt.repo)
        except PublishError as e:
            done.failed[receipt.id] = e
            book.failed(receipt.id, _line(e))
            report.line(f"{receipt.id}: not public yet: {_line(e)}")
            continue
        book.mark(receipt.id, False)
        done.published.append(receipt.id)
        report.line(f"{receipt.id}: public  {receipt.repo}")


def _prune(project: Project, hub: Hub, done: Released, report: Report) -> None:
    """The hub is asked again for each: what was proven before the others were pushed is not proven now."""
    for receipt in done.receipts:
        try:
            manifest = read_model(project.store.manifest(receipt.id), Manifest)
            assert manifest is not None
            proven = {path: f.sha256 for path, f in _proven(hub, receipt).items()}
            freed = delete_weights(project, manifest, receipt, proven)
        except PublishError as e:
            done.failed[receipt.id] = e
            report.line(_line(e))
            continue
        if freed:
            done.freed[receipt.id] = freed
            report.line(
                f"{receipt.id}: pruned  {freed / 1e9:.3f} GB of weights; publish build {receipt.id} brings them back"
            )


def _proven(hub: Hub, receipt: Receipt) -> dict[str, RemoteFile]:
    return hub.tree(receipt.repo, receipt.commit) or {}


# ------------------------------------------------------------------------------------------------ build and push


def build_and_push(
    project: Project,
    ids: Sequence[str],
    hub: Callable[[], Hub],
    report: Report,
    choices: Choices,
    force: bool = False,
    skip: Collection[str] = (),
    evaluate: bool = False,
    jobs: int | None = None,
) -> tuple[list[Outcome], Released]:
    """Build, and push what passes. Weights go up as soon as they pass their smoke test, while others are still made
    (`ahead`); commits follow when all cards are final, for cards list each other. What fails does not stop the rest.
    """
    choices.check()
    connection = hub()
    before_building(project, connection, ids, choices.private, choices.staged)
    with project.store.lock("build --push"):
        with Ahead(project, connection, choices.private, choices.staged, report) as ahead:
            # one connection for both: a second one would close the client that uploads
            outcomes = build_held(
                project, ids, lambda: connection, report, force, skip, evaluate, ahead, choices.prune, jobs
            )
        plans, failed = [], {}
        for id, refusals in refused(project, ids, connection).items():
            try:
                if refusals:
                    raise GateRefused("; ".join(refusals))
                plans.append(_plan(project, id, connection, choices))
            except PublishError as e:
                failed[id] = e
                report.line(f"{id}: not pushed: {_line(e)}")
        plans, errors = check(project, connection, plans)
        for id, error in errors.items():
            failed[id] = error
            report.line(f"{id}: not pushed: {_line(error)}")
        plans = [p for p in plans if p.id not in errors]
        return outcomes, release_held(project, connection, plans, report, choices, failed)
