"""One token through a gated delta net, between its projections, as one GPU kernel.

Plain MLX launches a dozen kernels for it (conv and silu, gates, norms, reads and writes of the state, gated norm), each of which
takes less time than launching it. Here a thread group does all of it for one value head, a thread for each of the head's
Dv channels: `model.DeltaNet.advance` for T = 1, in float32, up to the order of sums.
"""

from __future__ import annotations

import functools

import numpy as np

from ..backend import BACKEND, mx
from ..kernels import ROUNDING, kernel, trusted

# T: type of activations; HK, HV, DK, DV: heads and their sizes; TAPS: of the conv. Inputs, for each of B sequences:
#   z [HV DV], a and b [HV], x [C] and past0 … the TAPS - 1 inputs of the conv before it, oldest first [C], C = 2 HK DK + HV DV;
#   state [HV, DV, DK]; of the layer: taps [TAPS, C], rate = -exp(A_log) and dt [HV], norm [DV], eps = (qk, y).
# Outputs: y [HV DV] in T, next [HV, DV, DK].
SOURCE = """
    constexpr int C = 2 * HK * DK + HV * DV;
    SHARED float qk[2 * DK];
    SHARED float ys[DV];
    const int head = GROUP, lane = LANE, key = head / (HV / HK);
    const OFFSET batch = THIRD;
    for (int i = lane; i < 2 * DK; i += DV) {
        const int c = i < DK ? key * DK + i : HK * DK + key * DK + i - DK;
        CONV
        qk[i] = sum / (1.0f + exp(-sum));
    }
    float v;
    {
        const int c = 2 * HK * DK + head * DV + lane;
        CONV
        v = sum / (1.0f + exp(-sum));
    }
    SYNC;
    float qq = 0.0f, kk = 0.0f, both = 0.0f;
    for (int i = 0; i < DK; ++i) {
        qq += qk[i] * qk[i];
        kk += qk[DK + i] * qk[DK + i];
        both += qk[i] * qk[DK + i];
    }
    const float q_scale = rsqrt((qq / DK + eps[0]) * DK), k_scale = rsqrt((kk / DK + eps[0]) * DK);
    const float gate = (float)a[batch * HV + head] + dt[head];
    const float decay = exp(rate[head] * (fmax(gate, 0.0f) + log(1.0f + exp(-fabs(gate)))));
    const float beta = 1.0f / (1.0f + exp(-(float)b[batch * HV + head]));
    const OFFSET row = ((batch * HV + head) * DV + lane) * DK;
    float read_q = 0.0f, read_k = 0.0f;
    for (int i = 0; i < DK; ++i) {
        const float s = state[row + i];
        read_q += s * qk[i];
        read_k += s * qk[DK + i];
    }
    const float u = beta * (v - decay * read_k * k_scale);
    for (int i = 0; i < DK; ++i) next[row + i] = decay * state[row + i] + u * k_scale * qk[DK + i];
    const float out = decay * read_q * q_scale + u * both * q_scale * k_scale;
    ys[lane] = out;
    SYNC;
    float square = 0.0f;
    for (int i = 0; i < DV; ++i) square += ys[i] * ys[i];
    const OFFSET at = (batch * HV + head) * DV + lane;
    const float wide = (float)z[at];
    y[at] = (T)(out * rsqrt(square / DV + eps[1]) * norm[lane] * (wide / (1.0f + exp(-wide))));
"""


def _source(taps: int) -> str:
    lines = [f"sum += (float)past{i}[batch * C + c] * taps[{i} * C + c];" for i in range(taps - 1)]
    conv = " ".join(["float sum = 0.0f;", *lines, f"sum += (float)x[batch * C + c] * taps[{taps - 1} * C + c];"])
    return SOURCE.replace("CONV", conv)


def advance(
    z: mx.array, a: mx.array, b: mx.array, x: mx.array, past: tuple[mx.array, ...], state: mx.array,
    taps: mx.array, rate: mx.array, dt: mx.array, norm: mx.array, eps: mx.array, key_heads: int,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """(what `out_proj` reads [B, 1, Hv · Dv], in z's type, and the next state [B, Hv, Dv, Dk]).

    z, a, b, x: [B, 1, Hv · Dv], [B, 1, Hv] twice and [B, 1, C] of the projections; past: the conv's last inputs, oldest
    first, [B, 1, C] each; state: [B, Hv, Dv, Dk] float32; taps: [K, C], rate, dt: [Hv], norm: [Dv], all float32; eps: [2],
    of the norms of q and k (per element) and of y.
    """
    batch, hv, dv, dk = state.shape
    names = ("z", "a", "b", "x", *(f"past{i}" for i in range(len(past))))
    run = kernel(
        "delta_token", (*names, "state", "taps", "rate", "dt", "norm", "eps"), ("y", "next"), _source(len(taps))
    )
    sizes = [("T", z.dtype), ("HK", key_heads), ("HV", hv), ("DK", dk), ("DV", dv)]
    found = run(
        inputs=[z, a, b, x, *past, state, taps, rate, dt, norm, eps], template=sizes,
        grid=(hv * dv, 1, batch), threadgroup=(dv, 1, 1), output_shapes=[z.shape, state.shape],
        output_dtypes=[z.dtype, mx.float32],
    )  # fmt: skip
    return found[0], found[1]


@functools.cache
def usable() -> bool:
    """Whether this process decodes by this kernel: on CUDA, if it proves right there; PUBLISH_KERNELS overrides.

    On Metal a launch costs less, and it has not been timed there. Raises InputError as `trusted` does.
    """
    return trusted(_fault, BACKEND == "cuda")


def _fault() -> str | None:
    """What is wrong with the kernel on this device, by the rule as it is written, in float64; activations are bfloat16, which
    models are mostly run in."""
    hk, hv, dk, dv, taps, batch = 2, 4, 32, 48, 4, 2
    c = 2 * hk * dk + hv * dv
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    given = [mx.array(normal(batch, 1, n), mx.bfloat16) for n in (hv * dv, hv, hv, *[c] * taps)]
    z, a, b, x, *past = (np.array(v.astype(mx.float32)) for v in given)
    state, filters = normal(batch, hv, dv, dk), normal(taps, c)
    rate, dt, norm, eps = -np.exp(normal(hv)), normal(hv), normal(dv), np.array([1e-6, 1e-5], np.float32)
    found = advance(
        given[0], given[1], given[2], given[3], tuple(given[4:]), mx.array(state), mx.array(filters), mx.array(rate),
        mx.array(dt), mx.array(norm), mx.array(eps), hk,
    )  # fmt: skip

    mixed = silu((np.stack([*past, x]).astype(np.float64)[:, :, 0] * filters[:, None]).sum(axis=0))
    qk = mixed[:, : 2 * hk * dk].reshape(batch, 2, hk, dk)
    qk /= np.sqrt((np.square(qk).mean(axis=-1, keepdims=True) + eps[0]) * dk)
    q, k = (np.repeat(v, hv // hk, axis=1) for v in (qk[:, 0], qk[:, 1]))  # [B, Hv, Dk]
    v = mixed[:, 2 * hk * dk :].reshape(batch, hv, dv)
    decay = np.exp(rate * np.logaddexp(a[:, 0].astype(np.float64) + dt, 0))[..., None, None]
    beta = 1 / (1 + np.exp(-b[:, 0].astype(np.float64)))
    left = decay * state
    u = beta[..., None] * (v - (left * k[:, :, None]).sum(axis=-1))
    right_state = left + u[..., None] * k[:, :, None]
    y = (right_state * q[:, :, None]).sum(axis=-1)
    y = y / np.sqrt(np.square(y).mean(axis=-1, keepdims=True) + eps[1]) * norm * silu(z.reshape(batch, hv, dv))
    for name, got, right, part in (
        ("output", found[0], y.reshape(z.shape), ROUNDING),
        ("state", found[1], right_state, 0),
    ):
        off = np.abs(np.array(got.astype(mx.float32)) - right)
        if not (off < 1e-3 + part * np.abs(right)).all():  # not: it may be no number
            return f"the kernel's {name} is off by {float(off.max()):.2g} on this device"
    return None


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x.astype(np.float64)))
