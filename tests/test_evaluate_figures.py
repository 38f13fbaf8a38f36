"""Figures and intervals of a comparison: what they are, and that the intervals mean what they say."""

from __future__ import annotations

import numpy as np
import pytest

from inference.divergence import Comparison
from publisher import evaluate_figures as figures
from publisher.evaluate_figures import divergence, greedy, paired, ratio_interval
from publisher.schema import Divergence

TEACHER = "a" * 64


def comparison(kld: np.ndarray, **change: np.ndarray) -> Comparison:
    n = len(kld)
    fields = {
        "finite": np.ones(n, bool), "kld": kld, "same_top": np.ones(n, bool), "nll_ref": np.full(n, 2.0),
        "nll": np.full(n, 2.0) + kld,
    }  # fmt: skip
    return Comparison(**(fields | change))


def measured(kld: np.ndarray, sizes: list[int], **change: np.ndarray) -> Divergence:
    return divergence(comparison(kld, **change), sizes, "text", TEACHER, 512)


def windows(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Positions of a window share its level: [count × size]."""
    level = rng.gamma(4.0, 0.25, (count, 1))
    return (level * rng.exponential(1.0, (count, size))).reshape(-1)


def test_the_interval_covers_the_truth_as_often_as_it_says_though_positions_of_a_window_depend_on_each_other():
    rng = np.random.default_rng(1)
    hits = alone = 0
    for _ in range(300):
        kld = windows(rng, 24, 50)
        sums = kld.reshape(24, 50).sum(axis=1)
        found = ratio_interval(sums, np.full(24, 50.0))
        assert found
        hits += found.low <= 1 <= found.high
        error = 1.96 * kld.std() / len(kld) ** 0.5  # as if all were independent
        alone += abs(kld.mean() - 1) <= error
    assert 0.91 <= hits / 300 <= 0.99
    assert alone / 300 < 0.75


def test_a_window_counts_by_its_positions():
    found = measured(np.array([1.0, 1, 1, 5]), [3, 1])
    assert found.kld
    assert found.kld.value == 2
    assert found.window_kld == [1, 5]
    assert found.window_positions == [3, 1]


def test_the_same_values_give_the_same_interval():
    kld = windows(np.random.default_rng(2), 10, 20)
    assert measured(kld, [20] * 10) == measured(kld, [20] * 10)


def test_percentiles_interpolate_as_llama_cpp_does():
    kld = np.random.default_rng(3).exponential(1.0, 1000)
    found = measured(kld, [100] * 10)
    rows = np.sort(kld)
    for share, value in (
        (0.5, found.kld_median),
        (0.99, found.kld_p99),
        (0.999, found.kld_p999 and found.kld_p999.value),
    ):
        at = share * (len(rows) - 1)
        low = int(at)
        assert value == pytest.approx(rows[low] + (at - low) * (rows[low + 1] - rows[low]), rel=1e-5)
    assert found.kld_max == pytest.approx(rows[-1], rel=1e-5)
    assert found.kld_p999
    assert found.kld_p999.low <= found.kld_p999.value <= found.kld_p999.high <= rows[-1] * 1.00001


def test_the_other_figures_are_what_their_names_say():
    nll_ref, nll = np.array([1.0, 2, 3, 4]), np.array([1.1, 2.1, 3.1, 4.5])
    found = measured(np.zeros(4), [2, 2], nll_ref=nll_ref, nll=nll, same_top=np.array([True, False, True, True]))
    assert found.ppl == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert found.ppl_base == pytest.approx(np.exp(2.5), rel=1e-5)
    assert found.ln_ppl_ratio
    assert found.ln_ppl_ratio.value == pytest.approx((nll - nll_ref).mean(), rel=1e-5)
    assert found.dp_rms
    assert found.dp_rms.value == pytest.approx(((np.exp(-nll) - np.exp(-nll_ref)) ** 2).mean() ** 0.5, rel=1e-5)
    assert found.top1
    assert found.top1.value == 0.75


def test_positions_that_are_not_finite_are_counted_and_left_out():
    kld, ok = np.array([1.0, np.nan, 3, 3]), np.array([True, False, True, True])
    found = measured(kld, [2, 2], finite=ok)
    assert found.kld
    assert (found.kld.value, found.nonfinite, found.positions) == (pytest.approx(7 / 3, rel=1e-5), 1, 4)
    assert found.window_positions == [1, 2]
    none = measured(np.full(4, np.nan), [2, 2], finite=np.zeros(4, bool))
    assert none.kld is none.ppl is none.top1 is none.kld_p999 is None
    assert none.nonfinite == 4


def test_paired_windows_tell_apart_what_the_intervals_do_not():
    rng = np.random.default_rng(4)
    kld = windows(rng, 24, 50)
    a, b = measured(1.02 * kld, [50] * 24), measured(kld, [50] * 24)
    assert a.kld
    assert b.kld
    assert a.kld.low < b.kld.high
    floor = measured(kld * 1e-9, [50] * 24)
    found = paired(a, b, floor)
    assert found
    assert found.excludes_zero
    assert found.above_floor
    assert found.difference.low <= 0.02 * kld.mean() <= found.difference.high
    noise = paired(measured(kld + 1e-3 * rng.standard_normal(len(kld)), [50] * 24), b, measured(kld, [50] * 24))
    assert noise
    assert not noise.excludes_zero
    assert noise.above_floor is False


def test_figures_of_another_teacher_are_not_compared():
    d = measured(np.ones(4), [2, 2])
    assert paired(d, d.model_copy(update={"teacher": "b" * 64}), None) is None


@pytest.mark.parametrize(("df", "t"), [(3, 3.1824), (4, 2.7764), (9, 2.2622), (23, 2.0687), (1000, 1.9623)])
def test_students_t(df, t):
    assert figures._student(df) == pytest.approx(t, rel=0.005)


def test_greedy_figures():
    found = greedy([3, 8, 8, 0], [8, 8, 8, 8], 8)
    assert (found.mean, found.median, found.identical) == (4.75, 5.5, 0.5)
