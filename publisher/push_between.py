"""What came between a plan and its commit, where the hub did not stop it.

A commit names the parent that it was planned on, and a hub refuses it once the head is another one. Some answer as if it
had gone well all the same. So the history is read after each commit: what lies between that parent and our commit is
somebody else's, and was not looked at when ours was planned. Each commit says in its message what it was planned on, so
that a later push can tell, too, where this one was killed before it could.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .hub import Commit, Hub
from .push_cards import edit_between
from .push_plan import LOOKED_AT, TEXT_BYTES, PushPlan
from .schema import ReplacedFile

NAMED = 5  # commits and files of others that an error names, and differences that it shows
MARK = re.compile(r"Planned on ([0-9a-f]{40}), files ([0-9a-f]{16})")


@dataclass(frozen=True)
class Between:
    """What a plan did not know of. told: for people, one line, then the differences; replaced: of theirs, by ours."""

    told: str
    replaced: tuple[ReplacedFile, ...]


def digest(plan: PushPlan) -> str:
    """Of all the files that the plan leaves on the hub."""
    return hashlib.sha256("".join(f"{f.path} {f.sha256}\n" for f in plan.files).encode()).hexdigest()


def mark(plan: PushPlan) -> str:
    """The message of the plan's commit, by which it is known again."""
    return f"Planned on {plan.head}, files {digest(plan)[:16]}"


def came_between(hub: Hub, plan: PushPlan, commit: str) -> Between | None:
    """`commit`: the plan's own, or the head that holds its files. None where it landed on what it was planned on."""
    assert plan.head is not None
    return _between(hub, plan, hub.history(plan.repo, commit, plan.head), mark(plan), plan.head)


def came_between_before(hub: Hub, plan: PushPlan, head: str, known: str | None) -> Between | None:
    """The same of an earlier push of these files, which may have been killed before it looked. known: the commit of the
    last one that did look."""
    history = hub.history(plan.repo, head, known)
    unknown = history[:-1] if history and history[-1].id == known else history
    for commit in unknown:
        found = MARK.fullmatch(commit.message)
        if found and found[2] == digest(plan)[:16]:
            return _between(hub, plan, hub.history(plan.repo, commit.id, found[1]), found[0], found[1])
    return None


def _between(hub: Hub, plan: PushPlan, history: Sequence[Commit], said: str, parent: str) -> Between | None:
    """history: newest first, down to the parent, or all of it where that is no more in it."""
    newer = [c for c in history if c.id != parent]
    # a hub that keeps no messages: then the newest one is the one that was asked about
    ours = {c.id for c in newer if c.message == said} or {c.id for c in newer[:1]}
    others: list[Commit] = []
    replaced: list[ReplacedFile] = []
    kept: list[str] = []
    diffs: list[str] = []
    theirs: list[Commit] = []
    last, below = "", parent
    for commit in reversed(newer):
        if commit.id not in ours:
            theirs.append(commit)
            continue
        if theirs:
            before, there, here = (hub.tree(plan.repo, id) or {} for id in (below, theirs[-1].id, commit.id))
            changes = _changes(hub, plan.repo, theirs)
            for path in sorted((before.keys() | there.keys()) - {".gitattributes"}):  # that is the hub's own
                old, new, now = (files.get(path) for files in (before, there, here))
                if (old and old.identity) == (new and new.identity):
                    continue
                if (new and new.identity) == (now and now.identity):
                    kept.append(path)
                    continue
                replaced.append(ReplacedFile(path=path, commit=changes.get(path, theirs[0].id), before=below))
                if len(diffs) < NAMED and all(file is None or file.size <= TEXT_BYTES for file in (old, new)):
                    diffs.append(edit_between(hub, plan.repo, below, theirs[-1].id, path))
            others += theirs
            last = commit.id
        below, theirs = commit.id, []
    if not others:
        return None
    return Between("\n".join([_line(plan, last, others, replaced, kept), *filter(None, diffs)]), tuple(replaced))


def _changes(hub: Hub, repo: str, commits: Sequence[Commit]) -> dict[str, str]:
    """The last of these commits, which are oldest first, that changed a file, by path; of the first one nothing is said."""
    found: dict[str, str] = {}
    for old, new in pairwise(commits[-LOOKED_AT:]):
        before, after = hub.tree(repo, old.id) or {}, hub.tree(repo, new.id) or {}
        found |= {p: new.id for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    return found


def _line(
    plan: PushPlan, ours: str, others: Sequence[Commit], replaced: Sequence[ReplacedFile], kept: Sequence[str]
) -> str:
    who = _named([f'{c.id[:8]} "{c.title[:60]}" by {c.author or "somebody"}' for c in others])
    paths = list(dict.fromkeys(f.path for f in replaced))
    did = [f"replaced their {_named(paths)}"] if paths else []
    did += [f"kept their {_named(kept)}"] if kept else []
    step = "run push again to go on"
    if paths:
        step = (
            f"it is still in {_named(sorted({f.commit[:8] for f in replaced}))}: take over what is to stay, then push with "
            "--overwrite"
        )
    return (
        f"committed as {ours[:8]}, but the hub put it on top of {who}, which came after the plan; it "
        f"{' and '.join(did) or 'changed nothing of theirs'}; {step}"
    )


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if names[NAMED:] else "")
