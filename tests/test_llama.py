"""Llama, the second family: the engine against `transformers` (recorded) and mlx-lm, names, recipes, statistics, cards."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import EXAMPLE
from engine_checkpoints import write_variant
from llama_checkpoints import KINDS, LLAMA3, config, write_llama
from test_recipes import mlx_lm_formats

from inference.backend import BACKEND, mx
from inference.blocks import attend
from inference.cache import KVCache
from inference.checkpoint import QuantSpec, TensorInfo, read_checkpoint, read_quantization
from inference.divergence import kld
from inference.errors import CheckpointError, InputError
from inference.families import names_of
from inference.layout import Target
from inference.llama.model import Layer, TextModel
from inference.llama.names import mlx_config, read_config, rope_wavelengths, text_shapes
from inference.load import Weights, hidden_states_streamed, load, load_head
from publisher.localhub import LocalHub
from quant import llama
from quant.awq import folds
from quant.builtin import BUILTIN
from quant.convert import Job, convert, unquantized
from quant.imatrix import gguf_shapes, read_imatrix, write_imatrix
from quant.recipe import resolve
from quant.tables import scalable

FIXTURES = Path(__file__).parent / "fixtures"
# Largest difference of a logit from transformers'. Measured in float32: 6e-6. A GPU computes in bfloat16.
TOLERANCE = 2e-4 if BACKEND == "cpu" else 0.6
NOWHERE = TensorInfo("", "BF16", (), Path(), 0, 0)
WRITE = "hf_llamaWRITEtoken"
L = "model.layers."


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return {kind: write_llama(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def recorded():
    return np.load(FIXTURES / "llama-logits.npz")


# ------------------------------------------------------------------------------------------------ the engine


def check(logits: mx.array, recorded, kind: str) -> None:
    got = np.array(logits[0].astype(mx.float32))
    assert np.abs(got[:, recorded[f"{kind}.columns"]] - recorded[f"{kind}.logits"]).max() <= TOLERANCE
    logsumexp = np.array(mx.logsumexp(logits[0].astype(mx.float32), axis=-1))
    assert np.abs(logsumexp - recorded[f"{kind}.logsumexp"]).max() <= TOLERANCE
    if BACKEND == "cpu":
        assert (got.argmax(axis=1) == recorded[f"{kind}.argmax"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_whole_split_and_token_by_token(kind, bases, recorded):
    model = load(bases[kind])
    ids = recorded[f"{kind}.ids"]
    for points in ([], [1], [63, 64, 65], list(range(1, len(ids)))):
        cache = model.make_cache()
        pieces = zip([0, *points], [*points, len(ids)], strict=True)
        out = [model.forward(mx.array(ids[a:b])[None], cache) for a, b in pieces]
        check(mx.concatenate(out, axis=1), recorded, kind)


def test_the_kinds_differ_in_what_they_compute(recorded):
    logits = [recorded[f"{kind}.logits"] for kind in KINDS if kind != "parameters"]
    assert all(np.abs(a - b).max() > 0.5 for i, a in enumerate(logits) for b in logits[:i])
    assert (recorded["parameters.logits"] == recorded["llama3.logits"]).all()


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_streaming_layer_by_layer_gives_the_same_states(kind, bases, recorded):
    seen: list[int] = []
    batches = [mx.array(recorded["tied.ids"][:n])[None] for n in (96, 10)]
    weights = Weights(bases[kind])
    names = names_of(weights.raw_config)
    assert names.__name__ == "inference.llama.names"
    whole, short = hidden_states_streamed(bases[kind], batches, after_layer=seen.append)
    assert seen == [0, 1, 2]
    model = load(bases[kind])
    for streamed, tokens in ((whole, batches[0]), (short, batches[1])):  # a loaded model joins matrices of one input
        assert mx.allclose(streamed, model.hidden(tokens), atol=1e-5)
    check(load_head(bases[kind])(whole), recorded, kind)


def test_qwens_streaming_calls_after_layer_once_a_layer(tiny):
    seen: list[int] = []
    hidden_states_streamed(tiny, [mx.array([[5, 6, 7]]), mx.array([[8]])], after_layer=seen.append)
    assert seen == [0, 1, 2, 3]


@pytest.mark.skipif(BACKEND != "cpu", reason="central differences need float32")
def test_a_layer_can_be_differentiated(bases):
    weights = Weights(bases["llama3"])
    layer = Layer(weights.config, 1, weights)
    mx.random.seed(0)
    x, direction, probe = (mx.random.normal((1, 9, 64)) for _ in range(3))

    def loss(x: mx.array) -> mx.array:
        return (layer(x, KVCache()) * probe).sum()

    _, (gradient,) = mx.vjp(loss, [x], [mx.array(1.0)])
    h = 1e-2
    slope = (loss(x + h * direction) - loss(x - h * direction)).item() / (2 * h)
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=2e-2)


def test_attention_in_blocks_of_queries_is_the_same(monkeypatch):
    mx.random.seed(0)
    q, k, v = (mx.random.normal((1, heads, n, 16)) for heads, n in ((4, 33), (2, 50), (2, 50)))
    whole = attend(q, k, v, 0.25)
    monkeypatch.setattr("inference.blocks.SCORE_BYTES", 4 * 4 * 50 * 7)
    assert mx.allclose(attend(q, k, v, 0.25), whole, atol=1e-5)


def test_llama3_leaves_short_waves_alone_and_stretches_long_ones_by_the_factor():
    plain, scaled = (rope_wavelengths(read_config(config(k, rope_theta=500000.0))) for k in ("tied", "llama3"))
    ratio = np.array(scaled) / np.array(plain)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(4)
    assert (np.diff(ratio) >= 0).all()
    assert any(1.01 < r < 3.99 for r in ratio)


# ------------------------------------------------------------------------------------------------ against mlx-lm

FORMATS: dict[str, tuple[QuantSpec | None, dict[str, QuantSpec | bool]]] = {
    "dense": (None, {}),
    "affine": (
        QuantSpec(4, 32),
        {L + "0.mlp.down_proj": QuantSpec(3, 64), L + "1.self_attn.o_proj": False, L + "2.self_attn.q_proj": QuantSpec(8, 32)},
    ),
    "nvfp4": (QuantSpec(4, 16, "nvfp4"), {L + "0.mlp.up_proj": QuantSpec(8, 32, "mxfp8")}),
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_loads_it_strictly_and_computes_the_same(kind, format, bases, tmp_path):
    from mlx_lm.utils import load_model

    folder = write_variant(bases[kind], tmp_path / "v", *FORMATS[format])
    theirs, _ = load_model(folder, strict=True)
    theirs.set_dtype(mx.float32)
    ids = mx.array(np.random.RandomState(1).randint(0, 256, (1, 80)))
    want, got = theirs(ids), load(folder, mx.float32).forward(ids)
    spread = float(want.max() - want.min())
    assert spread > 1
    assert float(mx.abs(got - want).max()) < 1e-4 * spread
    assert float(kld(want[0], got[0]).max()) < 1e-5
    _, named = read_quantization(json.loads((folder / "config.json").read_text()))
    found = {path for path, m in theirs.named_modules() if hasattr(m, "bits")}
    assert found == ({k.removesuffix(".weight") for k, s in text_shapes(read_config(config(kind))).items() if len(s) == 2}
                     - {m for m, s in named.items() if s is None} if format != "dense" else set())  # fmt: skip


def test_the_config_says_to_mlx_lm_what_it_would_guess_wrong():
    told = mlx_config(config("parameters"))
    assert told["rope_theta"] == 500000.0  # it would take 10000
    assert told["rope_scaling"] == LLAMA3  # and no scaling
    assert read_config(told) == read_config(config("parameters"))
    assert mlx_config(config("untied"))["tie_word_embeddings"] is False  # it would tie them
    assert mlx_config(config("llama3")) == config("llama3")


@pytest.mark.parametrize("kind", ["tied", "untied", "biases"])
@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_every_built_in_recipe_fits_and_those_of_mlx_lm_give_what_it_gives(name, kind):
    found = config(kind, num_hidden_layers=8, vocab_size=64)
    targets = [Target(n, s, "BF16", NOWHERE) for n, s in text_shapes(read_config(found)).items()]
    plans = resolve(BUILTIN[name], 4, 64 if name != "nvfp4" else 32, targets, llama.CLASSES)
    matrices = {p.target.module: p for p in plans if len(p.target.shape) == 2}
    assert all(p.why for p in matrices.values())
    assert all(p.spec is None for p in plans if len(p.target.shape) == 1)
    ours = {m: (p.spec.bits, p.spec.group_size, p.spec.mode) if p.spec else None for m, p in matrices.items()}
    if name in ("mxfp4", "mxfp8", "nvfp4"):
        assert ours == mlx_lm_formats(mlx_config(found), None, None, name)
    elif not name.startswith("unsloth"):
        assert ours == mlx_lm_formats(mlx_config(found), 4, 64, recipe=name if name.startswith("mixed_") else None)
    else:
        out = None if name == "unsloth" else (8, 64, "affine")
        roles = {"self_attn.o_proj": out, "mlp.down_proj": (5, 64, "affine"), "self_attn.k_proj": (6, 64, "affine")}
        assert {r: ours[f"{L}3.{r}"] for r in roles} == roles
        assert ours.get("lm_head") == ((8, 64, "affine") if kind == "untied" else None)


def test_columns_that_no_group_divides_are_one_clear_line():
    found = config("tied", hidden_size=576 // 4, num_attention_heads=9, num_key_value_heads=3)
    targets = [Target(n, s, "BF16", NOWHERE) for n, s in text_shapes(read_config(found)).items()]
    with pytest.raises(InputError, match=r"model.embed_tokens has 144 columns, no multiple of group size 128"):
        resolve(BUILTIN["uniform"], 4, 128, targets, llama.CLASSES)


# ------------------------------------------------------------------------------------------------ statistics


def statistics(path: Path, found: dict[str, Any], more: dict[str, int] | None = None) -> Path:
    rng = np.random.default_rng(0)
    shapes = {n: k for n, (_, k) in gguf_shapes(found).items()} | (more or {})
    write_imatrix(
        path, {n: (10 * (rng.random((1, k), np.float32) + 0.05), np.full(1, 10, np.float32)) for n, k in shapes.items()}
    )
    return path


def test_llama_cpps_statistics_go_to_their_modules_unpermuted(tmp_path):
    found = config("untied")
    path = statistics(tmp_path / "i.gguf", found, {"output.weight": 64})
    m = read_imatrix(path, found)
    matrices = {n.removesuffix(".weight") for n, s in text_shapes(read_config(found)).items() if len(s) == 2}
    assert set(m.importance) == matrices - {"model.embed_tokens"}
    assert m.missing == ()
    from gguf import GGUFReader

    sums = {t.name: np.array(t.data).reshape(-1) for t in GGUFReader(path).tensors}
    for gguf, module in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("ffn_down", "mlp.down_proj")):
        want = (sums[f"blk.1.{gguf}.weight.in_sum2"].astype(float) / 10).astype(np.float32)
        np.testing.assert_array_equal(m.importance[f"{L}1.{module}"], want)
    with pytest.raises(InputError, match="is of another model"):
        read_imatrix(path, config("untied", num_hidden_layers=4))


@pytest.mark.parametrize("kind", ["untied", "biases"])
def test_a_folded_model_computes_what_the_original_computes(kind, bases, tmp_path):
    base = bases[kind]
    checkpoint = read_checkpoint(base)
    targets = names_of(checkpoint.config).targets(checkpoint)
    plans = resolve(BUILTIN["unsloth"], 4, 32, targets, llama.CLASSES, scalable(llama.AWQ_GROUPS), True)
    imatrix = read_imatrix(statistics(tmp_path / "i.gguf", checkpoint.config), checkpoint.config)
    scales = folds(plans, imatrix, 1.0, llama.AWQ_GROUPS)
    scaled = {n for n, f in scales.items() if f.columns is not None}
    roles = ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up", "mlp.down")
    assert scaled == {f"{L}{i}.{n}_proj.weight" for i in range(3) for n in roles}
    assert (f"{L}0.mlp.up_proj.bias" in scales) == (kind == "biases")
    job = Job("v", unquantized(plans), tmp_path / "staging", base, checkpoint.config, scales)
    (done,) = convert([job])
    ids = mx.array([[5, 200, 17, 31, 8, 77, 140, 3]])
    want, got = (load(f, mx.float32).forward(ids) for f in (base, done.folder))
    assert mx.abs(got - want).max().item() < 1e-3 * float(want.max() - want.min())


# ------------------------------------------------------------------------------------------------ what is refused

BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no sizes": ({"hidden_size": None}, "hidden_size: found None, expected an integer ≥ 1"),
    "a size as text": ({"vocab_size": "256"}, "vocab_size: found '256'"),
    "too many layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000, expected at most"),
    "heads that do not divide": ({"num_attention_heads": 5}, "hidden_size 64 is no multiple of num_attention_heads 5"),
    "groups that do not divide": ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value"),
    "an odd head": ({"head_dim": 15}, "head_dim: found 15, expected an even number"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', only 'silu' is supported"),
    "a sliding window": ({"layer_types": ["sliding_attention"] * 3}, "layer_types: only full_attention"),
    "ties as text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: found 'yes', expected true or false"),
    "an epsilon of nothing": ({"rms_norm_eps": 0}, "rms_norm_eps: found 0"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling.rope_type: found 'yarn', supported are"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope_scaling.rope_type: found 'dynamic'"),
    "two types": ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "type 'linear' and rope_type 'llama3'"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: found None, expected a positive number"),
    "half of llama3": ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "rope_scaling.low_freq_factor: found None"),
    "llama3 upside down": ({"rope_scaling": {**LLAMA3, "low_freq_factor": 8}}, "low_freq_factor 8 must be below"),
    "scaling no object": ({"rope_scaling": 4}, "rope_scaling: found 4, expected an object"),
    "two bases": ({"rope_parameters": {"rope_theta": 7.0}}, "rope_theta is given twice, as 10000.0 and 7.0"),
    "two scalings": ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "linear"}}, "rope_parameters differ"),
    "a base of nan": ({"rope_theta": float("nan")}, "rope_theta: found nan, expected a number above 1"),
    "half a head turned": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, only 1 is supported"),
    "another dtype": ({"torch_dtype": "float8"}, "dtype 'float8': expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_CONFIGS)
def test_bad_configs_are_refused_in_one_line(fault):
    change, text = BAD_CONFIGS[fault]
    with pytest.raises(CheckpointError) as e:
        read_config(config(**change))
    assert text in str(e.value)
    assert str(e.value).startswith("config.json: ")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"intermediate_size": 96}, "shape [128, 64], config.json calls for [96, 64]"),
        ({"num_hidden_layers": 2}, "tensor model.layers.2.input_layernorm.weight is not part of a Llama checkpoint"),
        ({"num_hidden_layers": 4}, "tensor model.layers.3.input_layernorm.weight is missing"),
        ({"attention_bias": True}, "tensor model.layers.0.self_attn.k_proj.bias is missing"),
    ],
)
def test_tensors_that_the_config_does_not_call_for_are_refused(change, text, bases, tmp_path):
    folder = shutil.copytree(bases["tied"], tmp_path / "base")
    (folder / "config.json").write_text(json.dumps(config(**change)))
    with pytest.raises(CheckpointError) as e:
        load(folder)
    assert text in str(e.value)
    assert "\n" not in str(e.value)


def test_an_untied_checkpoint_needs_its_output(bases, tmp_path):
    folder = shutil.copytree(bases["untied"], tmp_path / "base")
    weights = Weights(folder)
    assert TextModel.head(weights.config, weights).weight.shape == (256, 64)
    assert len([t for t in names_of(weights.raw_config).targets(read_checkpoint(folder))]) == 3 * 9 + 3
    tied = Weights(bases["tied"])
    assert mx.array_equal(TextModel.head(tied.config, tied).weight, tied.array("model.embed_tokens.weight"))


# ------------------------------------------------------------------------------------------------ end to end


@pytest.fixture(scope="module")
def project(tmp_path_factory, quick_yaml) -> Path:
    """A Llama with the example's tokenizer beside a variants.yaml that `publish init` wrote."""
    from conftest import run_here

    folder = tmp_path_factory.mktemp("project")
    base = write_llama(folder / "Llama-tiny", "parameters", vocab_size=4096, hidden_size=128)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        shutil.copy(EXAMPLE / "model" / name, base / name)
    statistics(folder / "imatrix.gguf", json.loads((base / "config.json").read_text()))
    run_here("init", "./Llama-tiny", "--owner", "demo", "--imatrix", "imatrix.gguf", cwd=folder).ok()
    return folder


def test_a_llama_goes_from_init_to_a_verified_variant_whose_card_speaks_of_llama_alone(
    project, publish, quick_yaml, tmp_path
):
    written = (project / "variants.yaml").read_text()
    assert "mtp" not in written
    assert "vision" not in written
    plan = publish("plan", cwd=project).ok().out
    assert "vision" not in plan
    assert "self_attn.o_proj" in plan
    text = written.partition("variants:\n")[0] + "variants:\n  Q4_K_XL: {bits: 4}\n  Q6_K_XL: {bits: 6}\n"
    quick = quick_yaml[quick_yaml.index("bench:") : quick_yaml.index("collection:")]
    (project / "variants.yaml").write_text(
        f"card: {{license: apache-2.0}}\n{quick}{text}  U8: {{bits: 8, recipe: uniform}}\n"
    )
    publish("build", "--all", cwd=project).ok()
    publish("card", "--all", "--check", cwd=project).ok()
    checks = json.loads(publish("verify", "--json", cwd=project).ok().out)
    assert set(checks) == {"Q4_K_XL", "Q6_K_XL", "U8"}
    assert all(c["passed"] is not False for found in checks.values() for c in found)
    for id in checks:
        card = (project / "build" / id / "README.md").read_text()
        assert not re.search(
            r"vision|image|\bmtp\b|multi-token|gated|delta|linear_attn|out_proj|language model", card, re.I
        )
        assert "model_type: llama" in card
        assert "the Llama architecture" in card
    q4 = (project / "build/Q4_K_XL/README.md").read_text()
    assert "6-bit + AWQ" in q4
    built = json.loads((project / "build/Q4_K_XL/config.json").read_text())
    assert built["rope_theta"] == 500000.0
    assert publish("chat", "Q4_K_XL", "--prompt", "x", "--max-tokens", "3", cwd=project).ok().out.strip()
    with LocalHub(tmp_path / "hub", {WRITE: "write:demo"}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}
        publish("push", "--all", "--yes", cwd=project, env=env).ok()
        publish("verify", "--remote", cwd=project, env=env).ok()
    # the card's own variants.yaml gives the same weights
    fragment = re.search(r"```yaml\n(base: .*?)```", q4, re.S)
    assert fragment
    again = project / "again"
    again.mkdir()
    for name in ("Llama-tiny", "imatrix.gguf"):
        (again / name).symlink_to(project / name)
    (again / "variants.yaml").write_text(fragment[1])
    publish("build", "--all", "--skip", "smoke", "--skip", "bench", "--skip", "card", cwd=again).ok()
    hashes = [json.loads((f / "build/Q4_K_XL/manifest.json").read_text())["weights_hash"] for f in (project, again)]
    assert hashes[0] == hashes[1]


def test_mlx_lm_reads_what_was_built(project, publish):
    from mlx_lm.utils import load_model

    folder = project / "build/Q4_K_XL"
    if not folder.is_dir():
        publish("build", "Q4_K_XL", "--skip", "smoke", "--skip", "bench", cwd=project).ok()
    theirs, _ = load_model(folder, strict=True)
    theirs.set_dtype(mx.float32)
    ids = mx.array([[(7 * i * i + 3 * i) % 4000 + 20 for i in range(48)]])
    want, got = theirs(ids), load(folder, mx.float32).forward(ids)
    assert float(mx.abs(got - want).max()) < 1e-4 * float(want.max() - want.min())
