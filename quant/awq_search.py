"""The exponent of every AWQ group, chosen by what the group's rounding errors do to its outputs.

`quant.awq` scales input channels by s = E[x²]^(exponent / 2). Of the exponents in GRID the one is taken with the least

    Σ over members, rows, channels of E[x²] · ((W s)_q / s − W)²,

where (W s)_q is what the variant's format and solver leave of the scaled weights; the sum is over a sample of rows. 0,
which scales nothing, is among them, so that a group is never made worse on this measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from inference.backend import mx
from inference.load import DTYPES

from .awq import Exponents, Group, groups, scale
from .imatrix import Imatrix
from .recipe import TensorPlan
from .sample import restored, sample
from .solve import QUICK, SOLVERS, Moments, solve

GRID = tuple(i / 10 for i in range(11))
ROWS = 128  # of a member


def search(plans: Iterable[TensorPlan], imatrix: Imatrix, table: Sequence[Group], solver: str = "rtn") -> Exponents:
    """Exponent by layer and group, for every group that `quant.awq.folds` scales. Reads ROWS rows of each member.

    solver: rounding to nearest for `rtn`; for others least squares, which they start from.
    """
    plans = list(plans)
    by = "ls" if SOLVERS[solver].uses_second else "rtn"
    return {
        (g.layer, g.group.label): _best([_Member(p, imatrix, g.importance, by) for p in g.members], g.importance)
        for g in groups(plans, imatrix, table)
    }


class _Member:
    """A matrix of the group: a sample of its rows, and the error that scaling its columns leaves."""

    def __init__(self, plan: TensorPlan, imatrix: Imatrix, importance: np.ndarray, by: str) -> None:
        # the fold is rounded to the stored type once, from the source's values
        source = replace(plan.target, dtype="F32")
        ((rows, weights, _),) = sample(source, ROWS)
        self.dtype = DTYPES[plan.target.dtype]
        self.weights, self.by = weights, by
        self.worth = plan.target.shape[0] / len(rows)
        self.second = imatrix.importance.get(plan.target.module, importance)
        assert plan.spec is not None
        self.spec = plan.spec

    def error(self, s: np.ndarray) -> float:
        columns = mx.array(s)
        scaled = (self.weights * columns).astype(self.dtype)
        moments = Moments((self.second / s**2).astype(np.float32)) if self.by == "ls" else None
        left = restored(solve(scaled, moments, self.spec, self.by, QUICK), self.spec) / columns - self.weights
        by_channel = np.array(mx.square(left).sum(axis=0), np.float64)
        return self.worth * float(by_channel @ self.second.astype(np.float64))


def _best(members: Sequence[_Member], importance: np.ndarray) -> float:
    """The least error wins; of equal ones the smallest exponent."""
    errors = [sum(m.error(scale(importance, e)) for m in members) for e in GRID]
    return GRID[int(np.argmin(errors))]
