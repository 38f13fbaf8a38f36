"""Llama, dense: the forward pass, from token ids to logits.

Every layer is x + attention(norm(x)), then x + mlp(norm(x)). B is the batch, T the tokens of this call, H the hidden
size. Activations keep the compute type of the model (float32 on the CPU); norms and softmax are computed in float32.

Follows `transformers` model llama.
"""

from __future__ import annotations

from ..backend import mx
from ..blocks import MLP, Decoder, Weights, attend, rms_norm
from ..cache import Cache, KVCache
from .names import Config, rope_wavelengths

PREFIX = "model."


class TextModel(Decoder):
    prefix, output = PREFIX, "lm_head"

    @staticmethod
    def make_layer(cfg: Config, index: int, weights: Weights) -> Layer:
        return Layer(cfg, index, weights)


def make_cache(cfg: Config) -> Cache:
    return Cache([KVCache() for _ in range(cfg.num_hidden_layers)])


class Layer:
    def __init__(self, cfg: Config, index: int, weights: Weights) -> None:
        prefix = f"{PREFIX}layers.{index}."
        self.eps = cfg.rms_norm_eps
        self.input_layernorm = weights.array(prefix + "input_layernorm.weight")
        self.post_attention_layernorm = weights.array(prefix + "post_attention_layernorm.weight")
        self.self_attn = Attention(cfg, prefix + "self_attn.", weights)
        self.mlp = MLP(prefix + "mlp.", weights)

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        """[B, T, H] → [B, T, H]"""
        x = x + self.self_attn(rms_norm(x, self.input_layernorm, self.eps), cache)
        return x + self.mlp(rms_norm(x, self.post_attention_layernorm, self.eps))


class Attention:
    """Grouped-query attention with RoPE on the whole of each head."""

    def __init__(self, cfg: Config, prefix: str, weights: Weights) -> None:
        self.cfg = cfg
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            weights.linear(f"{prefix}{p}_proj") for p in ("q", "k", "v", "o")
        )
        self.wavelengths = mx.array(rope_wavelengths(cfg), mx.float32)

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        """[B, T, H] → [B, T, H]"""
        cfg, (b, t, _) = self.cfg, x.shape
        start = cache.length

        def heads(y: mx.array, n: int) -> mx.array:
            return y.reshape(b, t, n, cfg.head_dim).swapaxes(1, 2)

        q = self._rope(heads(self.q_proj(x), cfg.num_attention_heads), start)
        k = self._rope(heads(self.k_proj(x), cfg.num_key_value_heads), start)
        k, v = cache.append(k, heads(self.v_proj(x), cfg.num_key_value_heads))
        y = attend(q, k, v, cfg.head_dim**-0.5).swapaxes(1, 2)  # [B, T, Hq, D]
        return self.o_proj(y.reshape(b, t, -1))

    def _rope(self, x: mx.array, start: int) -> mx.array:
        return mx.fast.rope(
            x, self.cfg.head_dim, traditional=False, base=None, scale=1.0, offset=start, freqs=self.wavelengths
        )
