"""Hessians made ready for `quant.gptq`: damped, their columns put in order, factorized.

With H = (I + U) D (I + U)ᵀ, U strictly upper triangular, errors of rounding go along U from column to column, and what a column
adds to the error for good is weighed by its pivot in D.

On the host in float64 by LAPACK. Beside a GPU in float32 by blocks, all but the blocks on the diagonal by matrix products on the
device, where the host takes 15 s for 12,288 columns on 16 cores. Correlations are damped by a hundredth of their diagonal
at least, which is far above what float32 rounds off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from inference.backend import BACKEND, mx
from inference.checkpoint import AFFINE_GROUPS

T = TypeVar("T")

# Shrinking of correlations: 0.01, and more where tokens are few for the columns
DAMPING, DAMPING_SCARCE, DAMPING_MOST = 0.01, 0.1, 0.5
EXTRA = (0.0, 0.05, 0.5, 5.0)  # of the diagonal, added in turn where that is not definite
FACTOR_BLOCK = 256  # columns between two matrix products
SMALL_BLOCK = 32  # columns that LAPACK inverts by itself


@dataclass(frozen=True)
class Factor:
    """Hessians ready for use, float32: damped [E, K, K]; order and its inverse int32 [E, K]; in that order U [E, K, K] and
    the pivots D [E, K]."""

    hessian: mx.array
    order: mx.array
    inverse: mx.array
    feedback: mx.array
    pivots: mx.array


# of one Hessian: what `factorize` gives. Arrays of the device where it was factorized there, else numpy's; the order is numpy's
Part = tuple[Any, np.ndarray, Any, Any]


def damping(columns: int, tokens: float) -> float:
    """Part of every channel's own second moment that is added to it: grows as tokens get scarce."""
    return min(DAMPING + DAMPING_SCARCE * columns / max(tokens, 1.0), DAMPING_MOST)


def factorize(hessian: np.ndarray, damp: float) -> Part:
    """(H damped [K, K], order [K], U [K, K], D [K]) of one Hessian [K, K].

    Damping shrinks correlations, H + damp · diag(H): channels differ by orders of magnitude, and a multiple of the mean
    diagonal would be nothing to the large and everything to the small. A channel that saw nothing gets the least weight
    that is still told from zero.
    """
    d = np.diagonal(hessian).astype(np.float64)
    root = np.sqrt(np.maximum(d, max(float(d.max(initial=0.0)) * 1e-12, 1e-30)))
    # a unit that float32 has room around; changes no code
    unit = float(np.exp2(-np.round(np.log2(root.max()))))
    return (on_host if BACKEND == "cpu" else on_device)(hessian, damp, root, unit)


def on_host(hessian: np.ndarray, damp: float, root: np.ndarray, unit: float) -> Part:
    """In float64. root: of the diagonal, [K]; unit: what it is multiplied with at last."""
    h = hessian.astype(np.float64)
    h /= root
    h /= root[:, None]  # correlations: well scaled whatever the channels
    root = root * unit
    np.fill_diagonal(h, 1.0 + damp)
    order = _order(root)
    upper = _upper(h[np.ix_(order, order)], damp)
    diagonal = np.diagonal(upper).copy()
    upper /= diagonal
    np.fill_diagonal(upper, 0.0)
    sorted_root = root[order]
    pivots = np.square(diagonal * sorted_root)
    upper /= sorted_root
    upper *= sorted_root[:, None]  # in the channels' units again: U_kj takes an error of k and adds to j
    h *= root
    h *= root[:, None]
    return h.astype(np.float32), order.astype(np.int32), upper.astype(np.float32), pivots.astype(np.float32)


def on_device(hessian: np.ndarray, damp: float, root: np.ndarray, unit: float) -> Part:
    """As `on_host`, in float32 on the device."""
    r = mx.array(root.astype(np.float32))
    h = mx.array(hessian) / r / r[:, None]
    at = mx.arange(len(root))
    on_diagonal = at[:, None] == at
    h = mx.where(on_diagonal, 1.0 + damp, h)
    root = root * unit
    order = _order(root)
    # M upper triangular with M Mᵀ = c is the lower factor of c turned around, turned around
    turned = mx.array(order[::-1].astype(np.int32))
    upper = _lower(mx.take(mx.take(h, turned, axis=0), turned, axis=1), damp)[::-1, ::-1]
    diagonal = mx.diagonal(upper)
    r, sorted_root = mx.array(root.astype(np.float32)), mx.array(root[order].astype(np.float32))
    pivots = mx.square(diagonal * sorted_root)
    upper = mx.where(on_diagonal, 0.0, upper / diagonal / sorted_root * sorted_root[:, None])
    h = h * r * r[:, None]
    mx.eval(h, upper, pivots)
    return h, order.astype(np.int32), upper, pivots


def _order(root: np.ndarray) -> np.ndarray:
    """Columns [K] by falling root, those of a group together whatever the group size is: its sizes nest."""
    column = np.arange(len(root))
    keys = [-root]
    for size in sorted(AFFINE_GROUPS):
        starts = np.arange(0, len(root), size)
        keys += [column // size, -np.maximum.reduceat(root, starts)[column // size]]
    return np.lexsort(keys)


def _upper(c: np.ndarray, damp: float) -> np.ndarray:
    """M upper triangular with M Mᵀ = c; rounding of float32 statistics may have cost c its definiteness."""

    def factor(extra: float) -> np.ndarray:
        m = c if not extra else c + np.eye(len(c)) * extra
        return np.ascontiguousarray(np.linalg.cholesky(m[::-1, ::-1])[::-1, ::-1])

    found = _damped_until_definite(factor, damp)
    return np.eye(len(c)) if found is None else found


def _lower(c: mx.array, damp: float) -> mx.array:
    """L lower triangular with L Lᵀ = c [K, K]; more damping as in `_upper`."""
    found = _damped_until_definite(lambda extra: _by_blocks(c, extra), damp)
    return mx.eye(len(c)) if found is None else found


def _damped_until_definite(factor: Callable[[float], T], damp: float) -> T | None:
    """The first of `factor` of so much added to the diagonal that raises no LinAlgError; None if all do."""
    for extra in EXTRA:
        try:
            return factor(extra * (1 + damp))
        except np.linalg.LinAlgError:
            continue
    return None


def _by_blocks(c: mx.array, extra: float) -> mx.array:
    """L with L Lᵀ = c + extra · I: blocks on the diagonal in float64 on the host, all else on the device.

    Raises LinAlgError where c + extra · I is not positive definite.
    """
    k = len(c)
    columns = []
    for i in range(0, k, FACTOR_BLOCK):
        n = min(FACTOR_BLOCK, k - i)
        # a copy: a view is of the whole matrix, and no more than the block is to go to the host
        block = np.array(mx.contiguous(c[:n, :n])).astype(np.float64) + extra * np.eye(n)
        if not np.isfinite(block).all():
            raise np.linalg.LinAlgError
        own = np.linalg.cholesky(block)
        parts = [mx.zeros((i, n)), mx.array(own.astype(np.float32))]
        if i + n < k:
            below = c[n:, :n] @ mx.array(_inverse_of_lower(own).T.astype(np.float32))
            c = c[n:, n:] - below @ below.T
            parts.append(below)
        columns.append(mx.concatenate(parts))
        mx.eval(c, columns[-1])
    return mx.concatenate(columns, axis=1)


def _inverse_of_lower(lower: np.ndarray) -> np.ndarray:
    """Inverse of a lower triangular matrix, by halves. LAPACK's of any matrix does three times the work in small steps, for each
    of which its threads wait: 0.2 s for 256 columns on a busy machine."""
    n = len(lower)
    if n <= SMALL_BLOCK:
        return np.linalg.inv(lower)
    top, bottom = _inverse_of_lower(lower[: n // 2, : n // 2]), _inverse_of_lower(lower[n // 2 :, n // 2 :])
    corner = -bottom @ lower[n // 2 :, : n // 2] @ top
    return np.block([[top, np.zeros((n // 2, n - n // 2))], [corner, bottom]])


def rescale(part: Part, old: np.ndarray, new: np.ndarray) -> Part:
    """The result of `factorize` for S H S, where S takes the second moments from old [K] to new [K]; the order stays."""
    hessian, order, upper, pivots = part
    floor = np.maximum(old.max(initial=0.0) * 1e-12, 1e-30)
    scale = np.sqrt(np.maximum(new, floor) / np.maximum(old, floor)).astype(np.float32)
    d: Any = scale
    sorted_d: Any = scale[order]
    if isinstance(hessian, mx.array):
        d, sorted_d = mx.array(d), mx.array(sorted_d)
    return hessian * d * d[:, None], order, upper / sorted_d * sorted_d[:, None], pivots * sorted_d * sorted_d


def factor_of(parts: Sequence[Part]) -> Factor:
    """Results of `factorize`, one a matrix, as device arrays."""
    order = np.stack([p[1] for p in parts])
    hessian, feedback, pivots = (_stacked([p[i] for p in parts]) for i in (0, 2, 3))
    inverse = np.argsort(order, axis=1).astype(np.int32)
    mx.eval(hessian, feedback, pivots)  # threads with other streams use it
    return Factor(hessian, mx.array(order), mx.array(inverse), feedback, pivots)


def _stacked(parts: Sequence[Any]) -> mx.array:
    arrays = [p if isinstance(p, mx.array) else mx.array(p) for p in parts]
    return arrays[0][None] if len(arrays) == 1 else mx.stack(arrays)
