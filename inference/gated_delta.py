"""The gated delta rule: one token (decode), a chunked form (prefill), and a plain loop over tokens (the reference).

Per value head, with state S [Dv, Dk] (kept transposed, as `mx.fast.gated_delta_update` has it), decay exp(g) and rate
beta:

    S ← exp(g) · S;  S ← S + beta (v − S k) kᵀ;  y = S q

The chunked form (Yang et al., "Gated Delta Networks", arXiv 2412.06464, and "Parallelizing Linear Transformers with
the Delta Rule", arXiv 2406.06484) turns 64 tokens into a few matrix products. Inside a chunk the corrections u solve
(I + A) u = beta v − (beta exp(G) k) Sᵀ, with A strictly lower triangular and G the running sum of g. On the CPU the
inverse of I + A is LAPACK's, by substitution; elsewhere it is built from blocks of 1, 2, 4 … 32, each step exact:

    [L₁  0 ]⁻¹   [ L₁⁻¹            0   ]
    [A₂₁ L₂]   = [ −L₂⁻¹ A₂₁ L₁⁻¹  L₂⁻¹]

Every block is a product of contractions I − beta k kᵀ, so nothing grows when keys repeat; the series (I − A)(I + A²)…
overflows there. All of it is float32, and every decay is exp of a difference that is at most 0.

From chunk to chunk the state goes S ← S T + W, with T [Dk, Dk] and W [Dv, Dk] of all chunks computed at once. A GPU walks
these (`_by_transitions`): one product a chunk in sequence, all else in a few large ones. That is a third more arithmetic,
so the CPU carries S itself through every chunk (`_by_chunks`).
"""

from __future__ import annotations

import os
from typing import Literal, get_args

from .backend import BACKEND, fused, mx
from .errors import InputError
from .memory import CHUNK

Form = Literal["chunked", "kernel"]
FORMS = "PUBLISH_DELTA"  # the setting that overrides the choice below


def chosen_form() -> Form:
    """How this process computes the rule: `chunked`, as written here, or `kernel`, by `mx.fast.gated_delta_update`.

    MLX's kernel walks token by token. On Metal, where a launch costs little, that is the form it was made for. On CUDA it
    takes 0.3 ms for one token of a 9B layer and 454 for 2048 (H100), where `step` and `chunked` take 0.05 and 3.
    Raises InputError if PUBLISH_DELTA names neither.
    """
    wanted = os.environ.get(FORMS)
    if wanted is None:
        return "kernel" if BACKEND == "metal" else "chunked"
    if wanted not in get_args(Form):
        raise InputError(f"{FORMS}={wanted}: expected {' or '.join(get_args(Form))}")
    return wanted  # type: ignore[return-value] - checked


def gated_delta(
    qk: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array, form: Form
) -> tuple[mx.array, mx.array]:
    """The delta rule over T tokens.

    qk: [B, T, 2, Hk, Dk], the queries and the keys; v: [B, T, Hv, Dv]; g (log decay, ≤ 0), beta: [B, T, Hv];
    state: [B, Hv, Dv, Dk]; all float32, Hv a multiple of Hk. Returns y [B, T, Hv, Dv] and the new state.
    """
    if form == "kernel":
        return _kernel(qk[:, :, 0], qk[:, :, 1], v, g, beta, state)  # type: ignore[return-value] - a custom function
    if qk.shape[1] > 1:
        return chunked(qk[:, :, 0], qk[:, :, 1], v, g, beta, state)
    return step(qk, v, g, beta, state)


@mx.custom_function
def _kernel(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """MLX's own, forwards."""
    y, state = mx.fast.gated_delta_update(q, k, v, mx.exp(g), beta, state)
    return y, state


@_kernel.vjp
def _(primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], _: tuple[mx.array, ...]) -> list[mx.array]:
    """Backwards through the chunked form, which is the same function: the kernel may have no derivative."""
    return mx.vjp(chunked, list(primals), list(cotangents))[1]


def step(qk: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
    """One token; arguments and results as for `gated_delta`, T = 1.

    The state is what costs: it is read once for k and q together (with y = exp(g) S q + u (k · q), which needs the old S
    only) and once more to be rewritten. The value heads of one key head lie behind each other, so they are the rows of one
    matrix, and nothing is repeated for them. On a GPU, launching takes longer than computing here: few operations count.
    """
    b, _, _, hk, dk = qk.shape
    hv, dv = v.shape[2:]
    of_key_head = (b, hk, hv // hk)
    qk = qk.reshape(b, 2, hk, dk).swapaxes(1, 2)
    q, k = mx.split(qk, 2, axis=2)  # [B, Hk, 1, Dk]
    reads = qk @ state.reshape(b, hk, -1, dk).swapaxes(-1, -2)  # [B, Hk, 2, Hv / Hk · Dv]
    read_q, read_k = (x.reshape(*of_key_head, dv) for x in mx.split(reads, 2, axis=2))
    g, beta = (x.reshape(*of_key_head, 1) for x in (g, beta))
    dot = (q * k).sum(axis=-1, keepdims=True)
    y, u = _correct(read_k, read_q, v.reshape(*of_key_head, dv), g, beta, dot)
    state = _write(state.reshape(*of_key_head, dv, dk), g[..., None], u[..., None], k[:, :, :, None])
    return y.reshape(b, 1, hv, dv), state.reshape(b, hv, dv, dk)


@fused
def _correct(
    read_k: mx.array, read_q: mx.array, v: mx.array, g: mx.array, beta: mx.array, dot: mx.array
) -> tuple[mx.array, mx.array]:
    """y and the correction u, both [B, Hk, Hv / Hk, Dv]."""
    decay = mx.exp(g)
    u = beta * (v - decay * read_k)
    return decay * read_q + u * dot, u


@fused
def _write(state: mx.array, g: mx.array, u: mx.array, k: mx.array) -> mx.array:
    return mx.exp(g) * state + u * k


def reference(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Token by token, as the rule is written; q, k: [B, T, Hk, Dk], all else as for `gated_delta`. What all else is tested
    against."""
    heads, out = v.shape[2], []
    q, k = (mx.repeat(x, heads // x.shape[2], axis=2)[..., None] for x in (q, k))  # [B, T, Hv, Dk, 1]
    for t in range(q.shape[1]):
        state = state * mx.exp(g[:, t])[..., None, None]
        u = (v[:, t, ..., None] - state @ k[:, t]) * beta[:, t][..., None, None]  # [B, Hv, Dv, 1]
        state = state + u @ k[:, t].swapaxes(-1, -2)
        out.append((state @ q[:, t])[..., 0])
    return mx.stack(out, axis=1), state


def chunked(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """CHUNK tokens at a time; arguments and results as for `reference`. No loop over tokens, one over chunks."""
    b, t, heads, _ = v.shape
    n = -(-t // CHUNK)
    pad = n * CHUNK - t  # zeros: beta 0 writes nothing, g 0 decays nothing

    def chunks(x: mx.array) -> mx.array:
        """[B, T, H, ...] → [B, H, N, CHUNK, ...]"""
        if pad:
            x = mx.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return mx.moveaxis(x.reshape(b, n, CHUNK, *x.shape[2:]), 3, 1)

    q, k, v, g, beta = (chunks(x) for x in (q, k, v, g, beta))
    beta = beta[..., None]
    since_start = mx.cumsum(g, axis=-1)  # G: log decay from the chunk's start to after token i, [B, Hv, N, C]
    lower = mx.tri(CHUNK, CHUNK, 0)
    decay: mx.array = decays(g)  # type: ignore[assignment] - a custom function

    # key products are per key head, then shared by its value heads
    kk = _per_value_head(k @ k.swapaxes(-1, -2), heads)
    qk = _per_value_head(q @ k.swapaxes(-1, -2), heads) * decay * lower
    q, k = _per_value_head(q, heads), _per_value_head(k, heads)
    inverse: mx.array = unit_lower_inverse(beta * kk * decay)  # type: ignore[assignment] - a custom function
    from_start = mx.exp(since_start)[..., None]
    values = inverse @ (beta * v)  # what each token writes if the state were empty, [B, Hv, N, C, Dv]
    reads = inverse @ (beta * from_start * k)  # and what it reads of the old state, [B, Hv, N, C, Dk]
    q = q * from_start
    k = k * mx.exp(since_start[..., -1:] - since_start)[..., None]
    chunk_decay = mx.exp(since_start[..., -1])[..., None, None]
    walk = _by_chunks if BACKEND == "cpu" else _by_transitions
    y, state = walk(q, k, qk, values, reads, chunk_decay, state)
    return y.reshape(b, heads, n * CHUNK, -1)[:, :, :t].swapaxes(1, 2), state


def _by_chunks(
    q: mx.array, k: mx.array, qk: mx.array, values: mx.array, reads: mx.array, decay: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """y [B, Hv, N, C, Dv] and the last state, the state carried through each chunk."""
    out = []
    for i in range(q.shape[2]):
        u = values[:, :, i] - reads[:, :, i] @ state.swapaxes(-1, -2)
        out.append(q[:, :, i] @ state.swapaxes(-1, -2) + qk[:, :, i] @ u)
        state = state * decay[:, :, i] + u.swapaxes(-1, -2) @ k[:, :, i]
    return mx.stack(out, axis=2), state


def _by_transitions(
    q: mx.array, k: mx.array, qk: mx.array, values: mx.array, reads: mx.array, decay: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """The same, with what a chunk does to the state as one matrix for it, S T + W."""
    transition = decay * mx.eye(k.shape[-1]) - reads.swapaxes(-1, -2) @ k  # [B, Hv, N, Dk, Dk]
    written = values.swapaxes(-1, -2) @ k  # [B, Hv, N, Dv, Dk]
    before = []  # the state that each chunk starts from
    for i in range(q.shape[2]):
        before.append(state)
        state = mx.addmm(written[:, :, i], state, transition[:, :, i])
    return (q - qk @ reads) @ mx.stack(before, axis=2).swapaxes(-1, -2) + qk @ values, state


@mx.custom_function
def decays(g: mx.array) -> mx.array:
    """What is left at token i of what token j wrote, exp(g_{j+1} + … + g_i), for i ≥ j; 1 above. [..., C] → [..., C, C].

    On the CPU as running products: MLX's `exp` takes 25 ns a value there, twenty times a multiplication.
    """
    below = mx.tri(g.shape[-1], g.shape[-1], -1) > 0
    if BACKEND == "cpu":
        return mx.cumprod(mx.where(below, mx.exp(g)[..., :, None], 1), axis=-2)
    since_start = mx.cumsum(g, axis=-1)
    return mx.exp(mx.where(below, since_start[..., :, None] - since_start[..., None, :], 0))


@decays.vjp
def _(g: mx.array, cotangent: mx.array, decay: mx.array) -> mx.array:
    """Finite for gates that are shut, where a running product's own derivative divides by 0."""
    c = cotangent * decay * mx.tri(g.shape[-1], g.shape[-1], -1)
    return mx.cumsum(c.sum(axis=-1) - c.sum(axis=-2), axis=-1, reverse=True)


@mx.custom_function
def unit_lower_inverse(a: mx.array) -> mx.array:
    """(I + tril(a, -1))⁻¹ for a: [..., C, C] in float32, C a power of two."""
    if BACKEND == "cpu":
        size = a.shape[-1]
        return mx.linalg.tri_inv(mx.eye(size) + a * mx.tri(size, size, -1), stream=mx.cpu)
    return block_inverse(a)


@unit_lower_inverse.vjp
def _(a: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
    """d(L⁻¹) = −L⁻¹ dL L⁻¹, and only what lies below the diagonal of a counts. LAPACK's inverse has no derivative."""
    transposed = inverse.swapaxes(-1, -2)
    return -(transposed @ cotangent @ transposed) * mx.tri(a.shape[-1], a.shape[-1], -1)


def block_inverse(a: mx.array) -> mx.array:
    """`unit_lower_inverse` by products alone, block by block as in the module's docstring."""
    size = a.shape[-1]
    row, col = mx.arange(size)[:, None], mx.arange(size)[None, :]
    inverse = mx.eye(size)
    block = 1
    while block < size:
        # lower left quarters of the diagonal blocks of 2 · block
        quarter = (row // (2 * block) == col // (2 * block)) & (row // block > col // block)
        below = mx.where(quarter, a, 0)
        inverse = inverse - (below if block == 1 else inverse @ below @ inverse)
        block *= 2
    return inverse


def _per_value_head(x: mx.array, heads: int) -> mx.array:
    """[B, Hk, ...] → [B, Hv, ...]: each key head repeated for the value heads that it serves."""
    return x if x.shape[1] == heads else mx.repeat(x, heads // x.shape[1], axis=1)
