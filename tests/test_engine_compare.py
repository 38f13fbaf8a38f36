"""Divergence of whole corpora from final hidden states: exact, bounded, and the same on host and device."""

from __future__ import annotations

import numpy as np
import pytest

from inference import divergence
from inference.backend import mx
from inference.checkpoint import QuantSpec
from inference.divergence import compare, first_choices, head_logits
from inference.errors import CheckpointError
from inference.linear import Dense, Packed
from inference.load import hidden_states_streamed, load, load_head

H, V, T = 64, 300, 37


@pytest.fixture(scope="module")
def case():
    """(hidden of the base, its head, hidden of another, targets) as float32 numpy."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((T, H)).astype(np.float32)
    w = rng.standard_normal((V, H)).astype(np.float32) * 0.4
    return x, w, x + 0.1 * rng.standard_normal((T, H)).astype(np.float32), rng.integers(0, V, T).tolist()


def expected(x, w, y, v, targets):
    """Straightforward, in float64: KL, same top, −log p of the targets for both."""

    def log_softmax(z):
        z = z - z.max(axis=-1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))

    p, q = log_softmax(x.astype(np.float64) @ w.T), log_softmax(y.astype(np.float64) @ v.T)
    at = np.arange(len(targets)), targets
    return (np.exp(p) * (p - q)).sum(axis=-1), p.argmax(-1) == q.argmax(-1), -p[at], -q[at]


@pytest.mark.parametrize("tile", [4 * V, 4 * V * 10, 1 << 20], ids=["a row", "ten rows", "all"])
def test_it_is_the_textbook_sum_however_it_is_tiled(case, tile):
    x, w, y, targets = case
    found = compare(mx.array(x), Dense(mx.array(w)), mx.array(y), Dense(mx.array(w)), targets, tile)
    kld, same, nll_ref, nll = expected(x, w, y, w, targets)
    assert found.finite.all()
    np.testing.assert_allclose(found.kld, kld, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(found.same_top, same)
    np.testing.assert_allclose(found.nll_ref, nll_ref, atol=2e-5)
    np.testing.assert_allclose(found.nll, nll, atol=2e-5)
    np.testing.assert_allclose(found.p, np.exp(-nll), rtol=5e-5)


def test_a_packed_head_gives_what_its_unpacked_weights_give(case):
    x, w, _, targets = case
    parts = mx.quantize(mx.array(w), 64, 4)
    head = Packed(*parts, QuantSpec(4, 64), mx.float32)
    unpacked = np.array(mx.dequantize(*parts, 64, 4))
    found = compare(mx.array(x), Dense(mx.array(w)), mx.array(x), head, targets, 4 * V * 20)
    np.testing.assert_allclose(found.kld, expected(x, w, x, unpacked, targets)[0], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(np.array(head_logits(head, mx.array(x), 4 * H * 50)), x @ unpacked.T, atol=1e-4)
    np.testing.assert_array_equal(first_choices(head, mx.array(x), 4 * V * 5), (x @ unpacked.T).argmax(-1))


def test_host_and_device_agree(case):
    x, w, y, targets = case
    ref = mx.concatenate([mx.array(x @ w.T), mx.array(x @ w.T) * 9])
    got = mx.concatenate([mx.array(y @ w.T), -mx.array(y @ w.T)])  # the second half: far apart, in every term
    for host, device in zip(
        *(f(ref, got, targets * 2) for f in (divergence._on_host, divergence._on_device)), strict=True
    ):
        np.testing.assert_allclose(host, device, rtol=1e-4, atol=2e-6)


def test_a_model_against_itself_is_exactly_zero(case):
    x, w, _, targets = case
    found = compare(mx.array(x), Dense(mx.array(w)), mx.array(x), Dense(mx.array(w)), targets)
    assert (found.kld == 0).all()
    assert found.same_top.all()
    assert (found.nll == found.nll_ref).all()


def test_rounding_does_not_drown_a_small_divergence(case):
    """The plain sum has an error of about 1e-7 a position; here a divergence of 1e-11 keeps its first digits."""
    x, w, _, targets = case
    logits = (x @ w.T).astype(np.float32)
    step = np.where(np.arange(V) % 2, 2.0**-18, -(2.0**-18)).astype(np.float32)  # exact beside logits below 16
    other = logits + step
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    d = other.astype(np.float64) - logits
    truth = np.log((p * np.exp(d)).sum(-1)) - (p * d).sum(-1)
    found = divergence._on_host(mx.array(logits), mx.array(other), targets)[1]
    assert truth.max() < 1e-10
    np.testing.assert_allclose(found, truth, rtol=0.02, atol=1e-13)
    assert (found >= 0).all()


def test_positions_that_are_not_finite_are_named_and_have_no_divergence(case):
    x, w, _, targets = case
    broken = x.copy()
    broken[3] = np.nan
    broken[5, 0] = np.inf
    for a, b in ((x, broken), (broken, x)):
        found = compare(mx.array(a), Dense(mx.array(w)), mx.array(b), Dense(mx.array(w)), targets)
        assert np.flatnonzero(~found.finite).tolist() == [3, 5]
        assert np.isnan(found.kld[[3, 5]]).all()


def test_what_cannot_be_compared_is_refused(case):
    x, w, _, targets = case
    head, short = Dense(mx.array(w)), Dense(mx.array(w[:-1]))
    with pytest.raises(CheckpointError, match="vocabularies of 300 and 299"):
        compare(mx.array(x), head, mx.array(x), short, targets)
    with pytest.raises(CheckpointError, match="37 and 36 positions"):
        compare(mx.array(x), head, mx.array(x[:-1]), head, targets)


def test_nothing_is_compared_with_nothing():
    head, none = Dense(mx.ones((4, 8))), mx.zeros((0, 8))
    assert len(compare(none, head, none, head, []).kld) == 0


def test_the_streamed_pass_in_pieces_gives_the_same_states(tiny):
    tokens = mx.array([[5, 9, 2, 7, 11, 3, 8, 6, 4, 10] * 10])
    seen = []
    whole = hidden_states_streamed(tiny, [tokens], compute=mx.float32, after_layer=seen.append)[0]
    pieces = hidden_states_streamed(tiny, [tokens], compute=mx.float32, step=48)[0]
    loaded = load(tiny, mx.float32).hidden(tokens)
    assert seen == [0, 1, 2, 3]
    assert whole.dtype == pieces.dtype == mx.float32
    for other in (pieces, loaded):
        np.testing.assert_allclose(np.array(whole), np.array(other), atol=2e-4)


def test_all_weights_are_widened_where_float32_is_asked_for(tiny, built):
    model = load(built / "build/Q4_K_XL", mx.float32)
    assert model.forward(mx.array([[1, 2, 3]])).dtype == mx.float32
    head = load_head(built / "build/Q4_K_XL", mx.float32)
    assert isinstance(head, Packed)
    assert head.scales.dtype == head.dtype == mx.float32
    assert load_head(tiny, mx.float32).weight.dtype == mx.float32
