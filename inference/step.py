"""One token of decode as a few compiled functions, for a model of any family.

What lies between two readings of a key cache is one function whose shapes never change: Python does little a token, and no
length makes anything compile anew. Keys and values are appended and read between these functions, at their true length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .backend import compiled, mx
from .cache import Cache, DeltaCache, KVCache

if TYPE_CHECKING:
    from .blocks import DecoderLayer, Join

Memory = list[tuple[tuple[mx.array, ...] | None, mx.array | None]]  # conv, state of each recurrent layer
Begin = Callable[..., tuple[mx.array, "mx.array | None"]]
End = Callable[[mx.array, "mx.array | None", mx.array], tuple[mx.array, ...]]


class Step:
    """embed: token ids [B, 1] → [B, 1, H]; logits: x [B, 1, H] and what is yet to be added to it → [B, 1, V].

    join: how layers add and norm.

    It holds no model, so that a model which holds it goes when the last reference to it does.
    """

    def __init__(
        self,
        embed: Callable[[mx.array], mx.array],
        layers: Sequence[DecoderLayer],
        logits: Callable[[mx.array, mx.array | None], mx.array],
        cache: Cache,
        join: Join,
    ) -> None:
        self._attention = [
            layer for layer, entry in zip(layers, cache.layers, strict=True) if isinstance(entry, KVCache)
        ]
        self._recurrent: list[list[DecoderLayer]] = [[]]  # before the first reading, between two, after the last
        for layer, entry in zip(layers, cache.layers, strict=True):
            if isinstance(entry, KVCache):
                self._recurrent.append([])
            else:
                self._recurrent[-1].append(layer)
        after = [partial(layer.after, join=join) for layer in self._attention]
        before = [partial(layer.before, join=join) for layer in self._attention]
        begins: list[Begin] = [lambda tokens: (embed(tokens), None), *after]
        ends: list[End] = [*before, lambda x, y, _: (logits(x, y),)]
        self._stages = [
            compiled(_stage(begin, group, end, join))
            for begin, group, end in zip(begins, self._recurrent, ends, strict=True)
        ]

    def __call__(self, tokens: mx.array, cache: Cache) -> mx.array:
        """The tokens [B, 1] that follow those in the cache, which holds some → logits [B, 1, V]."""
        start = mx.array(cache.length)
        recurrent = iter([e for e in cache.layers if isinstance(e, DeltaCache)])
        attention = zip(self._attention, [e for e in cache.layers if isinstance(e, KVCache)], strict=True)
        x, read = tokens, ()
        for stage, group in zip(self._stages, self._recurrent, strict=True):
            entries = [next(recurrent) for _ in group]
            (x, *out), memory = stage(x, read, start, [(e.conv, e.state) for e in entries])
            for entry, (conv, state) in zip(entries, memory, strict=True):
                entry.conv, entry.state = conv, state
            if found := next(attention, None):
                layer, entry = found
                q, k, v, *rest = out
                read = (layer.mixer.attend(q, *entry.append(k, v)), *rest)
        cache.length += 1
        return x


def _stage(begin: Begin, group: Sequence[DecoderLayer], end: End, join: Join) -> Callable[..., Any]:
    """begin: of x and what the last reading gave; group: recurrent layers; end: of x, what is yet to be added to it and the
    position, what comes next."""

    def run(x: mx.array, read: tuple[mx.array, ...], start: mx.array, memory: Memory) -> Any:
        (x, y), new = begin(x, *read), []
        for layer, (conv, state) in zip(group, memory, strict=True):
            x, y, conv, state = layer.advance(x, y, conv, state, join)
            new.append((conv, state))
        return end(x, y, start), new

    return run
