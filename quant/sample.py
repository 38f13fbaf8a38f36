"""A few rows of a tensor, spread over it, and what a format leaves of them: errors are measured on these."""

from __future__ import annotations

import numpy as np

from inference.backend import mx
from inference.checkpoint import QuantSpec
from inference.layout import Target, read_band
from inference.load import DTYPES, decoded

from .solve import Packed

CHUNKS = 8  # pieces of a matrix
EXPERTS = 4  # of a stack


def sample(target: Target, wanted: int) -> list[tuple[np.ndarray, mx.array, int | None]]:
    """(row numbers, weights [r, K] in the stored type, expert) of pieces that together have about `wanted` rows."""
    if len(target.shape) == 2:
        rows = spread(target.shape[0], wanted, CHUNKS)
        pieces = [read_band(target, a, b) for a, b in rows]
        index = np.concatenate([np.arange(a, b) for a, b in rows])
        return [(index, _typed(np.concatenate(pieces), target), None)]
    out: list[tuple[np.ndarray, mx.array, int | None]] = []
    for a, _ in spread(target.shape[0], min(EXPERTS, target.shape[0]), min(EXPERTS, target.shape[0])):
        whole = read_band(target, a, a + 1)[0]
        index = np.concatenate([np.arange(*r) for r in spread(len(whole), wanted // EXPERTS, 2)])
        out.append((index, _typed(whole[index], target), a))
    return out


def spread(total: int, wanted: int, chunks: int) -> list[tuple[int, int]]:
    """`chunks` ranges of together `wanted` numbers below total, evenly apart."""
    if total <= wanted:
        return [(0, total)]
    size = max(1, wanted // chunks)
    starts = np.linspace(0, total - size, chunks).astype(int)
    return [(int(s), int(s) + size) for s in np.unique(starts)]


def restored(packed: Packed, spec: QuantSpec) -> mx.array:
    """float32 of what is stored."""
    if packed.biases is None:
        y = mx.dequantize(packed.codes, packed.scales, None, spec.group_size, spec.bits, spec.mode)
        return y.astype(mx.float32)
    scales, biases = packed.scales.astype(mx.float32), packed.biases.astype(mx.float32)
    return mx.dequantize(packed.codes, scales, biases, spec.group_size, spec.bits)


def _typed(raw: np.ndarray, target: Target) -> mx.array:
    return decoded(raw, target).astype(DTYPES[target.dtype])
