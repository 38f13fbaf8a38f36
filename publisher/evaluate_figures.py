"""Figures of a comparison with BF16, and how sure they are: position by position in, `Divergence` out. Pure, numpy only.

Tokens of one window depend on each other, so an interval resamples whole windows (or conversations), not positions: a
cluster bootstrap of the ratio Σ sums / Σ positions. With few windows the plain percentile interval is too narrow; its
percentiles are moved out by what Student's t and the factor n / (n − 1) ask for (Hesterberg, "What Teachers Should Know
About the Bootstrap", 2015, the expanded percentile interval). Seeded, so that the same values give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from .schema import Divergence, Greedy, Interval

if TYPE_CHECKING:
    from inference.divergence import Comparison

RESAMPLES = 4000
TAIL_RESAMPLES = 1000  # of the percentiles, which cost a partition each
LEVEL = 0.95
SEED = 20_260_701


@dataclass(frozen=True)
class Paired:
    """One model's mean KL minus another's over the same windows."""

    corpus: str
    difference: Interval
    excludes_zero: bool
    floor: float | None  # upper end of the control row: what two runs of BF16 differ by
    above_floor: bool | None


def divergence(found: Comparison, window_sizes: Sequence[int], corpus: str, teacher: str, context: int) -> Divergence:
    """window_sizes: scored positions of each window, in the order of `found`."""
    owner = np.repeat(np.arange(len(window_sizes)), window_sizes)
    ok = found.finite
    n = len(window_sizes)
    owner, kld = owner[ok], found.kld[ok]
    dp2 = (found.p[ok] - found.p_ref[ok]) ** 2
    change = found.nll[ok] - found.nll_ref[ok]
    same = found.same_top[ok].astype(np.float64)
    count = np.bincount(owner, minlength=n).astype(np.float64)
    sums = {
        name: np.bincount(owner, v, minlength=n)
        for name, v in (("kld", kld), ("dp2", dp2), ("ln", change), ("same", same))
    }
    known = bool(len(kld))
    root = ratio_interval(sums["dp2"], count)
    return Divergence(
        corpus=corpus,
        teacher=teacher,
        windows=n,
        context=context,
        positions=len(ok),
        nonfinite=int((~ok).sum()),
        kld=ratio_interval(sums["kld"], count),
        kld_median=_digits(float(np.median(kld))) if known else None,
        kld_p99=_digits(float(np.percentile(kld, 99))) if known else None,
        kld_p999=percentile_interval(kld, owner, n, 99.9),
        kld_max=_digits(float(kld.max())) if known else None,
        top1=ratio_interval(sums["same"], count),
        dp_rms=root
        and Interval(
            value=_digits(root.value**0.5),
            low=_digits(max(root.low, 0.0) ** 0.5),
            high=_digits(max(root.high, 0.0) ** 0.5),
        ),
        ln_ppl_ratio=ratio_interval(sums["ln"], count),
        ppl=_exp_mean(found.nll[ok]),
        ppl_base=_exp_mean(found.nll_ref[ok]),
        window_positions=[int(c) for c in count],
        window_kld=_means(sums["kld"], count),
        window_top1=_means(sums["same"], count),
        window_ln_ratio=_means(sums["ln"], count),
    )


def ratio_interval(sums: np.ndarray, counts: np.ndarray) -> Interval | None:
    """Σ sums / Σ counts over windows and its interval; None if nothing was counted."""
    if not counts.sum():
        return None
    value = float(sums.sum() / counts.sum())
    weights = _weights(len(counts), RESAMPLES)
    low, high = _expanded(_ratio(weights, sums, counts), len(counts))
    return Interval(value=_digits(value), low=_digits(min(low, value)), high=_digits(max(high, value)))


def percentile_interval(values: np.ndarray, owner: np.ndarray, windows: int, percent: float) -> Interval | None:
    """A percentile (linear interpolation, as llama.cpp has it) of values that belong to windows, and its interval."""
    if not len(values):
        return None
    value = float(np.percentile(values, percent))
    order = np.argsort(values)
    values, owner = values[order], owner[order]
    found = []
    for row in _weights(windows, TAIL_RESAMPLES):
        # np.percentile of each value as often as its window was drawn, without making that: it is sorted once for all
        upto = np.cumsum(row[owner])
        if upto[-1]:
            place = (upto[-1] - 1) * (percent / 100)
            below = int(place)
            a, b = values[np.searchsorted(upto, [below, min(below + 1, upto[-1] - 1)], side="right")]
            found.append(a + (b - a) * (place - below))
    low, high = _expanded(np.array(found), windows)
    return Interval(value=_digits(value), low=_digits(min(low, value)), high=_digits(max(high, value)))


def paired(a: Divergence, b: Divergence, control: Divergence | None) -> Paired | None:
    """a minus b, by windows; None if they are not of the same windows and teacher, or nothing was counted."""
    if a.teacher != b.teacher or a.kld is None or b.kld is None:
        return None
    weights = _weights(a.windows, RESAMPLES)
    both = []
    for d in (a, b):
        counts = np.array(d.window_positions, np.float64)
        sums = np.array([x or 0.0 for x in d.window_kld]) * counts
        both.append((sums, counts))
    value = float(np.subtract(*(s.sum() / c.sum() for s, c in both)))
    low, high = _expanded(_ratio(weights, *both[0]) - _ratio(weights, *both[1]), a.windows)
    difference = Interval(value=_digits(value), low=_digits(min(low, value)), high=_digits(max(high, value)))
    floor = control.kld.high if control and control.kld else None
    excludes = difference.low > 0 or difference.high < 0
    return Paired(a.corpus, difference, excludes, floor, None if floor is None else abs(value) > floor)


def greedy(agreed: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Greedy:
    """agreed: tokens before the first difference; lengths: of BF16's continuations."""
    return Greedy(
        prompts=len(agreed),
        max_tokens=max_tokens,
        agreed=list(agreed),
        lengths=list(lengths),
        mean=_digits(float(np.mean(agreed))),
        median=float(np.median(agreed)),
        identical=_digits(float(np.mean([a == n for a, n in zip(agreed, lengths, strict=True)]))),
    )


@lru_cache(maxsize=4)  # cards compare every pair
def _weights(windows: int, resamples: int) -> np.ndarray:
    """How often each window was drawn, [resamples, windows]."""
    rng = np.random.default_rng([SEED, windows])
    return rng.multinomial(windows, np.full(windows, 1 / windows), size=resamples).astype(np.float64)


def _ratio(weights: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    drawn = weights @ counts
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ sums / drawn)[drawn > 0]


def _expanded(samples: np.ndarray, n: int) -> tuple[float, float]:
    normal = NormalDist()
    tail = normal.cdf(-_student(n - 1) * math.sqrt(n / (n - 1)))
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def _student(df: int) -> float:
    """Quantile of Student's t at LEVEL, two-sided (Cornish-Fisher; Abramowitz & Stegun 26.7.5; within 0.5 % from 3 on)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(t / df ** (i + 1) for i, t in enumerate(terms))


def _means(sums: np.ndarray, counts: np.ndarray) -> list[float | None]:
    return [_digits(float(s / c)) if c else None for s, c in zip(sums, counts, strict=True)]


def _exp_mean(nll: np.ndarray) -> float | None:
    return _digits(math.exp(min(float(nll.mean()), 700.0))) if len(nll) else None


def _digits(x: float) -> float:
    return float(f"{x:.6g}")
