"""AWQ folds: scale the input channels of a matrix up by their activations, and what feeds them down by as much.

Rounding errors of a channel weigh by its activations, so a channel with large activations is multiplied by s before
rounding; the inverse goes into the norm before it (or, for `down_proj`, into the rows of `up_proj`: SwiGLU is linear in
up). The product is unchanged but for rounding. As the reference recipe does it, per group:

    importance = E[x²], elementwise maximum over the members;  s = max(importance, 1e-8)^(exponent / 2)
    s /= sqrt(max(s) · min(s))

exponent 1.0 scales by the root mean square (the reference), 0 by nothing. Pure numpy: whoever
streams the weights applies a fold in float32 (`quant.folding`) and rounds once, or leaves that to the solver. The
published recipe has one exponent for all and no clipping; `quant.awq_search` finds one a group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from inference.errors import InputError

from .imatrix import Imatrix
from .recipe import TensorPlan
from .tables import Group

FLOOR = 1e-8  # of the importance and of the normaliser; mlx-node's apply_awq_prescaling


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


def scale(importance: np.ndarray, exponent: float) -> np.ndarray:
    """s of one group [K] float32 from its importance E[x²] [K]."""
    s = np.maximum(importance.astype(np.float64), FLOOR) ** (exponent / 2)
    s /= max(float(np.sqrt(s.max() * s.min())), FLOOR)
    return s.astype(np.float32)


@dataclass(frozen=True)
class Scaled:
    """A group of one layer that is to be scaled: its members' plans, and E[x²] of its input."""

    layer: str
    group: Group
    members: tuple[TensorPlan, ...]
    importance: np.ndarray


Exponents = Mapping[tuple[str, str], float]  # by layer and label of the group


def folds(
    plans: Iterable[TensorPlan], imatrix: Imatrix, exponent: float | Exponents, table: Sequence[Group]
) -> dict[str, Fold]:
    """Folds by target name, for every group whose members are all planned with `awq` and have statistics.

    exponent: one for all, or those that `quant.awq_search` found. Raises InputError if some members of a group have
    `awq` and some do not: they share one norm, so that no scale can serve both.
    """
    if exponent == 0:
        return {}
    plans = list(plans)
    modules = by_module(plans)
    columns: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    for found in groups(plans, imatrix, table):
        layer, group = found.layer, found.group
        s = scale(found.importance, exponent[layer, group.label] if isinstance(exponent, Mapping) else exponent)
        for m in group.members + group.followers:
            columns[modules[f"{layer}.{m}"].target.name] = s
        for inverse in (f"{layer}.{group.inverse}", f"{layer}.{group.inverse}.bias"):
            if inverse in modules:
                rows[modules[inverse].target.name] = np.float32(1) / s
    return {name: Fold(columns.get(name), rows.get(name)) for name in sorted(columns.keys() | rows.keys())}


def groups(plans: Iterable[TensorPlan], imatrix: Imatrix, table: Sequence[Group]) -> list[Scaled]:
    """What there is to scale, layer by layer; raises what `folds` raises."""
    modules = by_module(plans)
    layers = sorted({m.rpartition(f".{group.inverse}")[0] for group in table for m in modules} - {""})
    found = (_scaled(layer, group, modules, imatrix) for layer in layers for group in table)
    return [g for g in found if g is not None]


def by_module(plans: Iterable[TensorPlan]) -> dict[str, TensorPlan]:
    return {p.target.module: p for p in plans if p.target.part == "text"}


def _scaled(layer: str, group: Group, modules: dict[str, TensorPlan], imatrix: Imatrix) -> Scaled | None:
    members = [f"{layer}.{m}" for m in group.members]
    needed = [*members, *(f"{layer}.{m}" for m in (*group.followers, group.inverse))]
    if not all(m in modules for m in needed):
        return None  # another kind of layer: gdn, full attention, or experts
    flags = [modules[m].awq for m in members]
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
    return Scaled(layer, group, tuple(modules[m] for m in members), np.maximum.reduce(found))
