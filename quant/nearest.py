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

BLOCK = 1 << 17  # values: 512 KiB in float32, so that a block and its quotients stay in a core's cache
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
        self.pairs = np.empty(BLOCK // 2, np.uint32)
        self.values = np.empty(BLOCK, np.float32)
        self.distance = np.empty(BLOCK, np.float32)
        self.quotient = np.empty(BLOCK, np.float32)
        self.codes = np.empty(BLOCK, np.uint16)
        self.high = np.empty(BLOCK // 2, np.uint16)


_THREAD = local()


def _work() -> _Work:
    """This thread's buffers (2.4 MiB), kept: fresh pages cost as much as the arithmetic on them."""
    if not hasattr(_THREAD, "work"):
        _THREAD.work = _Work()
    return _THREAD.work


def _block(pairs: np.ndarray, work: _Work, widths: Sequence[int], out: Sequence[tuple[np.ndarray, ...]]) -> bool:
    """Quantize groups [G, group/2] of pairs into `out`. False, if a value is too large.

    Row r of what follows holds value 2r of every group for r < group/2, then value 2(r - group/2) + 1.
    """
    groups, half = pairs.shape
    shape = (2 * half, groups)
    columns = _view(work.pairs, (half, groups))
    np.copyto(columns, pairs.T)
    values, distance, quotient = (_view(a, shape) for a in (work.values, work.distance, work.quotient))
    codes = _view(work.codes, shape)
    bits = values.view(np.uint32)  # bfloat16 is the upper half of float32
    np.left_shift(columns, 16, out=bits[:half])
    np.bitwise_and(columns, np.uint32(0xFFFF0000), out=bits[half:])
    high, low = values.max(axis=0), values.min(axis=0)
    below = np.abs(low) > np.abs(high)
    edge, span = np.where(below, low, high), high - low
    if not np.abs(edge).max() < LIMIT:
        return False
    np.subtract(values, edge, out=distance)
    sign = np.where(below, np.float32(1), np.float32(-1))
    edge_bits = _upper(edge.view(np.uint32))  # it is one of the values
    for width, (packed, scales, biases) in zip(widths, out, strict=True):
        most = (1 << width) - 1
        scale = np.maximum(span / np.float32(most), EPSILON)
        scale *= sign
        steps = np.rint(edge / scale)
        zero = steps == 0
        if zero.any():
            # Without a step to the edge the bias is 0; all values are within half of a scale then, so every code is 0.
            exact = edge / np.where(zero, np.float32(1), steps)
            stored, bias_bits = np.where(zero, scale, exact), np.where(zero, np.uint16(0), edge_bits)
            exact[zero] = np.inf
        else:
            stored = exact = edge / steps
            bias_bits = edge_bits
        np.divide(distance, exact, out=quotient)  # 0 to most + 1: never negative
        np.rint(quotient, out=quotient)
        np.copyto(codes, quotient, casting="unsafe")
        np.minimum(codes, np.full(groups, most, np.uint16), out=codes)
        np.copyto(packed.view(np.uint16), _pack(codes, width, _view(work.high, (half, groups))).T)
        scales[:] = _bfloat16(stored)
        biases[:] = bias_bits
    return True


def _view(buffer: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return buffer[: shape[0] * shape[1]].reshape(shape)


def _pack(codes: np.ndarray, width: int, high: np.ndarray) -> np.ndarray:
    """Codes uint16 [group, G], even values first → [group·width/16, G] uint16: a column is one bit stream, least
    significant bit first. Overwrites codes. (A product shifts left: numpy vectorizes it, and not the shift.)"""
    even, odd = np.split(codes, 2)
    np.multiply(odd, np.uint16(1 << width), out=high)
    np.bitwise_or(even, high, out=even)
    fields, size = even, 2 * width
    while 2 * size <= HALF_WORD:
        fields, size = fields[0::2] | fields[1::2] * np.uint16(1 << size), 2 * size
    if size == HALF_WORD:
        return fields
    period = HALF_WORD // gcd(size, HALF_WORD)  # so many fields fill whole half words
    per = period * size // HALF_WORD
    out = np.empty((len(fields) * size // HALF_WORD, fields.shape[1]), np.uint16)
    for i in range(period):
        word, shift = divmod(i * size, HALF_WORD)
        field = fields[i::period]
        if shift == 0:
            out[word::per] = field
        else:
            out[word::per] |= field * np.uint16(1 << shift)
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
    return words.view(np.uint16)[1::2]
