"""One weight → packed codes, scales and biases, behind one interface.

A solver chooses codes, scales and biases of a matrix in the stored format that `QuantSpec` names; it may use the mean
squared activation of every input channel. Solvers work on any band of leading rows, so that a matrix never has to be
in memory whole. `rtn` (round to nearest) is exactly `mx.quantize`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from inference.backend import mx
from inference.checkpoint import QuantSpec


@dataclass(frozen=True)
class Packed:
    """A band as it is stored: codes [..., K·bits/32] U32, scales and biases [..., K/group] (no biases off affine)."""

    codes: mx.array
    scales: mx.array
    biases: mx.array | None


@dataclass(frozen=True)
class Solver:
    """weights [..., K], statistics E[x²] [K] or [..., 1, K] or None, spec → Packed (lazy)."""

    run: Callable[[mx.array, mx.array | None, QuantSpec], Packed]
    uses_statistics: bool = False


def solve(weights: mx.array, statistics: mx.array | None, spec: QuantSpec, solver: str = "rtn") -> Packed:
    """Quantize a band of rows and evaluate the result.

    weights: [..., K], float32 or the model's type; affine scales and biases are stored in that type. statistics: mean
    squared activation of the K input channels (after any fold), used by solvers that declare it.
    """
    packed = SOLVERS[solver].run(weights, statistics, spec)
    mx.eval(packed.codes, packed.scales, *([] if packed.biases is None else [packed.biases]))
    return packed


def _rtn(weights: mx.array, statistics: mx.array | None, spec: QuantSpec) -> Packed:
    codes, scales, *biases = mx.quantize(weights, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    return Packed(codes, scales, biases[0] if biases else None)


SOLVERS: dict[str, Solver] = {"rtn": Solver(_rtn)}
