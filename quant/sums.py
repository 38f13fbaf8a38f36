"""Sums over what linears read and over the gradients of what they gave, one batch at a time, in float32 on the device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from inference.backend import mx
from inference.taps import Reading

from .statistics import HessianKind, Tensor, blocks, packed_size, whole


class Sums:
    """Sums over one input of one layer."""

    def __init__(self, modules: list[str], k: int, experts: int | None, kind: HessianKind) -> None:
        self.modules, self.columns, self.experts, self.kind = list(modules), k, experts, kind
        self.counts = np.zeros(experts or 1, np.int64)
        n = experts if experts and kind == "experts" else 1
        self.hessians = [mx.zeros((k, k), mx.float32) for _ in range(n)]
        self.squares = mx.zeros((experts, k), mx.float32) if kind == "shared" and experts else None

    def add(self, reading: Reading) -> None:
        x, experts = reading.rows()
        x = x.astype(mx.float32)
        if experts is None:
            self.counts[0] += x.shape[0]
            self.hessians[0] = mx.addmm(self.hessians[0], x.T, x)
            mx.eval(self.hessians[0])
            return
        assert self.experts
        counts = np.bincount(np.array(experts), minlength=self.experts)
        self.counts += counts
        if self.kind == "shared":
            assert self.squares is not None
            chosen = (mx.arange(self.experts)[:, None] == experts[None]).astype(mx.float32)
            self.squares = mx.addmm(self.squares, chosen, x.square())
            self.hessians[0] = mx.addmm(self.hessians[0], x.T, x)
            mx.eval(self.squares, self.hessians[0])
            return
        x = x[mx.argsort(experts)]
        ends = np.cumsum(counts)
        for e in np.flatnonzero(counts):
            rows = x[int(ends[e] - counts[e]) : int(ends[e])]
            self.hessians[e] = mx.addmm(self.hessians[e], rows.T, rows)
        mx.eval(self.hessians)

    def tensors(self, name: str) -> dict[str, Tensor]:
        n = np.maximum(self.counts, 1).astype(np.float32)
        if self.squares is not None:
            second = np.array(self.squares) / n[:, None]
            divisors = [float(self.counts.sum()) or 1.0]
        else:
            divisors = [float(v) for v in n]
            second = np.stack(
                [np.diagonal(np.array(h)) / np.float32(d) for h, d in zip(self.hessians, divisors, strict=True)]
            )
            second = second if self.experts else second[0]
        return {
            f"{name}.tokens": whole(self.counts),
            f"{name}.second": whole(np.ascontiguousarray(second, np.float32)),
            f"{name}.hessian": triangles(self.hessians, divisors),
        }


class Moments:
    """Second moments of an input in which every token weighs its squared gradient."""

    def __init__(self, k: int, hessian: bool) -> None:
        self.weight = mx.zeros((), mx.float32)
        self.second = mx.zeros((k,), mx.float32)
        self.hessian = mx.zeros((k, k), mx.float32) if hessian else None

    def add(self, x: mx.array, weights: mx.array) -> None:
        """x [R, K], weights [R], float32"""
        self.weight = self.weight + weights.sum()
        self.second = self.second + weights @ x.square()
        if self.hessian is not None:
            self.hessian = mx.addmm(self.hessian, (x * weights[:, None]).T, x)

    def arrays(self) -> list[mx.array]:
        return [self.weight, self.second, *([] if self.hessian is None else [self.hessian])]

    def tensors(self, module: str) -> dict[str, Tensor]:
        total = float(np.array(self.weight)) or 1.0
        out = {f"{module}.second_g": whole(np.array(self.second) / np.float32(total))}
        if self.hessian is not None:
            out[f"{module}.hessian_g"] = triangles([self.hessian], [total])
        return out


class Gradients:
    """Sums over the gradients of one linear's output."""

    def __init__(self, experts: int | None, hessian: bool) -> None:
        self.experts, self.hessian = experts, hessian
        self.squares: mx.array | None = None  # Σ g² [N] or [E, N]
        self.moments: Moments | None = None
        self.whole = self.apart = 0.0  # Σ over windows ‖Σ_t g_t x_tᵀ‖², Σ_t ‖g_t‖² ‖x_t‖²

    def add(self, reading: Reading, gradient: mx.array, windows: int) -> None:
        x, experts = reading.rows()
        x = x.astype(mx.float32)
        g = gradient.reshape(x.shape[0], -1).astype(mx.float32)
        squares = g.square()
        if self.moments is None or self.squares is None:
            self.moments = Moments(x.shape[1], self.hessian)
            self.squares = mx.zeros((self.experts, g.shape[1]) if self.experts else (g.shape[1],), mx.float32)
        self.moments.add(x, squares.sum(axis=-1))
        if experts is None or self.experts is None:
            self.squares = self.squares + squares.sum(axis=0)
            per_window = g.reshape(windows, -1, g.shape[1]).swapaxes(1, 2), x.reshape(windows, -1, x.shape[1])
            together = [(a @ b).square().sum() for a, b in zip(*per_window, strict=True)]
            apart = (squares.sum(axis=-1) * x.square().sum(axis=-1)).sum()
            mx.eval(self.squares, together, apart, self.moments.arrays())
            self.whole += sum(float(np.array(t)) for t in together)
            self.apart += float(np.array(apart))
            return
        chosen = (mx.arange(self.experts)[:, None] == experts[None]).astype(mx.float32)
        self.squares = mx.addmm(self.squares, chosen, squares)
        mx.eval(self.squares, self.moments.arrays())

    def tensors(self, module: str, tokens: int) -> dict[str, Tensor]:
        assert self.moments is not None
        coherence = self.whole / self.apart if self.apart else 1.0
        return {
            f"{module}.fisher": whole(np.array(self.squares) / np.float32(tokens)),
            f"{module}.coherence": whole(np.array([coherence], np.float32)),
        } | self.moments.tensors(module)


def triangles(hessians: list[mx.array], divisors: list[float]) -> Tensor:
    """Means as they are stored, made block by block."""
    k = hessians[0].shape[0]

    def pieces() -> Iterator[np.ndarray]:
        for h, d in zip(hessians, divisors, strict=True):
            for r, s in blocks(k):
                yield np.array(h[r:s, r:]) / np.float32(d)

    return Tensor("F32", (len(hessians), packed_size(k)), pieces)
