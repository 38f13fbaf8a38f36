"""What solvers are told of a module's input, from the statistics of `publish calibrate` or from an imatrix.

A Hessian is made ready (damped, ordered, factorized) once for all modules and formats that want it, and kept while the
pass over the source is near: the last few are remembered, since q, k and v, or gate and up, lie next to each other.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import numpy as np

from .hessians import Factor, Part, damping, factor_of, factorize, rescale
from .solve import Moments
from .statistics import KAPPA, Statistics

KEPT = 2  # factors; at 12,288 columns one takes 1.2 GB


class MomentSource(Protocol):
    """Statistics by MLX module path."""

    def digest(self, module: str, hessian: bool) -> str:
        """What a solver's result depends on, as a hash; "" where there is nothing."""
        ...

    def moments(self, module: str, rows: slice | None, columns: np.ndarray | None, hessian: bool) -> Moments | None:
        """rows: of the leading axis, for stacked experts. columns: the fold's scale of the inputs [K], if any."""
        ...


@dataclass(frozen=True)
class Objective:
    """What an error of a matrix (of one expert) costs: about ½ coherence Σ_o rows_o ΔW_o H ΔW_oᵀ nats a token.

    hessian [K, K]; second, second_g [K]: its diagonal, and that with tokens weighed by their gradients; rows [N]; share:
    of all experts' worth over this one's.
    """

    hessian: np.ndarray
    second: np.ndarray
    second_g: np.ndarray
    rows: np.ndarray
    coherence: float = 1.0
    share: float = 1.0


class FromImportance:
    """E[x²] alone, by module [K] or [E, K]: of an imatrix."""

    def __init__(self, importance: Mapping[str, np.ndarray]) -> None:
        self.importance = importance

    def digest(self, module: str, hessian: bool) -> str:
        value = self.importance.get(module)
        return "" if value is None else hashlib.sha256(np.ascontiguousarray(value, "<f4").tobytes()).hexdigest()

    def moments(self, module: str, rows: slice | None, columns: np.ndarray | None, hessian: bool) -> Moments | None:
        value = self.importance.get(module)
        if value is None:
            return None
        return Moments(_folded(value[rows] if rows and value.ndim == 2 else value, columns))


class FromStatistics:
    """E[x²] and Hessians of `quant.statistics.Statistics`. Safe to use from several threads."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics
        self._factors: OrderedDict[tuple[object, ...], Factor] = OrderedDict()
        self._last: tuple[object, np.ndarray] = (None, np.empty(0))  # a Hessian, asked for by modules of one input
        self._lock = Lock()

    def digest(self, module: str, hessian: bool) -> str:
        return f"{self.statistics.digest}{'H' if hessian else ''}" if self.knows(module) else ""

    def knows(self, module: str) -> bool:
        return self.statistics.has_objective(module)

    def objective(self, module: str, expert: int | None = None) -> Objective:
        """For prices. Raises InputError where no gradients were collected."""
        s = self.statistics
        with self._lock:
            hessian = self._hessian(module, expert)
        second = s.objective_second(module)
        fisher = s.objective_rows(module)
        if expert is None:
            return Objective(
                hessian, second, s.objective_second_g(module), fisher, s.coherence(module) if module in s else 1.0
            )
        share = float(fisher.sum()) / max(float(fisher[expert].sum()), 1e-30)
        return Objective(hessian, second[expert], second[expert], fisher[expert], 1.0, share)

    def moments(self, module: str, rows: slice | None, columns: np.ndarray | None, hessian: bool) -> Moments | None:
        if not self.knows(module):
            return None
        with self._lock:  # files and the cache are not made for two at a time
            second = self.statistics.objective_second(module)
            experts = second.ndim == 2
            part = second[rows] if experts and rows else second
            factor = self._factor(module, rows if experts else None, columns) if hessian else None
        return Moments(_folded(part, columns), factor)

    def _hessian(self, module: str, expert: int | None = None) -> np.ndarray:
        """Of the objective, [K, K]; not to be written to."""
        key = (self.statistics.objective_name(module), expert)
        if key != self._last[0]:
            self._last = (key, self.statistics.objective_hessian(module, expert))
        return self._last[1]

    def _factor(self, module: str, rows: slice | None, columns: np.ndarray | None) -> Factor:
        fold = None if columns is None else hashlib.sha256(columns.tobytes()).digest()
        key = (self.statistics.objective_name(module), None if rows is None else (rows.start, rows.stop), fold)
        if key in self._factors:
            self._factors.move_to_end(key)
            return self._factors[key]
        while len(self._factors) >= KEPT:
            self._factors.popitem(last=False)
        self._factors[key] = factor_of(self._parts(module, rows, columns))
        return self._factors[key]

    def _parts(self, module: str, rows: slice | None, columns: np.ndarray | None) -> list[Part]:
        s = self.statistics
        if module not in s or s.input(module).experts is None:
            hessian = self._hessian(module)
            return [factorize(_scaled(hessian, columns), damping(len(hessian), s.objective_tokens(module)))]
        known = s.input(module)
        tokens = np.atleast_1d(np.asarray(s.tokens(module)))
        experts = range(*(rows or slice(None)).indices(known.experts or 1))
        if known.hessian == "shared":  # one factorization serves all: an expert's differs by a scale of its channels
            common = _scaled(s.hessian(module), columns)
            part = factorize(common, damping(known.columns, float(tokens.sum())))
            own = _folded(s.second(module), columns)
            return [rescale(part, np.diagonal(common), own[e]) for e in experts]
        total = float(tokens.sum())
        return [
            factorize(
                _scaled(s.hessian(module, expert=e), columns),
                # blended with the layer's mean, it rests on more than its own tokens
                damping(known.columns, min(float(tokens[e]) + KAPPA, total)),
            )
            for e in experts
        ]


def _folded(second: np.ndarray, columns: np.ndarray | None) -> np.ndarray:
    """E[x²] of the inputs that a folded weight sees: its columns were multiplied, so x is divided."""
    return second if columns is None else (second / columns**2).astype(np.float32)


def _scaled(hessian: np.ndarray, columns: np.ndarray | None) -> np.ndarray:
    return hessian if columns is None else hessian / columns / columns[:, None]
