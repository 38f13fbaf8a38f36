"""The inner loops of `quant.gptq` as GPU kernels: a group or block of columns in one launch, not two launches a column.

Columns answer for each other one after the other, so that a matrix of 4,096 columns is some 40,000 launches, and a GPU
waits for them. Here a thread walks over the columns of its row, with what it moved so far in its own memory; rows,
candidates and experts are what runs side by side. They compute what `gptq._round_group` and `gptq._descend_block` do, up to the
order of float32 sums, and are used where `gptq.by_kernels` finds them right (`inference.kernels`).
"""

from __future__ import annotations

from inference.backend import mx
from inference.kernels import Kernel, kernel

TILE = 8  # columns whose sums a thread holds in registers
GROUP_THREADS, BLOCK_THREADS = 128, 32  # of a thread group; a block has few rows to spread over the device

# One group of N columns, rounded with every pair of scale and bias: what it adds to the error (COST), or codes and errors.
#   w, target [E, N, R]; s, b [E, C, R]; u [E, N, N] upper; pivots [E, N]; size = (R, C). TOP: largest code.
#   COST: cost [E, C, R]. Otherwise, with C = 1: codes, errors [E, N, R].
GROUP = """
    const int rows = size[0], pairs = size[1];
    const int row = ROW, pair = SECOND, matrix = THIRD;
    if (row >= rows) return;
    const OFFSET columns = (OFFSET)matrix * N * rows + row;
    const OFFSET own = ((OFFSET)matrix * pairs + pair) * rows + row;
    const float scale = s[own], bias = b[own];
    const float divisor = scale == 0.0f ? 1.0f : scale;
    float moved[N];
    float total = 0.0f;
    for (int from = 0; from < N; from += TILE) {
        float sum[TILE];
        for (int i = 0; i < TILE; ++i) sum[i] = target[columns + (OFFSET)(from + i) * rows];
        for (int k = 0; k < from; ++k) {
            const float e = moved[k];
            const OFFSET at = ((OFFSET)matrix * N + k) * N + from;
            for (int i = 0; i < TILE; ++i) sum[i] += e * u[at + i];
        }
        for (int i = 0; i < TILE; ++i) {
            const int j = from + i;
            const float q = fmin(fmax(rint((sum[i] - bias) / divisor), 0.0f), (float)TOP);
            const float y = scale * q + bias;
            const float left = sum[i] - y;
            const float e = w[columns + (OFFSET)j * rows] - y;
            moved[j] = e;
            total += pivots[matrix * N + j] * left * left;
            const OFFSET at = ((OFFSET)matrix * N + j) * N + from;
            for (int l = i + 1; l < TILE; ++l) sum[l] += e * u[at + l];
            WRITE
        }
    }
    FINISH
"""
# Coordinate descent over one block of N columns, everything before it done.
#   q, pull [E, N, R]; s [E, N / SHARE, R], a scale for SHARE columns; h [E, N, N]; size = (R, 1). codes, moves: [E, N, R].
BLOCK = """
    const int rows = size[0];
    const int row = ROW, matrix = THIRD;
    if (row >= rows) return;
    const OFFSET columns = (OFFSET)matrix * N * rows + row;
    float moved[N];
    for (int from = 0; from < N; from += TILE) {
        float sum[TILE];
        for (int i = 0; i < TILE; ++i) sum[i] = pull[columns + (OFFSET)(from + i) * rows];
        for (int k = 0; k < from; ++k) {
            const float m = moved[k];
            const OFFSET at = ((OFFSET)matrix * N + k) * N + from;
            for (int i = 0; i < TILE; ++i) sum[i] -= m * h[at + i];
        }
        for (int i = 0; i < TILE; ++i) {
            const int j = from + i;
            const OFFSET at = ((OFFSET)matrix * N + j) * N + from;
            const float scale = s[((OFFSET)matrix * (N / SHARE) + j / SHARE) * rows + row];
            const float was = q[columns + (OFFSET)j * rows];
            const float step = sum[i] / (h[at + i] * (scale == 0.0f ? 1.0f : scale));
            const float now = fmin(fmax(rint(was + step), 0.0f), (float)TOP);
            const float m = scale * (now - was);
            moved[j] = m;
            for (int l = i + 1; l < TILE; ++l) sum[l] -= m * h[at + l];
            codes[columns + (OFFSET)j * rows] = now;
            moves[columns + (OFFSET)j * rows] = m;
        }
    }
"""


def _unrolled(source: str) -> str:
    """With every loop over a tile marked, so that its sums stay in registers."""
    return f"    constexpr int TILE = {TILE};\n" + "".join(
        line[: len(line) - len(line.lstrip())] + "#pragma unroll\n" + line if "< TILE; ++" in line else line
        for line in source.splitlines(keepends=True)
    )


COST = _unrolled(GROUP.replace("WRITE", "").replace("FINISH", "cost[own] = total;"))
CODES = _unrolled(
    GROUP.replace(
        "WRITE", "codes[columns + (OFFSET)j * rows] = q;\n            errors[columns + (OFFSET)j * rows] = e;"
    ).replace("FINISH", "")
)
DESCENT = _unrolled(BLOCK)
GROUP_INPUTS = ("w", "target", "s", "b", "u", "pivots", "size")


def costs(w: mx.array, target: mx.array, s: mx.array, b: mx.array, u: mx.array, pivots: mx.array, top: int) -> mx.array:
    """What a group adds to the error under each pair of scale and bias, [E, C, R]; arguments as of `gptq._round_group`."""
    run = kernel("costs", GROUP_INPUTS, ("cost",), COST)
    return _of_group(run, (w, target, s, b, u, pivots), top, [s.shape])[0]


def codes(
    w: mx.array, target: mx.array, s: mx.array, b: mx.array, u: mx.array, pivots: mx.array, top: int
) -> tuple[mx.array, mx.array]:
    """Codes and errors w − ŵ [E, N, R] of a group under scales and biases [E, 1, R]."""
    run = kernel("codes", GROUP_INPUTS, ("codes", "errors"), CODES)
    found = _of_group(run, (w, target, s, b, u, pivots), top, [w.shape] * 2)
    return found[0], found[1]


def _of_group(run: Kernel, inputs: tuple[mx.array, ...], top: int, shapes: list[tuple[int, ...]]) -> list[mx.array]:
    """A kernel of GROUP_INPUTS, a thread for every matrix, pair and row. shapes: of its outputs, float32."""
    (e, n, r), c = inputs[0].shape, inputs[2].shape[1]
    return run(
        inputs=[*inputs, mx.array([r, c], mx.int32)], template=[("N", n), ("TOP", top)], grid=(r, c, e),
        threadgroup=(GROUP_THREADS, 1, 1), output_shapes=shapes, output_dtypes=[mx.float32] * len(shapes),
    )  # fmt: skip


def descent(q: mx.array, pull: mx.array, s: mx.array, h: mx.array, top: int) -> tuple[mx.array, mx.array]:
    """New codes of a block and by how much their weights moved, [E, N, R].

    q, pull: [E, N, R]; s: scales [E, N / columns that share one, R]; h: the block's Hessian [E, N, N].
    """
    e, n, r = q.shape
    run = kernel("descent", ("q", "pull", "s", "h", "size"), ("codes", "moves"), DESCENT)
    found = run(
        inputs=[q, pull, s, h, mx.array([r, 1], mx.int32)], grid=(r, 1, e), threadgroup=(BLOCK_THREADS, 1, 1),
        template=[("N", n), ("TOP", top), ("SHARE", n // s.shape[1])],
        output_shapes=[q.shape] * 2, output_dtypes=[mx.float32] * 2,
    )  # fmt: skip
    return found[0], found[1]
