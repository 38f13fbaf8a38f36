"""How far one model's logits are from another's: KL divergence, agreement of the first choice, perplexity.

A position with a NaN or infinity in either model's logits has no divergence: it comes out as NaN, and `finite` says
which positions to keep. How many there were belongs into every result.

`compare` does it for whole corpora from final hidden states, of which a token has a few KB where its logits have a
megabyte: logits of both models are made again for as many positions at a time as fit `tile_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .backend import BACKEND, fused, mx
from .errors import CheckpointError
from .linear import Dense, Linear

BAND_BYTES = 128 << 20  # float32 logits worked on at once
TILE_BYTES = 48 << 20  # `compare`: float32 logits of one model, about eight such arrays live at once
SERIES = 0.25  # |log q − log p| below which e^d − 1 − d is summed as a series: the difference of large terms loses it


@dataclass(frozen=True)
class Comparison:
    """One model against another, position by position; all [T]. Where `finite` is false the figures mean nothing."""

    finite: np.ndarray  # bool: all logits of both
    kld: np.ndarray  # KL(ref ‖ got), nats
    same_top: np.ndarray  # bool: both prefer the same token
    nll_ref: np.ndarray  # −log p of the token that came next
    nll: np.ndarray

    @property
    def p_ref(self) -> np.ndarray:
        """Probability of the token that came next."""
        return np.exp(-self.nll_ref)

    @property
    def p(self) -> np.ndarray:
        return np.exp(-self.nll)


def compare(
    ref_hidden: mx.array,
    ref_head: Linear,
    hidden: mx.array,
    head: Linear,
    targets: Sequence[int],
    tile_bytes: int = TILE_BYTES,
) -> Comparison:
    """Exact divergence over the whole vocabulary from final hidden states, in float32.

    ref_hidden, hidden: [T, H] of each model (H may differ); ref_head, head: their output matrices, in float32 where they
    are packed; targets: T token ids that came next. Peak: about eight times tile_bytes, beside states and heads.
    Raises CheckpointError if the vocabularies or lengths differ.
    """
    sizes = [_vocab_size(ref_head), _vocab_size(head)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(f"vocabularies of {sizes[0]} and {sizes[1]} tokens cannot be compared")
    total = len(targets)
    if ref_hidden.shape[0] != total or hidden.shape[0] != total:
        raise CheckpointError(
            f"states of {ref_hidden.shape[0]} and {hidden.shape[0]} positions cannot be compared at {total} tokens"
        )
    rows = max(1, tile_bytes // (4 * sizes[0]))
    measure = _on_host if BACKEND == "cpu" else _on_device
    parts: list[tuple[np.ndarray, ...]] = []
    for i in range(0, total, rows):
        ref = head_logits(ref_head, ref_hidden[i : i + rows], tile_bytes)
        got = head_logits(head, hidden[i : i + rows], tile_bytes)
        parts.append(measure(ref, got, targets[i : i + rows]))
    columns = [np.concatenate(c) for c in zip(*parts, strict=True)] if parts else [np.zeros(0)] * 5
    ok, d, same, nll_ref, nll_got = columns
    return Comparison(ok.astype(bool), np.where(ok, d, np.nan), same.astype(bool), nll_ref, nll_got)


def first_choices(head: Linear, hidden: mx.array, tile_bytes: int = TILE_BYTES) -> np.ndarray:
    """The most likely token of each position; [T, H] → [T]. −1 where a logit is not finite."""
    rows = max(1, tile_bytes // (4 * _vocab_size(head)))
    out = [np.zeros(0, np.int64)]
    for i in range(0, hidden.shape[0], rows):
        logits = head_logits(head, hidden[i : i + rows], tile_bytes)
        out.append(np.array(mx.where(finite(logits), mx.argmax(logits, axis=-1).astype(mx.int32), -1)))
    return np.concatenate(out)


def head_logits(head: Linear, hidden: mx.array, band_bytes: int = TILE_BYTES) -> mx.array:
    """`head(hidden)` in float32, [T, H] → [T, V], with no more than band_bytes of the matrix unpacked at once."""
    hidden = hidden.astype(mx.float32)
    step = max(1, band_bytes // (4 * hidden.shape[1]))
    size = _vocab_size(head)
    if size <= step:
        return head(hidden).astype(mx.float32)
    out = []
    for start in range(0, size, step):
        out.append(_rows_of(head, start, min(size, start + step))(hidden).astype(mx.float32))
        mx.eval(out[-1])
    return mx.concatenate(out, axis=-1)


def _vocab_size(head: Linear) -> int:
    return head.weight.shape[0]


def _rows_of(head: Linear, start: int, stop: int) -> Linear:
    """The linear that gives outputs start to stop only."""
    weight, bias = head.weight[start:stop], None if head.bias is None else head.bias[start:stop]
    if isinstance(head, Dense):
        return Dense(weight, bias)
    biases = None if head.biases is None else head.biases[start:stop]
    return replace(head, weight=weight, scales=head.scales[start:stop], biases=biases, bias=bias)


def _on_device(ref: mx.array, got: mx.array, targets: Sequence[int]) -> tuple[np.ndarray, ...]:
    """finite, kld, same_top, nll_ref, nll of each position, from logits [T, V]."""
    chosen = mx.array(list(targets), mx.int32)[:, None]
    p, q = _log_softmax(ref), _log_softmax(got)
    found = [
        finite(ref) & finite(got),
        _terms(p, q).sum(axis=-1),
        top1_agreement(ref, got),
        -mx.take_along_axis(p, chosen, axis=-1)[:, 0],
        -mx.take_along_axis(q, chosen, axis=-1)[:, 0],
    ]
    mx.eval(found)
    ok, d, same, nll_ref, nll_got = (np.array(x) for x in found)
    return ok, d.astype(np.float64), same, nll_ref.astype(np.float64), nll_got.astype(np.float64)


@fused
def _terms(p: mx.array, q: mx.array) -> mx.array:
    """Terms whose sum is KL(p ‖ q), from log-probabilities [T, V].

    Σ p (log p − log q) = Σ p (e^d − 1 − d) with d = log q − log p, since both sum to 1. Every term of the second form is
    at least 0 and of second order in d, so that rounding of the logarithms does not drown small divergences.
    """
    d = q - p
    weight = mx.exp(p)
    series = d * d * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720)))))
    return mx.where(mx.abs(d) < SERIES, weight * series, mx.exp(q) - weight - weight * d)


def _on_host(ref: mx.array, got: mx.array, targets: Sequence[int]) -> tuple[np.ndarray, ...]:
    """As `_on_device`, row by row in numpy: a row stays in the cache, and its exp is ten times that of MLX's CPU
    backend."""
    ref_rows, got_rows = np.array(ref), np.array(got)
    rows = [_row(*x) for x in zip(ref_rows, got_rows, targets, strict=True)]
    ok, d, same, nll_ref, nll_got = (np.array(c) for c in zip(*rows, strict=True))
    return ok, d, same, nll_ref, nll_got


def _row(ref: np.ndarray, got: np.ndarray, target: int) -> tuple[bool, float, bool, float, float]:
    if not (np.isfinite(ref).all() and np.isfinite(got).all()):
        return False, np.nan, False, np.nan, np.nan
    first, other = ref.argmax(), got.argmax()
    x, y = ref - ref[first], got - got[other]
    p, q = np.exp(x), np.exp(y)
    mass_p, mass_q = p.sum(dtype=np.float64), q.sum(dtype=np.float64)
    log_p, log_q = np.log(mass_p), np.log(mass_q)
    d = y - x
    d -= np.float32(log_q - log_p)
    terms = d * np.float32(1 / 720)
    for c in (1 / 120, 1 / 24, 1 / 6, 0.5):
        terms += np.float32(c)
        terms *= d
    terms *= d
    terms *= p
    if max(d.max(), -d.min()) >= SERIES:
        direct = q * np.float32(mass_p / mass_q) - p - p * d
        terms = np.where(np.abs(d) < SERIES, terms, direct)
    kl = terms.sum(dtype=np.float64) / mass_p
    return True, kl, bool(first == other), log_p - float(x[target]), log_q - float(y[target])


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
