"""AWQ folds: scale the input channels of a matrix up by their activations, and what feeds them down by as much.

Rounding errors of a channel weigh by its activations, so a channel with large activations is multiplied by s before
rounding; the inverse goes into the norm before it (or, for `down_proj`, into the rows of `up_proj`: SwiGLU is linear in
up). The product is unchanged but for rounding. As the reference recipe does it, per group:

    importance = E[x²], elementwise maximum over the members;  s = max(importance, 1e-8)^(exponent / 2)
    s /= sqrt(max(s) · min(s))

exponent 1.0 scales by the root mean square (the reference), 0 by nothing. Pure numpy: whoever streams the weights
applies a fold in float32 and rounds once. No search and no clipping: the published recipe has none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from inference.errors import InputError

from .imatrix import Imatrix
from .recipe import TensorPlan

FLOOR = 1e-8  # of the importance and of the normaliser; mlx-node's apply_awq_prescaling


@dataclass(frozen=True)
class Group:
    """Matrices of one layer that share an input, and what takes the inverse of their scale.

    Module paths relative to the layer. members: scaled, and their statistics enter the importance. followers: fed by
    the same input, so scaled as well, but with no say in s. inverse: a norm (its weights are divided), or with `rows` a
    matrix whose output rows are divided. every: the statistics of all members are needed, else any one suffices.
    """

    label: str
    members: tuple[str, ...]
    inverse: str
    followers: tuple[str, ...] = ()
    rows: bool = False
    every: bool = True


@dataclass(frozen=True)
class Fold:
    """weight' = weight · columns · rows[:, None], float32. A norm (1-D) has rows only. None: leave that axis alone."""

    columns: np.ndarray | None = None
    rows: np.ndarray | None = None

    def digest(self) -> str:
        """sha256 of both vectors; equal folds give equal weights."""
        h = hashlib.sha256()
        for v in (self.columns, self.rows):
            h.update(b"-" if v is None else b"+" + len(v).to_bytes(8, "little") + v.astype("<f4").tobytes())
        return h.hexdigest()


def scalable(table: Iterable[Group]) -> tuple[str, ...]:
    """Globs of the modules whose input channels a fold can scale (`quant.recipe.resolve`)."""
    return tuple(f"*.{m}" for group in table for m in group.members)


def scale(importance: np.ndarray, exponent: float) -> np.ndarray:
    """s of one group [K] float32 from its importance E[x²] [K]."""
    s = np.maximum(importance.astype(np.float64), FLOOR) ** (exponent / 2)
    s /= max(float(np.sqrt(s.max() * s.min())), FLOOR)
    return s.astype(np.float32)


def folds(plans: Iterable[TensorPlan], imatrix: Imatrix, exponent: float, table: Sequence[Group]) -> dict[str, Fold]:
    """Folds by target name, for every group whose members are all planned with `awq` and have statistics.

    Raises InputError if some members of a group have `awq` and some do not: they share one norm, so that no scale can
    serve both.
    """
    if exponent == 0:
        return {}
    by_module = {p.target.module: p for p in plans if p.target.part == "text"}
    columns: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    for layer in sorted({m.rpartition(f".{group.inverse}")[0] for group in table for m in by_module} - {""}):
        for group in table:
            s = _group_scale(layer, group, by_module, imatrix, exponent)
            if s is None:
                continue
            for m in group.members + group.followers:
                columns[by_module[f"{layer}.{m}"].target.name] = s
            rows[by_module[f"{layer}.{group.inverse}"].target.name] = np.float32(1) / s
    return {name: Fold(columns.get(name), rows.get(name)) for name in sorted(columns.keys() | rows.keys())}


def _group_scale(
    layer: str, group: Group, by_module: dict[str, TensorPlan], imatrix: Imatrix, exponent: float
) -> np.ndarray | None:
    members = [f"{layer}.{m}" for m in group.members]
    needed = [*members, *(f"{layer}.{m}" for m in (*group.followers, group.inverse))]
    if not all(m in by_module for m in needed):
        return None  # another kind of layer: gdn, full attention, or experts
    flags = [by_module[m].awq for m in members]
    if not any(flags):
        return None
    if not all(flags):
        on, off = members[flags.index(True)], members[flags.index(False)]
        raise InputError(
            f"{on} has awq and {off} has not, but both read {group.inverse}: give their rules the same awq"
        )
    found = [imatrix.importance[m] for m in members if m in imatrix.importance]
    if not found or (group.every and len(found) < len(members)):
        return None
    return scale(np.maximum.reduce(found), exponent)
