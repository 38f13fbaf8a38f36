"""The gated delta rule: one token (decode), a chunked form (prefill), and a plain loop over tokens (the reference).

Per value head, with state S [Dv, Dk] (kept transposed, as `mx.fast.gated_delta_update` has it), decay exp(g) and rate
beta:

    S ← exp(g) · S;  S ← S + beta (v − S k) kᵀ;  y = S q

The chunked form (Yang et al., "Gated Delta Networks", arXiv 2412.06464, and "Parallelizing Linear Transformers with
the Delta Rule", arXiv 2406.06484) turns 64 tokens into a few matrix products. Inside a chunk the corrections u solve
(I + A) u = beta v − (beta exp(G) k) Sᵀ, with A strictly lower triangular and G the running sum of g. The inverse of
I + A is built from blocks of 1, 2, 4 … 32, each step exact:

    [L₁  0 ]⁻¹   [ L₁⁻¹            0   ]
    [A₂₁ L₂]   = [ −L₂⁻¹ A₂₁ L₁⁻¹  L₂⁻¹]

Every block is a product of contractions I − beta k kᵀ, so nothing grows when keys repeat; the series (I − A)(I + A²)…
overflows there. All of it is float32, and every decay is exp of a difference that is at most 0.
"""

from __future__ import annotations

from .backend import fused, mx

CHUNK = 64  # tokens; a power of two


def gated_delta(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """The delta rule over T tokens: one token directly, more in chunks.

    q, k: [B, T, Hk, Dk], normalised, q scaled; v: [B, T, Hv, Dv]; g (log decay, ≤ 0), beta: [B, T, Hv];
    state: [B, Hv, Dv, Dk]; all float32, Hv a multiple of Hk. Returns y [B, T, Hv, Dv] and the new state.

    `mx.fast.gated_delta_update` computes the same, but slowly: at 9B shapes on an H100 0.3 ms for one token, where
    `step` is lost in the launch time, and 44 ms for 512, where `chunked` takes 3.
    """
    if q.shape[1] > 1:
        return chunked(q, k, v, g, beta, state)
    y, state = step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], state)
    return y[:, None], state


def step(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """One token. q, k: [B, Hk, Dk]; v: [B, Hv, Dv]; g, beta: [B, Hv]; state: [B, Hv, Dv, Dk].

    Returns y [B, Hv, Dv] and the new state. The state is what costs: it is read once for k and q together (with
    y = exp(g) S q + u (k · q), which needs the old S only) and once more to be rewritten.
    """
    kq = _per_value_head(mx.stack([k, q], axis=-1), v.shape[1], 1)  # [B, Hv, Dk, 2]
    reads = state @ kq  # [B, Hv, Dv, 2]
    dot = _per_value_head((k * q).sum(axis=-1, keepdims=True), v.shape[1], 1)  # [B, Hv, 1]
    y, u = _correct(reads[..., 0], reads[..., 1], v, g[..., None], beta[..., None], dot)
    return y, _write(state, g[..., None, None], u[..., None], kq[..., 0][:, :, None])


@fused
def _correct(
    read_k: mx.array, read_q: mx.array, v: mx.array, g: mx.array, beta: mx.array, dot: mx.array
) -> tuple[mx.array, mx.array]:
    """y and the correction u, both [B, Hv, Dv]."""
    decay = mx.exp(g)
    u = beta * (v - decay * read_k)
    return decay * read_q + u * dot, u


@fused
def _write(state: mx.array, g: mx.array, u: mx.array, k: mx.array) -> mx.array:
    return mx.exp(g) * state + u * k


def reference(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Token by token, as the rule is written; arguments and results as for `gated_delta`. What all else is tested
    against."""
    heads, out = v.shape[2], []
    q, k = _per_value_head(q, heads, 2)[..., None], _per_value_head(k, heads, 2)[..., None]  # [B, T, Hv, Dk, 1]
    for t in range(q.shape[1]):
        state = state * mx.exp(g[:, t])[..., None, None]
        u = (v[:, t, ..., None] - state @ k[:, t]) * beta[:, t][..., None, None]  # [B, Hv, Dv, 1]
        state = state + u @ k[:, t].swapaxes(-1, -2)
        out.append((state @ q[:, t])[..., 0])
    return mx.stack(out, axis=1), state


def chunked(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """CHUNK tokens at a time; arguments and results as for `gated_delta`. No loop over tokens, one over chunks."""
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
    decay = mx.exp(mx.minimum(since_start[..., :, None] - since_start[..., None, :], 0))  # of j's entry, at i ≥ j
    lower = mx.tri(CHUNK, CHUNK, 0)

    # key products are per key head, then shared by its value heads
    kk = _per_value_head(k @ k.swapaxes(-1, -2), heads, 1)
    qk = _per_value_head(q @ k.swapaxes(-1, -2), heads, 1) * decay * lower
    q, k = _per_value_head(q, heads, 1), _per_value_head(k, heads, 1)
    inverse = _unit_lower_inverse(beta * kk * decay)
    from_start = mx.exp(since_start)[..., None]
    values = inverse @ (beta * v)  # what each token writes if the state were empty, [B, Hv, N, C, Dv]
    reads = inverse @ (beta * from_start * k)  # and what it reads of the old state, [B, Hv, N, C, Dk]
    q = q * from_start
    k = k * mx.exp(since_start[..., -1:] - since_start)[..., None]
    chunk_decay = mx.exp(since_start[..., -1])[..., None, None]

    out = []
    for i in range(n):
        u = values[:, :, i] - reads[:, :, i] @ state.swapaxes(-1, -2)
        out.append(q[:, :, i] @ state.swapaxes(-1, -2) + qk[:, :, i] @ u)
        state = state * chunk_decay[:, :, i] + u.swapaxes(-1, -2) @ k[:, :, i]
    y = mx.concatenate(out, axis=2) if n > 1 else out[0]  # [B, Hv, N · C, Dv]
    return y[:, :, :t].swapaxes(1, 2), state


def _unit_lower_inverse(a: mx.array) -> mx.array:
    """(I + tril(a, -1))⁻¹ for a: [..., C, C], C a power of two, block by block as in the module's docstring."""
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


def _per_value_head(x: mx.array, heads: int, axis: int) -> mx.array:
    """Each key head repeated for the value heads that it serves."""
    return x if x.shape[axis] == heads else mx.repeat(x, heads // x.shape[axis], axis=axis)
