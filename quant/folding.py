"""What a fold makes of a band of weights, and what rounding a norm leaves to the matrices that read it.

A norm of the Qwen3.5 family is kept as w and used as 1 + w; MLX stores 1 + w, rounded to bfloat16, which changes every
channel by up to 0.4 %. (So does dividing a norm by an AWQ scale.) The matrices that read the channel are about to be
quantized anyway: multiplied by r = exact / stored first, they undo it at no cost in bytes,

    W · diag(exact) x  =  (W · diag(r)) · diag(stored) x.

Norms of queries and keys have no such reader, but a score sees nothing of them but products, q's of a channel times k's:
there the two are rounded together.

On a trained model of 32 M parameters all its norms rounded cost 1e-5 nats a token, 13 % of what 8 bits by `gptq` cost
(docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from inference.backend import mx
from inference.layout import Target, read_band
from inference.load import DTYPES, decoded

from .awq import Fold, by_module
from .least_squares import stored
from .recipe import TensorPlan
from .tables import Readers

TRIES = 4096  # ratios between the norms of queries and keys


def changes(target: Target, fold: Fold | None) -> bool:
    """Whether stored values differ from the source's."""
    return target.op == "plus_one" or fold is not None or target.dtype != target.source.dtype


def exact(raw: np.ndarray, target: Target, fold: Fold | None, start: int, stop: int) -> mx.array:
    """float32 of rows [start, stop) of a target as they are before they are rounded to the stored type.

    raw: as `read_band` returns them.
    """
    x = decoded(raw, target).astype(mx.float32)
    if target.op == "plus_one":
        x = 1.0 + x
    if fold is not None and fold.columns is not None:
        x = x * mx.array(fold.columns)
    if fold is not None and fold.rows is not None:
        rows = mx.array(fold.rows[start:stop])
        x = x * (rows if x.ndim == 1 else rows[:, None])
    return x


def undo_rounded_norms(
    plans: Iterable[TensorPlan], folds: Mapping[str, Fold], table: Sequence[Readers]
) -> dict[str, Fold]:
    """`folds` (by target name), in which the readers of every rounded norm also undo its rounding.

    Readers that are stored unquantized and unscaled keep their bytes: rounding them would cost what it gains. Reads the
    norms from the source.
    """
    known = by_module(plans)
    out = dict(folds)
    for group in table:
        for norm in [m for m in known if m == group.norm or m.endswith(f".{group.norm}")]:
            layer = norm.removesuffix(group.norm)
            found = (known.get(layer + m) for m in group.modules)
            readers = [p for p in found if p is not None and (p.spec is not None or p.target.name in folds)]
            if readers:
                r = _ratio(known[norm].target, folds.get(known[norm].target.name))
                if r is not None:
                    out |= {p.target.name: _times(out.get(p.target.name), _tiled(r, p.target)) for p in readers}
    return out


def round_together(plans: Iterable[TensorPlan], pairs: Sequence[tuple[str, str]], rotary: int) -> dict[str, Fold]:
    """Folds that make norms of queries and keys round to values whose products are those of the norms as they are.

    pairs: module paths of both, relative to a layer. rotary: channels that rotate, the first ones, channel d with d +
    rotary / 2; their four products must hold at once, of all others each channel's own. Reads the norms from the source.
    """
    known = by_module(plans)
    out: dict[str, Fold] = {}
    for q, k in pairs:
        for module in [m for m in known if m.endswith(f".{q}")]:
            both = [known[module].target, known[module.removesuffix(q) + k].target]
            if not all(changes(t, None) for t in both):
                continue
            a, b = (np.array(exact(read_band(t, 0, t.shape[0]), t, None, 0, t.shape[0]), np.float64) for t in both)
            if (a > 0).all() and (b > 0).all():
                for target, x, y in zip(both, (a, b), _rounded_together(a, b, rotary, both[0].dtype), strict=True):
                    out[target.name] = Fold(rows=(y / x).astype(np.float32))
    return out


def _rounded_together(a: np.ndarray, b: np.ndarray, rotary: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """a · t and b / t [K] as stored, with t (one for the two channels of a rotation) for which the products are truest."""
    t = np.exp2(np.linspace(-0.5, 0.5, TRIES))[:, None]
    left, right = _stored(a * t, dtype), _stored(b / t, dtype)  # [TRIES, K]
    first, second = np.log(left / a), np.log(right / b)  # up to rounding log t and −log t
    cost = np.square(first + second)
    half = rotary // 2
    low, high = slice(0, half), slice(half, rotary)
    cost[:, low] += (
        cost[:, high] + np.square(first[:, low] + second[:, high]) + np.square(first[:, high] + second[:, low])
    )
    cost[:, high] = cost[:, low]
    best = cost.argmin(axis=0)[None]
    return np.take_along_axis(left, best, axis=0)[0], np.take_along_axis(right, best, axis=0)[0]


def _stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 of x [..., K] as it is when stored."""
    return np.array(stored(mx.array(x.astype(np.float32)), DTYPES[dtype]), np.float64)


def _ratio(norm: Target, fold: Fold | None) -> np.ndarray | None:
    """exact / stored of every channel, float32 [K]; None where all are 1."""
    if not changes(norm, fold):
        return None
    k = norm.shape[0]
    x = exact(read_band(norm, 0, k), norm, fold, 0, k)
    kept = stored(x, DTYPES[norm.dtype])
    r = np.array(mx.where(kept == 0, 1.0, x / mx.where(kept == 0, 1.0, kept)))
    return None if not np.isfinite(r).all() or (r == 1).all() else r


def _tiled(r: np.ndarray, reader: Target) -> np.ndarray:
    """For every column of the reader: a norm of heads is one for all heads, which lie one after the other."""
    return np.tile(r, reader.shape[-1] // len(r))


def _times(fold: Fold | None, r: np.ndarray) -> Fold:
    columns = r if fold is None or fold.columns is None else fold.columns * r
    return Fold(columns, fold.rows if fold is not None else None)
