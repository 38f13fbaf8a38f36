"""Statistics from an imatrix: names, order, experts, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from engine_checkpoints import MOE_CONFIG
from gguf import GGUFWriter
from quant_jobs import TINY_IMATRIX

from inference.errors import InputError
from quant.imatrix import gguf_shapes, read_imatrix, tile, untile, write_imatrix

LAYER = "language_model.model.layers."


@pytest.fixture
def config(tiny):
    return json.loads((tiny / "config.json").read_text())


def sums_for(config, seed=0):
    """Random statistics of every matrix of the model, 100 tokens each."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.random((nmat, k), np.float32) + 0.5, np.full(nmat, 100, np.float32))
        for name, (nmat, k) in gguf_shapes(config).items()
    }


def refused(path: Path, sums, config) -> str:
    write_imatrix(path, sums)
    with pytest.raises(InputError) as e:
        read_imatrix(path, config)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_llama_cpps_file_covers_every_matrix_but_the_embedding(config):
    m = read_imatrix(TINY_IMATRIX, config)
    assert m.chunks == 100
    assert m.chunk_size == 512
    assert m.tokens == 51200
    assert m.missing == ()
    assert len(m.importance) == 3 * 8 + 7 + 1
    assert m.importance["language_model.lm_head"].shape == (256,)
    q = m.importance[LAYER + "3.self_attn.q_proj"]
    assert q.dtype == np.float32
    np.testing.assert_allclose(q[:3], np.array([64810.258, 58116.44, 72349.08]) / 51200, rtol=1e-6)


def test_what_is_written_is_read_back(config, tmp_path):
    sums = sums_for(config)
    write_imatrix(tmp_path / "i.gguf", sums, ["a.txt"], 7, 256)
    m = read_imatrix(tmp_path / "i.gguf", config)
    assert (m.datasets, m.chunks, m.chunk_size) == (("a.txt",), 7, 256)
    total, _ = sums["blk.2.ffn_down.weight"]
    np.testing.assert_array_equal(m.importance[LAYER + "2.mlp.down_proj"], (total[0].astype(float) / 100).astype("f4"))


@pytest.mark.parametrize("r", [1, 2, 3])
def test_ssm_out_returns_to_the_originals_order_of_value_heads(config, tmp_path, r):
    text = config["text_config"]
    text["linear_num_value_heads"] = 2 * r
    sums = sums_for(config)
    total, _ = sums["blk.0.ssm_out.weight"]
    write_imatrix(tmp_path / "i.gguf", sums)
    got = read_imatrix(tmp_path / "i.gguf", config).importance[LAYER + "0.linear_attn.out_proj"]
    nk, hd = 2, text["linear_value_head_dim"]
    for k in range(nk):
        for j in range(r):
            for d in range(hd):  # llama.cpp puts the j-th value head of key head k at j·nk + k
                assert got[(k * r + j) * hd + d] == np.float32(total[0, (j * nk + k) * hd + d] / 100)


def test_tile_is_the_inverse_of_untile():
    x = np.arange(24.0)
    assert (tile(untile(x, 3, 2), 3, 2) == x).all()
    assert (untile(x, 1, 8) == x).all()


def test_an_expert_without_tokens_takes_the_mean_over_the_experts(tmp_path):
    sums = sums_for(MOE_CONFIG)
    total, count = sums["blk.1.ffn_down_exps.weight"]
    count[:] = [10, 0, 30, 10, 10, 10, 10, 10]
    total[1] = 0
    write_imatrix(tmp_path / "i.gguf", sums)
    m = read_imatrix(tmp_path / "i.gguf", MOE_CONFIG)
    got = m.importance[LAYER + "1.mlp.switch_mlp.down_proj"]
    assert got.shape == (8, 64)
    np.testing.assert_allclose(got[2], total[2] / 30, rtol=1e-6)
    np.testing.assert_allclose(got[1], total.sum(0) / 90, rtol=1e-6)
    assert m.counts[LAYER + "1.mlp.switch_mlp.down_proj"].tolist() == [10, 0, 30, 10, 10, 10, 10, 10]


def test_fused_gate_and_up_experts_serve_both(tmp_path):
    sums = sums_for(MOE_CONFIG)
    for i in range(4):
        sums[f"blk.{i}.ffn_gate_up_exps.weight"] = sums.pop(f"blk.{i}.ffn_gate_exps.weight")
        del sums[f"blk.{i}.ffn_up_exps.weight"]
    write_imatrix(tmp_path / "i.gguf", sums)
    m = read_imatrix(tmp_path / "i.gguf", MOE_CONFIG)
    gate, up = (m.importance[f"{LAYER}0.mlp.switch_mlp.{n}_proj"] for n in ("gate", "up"))
    assert (gate == up).all()


def test_a_single_matrix_may_be_missing_and_is_named(config, tmp_path):
    sums = sums_for(config)
    del sums["blk.1.ffn_down.weight"]
    write_imatrix(tmp_path / "i.gguf", sums)
    assert read_imatrix(tmp_path / "i.gguf", config).missing == (LAYER + "1.mlp.down_proj",)


def test_the_block_of_an_mtp_layer_is_accepted_and_unused(config, tmp_path):
    sums = sums_for(config)
    sums["blk.4.attn_q.weight"] = sums["blk.3.attn_q.weight"]
    write_imatrix(tmp_path / "i.gguf", sums)
    assert LAYER + "4.self_attn.q_proj" not in read_imatrix(tmp_path / "i.gguf", config).importance


def test_refuses_a_file_that_is_no_gguf(config, tmp_path):
    for name, data in (
        ("a.gguf", b"no gguf file at all"),
        ("b.gguf", b""),
        ("c.gguf", TINY_IMATRIX.read_bytes()[:3000]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=rf"^{name}: no readable GGUF file \(.*\)$"):
            read_imatrix(tmp_path / name, config)
    with pytest.raises(InputError, match=r"d\.gguf: no such file$"):
        read_imatrix(tmp_path / "d.gguf", config)


def test_refuses_a_gguf_that_is_no_imatrix(config, tmp_path):
    w = GGUFWriter(tmp_path / "model.gguf", "qwen35")
    w.add_type("model")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    with pytest.raises(InputError, match=r"^model\.gguf: general\.type is 'model', expected 'imatrix'$"):
        read_imatrix(tmp_path / "model.gguf", config)


def test_refuses_sums_that_are_not_float32(config, tmp_path):
    w = GGUFWriter(tmp_path / "i.gguf", "")
    w.add_type("imatrix")
    w.add_tensor("blk.0.ffn_up.weight.in_sum2", np.ones((1, 256), np.float16))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(InputError, match=r"^i\.gguf: blk\.0\.ffn_up\.weight\.in_sum2: type F16, expected F32$"):
        read_imatrix(tmp_path / "i.gguf", config)


def test_refuses_the_imatrix_of_another_model(config, tmp_path):
    path = tmp_path / "i.gguf"
    narrow = json.loads(json.dumps(config))
    narrow["text_config"]["intermediate_size"] = 512
    assert refused(path, sums_for(narrow), config) == (
        "i.gguf: blk.0.ffn_down.weight: is of another model: 512 columns, the model has 768"
    )
    few = {n: v for n, v in sums_for(config).items() if not n.startswith("blk.3.")}
    assert refused(path, few, config) == "i.gguf: is of another model: lacks block 3, the model has 4 blocks"
    many = sums_for(config) | {"blk.5.ffn_up.weight": (np.ones((1, 256)), np.ones(1))}
    assert refused(path, many, config) == "i.gguf: is of another model: has block 5, the model has 4 blocks"
    moe = sums_for(MOE_CONFIG)
    moe["blk.0.ffn_down_exps.weight"] = (np.ones((4, 64)), np.ones(4))
    assert refused(path, moe, MOE_CONFIG) == (
        "i.gguf: blk.0.ffn_down_exps.weight: is of another model: 4 matrices, the model has 8"
    )


def test_refuses_an_imatrix_without_a_class_or_without_any_match(config, tmp_path):
    path = tmp_path / "i.gguf"
    sums = sums_for(config)
    del sums["blk.3.attn_q.weight"]
    assert refused(path, sums, config) == (
        "i.gguf: no statistics for any self_attn.q_proj (blk.N.attn_q.weight); the model has 1"
    )
    one = (np.ones((1, 256)), np.ones(1))
    assert refused(path, {f"blk.{i}.nothing.weight": one for i in range(4)}, config) == (
        "i.gguf: none of its 4 matrices belongs to this model, e.g. blk.0.nothing.weight"
    )
    assert refused(path, {}, config) == "i.gguf: holds no .in_sum2 tensor, expected one a matrix"


@pytest.mark.parametrize("bad", [-1, 0.5, 1e30, np.inf, np.nan])
def test_refuses_counts_that_cannot_be(config, tmp_path, bad):
    sums = sums_for(config)
    sums["blk.0.ffn_up.weight"][1][0] = bad
    assert refused(tmp_path / "i.gguf", sums, config) == (
        f"i.gguf: blk.0.ffn_up.weight.counts: found {np.float32(bad):g}, expected whole numbers of tokens up to 1e+12"
    )


def test_refuses_a_matrix_that_saw_no_token(config, tmp_path):
    sums = sums_for(config)
    sums["blk.0.ffn_up.weight"][1][0] = 0
    assert refused(tmp_path / "i.gguf", sums, config) == "i.gguf: blk.0.ffn_up.weight.counts: no token was counted"


@pytest.mark.parametrize("bad", [-1, np.inf, np.nan])
def test_refuses_sums_of_squares_that_cannot_be(config, tmp_path, bad):
    sums = sums_for(config)
    sums["blk.0.ffn_up.weight"][0][0, 7] = bad
    assert refused(tmp_path / "i.gguf", sums, config) == (
        f"i.gguf: blk.0.ffn_up.weight.in_sum2: found {bad:g}, expected finite sums of squares"
    )
