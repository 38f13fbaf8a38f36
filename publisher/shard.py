"""`publish build --shard i/n`: which of the chosen variants this host builds.

Every host computes the same partition from variants.yaml and the headers of the base alone, so none has to talk to another:
nothing that lies in one host's output folder (what is built, measured or allocated there) has a part in it. Longest first:
variants by falling work, each to the share that has least so far. That is at most 4/3 of the best possible largest
share (Graham 1969).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inference.errors import InputError

from .base import resolve_base
from .plan import plan_variant, select_targets
from .variants import Project

if TYPE_CHECKING:
    from .hub import Hub

MAX_SHARDS = 10_000
# Work on a byte of the language model's source, beside a byte that is written: rtn reads and rounds it; the others from
# docs/quality.md, a 9B (18 GB) on an H200 in 25 s and in 127 s, written at about 1 GB/s. Only the ratios matter.
SOLVE_WORK = {"rtn": 1, "ls": 2, "gptq": 7}


@dataclass(frozen=True)
class Shard:
    """Share `index` of `count`, from 1."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class Partition:
    """Ids of each share, in ladder order; work by id, in bytes."""

    shares: tuple[tuple[str, ...], ...]
    work: Mapping[str, int]

    def of(self, shard: Shard) -> tuple[str, ...]:
        return self.shares[shard.index - 1]

    def lines(self, shard: Shard) -> list[str]:
        """What people are told: the own share first, then those of the others."""
        total = sum(self.work.values())
        out = []
        for i in (shard.index, *(i for i in range(1, shard.count + 1) if i != shard.index)):
            share = self.shares[i - 1]
            if not share and i != shard.index:
                continue  # more shares than variants: the empty ones are many, and nobody's news
            part = f" ({100 * sum(self.work[id] for id in share) / total:.0f} % of the work)" if share else ""
            verb = "takes" if i == shard.index else "is left"
            out.append(f"shard {i}/{shard.count} {verb} {', '.join(share) or 'no variant'}{part}")
        return out


def parse_shard(text: str) -> Shard:
    """`i/n` with 1 ≤ i ≤ n ≤ MAX_SHARDS. Raises InputError."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if found and 1 <= int(found[1]) <= int(found[2]) <= MAX_SHARDS:
        return Shard(int(found[1]), int(found[2]))
    raise InputError(f"--shard: found {text[:40]!r}, expected i/n with 1 ≤ i ≤ n ≤ {MAX_SHARDS}, such as 2/4")


def partition(work: Mapping[str, int], count: int) -> Partition:
    """work: by id, in ladder order. Ties go by id, and to the first of equal shares."""
    loads, shares = [0] * count, [set[str]() for _ in range(count)]
    for id in sorted(work, key=lambda id: (-work[id], id)):
        least = min(range(count), key=loads.__getitem__)
        loads[least] += work[id]
        shares[least].add(id)
    return Partition(tuple(tuple(id for id in work if id in share) for share in shares), work)


def partition_of(project: Project, ids: Sequence[str], count: int, hub: Callable[[], Hub]) -> Partition:
    """The partition of these variants. Raises what planning raises."""
    base = resolve_base(project, hub, weights=False)
    work = {}
    for id in ids:
        # with nothing from disk: one made by size counts by its budget, allocated or not
        plan = plan_variant(project, id, base.checkpoint, base.targets)
        source = sum(t.nbytes for t in select_targets(project, id, base.targets) if t.part == "text")
        work[id] = plan.nbytes + SOLVE_WORK[project.solver(id)] * source
    return partition(work, count)
