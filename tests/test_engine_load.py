"""Loading: every format that ships, as mlx-lm reads the same folder; and every way in which a folder can be wrong."""

import shutil
from pathlib import Path

import mlx_lm.utils
import pytest
from engine_checkpoints import edit_config, edit_tensors, write_moe, write_variant

from inference import linear
from inference import load as load_module
from inference.backend import BACKEND, mx
from inference.checkpoint import QuantSpec
from inference.errors import CheckpointError, PublishError, ResourceError
from inference.linear import Dense, Sorting
from inference.load import load

L = "language_model.model.layers."
IDS = list(range(9, 246, 3))  # 79 tokens: more than a chunk
MIXED = {
    L + "0.linear_attn.out_proj": QuantSpec(8, 32),
    L + "1.mlp.down_proj": QuantSpec(6, 128),
    L + "3.self_attn.v_proj": QuantSpec(5, 64),
    L + "2.linear_attn.in_proj_a": False,
    "language_model.lm_head": QuantSpec(8, 64),
    "language_model.model.embed_tokens": False,
}


def mlx_lm_logits(folder: Path, ids: list[int]) -> mx.array:
    model, _ = mlx_lm.utils.load_model(folder)
    model.set_dtype(mx.float32)
    return model(mx.array([ids]))


@pytest.mark.parametrize(
    ("default", "overrides"),
    [
        (None, {}),
        (QuantSpec(4, 64), MIXED),
        (QuantSpec(2, 128), {}),
        (QuantSpec(3, 32), {}),
        (QuantSpec(4, 32, "mxfp4"), {"language_model.lm_head": QuantSpec(8, 64)}),
        (QuantSpec(8, 32, "mxfp8"), {}),
        (QuantSpec(4, 16, "nvfp4"), {L + "0.mlp.up_proj": False}),
    ],
    ids=["bf16", "mixed", "affine2", "affine3", "mxfp4", "mxfp8", "nvfp4"],
)
def test_variant_gives_the_logits_of_mlx_lm(tiny, tmp_path, default, overrides):
    folder = write_variant(tiny, tmp_path / "v", default, overrides)
    if BACKEND == "cuda" and any(s and s.group_size == 128 for s in (default, *overrides.values())):
        pytest.skip("MLX 0.32.4 does not launch its product of many float32 rows with groups of 128 there")
    got, expected = load(folder, mx.float32).forward(mx.array([IDS])), mlx_lm_logits(folder, IDS)
    assert mx.abs(got - expected).max().item() <= 1e-3


def test_packed_decode_equals_packed_prefill(tiny, tmp_path):
    """One token runs through `quantized_matmul`, many through the unpacked matrix."""
    model = load(write_variant(tiny, tmp_path / "v", QuantSpec(4, 64), MIXED), mx.float32)
    cache = model.make_cache()
    steps = mx.concatenate([model.forward(mx.array([[t]]), cache) for t in IDS[:30]], axis=1)
    assert mx.abs(steps - model.forward(mx.array([IDS[:30]]))).max().item() <= 1e-3


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return write_moe(tmp_path_factory.mktemp("moe"))


@pytest.mark.parametrize(
    "default", [None, QuantSpec(4, 32), QuantSpec(4, 32, "mxfp4")], ids=["bf16", "affine4", "mxfp4"]
)
def test_moe_gives_the_logits_of_mlx_lm(moe, tmp_path, default):
    folder = write_variant(moe, tmp_path / "v", default, {L + "1.mlp.gate": False} if default else {})
    model, expected = load(folder, mx.float32), mlx_lm_logits(folder, IDS)
    assert mx.abs(model.forward(mx.array([IDS])) - expected).max().item() <= 1e-3
    cache = model.make_cache()
    steps = mx.concatenate([model.forward(mx.array([[t]]), cache) for t in IDS[:20]], axis=1)
    assert mx.abs(steps - expected[:, :20]).max().item() <= 1e-3


def test_rows_sorted_by_expert_are_multiplied_by_their_own(monkeypatch):
    """One batched product with places for the busiest, row by row where one expert has nearly all, and a derivative."""
    mx.random.seed(0)
    dense = Dense(mx.random.normal((8, 5, 16)))
    for experts, batched in (
        (mx.random.randint(0, 8, (100,)), True),
        (mx.zeros((100,), mx.int32), False),
        (mx.array([3, 1, 7]), False),
    ):
        x = mx.random.normal((experts.size, 1, 16))
        monkeypatch.setattr(linear, "UNPACK_ROWS", 16)
        sorting = Sorting.of(experts, 8)
        assert (sorting.places is not None) == batched

        def by_sorting(x, experts=experts, sorting=sorting):
            return dense.gather(x[sorting.order], experts[sorting.order], sorting)[mx.argsort(sorting.order)]

        def by_row(x, experts=experts):
            return x @ dense.weight[experts].swapaxes(-1, -2)

        ones = [mx.random.normal((experts.size, 1, 5))]
        for a, b in zip(mx.vjp(by_sorting, [x], ones), mx.vjp(by_row, [x], ones), strict=True):
            assert mx.allclose(a[0], b[0], atol=1e-5)


def test_a_row_for_several_experts_gets_the_sum_of_what_comes_back_from_each():
    x, sorting = mx.random.normal((50, 16)), Sorting.of(mx.random.randint(0, 8, (150,)), 8)
    back = [mx.random.normal((150, 16))]
    (rows,), (grad,) = mx.vjp(lambda x: sorting.spread(x, 3), [x], back)
    assert mx.array_equal(rows, mx.repeat(x, 3, axis=0)[sorting.order])
    each = mx.zeros((150, 16))
    each[sorting.order] = back[0]
    assert mx.array_equal(grad, each.reshape(50, 3, 16).sum(axis=1))  # an index' derivative differs in last bits


def test_sorted_rows_are_handed_over_with_the_strides_of_rows(monkeypatch):
    """A view's axis of stride 1 makes kernels of a sorted product read other rows (ml-explore/mlx#4253): CUDA's to this day."""
    strides, gather_mm = {}, mx.gather_mm

    def noted(what, x):
        mx.eval(x)
        strides[what] = memoryview(x).strides
        return x

    def recorded(x, weight, **options):
        @mx.custom_function
        def product(x):
            return gather_mm(noted("forwards", x), weight, **options)

        @product.vjp
        def _(x, cotangent, _):
            return gather_mm(noted("back", cotangent), weight.swapaxes(-1, -2), **options)

        return product(x)

    monkeypatch.setattr(mx, "gather_mm", recorded)
    monkeypatch.setattr(linear, "UNPACK_ROWS", None)  # rows by expert, but no places
    dense, experts, rows = Dense(mx.random.normal((3, 5, 16))), mx.array([2, 0, 0, 1, 0]), mx.random.normal((5, 16))
    sorting, back = Sorting.of(experts, 3), [mx.random.normal((5, 5))]
    view = rows[sorting.order][:, None]
    mx.eval(view)
    assert memoryview(view).strides[1] == 4  # what would be read as the distance of two rows

    def by_expert(x):
        return dense.gather(x[sorting.order][:, None], experts[sorting.order], sorting)[:, 0][mx.argsort(sorting.order)]

    got = mx.vjp(by_expert, [rows], back)
    assert strides == {"forwards": (64, 64, 4), "back": (20, 20, 4)}
    expected = mx.vjp(lambda x: (dense.weight[experts] @ x[..., None])[..., 0], [rows], back)
    for a, b in zip(got, expected, strict=True):
        assert mx.allclose(a[0], b[0], atol=1e-5)


def test_a_mixture_of_experts_adds_gradients_in_the_order_of_experts(moe, monkeypatch):
    """Statistics of a run that was killed are those of one that was not, on a GPU too."""
    asked, spread = [], Sorting.spread
    monkeypatch.setattr(Sorting, "spread", lambda self, x, k: asked.append(x.shape) or spread(self, x, k))
    model = load(moe)
    mx.eval(model.forward(mx.array([IDS])))
    assert asked == [(len(IDS), 64)] * len(model.config.layer_types)


def test_original_layout_gives_the_same_logits(moe, tmp_path):
    """Fused experts, [C, 1, K] conv and w for 1 + w, which is exact in bfloat16 for this checkpoint."""
    variant = load(write_variant(moe, tmp_path / "v", None), mx.float32)
    assert mx.array_equal(load(moe, mx.float32).forward(mx.array([IDS])), variant.forward(mx.array([IDS])))


def test_vision_and_mtp_tensors_are_skipped(moe, tmp_path):
    folder = write_variant(moe, tmp_path / "v", None)
    before = load(folder)
    edit_tensors(folder, lambda t: t.update({"vision_tower.x.weight": mx.zeros((4,)), "mtp.y.weight": mx.zeros((4,))}))
    after = load(folder)
    assert after.nbytes == before.nbytes
    assert mx.array_equal(after.forward(mx.array([IDS])), before.forward(mx.array([IDS])))


def test_tied_embedding_serves_as_head(moe, tmp_path):
    folder = write_variant(moe, tmp_path / "v", QuantSpec(4, 32))
    edit_config(folder, lambda c: c["text_config"].update(tie_word_embeddings=True))
    edit_tensors(folder, lambda t: [t.pop(f"language_model.lm_head.{x}") for x in ("weight", "scales", "biases")])
    model = load(folder, mx.float32)
    tolerance = 1e-3 if BACKEND == "cpu" else 2e-3  # logits reach 17
    assert mx.abs(model.forward(mx.array([IDS])) - mlx_lm_logits(folder, IDS)).max().item() <= tolerance


def drop(name):
    return lambda t: t.pop(name)


def put(**tensors):
    return lambda t: t.update({k.replace("__", "."): v for k, v in tensors.items()})


BROKEN_TENSORS = {
    "missing tensor": (drop(L + "0.linear_attn.A_log"), f"tensor {L}0.linear_attn.A_log is missing"),
    "missing scales": (drop(L + "0.mlp.up_proj.scales"), f"{L}0.mlp.up_proj.weight: shape [64, 8], config.json calls"),
    "missing biases": (drop("language_model.lm_head.biases"), "tensor language_model.lm_head.biases is missing"),
    "extra tensor": (put(language_model__model__extra=mx.zeros((3,))), "language_model.model.extra is not part of"),
    "wrong shape": (put(language_model__model__norm__weight=mx.zeros((63,))), "shape [63], config.json calls"),
    "wrong type": (put(language_model__model__norm__weight=mx.zeros((64,), mx.int32)), "dtype I32, expected a"),
}  # fmt: skip


def variant_of(moe, tmp_path):
    return write_variant(moe, tmp_path / "v", QuantSpec(4, 32), {L + "0.mlp.shared_expert.up_proj": QuantSpec(8, 32)})


def assert_one_line(error: pytest.ExceptionInfo[PublishError], text: str) -> None:
    message = str(error.value)
    assert text in message
    assert "\n" not in message


@pytest.mark.parametrize("fault", BROKEN_TENSORS)
def test_broken_tensors_are_refused_in_one_line(moe, tmp_path, fault):
    change, text = BROKEN_TENSORS[fault]
    folder = variant_of(moe, tmp_path)
    if fault == "missing scales":
        text, change = "shared_expert.up_proj.scales is missing", drop(L + "0.mlp.shared_expert.up_proj.scales")
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError) as e:
        load(folder)
    assert_one_line(e, text)


def quantization(**changes):
    def change(config):
        config["quantization"].update(changes)
        config["quantization_config"] = config["quantization"]

    return change


BROKEN_CONFIGS = {
    "unknown model_type": (lambda c: c.update(model_type="gpt2"), "'gpt2' is not supported; supported: llama, qwen3_5"),
    "no model_type": (lambda c: c.pop("model_type"), "model_type None is not supported"),
    "text_config no object": (lambda c: c.update(text_config=3), "text_config must be an object"),
    "missing key": (lambda c: c["text_config"].pop("hidden_size"), "text_config.hidden_size: found None"),
    "negative size": (lambda c: c["text_config"].update(vocab_size=-1), "vocab_size: found -1"),
    "quantization no object": (lambda c: c.update(quantization=4), "quantization must be an object"),
    "quantization without bits": (quantization(bits=None), "bits and group_size must be integers"),
    "bits as text": (quantization(bits="4"), "bits and group_size must be integers"),
    "seven bits": (quantization(bits=7), "7 bits: allowed are"),
    "other bits": (quantization(bits=8), "config.json calls for"),
    "unknown mode": (quantization(mode="gptq"), "quantization mode 'gptq' is unknown"),
    "unknown module": (quantization(**{L + "9.mlp.up_proj": {"bits": 4, "group_size": 32}}), "the model does not"),
    "module denied": (quantization(**{L + "0.mlp.gate": False}), "config.json gives no quantization for it"),
    "two blocks": (lambda c: c["quantization"].update(bits=8), "quantization and quantization_config differ"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN_CONFIGS)
def test_broken_configs_are_refused_in_one_line(moe, tmp_path, fault):
    change, text = BROKEN_CONFIGS[fault]
    folder = variant_of(moe, tmp_path)
    edit_config(folder, change)
    with pytest.raises(CheckpointError) as e:
        load(folder)
    assert_one_line(e, text)


def test_broken_files_are_refused_in_one_line(moe, tmp_path):
    folder = variant_of(moe, tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for data, text in (
        (whole[:-10], "lie outside the file"),
        (whole[:5], "too short"),
        (b"\xff" * 64, "does not fit the file"),
    ):
        weights.write_bytes(data)
        with pytest.raises(CheckpointError) as e:
            load(folder)
        assert_one_line(e, text)
    weights.unlink()
    with pytest.raises(CheckpointError) as e:
        load(folder)
    assert_one_line(e, "no model*.safetensors")
    with pytest.raises(CheckpointError) as e:
        load(tmp_path / "nowhere")
    assert_one_line(e, "no such folder")


def test_original_layout_with_a_missing_tensor_is_refused(moe, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(moe, folder)
    edit_tensors(folder, drop("model.language_model.norm.weight"))
    with pytest.raises(CheckpointError) as e:
        load(folder)
    assert_one_line(e, "language_model.model.norm.weight is missing")


def test_a_model_that_does_not_fit_is_refused_with_both_figures(tiny, monkeypatch):
    monkeypatch.setattr(load_module, "memory_limit", lambda: 10_000_000)
    with pytest.raises(ResourceError) as e:
        load(tiny)
    assert_one_line(e, "usable are 0.01 GB")
    assert "the weights need 0.0" in str(e.value)


def test_nbytes_is_what_the_weights_take(tiny):
    before = mx.get_active_memory()
    model = load(tiny)
    assert abs(mx.get_active_memory() - before - model.nbytes) < 0.02 * model.nbytes
