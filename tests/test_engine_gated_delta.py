"""The chunked delta rule against the token-by-token one, at the lengths where chunks begin and end."""

import random

import pytest

from inference import gated_delta as gd
from inference.backend import mx
from inference.errors import InputError

HK, HV, DK, DV = 2, 4, 32, 48
TOLERANCE = 2e-5  # float32; values of y are about 1


def inputs(t: int, seed: int = 0, *, same_key: bool = False, no_decay: bool = False):
    mx.random.seed(seed)
    k = mx.random.normal((1, 1 if same_key else t, HK, DK))
    k = mx.broadcast_to(k / mx.linalg.norm(k, axis=-1, keepdims=True), (1, t, HK, DK))
    q = mx.random.normal((1, t, HK, DK)) * DK**-0.5
    v = mx.random.normal((1, t, HV, DV))
    g = mx.zeros((1, t, HV)) if no_decay else -3 * mx.random.uniform(shape=(1, t, HV)) ** 4
    beta = mx.ones((1, t, HV)) if no_decay else mx.random.uniform(shape=(1, t, HV))
    state = 0.3 * mx.random.normal((1, HV, DV, DK))
    return q, k, v, g, beta, state


def rule(q, k, v, g, beta, state, form="chunked"):
    return gd.gated_delta(mx.stack([q, k], axis=2), v, g, beta, state, form)


def assert_close(got, expected, tolerance=TOLERANCE):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert mx.abs(a - b).max().item() <= tolerance


@pytest.mark.parametrize("t", [1, 2, 63, 64, 65, 127, 129, 1000])
def test_chunked_equals_token_by_token(t):
    x = inputs(t)
    assert_close(gd.chunked(*x), gd.reference(*x))
    assert_close(rule(*x), gd.reference(*x))


@pytest.mark.parametrize("no_decay", [False, True])
def test_chunked_stays_accurate_when_keys_repeat(no_decay):
    x = inputs(129, same_key=True, no_decay=no_decay)
    assert_close(gd.chunked(*x), gd.reference(*x), 1e-4)


@pytest.mark.parametrize("walk", [gd._by_chunks, gd._by_transitions])
def test_both_walks_from_chunk_to_chunk_are_the_rule(walk, monkeypatch):
    """The CPU takes one, GPUs the other."""
    monkeypatch.setattr(gd, "_by_chunks", walk)
    monkeypatch.setattr(gd, "_by_transitions", walk)
    for x in (inputs(129), inputs(129, same_key=True, no_decay=True)):
        assert_close(gd.chunked(*x), gd.reference(*x), 1e-4)


def test_padded_tokens_change_nothing():
    """Rate 0 and log decay 0, as `chunked` pads its last chunk and as a caller may pad a batch."""
    q, k, v, g, beta, state = inputs(70)
    padded = [mx.pad(x, [(0, 0), (0, 30)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, g, beta)]
    y, s = gd.chunked(*padded, state)
    assert_close((y[:, :70], s), gd.reference(q, k, v, g, beta, state))


def test_lapacks_inverse_is_the_blocks_and_has_its_derivative():
    mx.random.seed(3)
    a, cotangent = mx.random.normal((2, gd.CHUNK, gd.CHUNK)) * 0.1, mx.random.normal((2, gd.CHUNK, gd.CHUNK))
    (got,), (got_a,) = mx.vjp(gd.unit_lower_inverse, [a], [cotangent])
    (expected,), (expected_a,) = mx.vjp(gd.block_inverse, [a], [cotangent])
    assert mx.abs(got - expected).max().item() < 1e-5
    assert mx.abs(got_a - expected_a).max().item() < 1e-4


def test_decays_have_a_derivative_where_a_gate_is_shut():
    g = mx.concatenate([-mx.random.uniform(shape=(2, gd.CHUNK - 1)), mx.full((2, 1), -500.0)], axis=-1)
    cotangent = mx.random.normal((2, gd.CHUNK, gd.CHUNK)) * mx.tri(gd.CHUNK, gd.CHUNK, 0)

    def written_out(g):
        total = mx.cumsum(g, axis=-1)
        return mx.exp(mx.where(mx.tri(gd.CHUNK, gd.CHUNK, 0) > 0, total[..., :, None] - total[..., None, :], 0))

    got, expected = mx.vjp(gd.decays, [g], [cotangent]), mx.vjp(written_out, [g], [cotangent])
    for a, b in zip(got, expected, strict=True):
        assert mx.abs(a[0] - b[0]).max().item() < 1e-4


def test_mlx_kernel_can_be_chosen_and_differentiated(monkeypatch):
    q, k, v, g, beta, state = inputs(70)
    assert_close(rule(q, k, v, g, beta, state, "kernel"), gd.reference(q, k, v, g, beta, state))
    ones = [mx.ones(v.shape), mx.ones(state.shape)]
    by_kernel = mx.vjp(lambda *x: rule(*x, "kernel"), [q, k, v, g, beta, state], ones)[1]
    by_chunks = mx.vjp(gd.reference, [q, k, v, g, beta, state], ones)[1]
    assert_close(by_kernel, by_chunks, 1e-3)
    monkeypatch.setenv("PUBLISH_DELTA", "kernel")
    assert gd.chosen_form() == "kernel"
    monkeypatch.setenv("PUBLISH_DELTA", "fast")
    with pytest.raises(InputError, match="PUBLISH_DELTA=fast: expected chunked or kernel"):
        gd.chosen_form()


def test_inverse_of_the_worst_triangle_is_exact():
    """All ones: repeated squaring needs numbers of 1e17 here, the blocks need 1."""
    a = mx.tri(gd.CHUNK, gd.CHUNK, -1)
    inverse = gd.block_inverse(a)
    assert mx.array_equal((a + mx.eye(gd.CHUNK)) @ inverse, mx.eye(gd.CHUNK))
    assert mx.abs(inverse).max().item() == 1


def test_chunked_stays_finite_when_the_gate_closes():
    q, k, v, _, beta, state = inputs(100)
    g = mx.full((1, 100, HV), -500.0)
    got = gd.chunked(q, k, v, g, beta, state)
    assert_close(got, gd.reference(q, k, v, g, beta, state))


def test_split_at_any_point_gives_the_same_state():
    q, k, v, g, beta, state = inputs(150, seed=1)
    whole = gd.chunked(q, k, v, g, beta, state)
    for at in [1, 64, 149, *random.Random(0).sample(range(2, 149), 5)]:
        y1, s = rule(*(x[:, :at] for x in (q, k, v, g, beta)), state)
        y2, s = rule(*(x[:, at:] for x in (q, k, v, g, beta)), s)
        assert_close((mx.concatenate([y1, y2], axis=1), s), whole)


def test_mlx_kernel_computes_the_same_rule():
    """An independent implementation; its state has our layout."""
    q, k, v, g, beta, state = inputs(3)
    assert_close(
        tuple(mx.fast.gated_delta_update(q, k, v, mx.exp(g), beta, state)), gd.reference(q, k, v, g, beta, state)
    )
