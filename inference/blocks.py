"""What the layers of every family are made of: norm, causal attention, the SwiGLU MLP, and the pass layer by layer.

B is the batch, T the tokens of a call, H the hidden size. Activations keep the compute type of the model (float32 on the
CPU). Everything can be differentiated with `mx.vjp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from .backend import fused, mx
from .cache import Cache
from .linear import Linear

SCORE_BYTES = 256 << 20  # largest block of attention scores, where the backend has no fused kernel


class Weights(Protocol):
    """Tensors of one checkpoint by MLX name, each read once."""

    def linear(self, module: str) -> Linear: ...
    def array(self, name: str) -> mx.array: ...


class MLP:
    def __init__(self, prefix: str, weights: Weights) -> None:
        self.gate_proj, self.up_proj, self.down_proj = (
            weights.linear(prefix + p) for p in ("gate_proj", "up_proj", "down_proj")
        )

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, H] → [B, T, H]"""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """In float32 whatever the weight's type (an original checkpoint's 1 + w is float32); the result has x's type."""
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention of the last T of S tokens, in blocks of queries whose scores fit SCORE_BYTES.

    q: [B, Hq, T, D]; k, v: [B, Hkv, S, D]. Returns [B, Hq, T, D]. Softmax is in float32.
    """
    b, heads, t, _ = q.shape
    s = k.shape[2]
    block = max(1, SCORE_BYTES // (4 * b * heads * s))
    out = []
    for i in range(0, t, block):
        end = min(t, i + block)
        upto = s - t + end
        mask = "causal" if end - i > 1 else None
        out.append(mx.fast.scaled_dot_product_attention(
            q[:, :, i:end], k[:, :, :upto], v[:, :, :upto], scale=scale, mask=mask
        ))  # fmt: skip
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=2)


@fused
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


class Decoder:
    """A whole text model: embedding, layers, last norm, output. `layers[i]`, `hidden` and `logits` can be used one by one.

    A family says where its tensors lie (`prefix`, `output`) and what a layer is (`make_layer`: one that is called as
    layer(x, cache entry)).
    """

    prefix: ClassVar[str]  # of the module paths
    output: ClassVar[str]  # module path of an output matrix that is not tied to the embedding

    @staticmethod
    def make_layer(cfg: Any, index: int, weights: Weights) -> Callable[[mx.array, Any], mx.array]:
        raise NotImplementedError

    def __init__(self, cfg: Any, weights: Weights) -> None:
        self.cfg = cfg
        self.embed_tokens = weights.linear(self.prefix + "embed_tokens")
        self.layers = [self.make_layer(cfg, i, weights) for i in range(cfg.num_hidden_layers)]
        self.norm = weights.array(self.prefix + "norm.weight")
        self.lm_head = self.embed_tokens if cfg.tie_word_embeddings else self.head(cfg, weights)

    @classmethod
    def head(cls, cfg: Any, weights: Weights) -> Linear:
        """The output matrix alone; the embedding where they are tied."""
        return weights.linear(cls.prefix + "embed_tokens" if cfg.tie_word_embeddings else cls.output)

    def hidden(self, tokens: mx.array, cache: Cache) -> mx.array:
        """tokens [B, T], which follow those in the cache → states after the last norm [B, T, H]."""
        x = self.embed_tokens.rows(tokens)
        for layer, entry in zip(self.layers, cache.layers, strict=True):
            x = layer(x, entry)
        cache.length += tokens.shape[1]
        return rms_norm(x, self.norm, self.cfg.rms_norm_eps)

    def logits(self, hidden: mx.array) -> mx.array:
        """[B, T, H] → [B, T, V]"""
        return self.lm_head(hidden)

    @classmethod
    def hidden_streamed(
        cls,
        cfg: Any,
        weights: Weights,
        entries: Sequence[Any],
        batches: Sequence[mx.array],
        after_layer: Callable[[int], None] | None = None,
        step: int | None = None,
    ) -> list[mx.array]:
        """`hidden` of each batch of tokens [B, T] with one layer in memory at a time, all batches passing through it.

        entries: an empty cache entry of each layer, of which every batch gets a fresh one. after_layer(i) is called once
        all batches have passed layer i. step: a batch goes through each layer in pieces of that many tokens, behind each
        other with its cache; None: whole. Peak: the largest layer (or the embedding) and the states of all batches.
        """
        table = weights.linear(cls.prefix + "embed_tokens")
        states = [table.rows(tokens) for tokens in batches]
        mx.eval(states)
        del table
        for i, entry in enumerate(entries):
            layer = cls.make_layer(cfg, i, weights)
            for j, x in enumerate(states):
                own, size = type(entry)(), step or x.shape[1]
                pieces = [layer(x[:, start : start + size], own) for start in range(0, x.shape[1], size)]
                states[j] = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)
                mx.eval(states[j])
            del layer
            mx.clear_cache()
            if after_layer is not None:
                after_layer(i)
        norm = weights.array(cls.prefix + "norm.weight")
        return [rms_norm(x, norm, cfg.rms_norm_eps) for x in states]
