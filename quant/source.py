"""Identity of the source: a hash over the bytes of the tensors that a variant is made of, without MLX."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from inference.checkpoint import row_bands
from inference.layout import Target, read_band

from .folder import canonical

READ_BYTES = 32 << 20


def source_hash(sources: Iterable[Sequence[str]]) -> str:
    """sha256 over the sorted (target name, sha256 of its source bytes)."""
    return hashlib.sha256(canonical(sorted([name, sha] for name, sha in sources))).hexdigest()


def source_hash_of(targets: Iterable[Target]) -> str:
    """The same, by reading: what `quant.convert` computes while it builds."""
    return source_hash((t.name, _sha256(t)) for t in targets)


def _sha256(target: Target) -> str:
    sha = hashlib.sha256()
    for start, stop in row_bands(target.source, READ_BYTES):
        sha.update(read_band(target, start, stop).tobytes())
    return sha.hexdigest()
