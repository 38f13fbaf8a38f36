"""Identity of the source: a hash over the bytes of the tensors that a variant is made of, without MLX."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from blake3 import blake3

from inference.checkpoint import row_bands
from inference.layout import Target, read_band

from .folder import canonical

READ_BYTES = 32 << 20


def source_hash(sources: Iterable[Sequence[str]]) -> str:
    """sha256 over the sorted (target name, BLAKE3 of its source bytes)."""
    return hashlib.sha256(canonical(sorted([name, found] for name, found in sources))).hexdigest()


def source_hash_of(targets: Iterable[Target]) -> str:
    """The same, by reading: what `quant.convert` computes while it builds."""
    return source_hash((t.name, _blake3(t)) for t in targets)


def _blake3(target: Target) -> str:
    hasher = blake3()
    for start, stop in row_bands(target.source, READ_BYTES):
        hasher.update(read_band(target, start, stop).tobytes())
    return hasher.hexdigest()
