"""Round to nearest on the CPU: the bytes of `mx.quantize`, several widths at once.

`mx.quantize` goes through a matrix value by value on a CPU. Here the same float32 operations in the same order run over
thousands of groups at a time: a block is transposed, so that the values of one group lie in one column, and each step
is one numpy operation on whole rows, which numpy vectorizes. What does not depend on the width (range of a group,
distance from its edge) is computed once for all widths. `tests/test_nearest.py` compares every byte with `mx.quantize`,
`benchmarks/build_rates.py` both speeds.

Affine formats of bfloat16 matrices only; everything else is `mx.quantize`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from threading import local

import numpy as np

# values: between two operations on a block, threads wait for the interpreter. With two of them a quarter of this, which a
# second-level cache holds, takes 1.6 times as long, and twice as much no less
BLOCK = 1 << 19
TILE = 256  # groups transposed at once: 32 KiB, a first-level cache
EPSILON = np.float32(1e-7)  # least scale; mx.quantize's
HALF_WORD = 16  # bits
LIMIT = np.float32(1e30)  # from here on edge / scale may exceed float32

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def quantize(weights: np.ndarray, group_size: int, widths: Sequence[int]) -> list[Arrays] | None:
    """Codes, scales and biases for each width in bits: what `mx.quantize(weights, group_size, bits)` returns.

    weights: [..., K] uint16, the bit patterns of finite bfloat16, in C order, K a multiple of group_size (even).
    Returns codes [..., K·bits/32] uint32, scales and biases [..., K/group_size] uint16 patterns for each width; None if
    a value is so large (1e30) that arithmetic would overflow.
    """
    half, groups = group_size // 2, weights.size // group_size
    pairs = weights.reshape(-1).view(np.uint32).reshape(groups, half)  # two values a word, the first one low
    out = [
        (np.empty((groups, group_size * b // 32), np.uint32), np.empty(groups, np.uint16), np.empty(groups, np.uint16))
        for b in widths
    ]
    step = min(groups, BLOCK // group_size)
    work = _work()
    for start in range(0, groups, step):
        stop = min(groups, start + step)
        if not _block(pairs[start:stop], work, widths, [tuple(a[start:stop] for a in arrays) for arrays in out]):
            return None
    lead = weights.shape[:-1]
    return [(c.reshape(*lead, -1), s.reshape(*lead, -1), b.reshape(*lead, -1)) for c, s, b in out]


class _Work:
    """Buffers for one block."""

    def __init__(self) -> None:
        self.distance = np.empty(BLOCK, np.float32)
        self.quotient = np.empty(BLOCK, np.float32)
        self.codes = np.empty(BLOCK, np.uint16)


_THREAD = local()


def _work() -> _Work:
    """This thread's buffers (5 MiB), kept: fresh pages cost as much as the arithmetic on them."""
    if not hasattr(_THREAD, "work"):
        _THREAD.work = _Work()
    return _THREAD.work


def _block(pairs: np.ndarray, work: _Work, widths: Sequence[int], out: Sequence[tuple[np.ndarray, ...]]) -> bool:
    """Quantize groups [G, group/2] of pairs into `out`. False, if a value is too large.

    Row r of what follows holds value 2r of every group for r < group/2, then value 2(r - group/2) + 1. Buffers serve twice:
    values become distances, and where quotients stand is room before they are computed and once codes are made of them.
    """
    groups, half = pairs.shape
    distance, quotient, codes = (_view(a, (2 * half, groups)) for a in (work.distance, work.quotient, work.codes))
    values, columns = distance, quotient.view(np.uint32)[:half]
    for start in range(0, groups, TILE):
        np.copyto(columns[:, start : start + TILE], pairs[start : start + TILE].T)
    bits = values.view(np.uint32)  # bfloat16 is the upper half of float32
    np.left_shift(columns, 16, out=bits[:half])
    np.bitwise_and(columns, np.uint32(0xFFFF0000), out=bits[half:])
    high, low = values.max(axis=0), values.min(axis=0)
    below = np.abs(low) > np.abs(high)
    edge, span = np.where(below, low, high), high - low
    if not np.abs(edge).max() < LIMIT:
        return False
    np.subtract(values, edge, out=distance)
    stored, exact, biases = _scales(edge, span, below, widths)
    scratch = quotient.view(np.uint16).reshape(-1, groups)
    for i, (width, (packed, scale, bias)) in enumerate(zip(widths, out, strict=True)):
        np.divide(distance, exact[i], out=quotient)  # 0 to most + 1: never negative
        np.rint(quotient, out=quotient)
        np.copyto(codes, quotient, casting="unsafe")
        np.minimum(codes, np.full(groups, (1 << width) - 1, np.uint16), out=codes)
        np.copyto(packed.view(np.uint16), _pack(codes, width, scratch).T)
        scale[:], bias[:] = stored[i], biases[i]
    return True


def _scales(edge: np.ndarray, span: np.ndarray, below: np.ndarray, widths: Sequence[int]) -> Arrays:
    """Scales as they are stored, the float32 that distances are divided by, and biases, each [widths, G].

    edge: the value of largest magnitude of each group; below: where it is the lowest one.
    """
    most = np.array([[(1 << width) - 1] for width in widths], np.float32)
    scale = np.maximum(span / most, EPSILON)
    scale *= np.where(below, np.float32(1), np.float32(-1))
    steps = np.rint(edge / scale)
    biases = np.broadcast_to(_upper(edge.view(np.uint32)), steps.shape)  # the edge is one of the values
    zero = steps == 0
    if not zero.any():
        exact = edge / steps
        return _bfloat16(exact), exact, biases
    # Without a step to the edge the bias is 0; all values are within half of a scale then, so every code is 0.
    exact = edge / np.where(zero, np.float32(1), steps)
    stored = _bfloat16(np.where(zero, scale, exact))
    exact[zero] = np.inf
    return stored, exact, np.where(zero, np.uint16(0), biases)


def _view(buffer: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return buffer[: shape[0] * shape[1]].reshape(shape)


def _pack(codes: np.ndarray, width: int, scratch: np.ndarray) -> np.ndarray:
    """Codes uint16 [group, G], even values first → [group·width/16, G] uint16: a column is one bit stream, least
    significant bit first. Overwrites codes and scratch, uint16 of at least [group, G]; the result lies in one of them.
    (A product shifts left: numpy vectorizes it, and not the shift.)"""

    def joined(low: np.ndarray, high: np.ndarray, shift: int, out: np.ndarray) -> np.ndarray:
        shifted = np.multiply(high, np.uint16(1 << shift), out=scratch[: len(high)])
        return np.bitwise_or(low, shifted, out=out)

    half = len(codes) // 2
    fields, size, used = joined(codes[:half], codes[half:], width, codes[:half]), 2 * width, half
    while 2 * size <= HALF_WORD:
        half = len(fields) // 2
        fields = joined(fields[0::2], fields[1::2], size, scratch[used : used + half])
        size, used = 2 * size, used + half
    if size == HALF_WORD:
        return fields
    period = HALF_WORD // gcd(size, HALF_WORD)  # so many fields fill whole half words
    per = period * size // HALF_WORD
    out = scratch[used : used + len(fields) * size // HALF_WORD]
    for i in range(period):
        word, shift = divmod(i * size, HALF_WORD)
        field = fields[i::period]
        if shift == 0:
            out[word::per] = field
        else:
            joined(out[word::per], field, shift, out[word::per])
        if shift + size > HALF_WORD:
            np.right_shift(field, np.uint16(HALF_WORD - shift), out=out[word + 1 :: per])
    return out


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 → bfloat16 patterns, to nearest, ties to even."""
    bits = x.view(np.uint32)
    rounding = bits >> np.uint32(16)
    rounding &= np.uint32(1)
    rounding += np.uint32(0x7FFF)
    rounding += bits
    return _upper(rounding)


def _upper(words: np.ndarray) -> np.ndarray:
    """The upper half of each uint32."""
    return words.view(np.uint16)[..., 1::2]
