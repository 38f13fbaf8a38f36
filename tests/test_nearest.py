"""`quant.nearest` gives the bytes of `mx.quantize`, whatever the values."""

import numpy as np
import pytest

from inference.backend import BACKEND, mx
from inference.checkpoint import AFFINE_BITS, AFFINE_GROUPS
from quant import nearest

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="the bytes of a GPU's mx.quantize are not a CPU's")


def patterns(x: np.ndarray) -> np.ndarray:
    return np.array(mx.array(x.astype(np.float32)).astype(mx.bfloat16).view(mx.uint16))


def expect_equal(weights: np.ndarray, group: int) -> None:
    found = nearest.quantize(weights, group, AFFINE_BITS)
    assert found is not None
    for bits, arrays in zip(AFFINE_BITS, found, strict=True):
        theirs = mx.quantize(mx.array(weights).view(mx.bfloat16), group, bits)
        for ours, their in zip(arrays, (theirs[0], *(x.view(mx.uint16) for x in theirs[1:])), strict=True):
            np.testing.assert_array_equal(ours, np.array(their), f"{bits} bits in groups of {group}")


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.mark.parametrize("group", AFFINE_GROUPS)
def test_random_matrices_of_any_scale(rng, group):
    """Several blocks and a torn last one; rows from 1e-12 to 1e20 in size."""
    rows = 3 * nearest.BLOCK // 1024 + 7
    expect_equal(patterns(rng.standard_normal((rows, 1024)) * np.logspace(-12, 20, rows)[:, None]), group)


@pytest.mark.parametrize("group", AFFINE_GROUPS)
def test_groups_that_are_constant_tiny_one_sided_or_tied(rng, group):
    """Each row one kind of group: the edge is nought, the scale is at its least, or values lie halfway between codes."""
    wide = (1, 2 * group)
    rows = [
        np.zeros(wide),
        np.full(wide, -0.0),
        np.where(rng.random(wide) < 0.5, 0.0, -0.0),
        np.full(wide, 0.7), np.full(wide, -0.7),
        rng.random(wide) + 3, -rng.random(wide) - 3,
        rng.random(wide) * 1e-8, -rng.random(wide) * 1e-8, rng.standard_normal(wide) * 5e-8,
        rng.standard_normal(wide) * 1e-6, rng.standard_normal(wide) * 1e-39,
        rng.choice([-1.0, 1.0], wide),  # |min| = |max|
        rng.integers(-8, 9, wide) / 2, rng.integers(0, 511, wide) / 2, rng.integers(-3, 4, wide) * 0.5,
        np.where(np.arange(2 * group) == 3, -100.0, rng.standard_normal(wide) * 0.01),
    ]  # fmt: skip
    expect_equal(patterns(np.concatenate(rows)), group)


def test_every_bfloat16_below_the_limit_beside_every_other_size(rng):
    """All finite patterns below the limit, shuffled, and sorted: neighbours of like size, of either sign."""
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    values = (every.astype(np.uint32) << 16).view(np.float32)
    good = every[np.isfinite(values) & (np.abs(values) < nearest.LIMIT)]
    good = good[: len(good) // 1024 * 1024]
    order = np.argsort((good.astype(np.uint32) << 16).view(np.float32), kind="stable")
    for weights in (rng.permutation(good), good[order]):
        expect_equal(weights.reshape(-1, 1024), 64)


def test_stacked_experts_keep_their_shape(rng):
    weights = patterns(rng.standard_normal((3, 4, 128)))
    (codes, scales, biases), *_ = nearest.quantize(weights, 64, (4,)) or []
    assert (codes.shape, scales.shape, biases.shape) == ((3, 4, 16), (3, 4, 2), (3, 4, 2))
    np.testing.assert_array_equal(codes, np.array(mx.quantize(mx.array(weights).view(mx.bfloat16), 64, 4)[0]))


def test_values_that_float32_has_no_room_for_are_left_to_mlx(rng):
    from inference.checkpoint import QuantSpec
    from quant.solve import solve_together

    weights = patterns(rng.standard_normal((8, 128)))
    weights[3, 5] = 0x7F00  # 1.7e38
    assert nearest.quantize(weights, 64, (4, 8)) is None
    for bits, arrays in zip((4, 8), solve_together(weights, [QuantSpec(4, 64), QuantSpec(8, 64)]), strict=True):
        for ours, their in zip(arrays, mx.quantize(mx.array(weights).view(mx.bfloat16), 64, bits), strict=True):
            assert mx.array_equal(ours, their)
