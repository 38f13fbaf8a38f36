"""Llama, dense: the forward pass, from token ids to logits.

Every layer is x + attention(norm(x)), then x + mlp(norm(x)). B is the batch, T the tokens of this call, H the hidden
size. Activations keep the compute type of the model (float32 on the CPU); norms and softmax are computed in float32.

Follows `transformers` model llama.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..backend import mx
from ..blocks import MLP, Weights, attend, rms_norm, streamed
from ..cache import Cache, KVCache
from ..linear import Linear
from .names import Config, rope_wavelengths

PREFIX = "model."


class TextModel:
    """The whole model; `layers[i]` and `embed_tokens`, `norm`, `logits` can also be used one by one."""

    def __init__(self, cfg: Config, weights: Weights) -> None:
        self.cfg = cfg
        self.embed_tokens = weights.linear(PREFIX + "embed_tokens")
        self.layers = [Layer(cfg, i, weights) for i in range(cfg.num_hidden_layers)]
        self.norm = weights.array(PREFIX + "norm.weight")
        self.lm_head = lm_head(cfg, weights) if not cfg.tie_word_embeddings else self.embed_tokens

    def hidden(self, tokens: mx.array, cache: Cache) -> mx.array:
        """tokens [B, T], which follow those in the cache → states after the last norm [B, T, H]."""
        x = self.embed_tokens.rows(tokens)
        for layer, entry in zip(self.layers, cache.layers, strict=True):
            x = layer(x, entry)  # type: ignore[arg-type]
        cache.length += tokens.shape[1]
        return rms_norm(x, self.norm, self.cfg.rms_norm_eps)

    def logits(self, hidden: mx.array) -> mx.array:
        """[B, T, H] → [B, T, V]"""
        return self.lm_head(hidden)


def hidden_streamed(
    cfg: Config,
    weights: Weights,
    batches: list[mx.array],
    after_layer: Callable[[int], None] | None = None,
    step: int | None = None,
) -> list[mx.array]:
    """`TextModel.hidden` of each batch [B, T] with one layer in memory at a time, all batches passing through it.

    after_layer(i) is called once they all have passed layer i; step: tokens of a batch that pass at a time, all for None.
    Peak: the largest layer (or the embedding) and the states of all batches.
    """
    layers = [partial(Layer, cfg, i, weights) for i in range(cfg.num_hidden_layers)]
    embed = partial(weights.linear, PREFIX + "embed_tokens")
    states = streamed(embed, layers, make_cache(cfg).layers, batches, after_layer, step)
    norm = weights.array(PREFIX + "norm.weight")
    return [rms_norm(x, norm, cfg.rms_norm_eps) for x in states]


def lm_head(cfg: Config, weights: Weights) -> Linear:
    return weights.linear(PREFIX + "embed_tokens" if cfg.tie_word_embeddings else "lm_head")


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
