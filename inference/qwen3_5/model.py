"""Qwen3.5, dense and MoE: the forward pass of the text model, from token ids to logits.

Every layer is x + mixer(norm(x)), then x + mlp(norm(x)); three mixers of four are gated delta nets, the fourth full
attention. B is the batch, T the tokens of this call, H the hidden size. Activations keep the compute type of the
model (float32 on the CPU); norms, router, conv and delta rule are computed in float32.

Follows `transformers` models qwen3_5 and qwen3_5_moe.
"""

from __future__ import annotations

from ..backend import fused, mx
from ..blocks import MLP, Decoder, DecoderLayer, Weights, attend, rms_norm, swiglu
from ..cache import Cache, DeltaCache, KVCache
from ..gated_delta import Form, chosen_form, gated_delta
from ..linear import SameInput, Sorting
from . import token_kernel
from .names import Config

PREFIX = "language_model.model."
SORT_ROWS = 64  # routed rows from which sorting them by expert pays; mlx-lm's figure
L2_EPS = 1e-6  # of the norm of q and k, added to the sum of squares


class TextModel(Decoder):
    prefix, output = PREFIX, "language_model.lm_head"

    @staticmethod
    def make_layer(cfg: Config, index: int, weights: Weights) -> Layer:
        return Layer(cfg, index, weights)


def make_cache(cfg: Config) -> Cache:
    return Cache([KVCache() if kind == "full_attention" else DeltaCache() for kind in cfg.layer_types])


class Layer(DecoderLayer):
    def __init__(self, cfg: Config, index: int, weights: Weights) -> None:
        prefix = f"{PREFIX}layers.{index}."
        super().__init__(prefix, cfg.rms_norm_eps, weights)
        if cfg.layer_types[index] == "full_attention":
            self.mixer: Attention | DeltaNet = Attention(cfg, prefix + "self_attn.", weights)
        else:
            self.mixer = DeltaNet(cfg, prefix + "linear_attn.", weights)
        self.mlp: MLP | MoE = MoE(cfg, prefix + "mlp.", weights) if cfg.num_experts else MLP(prefix + "mlp.", weights)


class Attention:
    """Grouped-query attention, its output gated per head; RoPE on the first quarter of each head."""

    def __init__(self, cfg: Config, prefix: str, weights: Weights) -> None:
        self.cfg = cfg
        self.qkv = SameInput(*(weights.linear(f"{prefix}{p}_proj") for p in ("q", "k", "v")))
        self.o_proj = weights.linear(prefix + "o_proj")
        self.q_norm, self.k_norm = (weights.array(f"{prefix}{p}_norm.weight") for p in ("q", "k"))

    def before(self, x: mx.array, start: int | mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """[B, T, H] and the position of its first token → q [B, Hq, T, D], k and v [B, Hkv, T, D], gate [B, T, Hq, D]"""
        cfg, (b, t, _) = self.cfg, x.shape
        q, k, v = self.qkv(x)
        q, gate = mx.split(q.reshape(b, t, cfg.num_attention_heads, -1), 2, axis=-1)
        k = k.reshape(b, t, cfg.num_key_value_heads, -1)
        v = v.reshape(b, t, cfg.num_key_value_heads, -1).swapaxes(1, 2)
        q = self._rope(rms_norm(q, self.q_norm, cfg.rms_norm_eps).swapaxes(1, 2), start)
        k = self._rope(rms_norm(k, self.k_norm, cfg.rms_norm_eps).swapaxes(1, 2), start)
        return q, k, v, gate

    def after(self, y: mx.array, gate: mx.array) -> mx.array:
        """What the heads read, [B, Hq, T, D] → [B, T, H]"""
        return self.o_proj(_gate(y.swapaxes(1, 2), gate).reshape(*gate.shape[:2], -1))

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return attend(q, k, v, self.cfg.head_dim**-0.5)

    def fuse(self) -> None:
        self.qkv.fuse()

    def _rope(self, x: mx.array, start: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x, self.cfg.rotary_dim, traditional=False, base=self.cfg.rope_theta, scale=1.0, offset=start
        )


class DeltaNet:
    """Gated delta net: a causal conv over q‖k‖v, then the gated delta rule, then a gated norm."""

    def __init__(self, cfg: Config, prefix: str, weights: Weights) -> None:
        self.cfg = cfg
        self.inputs = SameInput(*(weights.linear(f"{prefix}in_proj_{p}") for p in ("z", "a", "b", "qkv")))
        self.out_proj = weights.linear(prefix + "out_proj")
        conv = weights.array(prefix + "conv1d.weight")  # [C, K, 1]
        self.filters = mx.contiguous(conv[:, :, 0].T.astype(mx.float32))  # [K, C]
        self.taps = [self.filters[i] for i in range(cfg.linear_conv_kernel_dim)]  # K times [C]
        self.decay_rate = -mx.exp(weights.array(prefix + "A_log").astype(mx.float32))
        self.dt_bias = weights.array(prefix + "dt_bias").astype(mx.float32)
        self.norm = weights.array(prefix + "norm.weight").astype(mx.float32)
        # q and k get length 1: an RMS norm (mean, not sum, of squares) times Dk^-1/2. The rule wants q times Dk^-1/2 once
        # more: y is linear in it and its scale leaves in the norm that follows, but for that norm's eps.
        dk = cfg.linear_key_head_dim
        self.unit = mx.full((dk,), dk**-0.5)
        self.y_eps = cfg.rms_norm_eps * dk
        self.eps = mx.array([L2_EPS / dk, self.y_eps])
        self.form: Form = chosen_form()

    def advance(
        self, x: mx.array, conv: tuple[mx.array, ...] | None, state: mx.array | None
    ) -> tuple[mx.array, tuple[mx.array, ...], mx.array]:
        """[B, T, H] and what the cache holds (None: nothing yet) → [B, T, H] and what it holds next."""
        cfg, (b, t, _) = self.cfg, x.shape
        dk, dv = cfg.linear_key_head_dim, cfg.linear_value_head_dim
        hk, hv = cfg.linear_num_key_heads, cfg.linear_num_value_heads
        z, a, beta, qkv = self.inputs(x)
        if t == 1 and conv is not None and state is not None and token_kernel.usable():
            y, state = token_kernel.advance(
                z, a, beta, qkv, conv, state, self.filters, self.decay_rate, self.dt_bias, self.norm, self.eps, hk
            )
            return self.out_proj(y), (*conv[1:], qkv), state
        g, beta = _gates(a, beta, self.decay_rate, self.dt_bias)
        qkv, conv = self._conv(qkv, conv)
        qk, v = mx.split(qkv, [2 * hk * dk], axis=-1)
        qk = mx.fast.rms_norm(qk.reshape(b, t, 2, hk, dk), self.unit, L2_EPS / dk)
        if state is None:
            state = mx.zeros((b, hv, dv, dk), mx.float32)
        y, state = gated_delta(qk, v.reshape(b, t, hv, dv), g, beta, state, self.form)
        y = _times_silu(mx.fast.rms_norm(y, self.norm, self.y_eps), z.reshape(b, t, hv, dv))
        return self.out_proj(y.reshape(b, t, -1)), conv, state

    def fuse(self) -> None:
        self.inputs.fuse()

    def _conv(self, x: mx.array, past: tuple[mx.array, ...] | None) -> tuple[mx.array, tuple[mx.array, ...]]:
        """Depthwise causal conv and silu; [B, T, C] → [B, T, C] in float32, and the last K - 1 inputs, [B, 1, C] each.

        As a sum of shifted products: on the CPU seven times as fast as `mx.conv1d`, and float32 on every backend.
        """
        before, t = len(self.taps) - 1, x.shape[1]
        if past is None:
            past = tuple(mx.zeros((x.shape[0], before, x.shape[2]), x.dtype).split(before, axis=1))
        if t == 1:  # nothing is moved
            return _conv_silu([*past, x], self.taps), (*past[1:], x)
        x = mx.concatenate([*past, x], axis=1)
        last = mx.contiguous(x[:, -before:])  # a view would keep all of x alive
        return _conv_silu([x[:, i : i + t] for i in range(before + 1)], self.taps), tuple(last.split(before, axis=1))


class MoE:
    """num_experts_per_tok of num_experts per token, and one shared expert for all, weighted by its own gate."""

    def __init__(self, cfg: Config, prefix: str, weights: Weights) -> None:
        self.k, self.experts = cfg.num_experts_per_tok, cfg.num_experts
        self.gate = weights.linear(prefix + "gate")
        self.gate_up = SameInput(*(weights.linear(f"{prefix}switch_mlp.{p}_proj") for p in ("gate", "up")))
        self.down_proj = weights.linear(prefix + "switch_mlp.down_proj")
        self.shared_expert = MLP(prefix + "shared_expert.", weights)
        self.shared_expert_gate = weights.linear(prefix + "shared_expert_gate")

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, H] → [B, T, H]"""
        b, t, h = x.shape
        flat = x.reshape(b * t, h)
        experts, scores = self.route(flat)
        y = (self._experts(flat, experts, t > 1) * scores[..., None].astype(x.dtype)).sum(axis=1)
        shared = self.shared_expert(flat) * mx.sigmoid(self.shared_expert_gate(flat))
        return (y + shared).reshape(b, t, h)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x: [N, H] → chosen experts [N, k] and their weights [N, k], which sum to 1; softmax over all, in float32."""
        p = mx.softmax(self.gate(x).astype(mx.float32), axis=-1, precise=True)
        experts = mx.stop_gradient(mx.argpartition(p, kth=-self.k, axis=-1)[:, -self.k :])
        scores = mx.take_along_axis(p, experts, axis=-1)
        return experts, scores / scores.sum(axis=-1, keepdims=True)

    def _experts(self, x: mx.array, experts: mx.array, sort: bool) -> mx.array:
        """x: [N, H], experts: [N, k] → [N, k, H]. sort: rows by expert; waits for the device, which a compiled step cannot."""
        n, k = experts.shape
        if not sort or n * k < SORT_ROWS:
            return self._apply(x[:, None, None], experts)[:, :, 0]
        flat = experts.reshape(-1)
        sorting = Sorting.of(flat, self.experts)
        y = self._apply(sorting.spread(x, k)[:, None], flat[sorting.order], sorting)[:, 0]
        return y[mx.argsort(sorting.order)].reshape(n, k, -1)

    def _apply(self, x: mx.array, experts: mx.array, sorting: Sorting | None = None) -> mx.array:
        y = swiglu(*self.gate_up.gather(x, experts, sorting))
        return self.down_proj.gather(y, experts, sorting)

    def fuse(self) -> None:
        self.gate_up.fuse()
        self.shared_expert.fuse()


@fused
def _gates(a: mx.array, b: mx.array, decay_rate: mx.array, dt_bias: mx.array) -> tuple[mx.array, mx.array]:
    """Log decay g = −exp(A_log) softplus(a + dt_bias) and rate beta = sigmoid(b); [B, T, Hv] each, float32."""
    softplus = mx.logaddexp(a.astype(mx.float32) + dt_bias, 0)
    return decay_rate * softplus, mx.sigmoid(b.astype(mx.float32))


@fused
def _conv_silu(shifted: list[mx.array], taps: list[mx.array]) -> mx.array:
    y = shifted[0] * taps[0]
    for x, tap in zip(shifted[1:], taps[1:], strict=True):
        y = y + x * tap
    return y * mx.sigmoid(y)


@fused
def _times_silu(y: mx.array, z: mx.array) -> mx.array:
    """In float32, the result in z's type."""
    wide = z.astype(mx.float32)
    return (y * (wide * mx.sigmoid(wide))).astype(z.dtype)


@fused
def _gate(y: mx.array, gate: mx.array) -> mx.array:
    return y * mx.sigmoid(gate)
