"""How far one model's logits are from another's: KL divergence, agreement of the first choice, perplexity.

A position with a NaN or infinity in either model's logits has no divergence: it comes out as NaN, and `finite` says
which positions to keep. How many there were belongs into every result.
"""

from __future__ import annotations

from .backend import mx
from .errors import CheckpointError

BAND_BYTES = 128 << 20  # float32 logits worked on at once


def kld(ref: mx.array, got: mx.array) -> mx.array:
    """KL(ref ‖ got) of each position, in nats.

    ref, got: logits [T, V], any float type; computed in float32. Returns [T], NaN where either is not finite.
    Raises CheckpointError if the shapes differ.
    Source: same direction as llama.cpp `llama-perplexity --kl-divergence`.
    """
    if ref.shape != got.shape:
        raise CheckpointError(f"logits of shapes {list(ref.shape)} and {list(got.shape)} cannot be compared")
    if not ref.shape[0]:
        return mx.zeros((0,), mx.float32)
    rows = max(1, BAND_BYTES // (4 * ref.shape[1]))
    out = []
    for i in range(0, ref.shape[0], rows):
        p, q = _log_softmax(ref[i : i + rows]), _log_softmax(got[i : i + rows])
        d = (mx.exp(p) * (p - q)).sum(axis=-1)
        out.append(mx.where(finite(ref[i : i + rows]) & finite(got[i : i + rows]), d, mx.nan))
        mx.eval(out[-1])
    return mx.concatenate(out)


def top1_agreement(ref: mx.array, got: mx.array) -> mx.array:
    """Whether both prefer the same token; [T, V] each → bool [T]."""
    return mx.argmax(ref, axis=-1) == mx.argmax(got, axis=-1)


def nll(logits: mx.array, targets: mx.array) -> mx.array:
    """−log p of the tokens that came next, in nats; perplexity is exp of the mean. [T, V], [T] → [T]."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return mx.logsumexp(logits, axis=-1) - chosen


def finite(logits: mx.array) -> mx.array:
    """Whether all logits of a position are finite; [T, V] → bool [T]."""
    return mx.isfinite(logits).all(axis=-1)


def nonfinite_count(logits: mx.array) -> int:
    """Positions with a NaN or an infinity; [T, V]."""
    return int((~finite(logits)).sum().item())  # type: ignore[arg-type]


def _log_softmax(x: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    return x - mx.logsumexp(x, axis=-1, keepdims=True)
