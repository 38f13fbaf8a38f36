"""KL divergence and its companions against numbers computed in double precision."""

import numpy as np
import pytest

from inference import divergence
from inference.backend import mx
from inference.divergence import finite, kld, nll, nonfinite_count, top1_agreement
from inference.errors import CheckpointError


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    ref = rng.normal(0, 4, (50, 1000)).astype(np.float32)
    return ref, ref + rng.normal(0, 0.3, ref.shape).astype(np.float32)


def test_kld_is_exact_in_float32_whatever_the_band(logits, monkeypatch):
    ref, got = logits
    p, q = log_softmax(ref.astype(np.float64)), log_softmax(got.astype(np.float64))
    expected = (np.exp(p) * (p - q)).sum(axis=1)
    for band in (1, 4 * 1000 * 7, 1 << 30):
        monkeypatch.setattr(divergence, "BAND_BYTES", band)
        assert np.abs(np.array(kld(mx.array(ref), mx.array(got))) - expected).max() < 2e-6


def test_kld_of_equal_logits_is_zero_and_shifts_do_not_matter(logits):
    ref = mx.array(logits[0])
    assert mx.abs(kld(ref, ref)).max().item() == 0
    assert mx.abs(kld(ref, ref + 100)).max().item() < 1e-5
    assert kld(ref[:0], ref[:0]).shape == (0,)


def test_kld_is_directed():
    ref, got = mx.array([[0.0, 0.0]]), mx.array([[3.0, 0.0]])
    assert abs(kld(ref, got).item() - kld(got, ref).item()) > 0.1


def test_kld_computes_bfloat16_logits_in_float32(logits):
    ref, got = (mx.array(x).astype(mx.bfloat16) for x in logits)
    assert mx.array_equal(kld(ref, got), kld(ref.astype(mx.float32), got.astype(mx.float32)))


def test_positions_that_are_not_finite_are_nan_and_counted():
    got = mx.array([[1.0, 2.0], [float("nan"), 0.0], [float("inf"), 0.0], [-float("inf"), 0.0]])
    assert finite(got).tolist() == [True, False, False, False]
    assert nonfinite_count(got) == 3
    assert mx.isnan(kld(mx.zeros((4, 2)), got)).tolist() == [False, True, True, True]


def test_kld_refuses_another_vocabulary():
    with pytest.raises(CheckpointError, match="cannot be compared"):
        kld(mx.zeros((2, 3)), mx.zeros((2, 4)))


def test_top1_agreement_and_nll():
    a, b = mx.array([[0.0, 1.0], [2.0, 1.0]]), mx.array([[0.0, 5.0], [0.0, 1.0]])
    assert top1_agreement(a, b).tolist() == [True, False]
    expected = np.log(1 + np.exp(np.array([-1.0, 1.0])))
    assert np.allclose(np.array(nll(a, mx.array([1, 1]))), expected, atol=1e-6)
