"""Llama, dense: the forward pass, from token ids to logits.

Every layer is x + attention(norm(x)), then x + mlp(norm(x)). B is the batch, T the tokens of this call, H the hidden
size. Activations keep the compute type of the model (float32 on the CPU); norms and softmax are computed in float32.

Follows `transformers` model llama.
"""

from __future__ import annotations

from ..backend import mx
from ..blocks import MLP, Decoder, DecoderLayer, Weights, attend
from ..cache import Cache, KVCache
from ..linear import SameInput
from .names import Config, rope_wavelengths

PREFIX = "model."


class TextModel(Decoder):
    prefix, output = PREFIX, "lm_head"

    @staticmethod
    def make_layer(cfg: Config, index: int, weights: Weights) -> Layer:
        return Layer(cfg, index, weights)


def make_cache(cfg: Config) -> Cache:
    return Cache([KVCache() for _ in range(cfg.num_hidden_layers)])


class Layer(DecoderLayer):
    def __init__(self, cfg: Config, index: int, weights: Weights) -> None:
        prefix = f"{PREFIX}layers.{index}."
        super().__init__(prefix, cfg.rms_norm_eps, weights)
        self.mixer = Attention(cfg, prefix + "self_attn.", weights)
        self.mlp = MLP(prefix + "mlp.", weights)


class Attention:
    """Grouped-query attention with RoPE on the whole of each head."""

    def __init__(self, cfg: Config, prefix: str, weights: Weights) -> None:
        self.cfg = cfg
        self.qkv = SameInput(*(weights.linear(f"{prefix}{p}_proj") for p in ("q", "k", "v")))
        self.o_proj = weights.linear(prefix + "o_proj")
        self.wavelengths = mx.array(rope_wavelengths(cfg), mx.float32)

    def before(self, x: mx.array, start: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """[B, T, H] and the position of its first token → q [B, Hq, T, D], k and v [B, Hkv, T, D]"""
        cfg, (b, t, _) = self.cfg, x.shape
        q, k, v = (y.reshape(b, t, -1, cfg.head_dim).swapaxes(1, 2) for y in self.qkv(x))
        return self._rope(q, start), self._rope(k, start), v

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return attend(q, k, v, self.cfg.head_dim**-0.5)

    def after(self, y: mx.array) -> mx.array:
        """What the heads read, [B, Hq, T, D] → [B, T, H]"""
        y = y.swapaxes(1, 2)
        return self.o_proj(y.reshape(*y.shape[:2], -1))

    def fuse(self) -> None:
        self.qkv.fuse()

    def _rope(self, x: mx.array, start: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x, self.cfg.head_dim, traditional=False, base=None, scale=1.0, offset=start, freqs=self.wavelengths
        )
