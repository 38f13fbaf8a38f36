"""What a model remembers of a sequence: keys and values of full attention, conv inputs and state of the delta rule.

A `Cache` also knows which tokens it has seen, so that the next turn of a chat prefills only what is new. Attention can
be cut back to any length, the delta rule cannot: `checkpoint` keeps its (small, immutable) states at a length worth
returning to, and `reuse` cuts back to the longest checkpoint that a new prompt starts with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .backend import mx
from .memory import KV_STEP

MAX_CHECKPOINTS = 4  # at 9B one takes 50 MB


class KVCache:
    """keys, values: [B, Hkv, capacity, D], the first `length` of them in use."""

    def __init__(self) -> None:
        self.length = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """keys, values: [B, Hkv, T, D] of the next T tokens. Returns those of all tokens so far."""
        start, self.length = self.length, self.length + keys.shape[2]
        all_keys, all_values = self._write(self.keys, keys, start), self._write(self.values, values, start)
        self.keys, self.values = all_keys, all_values
        return all_keys[:, :, : self.length], all_values[:, :, : self.length]

    def _write(self, buffer: mx.array | None, new: mx.array, start: int) -> mx.array:
        b, heads, _, dim = new.shape
        if buffer is None or self.length > buffer.shape[2]:
            room = -(-self.length // KV_STEP) * KV_STEP
            grown = mx.zeros((b, heads, room - start, dim), new.dtype)
            buffer = grown if buffer is None or not start else mx.concatenate([buffer[:, :, :start], grown], axis=2)
        buffer[:, :, start : self.length] = new
        return buffer

    def arrays(self) -> list[mx.array]:
        return [x for x in (self.keys, self.values) if x is not None]


class DeltaCache:
    """conv: the last K - 1 inputs of the causal conv, [B, 1, C] each; state: [B, Hv, Dv, Dk] in float32."""

    def __init__(self) -> None:
        self.conv: tuple[mx.array, ...] | None = None
        self.state: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        return [x for x in (*(self.conv or ()), self.state) if x is not None]


@dataclass(frozen=True)
class _Checkpoint:
    length: int
    states: list[tuple[tuple[mx.array, ...] | None, mx.array | None]]  # conv, state of each delta layer


@dataclass
class Cache:
    """One entry a layer, and the tokens inside (batch 1; empty for a cache that `Model.forward` alone has fed)."""

    layers: list[KVCache | DeltaCache]
    length: int = 0
    tokens: list[int] = field(default_factory=list)
    _checkpoints: list[_Checkpoint] = field(default_factory=list)

    def arrays(self) -> list[mx.array]:
        return [x for layer in self.layers for x in layer.arrays()]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays())

    def checkpoint(self) -> None:
        """Make the present length one that `reuse` can return to; the oldest beyond MAX_CHECKPOINTS is forgotten."""
        states = [(x.conv, x.state) for x in self.layers if isinstance(x, DeltaCache)]
        kept = [c for c in self._checkpoints if c.length < self.length]
        self._checkpoints = [*kept[-(MAX_CHECKPOINTS - 1) :], _Checkpoint(self.length, states)]

    def reuse(self, prompt: Sequence[int]) -> int:
        """Cut back to the longest kept state that `prompt` starts with and extends; how many tokens that saves."""
        if self.length and self.length == len(self.tokens):
            shared = _common_prefix(self.tokens, prompt)
            if shared == self.length < len(prompt):
                return self.length
            for c in reversed(self._checkpoints):
                if c.length <= shared and c.length < len(prompt):
                    self._restore(c)
                    return c.length
        self._restore(_Checkpoint(0, [(None, None)] * len(self.layers)))
        return 0

    def _restore(self, c: _Checkpoint) -> None:
        states = iter(c.states)
        for layer in self.layers:
            if isinstance(layer, DeltaCache):
                layer.conv, layer.state = next(states)
            else:
                layer.length = c.length
        self.length = c.length
        self._checkpoints = [x for x in self._checkpoints if x.length <= c.length]
        del self.tokens[c.length :]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
