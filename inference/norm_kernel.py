"""A residual sum and the RMS norm of it as one GPU kernel, for the few rows of decode, where launching is what costs."""

from __future__ import annotations

import functools

import numpy as np

from .backend import BACKEND, mx
from .kernels import ROUNDING, kernel, trusted

THREADS = 256  # of a row; SOURCE adds up their squares in two steps of 16

# x, y [R, H] in T; weight [H]; eps [1]. total: x + y [R, H], normed: its norm times the weight, both in T.
SOURCE = """
    SHARED float part[16 * 16];
    SHARED float sums[16];
    const int lane = LANE;
    const OFFSET row = (OFFSET)GROUP * H;
    float square = 0.0f;
    for (int i = lane; i < H; i += 16 * 16) {
        const T sum = (T)((float)x[row + i] + (float)y[row + i]);
        total[row + i] = sum;
        square += (float)sum * (float)sum;
    }
    part[lane] = square;
    SYNC;
    if (lane < 16) {
        float sum = 0.0f;
        for (int i = 0; i < 16; ++i) sum += part[16 * lane + i];
        sums[lane] = sum;
    }
    SYNC;
    float sum = 0.0f;
    for (int i = 0; i < 16; ++i) sum += sums[i];
    const float scale = rsqrt(sum / H + eps[0]);
    for (int i = lane; i < H; i += 16 * 16) {
        normed[row + i] = (T)((float)total[row + i] * scale * (float)weight[i]);
    }
"""


def add_norm(x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """(x + y, its RMS norm times weight), [..., H] both and of x's type; x, y: [..., H] of one type, weight: [H]."""
    h = x.shape[-1]
    run = kernel("add_norm", ("x", "y", "weight", "eps"), ("total", "normed"), SOURCE)
    found = run(
        inputs=[x, y, weight, mx.array([eps])], template=[("T", x.dtype), ("H", h)],
        grid=(THREADS * (x.size // h), 1, 1), threadgroup=(THREADS, 1, 1),
        output_shapes=[x.shape] * 2, output_dtypes=[x.dtype] * 2,
    )  # fmt: skip
    return found[0], found[1]


@functools.cache
def usable() -> bool:
    """Whether this process decodes by this kernel: on CUDA, if it proves right there; PUBLISH_KERNELS overrides."""
    return trusted(_fault, BACKEND == "cuda")


def _fault() -> str | None:
    """In the type that models are mostly run in."""
    rng = np.random.default_rng(0)
    shapes = ((2, 1, 700), (2, 1, 700), (700,))
    x, y, weight = (mx.array(rng.standard_normal(shape).astype(np.float32), mx.bfloat16) for shape in shapes)
    found = (np.array(v.astype(mx.float32)) for v in add_norm(x, y, weight, 1e-6))
    x, y, weight = (np.array(v.astype(mx.float32)) for v in (x, y, weight))
    total = np.array(mx.array(x + y).astype(mx.bfloat16).astype(mx.float32))  # the norm is of what is handed on
    normed = total / np.sqrt(np.square(total).mean(axis=-1, keepdims=True) + 1e-6) * weight
    off = np.stack([np.abs(a - b) / (np.abs(b) + 1) for a, b in zip(found, (total, normed), strict=True)])
    worst = float(off.max())  # no number, if one of them is none
    return None if worst < ROUNDING else f"the norm's kernel is off by {worst:.2g} on this device"
