"""Bytes of a push that the hub holds already under another name: copied there, server-side, instead of being sent.

In the same repo: a file that was renamed, such as a shard of a ladder whose number of shards changed. In another one: a
tokenizer, or whatever else the variants share with each other or with the base. The latter works by Xet hash alone, so a
hub without Xet is not asked; there a file that any repo of the hub's store has is not sent by LFS either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from .hub import Copy, Head, Hub, RemoteFile
from .schema import Receipt
from .store import read_result
from .variants import Project

if TYPE_CHECKING:
    from .push_plan import PushPlan

COPY_BYTES = 1 << 20  # smaller files are not worth the questions to other repos


def find_copies(hub: Hub, project: Project, plan: PushPlan, head: Head | None) -> Iterator[Copy]:
    """A source for what a plan would send, for each file that has one."""
    here = _by_content(head.files) if head else {}
    left = []
    for f in (*plan.add, *plan.update):
        path = here.get((f.sha256, f.size))
        if path is not None and head is not None:
            yield Copy(f.path, None, head.commit, path)
        elif f.size >= COPY_BYTES:
            left.append(f)
    if not left or not hub.copies_between_repos:
        return
    for repo, commit in _others(project, plan):
        files = {p: r for p, r in (hub.tree(repo, commit) or {}).items() if r.xet}
        there = _by_content(files)
        for f in [f for f in left if (f.sha256, f.size) in there]:
            yield Copy(f.path, repo, commit, there[f.sha256, f.size])
            left.remove(f)
        if not left:
            return


def _by_content(files: Mapping[str, RemoteFile]) -> dict[tuple[str, int], str]:
    """Path by (sha256, size), of large files."""
    return {(f.sha256, f.size): path for path, f in files.items() if f.sha256 is not None}


def _others(project: Project, plan: PushPlan) -> Iterator[tuple[str, str]]:
    """Repos that may hold the same: those of the other variants as they were pushed, and the base."""
    for id in project.ladder.variants:
        receipt = read_result(project.store.receipt(id), Receipt)
        if id != plan.id and receipt and receipt.endpoint == plan.target.endpoint and receipt.pull_request is None:
            yield receipt.repo, receipt.commit
    base = project.lock().base
    if base and base.repo == project.ladder.base.repo:
        yield base.repo, base.commit
