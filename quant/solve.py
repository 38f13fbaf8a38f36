"""One weight → packed codes, scales and biases, behind one interface.

A solver chooses codes, scales and biases of a matrix in the stored format that `QuantSpec` names, knowing what its input
looks like (`Moments`). Rows are independent of each other, so solvers work on any band of rows.

    rtn    round to nearest: exactly `mx.quantize` (on a CPU by `quant.nearest`, several formats at once)
    ls     scale and bias by least squares, weighted by E[x²] (`quant.least_squares`)
    gptq   the whole Hessian: error feedback with scales chosen around those of `ls`, coordinate descent, refitted scales
           (`quant.gptq`)

None is worse than round to nearest on its own objective: `ls` a group at a time under E[x²], `gptq` a row at a time under
the (damped) Hessian. Without statistics `ls` weighs all channels alike and `gptq` is `ls`. The float formats (mxfp4,
mxfp8, nvfp4) have fixed scales and are always rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inference.backend import BACKEND, mx
from inference.checkpoint import QuantSpec

from . import gptq, least_squares, nearest
from .hessians import Factor

WORD = 32  # bits


@dataclass(frozen=True)
class Packed:
    """A band as it is stored: codes [..., K·bits/32] U32, scales and biases [..., K/group] (no biases off affine)."""

    codes: mx.array
    scales: mx.array
    biases: mx.array | None


@dataclass(frozen=True)
class Moments:
    """What is known of a matrix' input, any fold applied.

    second: E[x²] float32 [K], or [E, K] for a band of stacked experts. factor: its Hessians made ready (E matrices, or
    one), for solvers that use them.
    """

    second: np.ndarray
    factor: Factor | None = None


@dataclass(frozen=True)
class Effort:
    """steps: of the search for a group's range, an end. rounds: of refit and descent."""

    steps: int = least_squares.STEPS
    rounds: int = gptq.ROUNDS


FULL = Effort()
QUICK = Effort(3, 1)  # for prices: a few percent more error than FULL at a sixth of the time


@dataclass(frozen=True)
class Solver:
    """weights [..., K], moments or None, spec, effort, stored type → Packed (lazy). What of the moments it uses."""

    run: Callable[[mx.array, Moments | None, QuantSpec, Effort, mx.Dtype], Packed]
    uses_second: bool = False
    uses_hessian: bool = False


def solve(
    weights: mx.array,
    moments: Moments | None,
    spec: QuantSpec,
    solver: str = "rtn",
    effort: Effort = FULL,
    dtype: mx.Dtype | None = None,
) -> Packed:
    """Quantize a band of rows and evaluate the result.

    weights: [R, K] or stacked [E, R, K]. dtype: in which affine scales and biases are stored; by default the weights'.
    Rounding to nearest rounds the weights to it first.
    """
    run = SOLVERS[solver].run if spec.mode == "affine" else _rtn
    packed = run(weights, moments, spec, effort, dtype or weights.dtype)
    mx.eval(packed.codes, packed.scales, *([] if packed.biases is None else [packed.biases]))
    return packed


def nearest_together(dtype: str, spec: QuantSpec, solver: str) -> bool:
    """Whether `solve_together` takes a matrix that is stored as `dtype` (safetensors name) to this format."""
    return dtype == "BF16" and spec.mode == "affine" and solver == "rtn"


def solve_together(weights: mx.array | np.ndarray, specs: Sequence[QuantSpec]) -> list[tuple[Any, Any, Any]]:
    """Round a band to nearest in several formats of one group size: (codes, scales, biases) for each, with the bytes of
    `mx.quantize`.

    weights: [..., K] bfloat16, evaluated, or on a CPU its patterns as uint16. Scales and biases are bfloat16 or patterns,
    too. On a GPU all formats are one evaluation, so that the host waits once.
    """
    group = specs[0].group_size
    if BACKEND == "cpu":
        bits: Any = weights if isinstance(weights, np.ndarray) else weights.view(mx.uint16)
        found = nearest.quantize(np.ascontiguousarray(memoryview(bits)), group, [s.bits for s in specs])
        if found is not None:
            return list(found)
    x = mx.array(weights).view(mx.bfloat16) if isinstance(weights, np.ndarray) else weights
    out = [mx.quantize(x, group_size=group, bits=s.bits) for s in specs]
    mx.eval(out)
    return [(codes, scales, biases) for codes, scales, biases in out]


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes [..., K] (any type, < 2^bits) → uint32 [..., K·bits/32]: one bit stream a row, least significant bit first."""
    c = codes.astype(mx.uint32).reshape(*codes.shape[:-1], -1, WORD)  # WORD codes fill `bits` words exactly
    words = []
    for word in range(bits):
        terms = []
        for i in range(WORD):
            shift = i * bits - word * WORD
            if -bits < shift < WORD:
                x = c[..., i]
                terms.append(mx.left_shift(x, shift) if shift >= 0 else mx.right_shift(x, -shift))
        total = terms[0]
        for t in terms[1:]:
            total = mx.bitwise_or(total, t)
        words.append(total)
    return mx.stack(words, axis=-1).reshape(*codes.shape[:-1], -1)


def _rtn(weights: mx.array, moments: Moments | None, spec: QuantSpec, effort: Effort, dtype: mx.Dtype) -> Packed:
    codes, scales, *biases = mx.quantize(
        weights.astype(dtype), group_size=spec.group_size, bits=spec.bits, mode=spec.mode
    )
    return Packed(codes, scales, biases[0] if biases else None)


def _ls(x: mx.array, moments: Moments | None, spec: QuantSpec, effort: Effort, dtype: mx.Dtype) -> Packed:
    codes, scales, biases = _fitted(x, moments, spec, effort, dtype)
    return Packed(pack(codes.reshape(x.shape), spec.bits), scales.astype(dtype), biases.astype(dtype))


def _gptq(x: mx.array, moments: Moments | None, spec: QuantSpec, effort: Effort, dtype: mx.Dtype) -> Packed:
    if moments is None or moments.factor is None:
        return _ls(x, moments, spec, effort, dtype)
    factor, group, bits = moments.factor, spec.group_size, spec.bits
    codes, scales, biases = _fitted(x, moments, spec, effort, dtype)
    w = _columns_first(x.astype(mx.float32))
    start = (_columns_first(codes.reshape(x.shape)), _columns_first(scales), _columns_first(biases))
    near_q, near_s, near_b = mx.quantize(x.astype(dtype), group_size=group, bits=bits)
    near_s, near_b = near_s.astype(mx.float32), near_b.astype(mx.float32)
    near_q = mx.dequantize(near_q, mx.ones_like(near_s), mx.zeros_like(near_s), group, bits)
    best = (_columns_first(near_q), _columns_first(near_s), _columns_first(near_b))
    found = gptq.optimize(w, start[1], start[2], factor, bits, dtype, effort.rounds)
    least = gptq.error(w, *best, factor.hessian)
    for q, s, b in (start, found):  # nearest came first: what overflows float32 on the way is less than nothing
        e = gptq.error(w, q, s, b, factor.hessian)
        better = (e < least)[:, None]
        best = (mx.where(better, q, best[0]), mx.where(better, s, best[1]), mx.where(better, b, best[2]))
        least = mx.where(e < least, e, least)
    codes, scales, biases = (_rows_first(t, x.ndim) for t in best)
    return Packed(pack(codes, bits), scales.astype(dtype), biases.astype(dtype))


def _fitted(
    weights: mx.array, moments: Moments | None, spec: QuantSpec, effort: Effort, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """(codes [..., groups, group], scales, biases [..., groups]) by least squares, float32, representable in dtype."""
    bits, group = spec.bits, spec.group_size
    x = weights.astype(mx.float32).reshape(*weights.shape[:-1], -1, group)
    if moments is None:
        v = mx.ones((x.shape[-2], group))
    else:
        second = moments.second if weights.ndim == 2 else moments.second.reshape(-1, 1, weights.shape[-1])
        v = mx.array(_floored(second)).reshape(*second.shape[:-1], -1, group)
    _, s, b = mx.quantize(weights.astype(dtype), group_size=group, bits=bits)
    start = (s.astype(mx.float32)[..., None], b.astype(mx.float32)[..., None])
    s, b = least_squares.fit(x, v, bits, dtype, start, effort.steps)
    return least_squares.code(x, s, b, bits), s[..., 0], b[..., 0]


def _floored(second: np.ndarray) -> np.ndarray:
    """In a unit that float32 has room around (a power of two, which changes no code). Channels that saw next to nothing
    still count a little: another text may use them."""
    mean = second.mean(axis=-1, keepdims=True, dtype=np.float64)
    unit = np.where(mean > 0, np.exp2(-np.round(np.log2(np.where(mean > 0, mean, 1.0)))), 1.0)
    return np.where(mean > 0, np.maximum(second, 1e-4 * mean) * unit, 1.0).astype(np.float32)


def _columns_first(x: mx.array) -> mx.array:
    """[R, K] or [E, R, K] → [E, K, R], contiguous."""
    x = x[None] if x.ndim == 2 else x
    return mx.contiguous(x.swapaxes(1, 2))


def _rows_first(x: mx.array, ndim: int) -> mx.array:
    x = mx.contiguous(x.swapaxes(1, 2))
    return x[0] if ndim == 2 else x


SOLVERS: dict[str, Solver] = {  # the names are those of `quant.version`, which plans read without MLX
    "rtn": Solver(_rtn),
    "ls": Solver(_ls, uses_second=True),
    "gptq": Solver(_gptq, uses_second=True, uses_hessian=True),
}
