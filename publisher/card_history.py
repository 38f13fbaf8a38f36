"""What stood in a repo before: out/history/<ID>.json, and the changelog that a card makes of it.

A push that landed adds the release (`record`); where the hub holds weights that no release on record is of, `adopt` takes
them from the manifest there. `publish card` reads the file and needs no hub. Dates are those of build.json, when these
weights were built: the manifest holds none, so that the same inputs give the same bytes, and rendering asks no clock.
A release counts in the repo and on the hub where it was made: a rehearsal is not the past of the real repo.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inference.errors import InputError

from . import card_format as fmt
from .hub_types import HUGGING_FACE, default_endpoint
from .schema import BuildRecord, History, Manifest, Receipt, Release, ReleaseQuality
from .staleness import input_reasons
from .store import MANIFEST_BYTES, read_model, read_result, write_model
from .survey import read_quality
from .variants import Project

if TYPE_CHECKING:
    from .hub import Hub
    from .push_plan import PushPlan

REASONS = 12  # told of one release
RELEASES = 12  # told on a card


@dataclass(frozen=True)
class Change:
    """A release beside the one before it. date: it was built; first: none is on record before it; kld: the difference."""

    date: str
    weights: str
    tag: str
    first: bool
    reasons: tuple[str, ...]
    more: int
    kld: str


@dataclass(frozen=True)
class Changelog:
    """Newest first. changes: empty where these weights replace none; replaces: the release that these come after."""

    changes: tuple[Change, ...] = ()
    replaces: Change | None = None
    older: int = 0  # not listed


# ---------------------------------------------------------------------------------------------- for cards


def releases(project: Project, id: str, manifest: Manifest) -> tuple[Release, ...]:
    """What was released of a variant, oldest first, and the weights in its folder as the last. Raises InputError if
    history.json does not parse."""
    at = default_endpoint()  # the past that counts is that of the hub that a push would go to
    known = [_measured(project, r) for r in _here(project, id, at)]
    if known and known[-1].weights_hash == manifest.weights_hash:
        known.pop()
    return (*known, _release(project, id, manifest, at))


def card_command(project: Project, id: str, manifest: Manifest) -> str:
    """What renders the card that a push from here would need: the past of another hub than the real one is asked for."""
    at = default_endpoint()
    try:
        past = at != HUGGING_FACE and len(releases(project, id, manifest)) > 1
    except InputError:
        past = False
    return f"HF_ENDPOINT={at} publish card {id}" if past else f"publish card {id}"


def changelog(found: Sequence[Release]) -> Changelog:
    """Pure."""
    if len(found) < 2:
        return Changelog()
    pairs = list(zip([None, *found], found, strict=False))
    changes = [_change(old, new, current=new is found[-1]) for old, new in reversed(pairs)]
    return Changelog(tuple(changes[:RELEASES]), changes[1], max(0, len(changes) - RELEASES))


def _change(old: Release | None, new: Release, current: bool) -> Change:
    reasons = list(_reasons(old, new)) if old else []
    return Change(
        date=fmt.pretty_date(new.built_at) if new.built_at else "",
        weights=new.weights_hash[:12],
        tag=new.tag if new.tag and not current else "",  # of these weights it is known only after their push
        first=old is None,
        reasons=tuple(reasons[:REASONS]),
        more=max(0, len(reasons) - REASONS),
        kld=_difference(old, new) if old else "",
    )


def _reasons(old: Release, new: Release) -> Iterator[str]:
    known, same = old.inputs, "no input on record differs; the bytes do"
    if not known.base.source_hash:  # of a history of version 1
        base = known.base.model_copy(update={"source_hash": new.inputs.base.source_hash})
        known = known.model_copy(update={"base": base})
        same = "no input on record differs; whether the bytes do is not on record: they were hashed another way"
    found = list(input_reasons(known, new.inputs))
    before, after = old.inputs.base.commit, new.inputs.base.commit
    if before != after and not any(r.startswith("base commit") for r in found):
        found.append(f"base commit: {(before or 'none')[:8]} → {(after or 'none')[:8]}")
    if old.tool != new.tool:
        found.append(f"made with: {old.tool} → {new.tool}")
    yield from found or [same]
    if old.nbytes != new.nbytes:
        yield f"size: {fmt.size(old.nbytes)} → {fmt.size(new.nbytes)}"


def _difference(old: Release, new: Release) -> str:
    """Never a figure beside one that was measured against something else."""
    what = "Mean KL divergence from BF16 over the evaluation text"
    if old.quality is None or new.quality is None:
        which = "either" if not (old.quality or new.quality) else "the earlier" if new.quality else "the later"
        return f"{what}: difference {fmt.not_measured(f'no figure of {which} weights is on record')}"
    if old.quality.teacher != new.quality.teacher:
        return f"{what}: difference {fmt.not_measured('the original or the text was another, so the figures do not compare')}"
    return f"{what}: {fmt.interval(old.quality.kld)} → {fmt.interval(new.quality.kld)} nats a token"


# ---------------------------------------------------------------------------------------------- for pushes


def record(project: Project, plan: PushPlan, manifest: Manifest, receipt: Receipt) -> None:
    """Write down what a push left on main; nothing if it is on record as it is."""
    known = _read(project, plan.id)
    made = _release(project, plan.id, manifest, receipt.endpoint)
    sent = {"repo": receipt.repo, "commit": receipt.commit, "tag": receipt.tag, "pushed_at": receipt.pushed_at}
    new = made.model_copy(update=sent)
    at = _last(known, plan.repo, receipt.endpoint)
    if at is not None and known[at].weights_hash == new.weights_hash:
        old = known[at]
        kept = {"commit": old.commit or new.commit, "pushed_at": old.pushed_at or new.pushed_at}
        kept |= {"built_at": new.built_at or old.built_at, "quality": new.quality or old.quality}
        known[at] = new.model_copy(update=kept)
    else:
        known.append(new)
    _write(project, plan.id, known)


def adopt(project: Project, hub: Hub, plan: PushPlan) -> bool:
    """Put on record what the hub holds and no push from here left; tells whether there was such.

    For repos that were pushed from elsewhere, or before there was a history.
    """
    if plan.head is None or plan.target.revision != "main" or not any(f.path == "manifest.json" for f in plan.update):
        return False
    known = _read(project, plan.id)
    at = _last(known, plan.repo, hub.endpoint)
    if at is not None and not any(f.path == "manifest.json" for f in plan.foreign):
        return False  # what is there is what the last push left
    try:
        there = Manifest.model_validate_json(hub.read_range(plan.repo, plan.head, "manifest.json", 0, MANIFEST_BYTES))
    except ValueError:
        return False  # some other tool's; whether it may be replaced, `foreign` says
    if there.weights_hash in (plan.weights_hash, known[at].weights_hash if at is not None else None):
        return False
    tag = next((name for name, commit in sorted(hub.tags(plan.repo).items()) if commit == plan.head), None)
    found = _release(project, plan.id, there, hub.endpoint).model_copy(update={"commit": plan.head, "tag": tag})
    _write(project, plan.id, [*known, found])
    return True


def _release(project: Project, id: str, manifest: Manifest, at: str) -> Release:
    """A manifest's weights, with what is on record about them."""
    built = read_result(project.store.results(manifest.weights_hash) / "build.json", BuildRecord)
    return Release(
        endpoint=at,
        repo=project.repo(id),
        weights_hash=manifest.weights_hash,
        tool=manifest.tool,
        built_at=built.built_at if built and built.weights_hash == manifest.weights_hash else None,
        inputs=manifest.inputs,
        nbytes=manifest.nbytes,
        quality=_quality(project, manifest.weights_hash),
    )


def _measured(project: Project, release: Release) -> Release:
    """With a figure that was measured after its push, where there is one."""
    if release.quality:
        return release
    return release.model_copy(update={"quality": _quality(project, release.weights_hash)})


def _quality(project: Project, weights_hash: str) -> ReleaseQuality | None:
    quality = read_quality(project, weights_hash)
    text = next((d for d in quality.corpora if d.corpus == "text"), None) if quality else None
    if text is None or text.kld is None or text.nonfinite:
        return None
    return ReleaseQuality(teacher=text.teacher, positions=text.positions, kld=text.kld)


def _here(project: Project, id: str, at: str) -> list[Release]:
    repo = project.repo(id)
    return [r for r in _read(project, id) if (r.repo, r.endpoint) == (repo, at)]


def _last(known: Sequence[Release], repo: str, at: str) -> int | None:
    return next((i for i in reversed(range(len(known))) if (known[i].repo, known[i].endpoint) == (repo, at)), None)


def _read(project: Project, id: str) -> list[Release]:
    found = read_model(project.store.history(id), History)
    return list(found.releases) if found else []


def _write(project: Project, id: str, known: list[Release]) -> None:
    if known != _read(project, id):
        write_model(project.store.history(id), History(id=id, releases=known))
