"""AWQ folds: the vectors, where they apply, and that a folded model computes the same."""

import json
from dataclasses import replace

import numpy as np
import pytest
from engine_checkpoints import write_moe
from quant_jobs import TINY_IMATRIX, job, load_tensors, plans

from inference.backend import mx
from inference.errors import InputError
from inference.load import load
from quant import qwen3_5
from quant.awq import Fold, folds, scale
from quant.convert import convert, unquantized
from quant.imatrix import Imatrix, gguf_shapes, read_imatrix, write_imatrix

LAYER = "language_model.model.layers."
TOKENS = [[5, 900, 17, 2048, 77, 31, 8, 1999, 640, 3]]


@pytest.fixture(scope="module")
def imatrix(tiny) -> Imatrix:
    return read_imatrix(TINY_IMATRIX, json.loads((tiny / "config.json").read_text()))


def tiny_folds(tiny, imatrix, exponent=1.0):
    return folds(plans(tiny, 4, awq=True), imatrix, exponent, qwen3_5.AWQ_GROUPS)


def test_scale_is_the_root_mean_square_centred_between_its_extremes():
    s = scale(np.array([4.0, 0.0, 16.0]), 1.0)
    raw = np.array([2.0, 1e-4, 4.0])
    np.testing.assert_allclose(s, raw / np.sqrt(4.0 * 1e-4), rtol=1e-6)
    assert s.dtype == np.float32
    assert s.max() * s.min() == pytest.approx(1, rel=1e-5)


def test_exponent_zero_folds_nothing_and_a_half_takes_the_square_root(tiny, imatrix):
    assert tiny_folds(tiny, imatrix, 0.0) == {}
    name = LAYER + "0.mlp.down_proj.weight"
    whole, half = (tiny_folds(tiny, imatrix, e)[name].columns for e in (1.0, 0.5))
    np.testing.assert_allclose(half**2, whole, rtol=1e-4)


def test_each_group_scales_its_members_and_divides_what_feeds_them(tiny, imatrix):
    f = tiny_folds(tiny, imatrix)
    gate, up, down = (f[f"{LAYER}0.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
    post = f[LAYER + "0.post_attention_layernorm.weight"]
    expected = scale(np.maximum(*(imatrix.importance[f"{LAYER}0.mlp.{n}_proj"] for n in ("gate", "up"))), 1.0)
    assert (gate.columns == expected).all()
    assert (up.columns == expected).all()
    assert gate.rows is None
    assert (up.rows == np.float32(1) / down.columns).all()
    assert (post.rows == np.float32(1) / gate.columns).all()
    assert post.columns is None
    for layer, names in (
        (0, ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")),
        (3, ("q_proj", "k_proj", "v_proj")),
    ):
        kind = "linear_attn" if layer == 0 else "self_attn"
        norm = f[f"{LAYER}{layer}.input_layernorm.weight"]
        for n in names:
            assert (norm.rows == np.float32(1) / f[f"{LAYER}{layer}.{kind}.{n}.weight"].columns).all()
    left = [n for n in f if n.endswith(("o_proj.weight", "out_proj.weight", "lm_head.weight", "embed_tokens.weight"))]
    assert left == []
    assert len(f) == 3 * 9 + 8


def test_a_group_without_statistics_is_left_alone(tiny, imatrix):
    gone = {m: v for m, v in imatrix.importance.items() if m != LAYER + "3.self_attn.k_proj"}
    f = tiny_folds(tiny, replace(imatrix, importance=gone))
    assert LAYER + "3.input_layernorm.weight" not in f
    assert LAYER + "3.self_attn.q_proj.weight" not in f
    one = {m: v for m, v in imatrix.importance.items() if m != LAYER + "3.mlp.up_proj"}
    assert LAYER + "3.mlp.gate_proj.weight" in tiny_folds(tiny, replace(imatrix, importance=one))


def test_a_group_that_is_planned_without_awq_is_left_alone(tiny, imatrix):
    planned = [replace(p, awq=p.awq and not p.target.module.endswith("down_proj")) for p in plans(tiny, 4, awq=True)]
    f = folds(planned, imatrix, 1.0, qwen3_5.AWQ_GROUPS)
    assert f[LAYER + "0.mlp.up_proj.weight"].rows is None
    assert LAYER + "0.mlp.down_proj.weight" not in f


def test_members_of_a_group_must_agree_on_awq(tiny, imatrix):
    planned = [
        replace(p, awq=p.awq and not p.target.module.endswith("0.mlp.up_proj")) for p in plans(tiny, 4, awq=True)
    ]
    with pytest.raises(InputError) as e:
        folds(planned, imatrix, 1.0, qwen3_5.AWQ_GROUPS)
    assert str(e.value) == (
        f"{LAYER}0.mlp.gate_proj has awq and {LAYER}0.mlp.up_proj has not, but both read post_attention_layernorm: "
        "give their rules the same awq"
    )


def test_experts_and_their_norm_stay_unscaled(tmp_path):
    base = write_moe(tmp_path / "moe")
    config = json.loads((base / "config.json").read_text())
    rng = np.random.default_rng(0)
    write_imatrix(
        tmp_path / "i.gguf",
        {n: (rng.random((e, k), np.float32), np.full(e, 8)) for n, (e, k) in gguf_shapes(config).items()},
    )
    f = folds(plans(base, 4, awq=True), read_imatrix(tmp_path / "i.gguf", config), 1.0, qwen3_5.AWQ_GROUPS)
    assert not any("mlp" in n or "post_attention" in n for n in f)
    assert LAYER + "0.linear_attn.in_proj_a.weight" in f
    assert LAYER + "3.self_attn.v_proj.weight" in f


def test_equal_folds_have_equal_digests():
    a = np.array([1, 2], np.float32)
    assert Fold(a).digest() == Fold(a.copy()).digest()
    assert len({Fold(a).digest(), Fold(None, a).digest(), Fold(a, a).digest(), Fold(-a).digest()}) == 4


def folded(tiny, out, dtype) -> mx.array:
    j = job(tiny, out, imatrix=TINY_IMATRIX)
    (done,) = convert([replace(j, plans=unquantized(j.plans, dtype))])
    return load(done.folder, mx.float32).forward(mx.array(TOKENS))


def test_a_folded_model_computes_what_the_original_computes(tiny, tmp_path):
    original = load(tiny, mx.float32).forward(mx.array(TOKENS))
    assert mx.abs(folded(tiny, tmp_path / "f32", "F32") - original).max().item() < 1e-4  # measured: 1.3e-5
    bf16 = mx.abs(folded(tiny, tmp_path / "bf16", "BF16") - original).max().item()
    assert bf16 < 0.2  # measured: 0.057; rounding the norms alone, without any fold, gives 0.067


def test_a_folded_weight_is_rounded_once_from_float32(tiny, imatrix, tmp_path):
    j = job(tiny, tmp_path / "v", recipe="unsloth", imatrix=TINY_IMATRIX)
    (done,) = convert([j])
    stored, source = load_tensors(done.folder), load_tensors(tiny)
    norm, a = LAYER + "0.input_layernorm.weight", LAYER + "0.linear_attn.in_proj_a.weight"
    original = "model.language_model.layers.0."
    w = source[original + "input_layernorm.weight"].astype(mx.float32)
    expected = ((1 + w) * mx.array(j.folds[norm].rows)).astype(mx.bfloat16)
    assert mx.array_equal(stored[norm], expected)
    w = source[original + "linear_attn.in_proj_a.weight"].astype(mx.float32)
    assert mx.array_equal(stored[a], (w * mx.array(j.folds[a].columns)).astype(mx.bfloat16))
