"""Norms are rounded when they are stored: what a solver quantizes undoes it, at no cost in bytes."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import write_ladder
from engine_checkpoints import write_moe
from quant_jobs import TINY_IMATRIX, job, plans
from solved_ladder import HEAD

from inference.backend import mx
from inference.load import Weights
from quant import llama, qwen3_5
from quant.convert import convert
from quant.folding import round_together, undo_rounded_norms

LAYERS = "language_model.model.layers."
READERS = {
    f"{LAYERS}0.input_layernorm": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_a"),
    f"{LAYERS}3.input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    f"{LAYERS}3.post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    f"{LAYERS}1.linear_attn.norm": ("out_proj",),
}


def undone(base, recipe="uniform", folds=None):
    return undo_rounded_norms(plans(base, 4, recipe), folds or {}, qwen3_5.READERS)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_reader_times_the_stored_norm_is_a_reader_times_the_norm_as_it_is(tiny, tmp_path, scaled):
    """With AWQ, too: there norms were divided by the scale that their readers were multiplied by."""
    j = job(
        tiny,
        tmp_path / "v",
        recipe="unsloth_8bit_out" if scaled else "uniform",
        imatrix=TINY_IMATRIX if scaled else None,
    )
    folds = undo_rounded_norms(j.plans, j.folds, qwen3_5.READERS)
    (done,) = convert([replace(j, folds=folds)])
    exact, stored = Weights(tiny, mx.float32), Weights(done.folder, mx.float32)
    for norm, readers in READERS.items():
        whole, rounded = (np.array(w.array(f"{norm}.weight")).astype(np.float64) for w in (exact, stored))
        assert np.allclose(whole, rounded, rtol=0.1) != (scaled and "layernorm" in norm)  # AWQ moved it
        for reader in readers:
            columns = folds[f"{norm.rpartition('.')[0]}.{reader}.weight"].columns
            heads = columns.reshape(-1, len(whole))  # a norm of heads is one for all
            np.testing.assert_allclose(heads * rounded, np.tile(whole, (len(heads), 1)), rtol=1e-6)


def test_what_feeds_no_quantized_matrix_or_loses_nothing_is_left_alone(tiny, tmp_path):
    folds = undone(tiny)
    assert not [name for name in folds if any(part in name for part in ("down_proj", "o_proj", "embed", "norm"))]
    dense = [replace(p, spec=None) for p in plans(tiny, 4)]
    assert undo_rounded_norms(dense, {}, qwen3_5.READERS) == {}
    assert undo_rounded_norms(plans(tiny, 4), {}, llama.READERS) != {}  # the norms are found by where they stand
    assert undo_rounded_norms([], {}, llama.READERS) == {}


def test_experts_and_the_output_undo_it_too(tiny, tmp_path):
    write_moe(tmp_path)
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    mx.eval(list(tensors.values()))
    for name in [n for n in tensors if n.endswith("layernorm.weight")]:
        tensors[name] = tensors[name] + 1 / 500  # no longer exact as 1 + w in bfloat16
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors, {"format": "pt"})
    for base, names in ((tmp_path, ("switch_mlp.up_proj", "shared_expert.gate_proj")), (tiny, ("lm_head",))):
        folds = undone(base)
        for name in names:
            assert any(name in f for f in folds), name
    assert not any("down_proj" in f for f in undone(tmp_path))


def test_a_solver_undoes_it_and_rounding_to_nearest_stays_what_other_tools_store(tiny, tmp_path, publish):
    """Of a matrix at 8 bits, channels are on average what they were, times what its norm lost in rounding."""
    (tmp_path / "words.txt").write_text("Not read.")
    write_ladder(tmp_path, HEAD + "variants: {L: {bits: 8, solver: ls}, R: {bits: 8, solver: rtn}}\n")
    publish("build", "--all", "--skip", "smoke", "--skip", "bench", "--skip", "card", "-q", cwd=tmp_path).ok()
    module = f"{LAYERS}3.self_attn.q_proj"
    w = Weights(tiny).linear(module).weight.astype(mx.float32)
    r = undone(tiny)[f"{module}.weight"].columns
    for id, expected in (("L", r), ("R", np.ones_like(r))):
        stored = Weights(tmp_path / "build" / id).linear(module)
        ratio = np.array((stored.unpacked() * w).sum(axis=0) / mx.square(w).sum(axis=0))
        assert np.sqrt(np.mean((ratio - expected) ** 2)) < 0.4 * np.std(r)


@pytest.mark.parametrize("rotary", [0, 16, 64])
def test_queries_and_keys_are_rounded_to_the_products_that_a_score_sees(tiny, tmp_path, rotary):
    j = job(tiny, tmp_path / "v")
    folds = round_together(j.plans, qwen3_5.PAIRED_NORMS, rotary)
    (done,) = convert([replace(j, folds=folds)])
    names = [f"{LAYERS}3.self_attn.{n}.weight" for n in ("q_norm", "k_norm")]
    assert set(folds) == set(names)
    (q, k), (q1, k1) = (
        [np.array(w.array(n)).astype(np.float64) for n in names]
        for w in (Weights(tiny, mx.float32), Weights(done.folder, mx.float32))
    )
    assert np.abs(np.log(q1 / q)).max() < 0.36  # half an octave at most
    still = slice(rotary, None)
    assert (np.abs(np.log(q1 * k1 / (q * k)))[still] < 2**-11).all()
    nearest = np.sqrt(np.mean(np.square(np.log(as_stored(q) * as_stored(k) / (q * k)))))
    low, high = slice(0, rotary // 2), slice(rotary // 2, rotary)
    for a, b in ((low, low), (high, high), (low, high), (high, low)):  # what turns together
        error = np.log(q1[a] * k1[b] / (q[a] * k[b]))
        assert np.square(error).sum() <= len(error) * (0.35 * nearest) ** 2


def as_stored(x):
    return np.array(mx.array(x.astype(np.float32)).astype(mx.bfloat16).astype(mx.float32), np.float64)
