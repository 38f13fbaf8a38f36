"""What the layers of every family are made of: norm, causal attention, the SwiGLU MLP, and the pass layer by layer.

B is the batch, T the tokens of a call, H the hidden size. Activations keep the compute type of the model (float32 on the
CPU). Everything can be differentiated with `mx.vjp`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from . import norm_kernel
from .backend import BACKEND, fused, mx
from .cache import Cache, DeltaCache, KVCache
from .linear import UNPACK_ROWS, Linear, SameInput
from .memory import SCORE_BYTES
from .step import Step

CPU_QUERIES = 64  # at most, of a block there: keys after its last query are not multiplied, and their exp not taken
# From this many tokens on, a forward pass is computed as it is built, this many layers behind, so that the temporaries of
# no more layers are there at once: at 9B and 2048 tokens on an H100, all 32 took 13 GB. Few tokens hold little, unless
# matrices are unpacked for them.
EVALUATED_TOKENS, LAYERS_AHEAD = UNPACK_ROWS or 64, 1


class Weights(Protocol):
    """Tensors of one checkpoint by MLX name, each read once."""

    def linear(self, module: str) -> Linear: ...
    def array(self, name: str) -> mx.array: ...


class MLP:
    def __init__(self, prefix: str, weights: Weights) -> None:
        self.gate_up = SameInput(*(weights.linear(prefix + p) for p in ("gate_proj", "up_proj")))
        self.down_proj = weights.linear(prefix + "down_proj")

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, H] → [B, T, H]"""
        return self.down_proj(swiglu(*self.gate_up(x)))

    def fuse(self) -> None:
        self.gate_up.fuse()


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """In float32 whatever the weight's type (an original checkpoint's 1 + w is float32); the result has x's type."""
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)


Join = Callable[[mx.array, mx.array | None, mx.array, float], tuple[mx.array, mx.array]]


def add_norm(x: mx.array, y: mx.array | None, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """x + y, and the norm of it. y: what is yet to be added to x, None for nothing."""
    x = x if y is None else x + y
    return x, rms_norm(x, weight, eps)


def add_norm_of_a_token(x: mx.array, y: mx.array | None, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """The same by one kernel where there is one; it has no derivative."""
    if y is None or not norm_kernel.usable():
        return add_norm(x, y, weight, eps)
    return norm_kernel.add_norm(x, y, weight, eps)


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Causal attention of the last T of S tokens, in blocks of queries whose scores fit SCORE_BYTES.

    q: [B, Hq, T, D]; k, v: [B, Hkv, S, D]. Returns [B, Hq, T, D]. Softmax is in float32.
    """
    b, heads, t, _ = q.shape
    s = k.shape[2]
    block = max(1, SCORE_BYTES // (4 * b * heads * s))
    if BACKEND == "cpu":
        block = min(block, CPU_QUERIES)
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


class Attention(Protocol):
    """Attention in three parts: what depends on x and its position alone, the reading of the cache, what follows."""

    def before(self, x: mx.array, start: int | mx.array) -> tuple[mx.array, ...]:
        """[B, T, H] → q [B, Hq, T, D], k and v [B, Hkv, T, D], and what `after` wants beside the heads' output."""
        ...

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array: ...
    def after(self, y: mx.array, *rest: mx.array) -> mx.array: ...


class Recurrent(Protocol):
    """A mixer whose memory has one size, however long the sequence."""

    def advance(
        self, x: mx.array, conv: tuple[mx.array, ...] | None, state: mx.array | None
    ) -> tuple[mx.array, tuple[mx.array, ...], mx.array]: ...


class DecoderLayer:
    """x + mixer(norm(x)), then x + mlp(norm(x)): what the layers of every family have in common.

    Between layers x goes with what is yet to be added to it, y or None, so that sum and norm can be one operation (join).
    """

    mixer: Any  # Attention or Recurrent
    mlp: Any  # [B, T, H] → [B, T, H]

    def __init__(self, prefix: str, eps: float, weights: Weights) -> None:
        self.eps = eps
        self.input_layernorm = weights.array(prefix + "input_layernorm.weight")
        self.post_attention_layernorm = weights.array(prefix + "post_attention_layernorm.weight")

    def __call__(self, x: mx.array, cache: KVCache | DeltaCache) -> mx.array:
        """[B, T, H] → [B, T, H]; the cache is brought up to date."""
        if isinstance(cache, DeltaCache):
            x, y, cache.conv, cache.state = self.advance(x, None, cache.conv, cache.state)
        else:
            x, q, k, v, *rest = self.before(x, None, cache.length)
            x, y = self.after(x, self.mixer.attend(q, *cache.append(k, v)), *rest)
        return x + y

    def advance(
        self,
        x: mx.array,
        y: mx.array | None,
        conv: tuple[mx.array, ...] | None,
        state: mx.array | None,
        join: Join = add_norm,
    ) -> tuple[mx.array, mx.array, tuple[mx.array, ...], mx.array]:
        """A whole layer with a recurrent mixer: x, what is yet to be added to it, and the mixer's memory."""
        x, normed = join(x, y, self.input_layernorm, self.eps)
        mixed, *memory = self.mixer.advance(normed, conv, state)
        return *self._feed_forward(x, mixed, join), *memory  # type: ignore[return-value] - two of memory

    def before(
        self, x: mx.array, y: mx.array | None, start: int | mx.array, join: Join = add_norm
    ) -> tuple[mx.array, ...]:
        """A layer with attention, up to the cache: x and what `Attention.before` gives; start: position of the first token."""
        x, normed = join(x, y, self.input_layernorm, self.eps)
        return x, *self.mixer.before(normed, start)

    def after(self, x: mx.array, heads: mx.array, *rest: mx.array, join: Join = add_norm) -> tuple[mx.array, mx.array]:
        """And from there on: x, as `before` gave it, and what is yet to be added to it."""
        return self._feed_forward(x, self.mixer.after(heads, *rest), join)

    def fuse(self) -> None:
        """Join matrices that read one input."""
        self.mixer.fuse()
        self.mlp.fuse()

    def _feed_forward(self, x: mx.array, y: mx.array, join: Join) -> tuple[mx.array, mx.array]:
        x, normed = join(x, y, self.post_attention_layernorm, self.eps)
        return x, self.mlp(normed)


class Decoder:
    """A whole text model: embedding, layers, last norm, output. `layers[i]`, `hidden` and `logits` can be used one by one.

    A family says where its tensors lie (`prefix`, `output`) and what a layer is (`make_layer`).
    """

    prefix: ClassVar[str]  # of the module paths
    output: ClassVar[str]  # module path of an output matrix that is not tied to the embedding

    @staticmethod
    def make_layer(cfg: Any, index: int, weights: Weights) -> DecoderLayer:
        raise NotImplementedError

    def __init__(self, cfg: Any, weights: Weights) -> None:
        self.cfg = cfg
        self.embed_tokens = weights.linear(self.prefix + "embed_tokens")
        self.layers: list[DecoderLayer] = []
        for i in range(cfg.num_hidden_layers):
            layer = self.make_layer(cfg, i, weights)
            layer.fuse()  # one layer after the other, so that no more than one is there twice
            self.layers.append(layer)
        self.norm = weights.array(self.prefix + "norm.weight")
        self.lm_head = self.embed_tokens if cfg.tie_word_embeddings else self.head(cfg, weights)
        self._step: Step | None = None

    @classmethod
    def head(cls, cfg: Any, weights: Weights) -> Linear:
        """The output matrix alone; the embedding where they are tied."""
        return weights.linear(cls.prefix + "embed_tokens" if cfg.tie_word_embeddings else cls.output)

    def hidden(self, tokens: mx.array, cache: Cache) -> mx.array:
        """tokens [B, T], which follow those in the cache → states after the last norm [B, T, H]."""
        x = self.embed_tokens.rows(tokens)
        begun: deque[mx.array] = deque()
        for layer, entry in zip(self.layers, cache.layers, strict=True):
            x = layer(x, entry)
            if tokens.size >= EVALUATED_TOKENS:
                mx.async_eval(x, *entry.arrays())
                begun.append(x)
                if len(begun) > LAYERS_AHEAD:
                    mx.eval(begun.popleft())
        cache.length += tokens.shape[1]
        return rms_norm(x, self.norm, self.cfg.rms_norm_eps)

    def logits(self, hidden: mx.array) -> mx.array:
        """[B, T, H] → [B, T, V]"""
        return self.lm_head(hidden)

    def step(self, tokens: mx.array, cache: Cache) -> mx.array:
        """One token of each sequence, [B, 1], behind a cache that holds some already → logits [B, 1, V]: the same numbers as
        `logits(hidden(tokens, cache))`, by functions that are compiled once."""
        if self._step is None:
            head, norm, eps = self.lm_head, self.norm, self.cfg.rms_norm_eps
            join = add_norm_of_a_token
            self._step = Step(
                self.embed_tokens.rows, self.layers, lambda x, y: head(join(x, y, norm, eps)[1]), cache, join
            )
        return self._step(tokens, cache)

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

        def done(i: int) -> None:
            if after_layer is not None and i >= 0:
                after_layer(i)

        return cls.hidden_of_versions(cfg, [weights], entries, batches, done, step)[0]

    @classmethod
    def hidden_of_versions(
        cls,
        cfg: Any,
        versions: Sequence[Weights],
        entries: Sequence[Any],
        batches: Sequence[mx.array],
        done: Callable[[int], None],
        step: int | None = None,
    ) -> list[list[mx.array]]:
        """`hidden_streamed` of the same tokens under several versions of the weights, side by side, so that what they share
        need be read once. done(i): every version has passed layer i, or the embedding (-1).

        Peak: a layer of one version, what the versions keep, and the states of all batches of all versions.
        """
        tables = [weights.linear(cls.prefix + "embed_tokens") for weights in versions]
        states = [[table.rows(tokens) for tokens in batches] for table in tables]
        mx.eval(states)
        del tables
        done(-1)
        for i, entry in enumerate(entries):
            for weights, own in zip(versions, states, strict=True):
                layer = cls.make_layer(cfg, i, weights)
                for j, x in enumerate(own):
                    memory, size = type(entry)(), step or x.shape[1]
                    pieces = [layer(x[:, start : start + size], memory) for start in range(0, x.shape[1], size)]
                    own[j] = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)
                    mx.eval(own[j])
                del layer
            mx.clear_cache()
            done(i)
        norms = [weights.array(cls.prefix + "norm.weight") for weights in versions]
        return [[rms_norm(x, norm, cfg.rms_norm_eps) for x in own] for norm, own in zip(norms, states, strict=True)]
