"""Codes that answer for each other: error feedback along a Hessian, coordinate descent, refitted scales.

All of it lowers, for every output row on its own, what rounding adds to the mean square of the output,

    e = (w − ŵ) H (w − ŵ)ᵀ,   H = E[x xᵀ],   ŵ = scale · code + bias,

starting from scales and biases that were fitted to every group by itself (`quant.least_squares`):

1. `feedback`: GPTQ (Frantar et al., arXiv 2210.17323) in the form of LDLQ (Chee et al., arXiv 2307.13304), which needs no
   inverse. With H = (I + U) D (I + U)ᵀ, U strictly upper triangular, columns are rounded one after the other, each
   after it was given the error of those before: code_j rounds t_j = w_j + Σ_{k<j} (w_k − ŵ_k) U_kj. Every group is
   rounded with several scales and biases around its own; the pair stays whose Σ_j D_j (t_j − ŵ_j)² is least, which is
   what the group adds to e for good, whatever the columns after it do. Columns go by falling H_jj (act-order), group by
   group.
2. `descend`: coordinate descent; every code moves to where the row's error is least with all others held.
3. `refit`: scale and bias of a group by least squares under H with the codes held, rounded to the stored type, kept
   where that lowers the error.

A GPU takes steps 1 and 2 through `quant.kernels`, a launch a group or block, and `_round_group` and `_descend_block` say here
what those compute.

Arrays are kept with columns first, [E, K, R] for E matrices (experts, else one) of R rows and K columns: a column of all
rows is contiguous. Columns are worked on in blocks; what a block does to the rest is one matrix product.
"""

from __future__ import annotations

import functools

import numpy as np

from inference.backend import BACKEND, fused, mx
from inference.kernels import trusted

from . import kernels
from .hessians import Factor
from .kernels import TILE
from .least_squares import stored

BLOCK = 64  # columns between two matrix products
# Scales and biases that `feedback` tries: so many scales, half a step apart at the range's end, and for each so many
# shifts of the grid, spread over one step. Twice as many left 1 % less error, one alone 3 to 10 % more.
SCALES, SHIFTS, SCALE_STEP = 5, 9, 0.5
# of float32 that a group's columns take under all of them, about five times live at once: 12,288 rows of a GPU's band
CHOICE_BYTES = (16 if BACKEND == "cpu" else 144) << 20
ROUNDS = 3  # of refit and descent after the first descent; a fourth gained under 0.3 % of e


def optimize(
    w: mx.array, scales: mx.array, biases: mx.array, factor: Factor, bits: int, dtype: mx.Dtype, rounds: int = ROUNDS
) -> tuple[mx.array, mx.array, mx.array]:
    """(codes [E, K, R], scales, biases [E, G, R]) from fitted scales and biases, all float32.

    w: [E, K, R]; scales, biases: [E, G, R], representable in dtype, as the results are.
    """
    top = 2**bits - 1
    codes, scales, biases = feedback(w, scales, biases, factor, top, dtype)
    codes = descend(w, codes, scales, biases, factor.hessian, top)
    for _ in range(rounds):
        scales, biases = refit(w, codes, scales, biases, factor.hessian, dtype)
        codes = descend(w, codes, scales, biases, factor.hessian, top)
    return codes, scales, biases


def error(w: mx.array, codes: mx.array, scales: mx.array, biases: mx.array, hessian: mx.array) -> mx.array:
    """(w − ŵ) H (w − ŵ)ᵀ of every row, [E, R]."""
    e = w - dequantized(codes, scales, biases)
    return ((hessian @ e) * e).sum(axis=1)


def dequantized(codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """[E, K, R]"""
    group = codes.shape[1] // scales.shape[1]
    return mx.repeat(scales, group, axis=1) * codes + mx.repeat(biases, group, axis=1)


def feedback(
    w: mx.array, scales: mx.array, biases: mx.array, factor: Factor, top: int, dtype: mx.Dtype, choose: bool = True
) -> tuple[mx.array, mx.array, mx.array]:
    """(codes [E, K, R], scales, biases [E, G, R]) by error feedback; arguments as for `optimize`.

    choose: among scales and biases around those given; otherwise these are kept.
    """
    n = w.shape[1] // scales.shape[1]
    order, u = factor.order, factor.feedback
    w = mx.take_along_axis(w, order[..., None], axis=1)
    groups = order[:, ::n] // n  # [E, G], in the order they are rounded
    s, b = (mx.take_along_axis(x, groups[..., None], axis=1) for x in (scales, biases))
    rows = max(1, CHOICE_BYTES // (4 * n * (SCALES * SHIFTS if choose else 1) * len(w)))  # at once
    codes: list[mx.array] = []
    errors: list[mx.array] = []  # of all columns so far, in few pieces
    chosen: list[tuple[mx.array, mx.array]] = []
    asked: Asked = ()
    for g in range(s.shape[1]):
        i, end = g * n, (g + 1) * n
        target = w[:, i:end]  # what these columns should be, given the errors so far
        if errors:
            target = target + u[:, :i, i:end].swapaxes(1, 2) @ mx.concatenate(errors, axis=1)
        pairs = _choices(s[:, g], b[:, g], top, dtype) if choose else (s[:, g, None], b[:, g, None])
        inner = (u[:, i:end, i:end], factor.pivots[:, i:end])
        if by_kernels():
            q, e, s1, b1 = _round_group_by_kernels(w[:, i:end], target, *pairs, *inner, top)
            asked = _ask(asked, q, e)
        else:
            parts = []
            for r in range(0, w.shape[2], rows):
                at = slice(r, r + rows)
                s_at, b_at = (x[..., at] for x in pairs)
                parts.append(_round_group(w[:, i:end, at], target[..., at], s_at, b_at, *inner, top))
                mx.eval(parts[-1])
            q, e, s1, b1 = (mx.concatenate(list(x), axis=-1) for x in zip(*parts, strict=True))
        codes.append(q)
        _append(errors, e)
        chosen.append((s1, b1))
    back = mx.argsort(groups, axis=1)[..., None]
    s, b = (mx.take_along_axis(mx.stack(list(x), axis=1), back, axis=1) for x in zip(*chosen, strict=True))
    return mx.take_along_axis(mx.concatenate(codes, axis=1), factor.inverse[..., None], axis=1), s, b


def _append(pieces: list[mx.array], piece: mx.array) -> None:
    """Add columns behind others, joining pieces of one size: as many are left as there are bits in the number of groups.
    Hundreds joined anew for every group are as many launches."""
    pieces.append(piece)
    while len(pieces) > 1 and pieces[-1].shape[1] == pieces[-2].shape[1]:
        pieces[-2:] = [mx.concatenate(pieces[-2:], axis=1)]


def _choices(s: mx.array, b: mx.array, top: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Scales and biases [E, C, R] around those of one group [E, R]: the range's middle stays but for the shift."""
    scale = 1 + mx.array([(i - SCALES // 2) * SCALE_STEP / top for i in range(SCALES) for _ in range(SHIFTS)])
    shift = mx.array([(i - SHIFTS // 2) / SHIFTS for _ in range(SCALES) for i in range(SHIFTS)])
    s1 = stored(s[:, None] * scale[:, None], dtype)
    return s1, stored(b[:, None] + (s[:, None] - s1) * (top / 2) + s[:, None] * shift[:, None], dtype)


def _round_group(
    w: mx.array, target: mx.array, s: mx.array, b: mx.array, u: mx.array, pivots: mx.array, top: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Codes and errors w − ŵ [E, n, R] of one group, with that scale and bias [E, R] which adds least to e.

    w, target: [E, n, R]; s, b: [E, C, R] to choose from; u: [E, n, n]; pivots: [E, n].
    """
    (matrices, n, r), c, limit = w.shape, s.shape[1], mx.array(float(top))
    cost = mx.zeros(s.shape)
    codes: list[mx.array] = []
    moved: list[mx.array] = []  # errors of the tiles so far, in few pieces
    for i in range(0, n, TILE):
        end = min(n, i + TILE)
        rest = mx.broadcast_to(target[:, i:end, None], (matrices, end - i, c, r))
        if i:  # what a tile gets from those before is a matrix product, not a sweep over memory for every column
            before = mx.concatenate(moved, axis=1).reshape(matrices, i, c * r)
            rest = rest + (u[:, :i, i:end].swapaxes(1, 2) @ before).reshape(rest.shape)
        errors = []
        for j in range(i, end):
            q, e, cost = _round(rest[:, 0], w[:, j, None], s, b, limit, pivots[:, j, None, None], cost)
            codes.append(q)
            errors.append(e)
            if j + 1 < end:
                rest = _add_outer(rest[:, 1:], u[:, j, j + 1 : end, None, None], e[:, None])
        _append(moved, mx.stack(errors, axis=1))
        mx.async_eval(moved, cost, codes[-1])
    best = mx.argmin(cost, axis=1)[:, None]  # [E, 1, R]
    every = mx.broadcast_to(best[:, None], (matrices, n, 1, r))
    both = (mx.stack(codes, axis=1), mx.concatenate(moved, axis=1))
    q, e = (mx.take_along_axis(x, every, axis=2)[:, :, 0] for x in both)
    s, b = (mx.take_along_axis(x, best, axis=1)[:, 0] for x in (s, b))
    return q, e, s, b


def _round_group_by_kernels(
    w: mx.array, target: mx.array, s: mx.array, b: mx.array, u: mx.array, pivots: mx.array, top: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """`_round_group`: first what every pair costs, then the codes of the best."""
    if s.shape[1] > 1:
        best = mx.argmin(kernels.costs(w, target, s, b, u, pivots, top), axis=1)[:, None]
        s, b = (mx.take_along_axis(x, best, axis=1) for x in (s, b))
    return *kernels.codes(w, target, s, b, u, pivots, top), s[:, 0], b[:, 0]


def descend(w: mx.array, codes: mx.array, scales: mx.array, biases: mx.array, hessian: mx.array, top: int) -> mx.array:
    """Codes [E, K, R] after one sweep of coordinate descent over all columns."""
    k, limit = w.shape[1], mx.array(float(top))
    group = k // scales.shape[1]
    pull = hessian @ (w - dequantized(codes, scales, biases))  # H eᵀ: half of the error's slope, negated
    weight = mx.diagonal(hessian, axis1=1, axis2=2)[..., None]  # [E, K, 1]
    out = []
    asked: Asked = ()
    for i in range(0, k, BLOCK):
        end = min(k, i + BLOCK)
        block, pull = pull[:, : end - i], pull[:, end - i :]
        if by_kernels():
            scale = scales[:, i // group : (end - 1) // group + 1]
            new, moved = kernels.descent(codes[:, i:end], block, scale, hessian[:, i:end, i:end], top)
        else:
            diagonal, h = weight[:, i:end], hessian[:, i:end, i:end]
            columns = [scales[:, j // group] for j in range(i, end)]
            new, moved = _descend_block(codes[:, i:end], block, columns, diagonal, h, limit)
        out.append(new)
        if end < k:
            pull = pull - hessian[:, end:, i:end] @ moved
        asked = _ask(asked, new, pull)
    return mx.concatenate(out, axis=1)


def _descend_block(
    codes: mx.array, pull: mx.array, scales: list[mx.array], weight: mx.array, hessian: mx.array, limit: mx.array
) -> tuple[mx.array, mx.array]:
    """New codes of n columns and by how much their weights moved, [E, n, R]. scales: of every column, [E, R]."""
    found = []
    for j, scale in enumerate(scales):
        found.append(_move(codes[:, j], pull[:, 0], scale, weight[:, j], limit))
        if j + 1 < len(scales):
            pull = _take_outer(pull[:, 1:], hessian[:, j, j + 1 :, None], found[-1][1][:, None])
    new, moved = (mx.stack(list(x), axis=1) for x in zip(*found, strict=True))
    return new, moved


def refit(
    w: mx.array, codes: mx.array, scales: mx.array, biases: mx.array, hessian: mx.array, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Scales and biases [E, G, R] by least squares under H, codes held, group after group."""
    k = w.shape[1]
    group = k // scales.shape[1]
    pull = hessian @ (w - dequantized(codes, scales, biases))
    new_s, new_b = [], []
    asked: Asked = ()
    for i in range(0, k, group):
        end = i + group
        q, s, b = codes[:, i:end], scales[:, i // group], biases[:, i // group]
        slope, pull = pull[:, :group], pull[:, group:]
        hq = hessian[:, i:end, i:end] @ q
        qq, q1 = (hq * q).sum(axis=1), hq.sum(axis=1)
        ones = hessian[:, i:end, i:end].sum(axis=(1, 2))[:, None]
        s1, b1 = _refit(s, b, qq, q1, ones, (slope * q).sum(axis=1), slope.sum(axis=1), dtype)
        if end < k:
            moved = (s1 - s)[:, None] * q + (b1 - b)[:, None]
            pull = pull - hessian[:, end:, i:end] @ moved
        new_s.append(s1)
        new_b.append(b1)
        asked = _ask(asked, s1, b1, pull)
    return mx.stack(new_s, axis=1), mx.stack(new_b, axis=1)


def _refit(
    s: mx.array, b: mx.array, qq: mx.array, q1: mx.array, ones: mx.array, rq: mx.array, r1: mx.array, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """New scale and bias [E, R] of one group. qq, q1, ones: qᵀHq, 1ᵀHq, 1ᵀH1; rq, r1: qᵀHe, 1ᵀHe."""
    det = qq * ones - q1 * q1
    good = det > 1e-6 * qq * ones
    det = mx.where(good, det, 1.0)
    s1 = stored(s + (rq * ones - r1 * q1) / det, dtype)
    # with the scale as it is stored, the bias that fits it
    b1 = stored(b + (r1 - (s1 - s) * q1) / mx.where(ones > 0, ones, 1.0), dtype)
    ds, db = s1 - s, b1 - b
    gain = 2 * (ds * rq + db * r1) - (ds * ds * qq + 2 * ds * db * q1 + db * db * ones)
    keep = good & (ones > 0) & (s1 != 0) & (gain > 0)
    return mx.where(keep, s1, s), mx.where(keep, b1, b)


Asked = tuple[mx.array, ...]  # computed by now, or soon


def _ask(before: Asked, *arrays: mx.array) -> Asked:
    """Have arrays computed while the next are put together, and wait for those before: all at once would need the memory
    of all."""
    mx.async_eval(*arrays)
    mx.eval(*before)
    return arrays


@functools.cache
def by_kernels() -> bool:
    """Whether this process uses `quant.kernels`; PUBLISH_KERNELS overrides. Raises InputError as `trusted` does."""
    return trusted(_kernel_fault)


def _kernel_fault() -> str | None:
    """What is wrong with the kernels on this device, if anything: on a small problem, whether each column was rounded right
    given what they moved before it."""
    n, rows, pairs, top = 32, 40, 3, 7
    rng = np.random.default_rng(0)
    w = rng.standard_normal((2, n, rows)).astype(np.float32)
    upper = np.triu(0.1 * rng.standard_normal((2, n, n)), 1).astype(np.float32)
    x = rng.standard_normal((2, 4 * n, n)).astype(np.float32)
    hessian, pivots = x.swapaxes(1, 2) @ x, 1 + rng.random((2, n)).astype(np.float32)
    s = 0.5 + 0.1 * rng.random((2, pairs, rows)).astype(np.float32)
    b = -3.5 * s
    inner = (mx.array(upper), mx.array(pivots), top)
    wrong = []
    costs = np.array(kernels.costs(mx.array(w), mx.array(w), mx.array(s), mx.array(b), *inner))
    for c in range(pairs):
        s1, b1 = s[:, c, None], b[:, c, None]
        found = kernels.codes(mx.array(w), mx.array(w), mx.array(s1), mx.array(b1), *inner)
        q, e = (np.array(x) for x in found)
        target, y = w + upper.swapaxes(1, 2) @ e, s1 * q + b1
        cost = (pivots[..., None] * np.square(target - y)).sum(axis=1)
        wrong += [q != np.clip(np.rint((target - b1) / s1), 0, top), ~np.isclose(e, w - y, atol=1e-5)]
        wrong.append(~np.isclose(costs[:, c], cost, rtol=1e-3))
        pull = hessian @ e
        found = kernels.descent(mx.array(q), mx.array(pull), mx.array(s1), mx.array(hessian), top)
        new, moved = (np.array(x) for x in found)
        pull -= np.triu(hessian, 1).swapaxes(1, 2) @ moved
        best = q + pull / (np.diagonal(hessian, axis1=1, axis2=2)[..., None] * s1)
        wrong += [new != np.clip(np.rint(best), 0, top), ~np.isclose(moved, s1 * (new - q), atol=1e-5)]
    # a sum in another order takes a value across a tie now and then, nothing more
    share = max(float(x.mean()) for x in wrong)
    return None if share < 0.01 else f"they give wrong codes on this device ({share:.1%} of them)"


@fused
def _round(
    target: mx.array, w: mx.array, s: mx.array, b: mx.array, top: mx.array, pivot: mx.array, cost: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Codes of one column [E, C, R] for every pair, their errors, and the cost so far."""
    q = mx.clip(mx.round((target - b) / mx.where(s == 0, 1.0, s)), 0, top)
    y = s * q + b
    return q, w - y, cost + pivot * mx.square(target - y)


@fused
def _move(q: mx.array, pull: mx.array, s: mx.array, weight: mx.array, top: mx.array) -> tuple[mx.array, mx.array]:
    """Best code of one column [E, R] with all others held, and by how much its weight moved."""
    new = mx.clip(mx.round(q + pull / (weight * mx.where(s == 0, 1.0, s))), 0, top)
    return new, s * (new - q)


@fused
def _add_outer(x: mx.array, column: mx.array, row: mx.array) -> mx.array:
    return x + column * row


@fused
def _take_outer(x: mx.array, column: mx.array, row: mx.array) -> mx.array:
    return x - column * row
