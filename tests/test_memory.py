"""What a model needs, from its config alone, against what MLX holds while it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from engine_checkpoints import write_moe, write_variant
from llama_checkpoints import write_llama

import inference.load as load_module
from inference import blocks, memory
from inference.backend import BACKEND, mx, peak_memory, reset_peak_memory
from inference.checkpoint import QuantSpec
from inference.errors import ResourceError
from inference.generate import Sampling, generate
from inference.load import Weights, load
from publisher.bench import measure
from publisher.schema import BenchSpec

LENGTHS = (20, 1100)
COMPUTE = "F32" if BACKEND == "cpu" else "BF16"


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("memory")
    moe = write_moe(root / "moe")
    return {
        "base": tiny,
        "4 bits": write_variant(tiny, root / "q4", QuantSpec(4, 64)),
        "mixed": write_variant(tiny, root / "mixed", QuantSpec(3, 32), {
            "language_model.lm_head": QuantSpec(8, 64), "language_model.model.embed_tokens": False,
        }),
        "moe": moe,
        "moe, 4 bits": write_variant(moe, root / "moe4", QuantSpec(4, 32)),
        "llama": write_llama(root / "llama"),
    }  # fmt: skip


KINDS = ("base", "4 bits", "mixed", "moe", "moe, 4 bits", "llama")


def test_sizes_of_the_forward_pass_are_those_of_its_code():
    assert memory.IN_FLIGHT == blocks.LAYERS_AHEAD + 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_the_weights_follow_from_the_config(kind, folders):
    weights = Weights(folders[kind])
    found = memory.weights_nbytes(weights.raw_config, COMPUTE)
    # beside bfloat16 the norms of an original layout are float32, which its config does not tell
    assert found == weights.nbytes if COMPUTE == "F32" else found == pytest.approx(weights.nbytes, rel=2e-3)


@pytest.mark.parametrize("step", [memory.PREFILL_STEP, memory.SMALLEST_STEP])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_stays_within_weights_caches_and_the_stated_workspace(kind, step, folders):
    model = replace(load(folders[kind]), prefill_step=step)
    for tokens in (n for n in LENGTHS if n < model.config.max_position_embeddings):
        need = memory.need(model.raw_config, tokens, BACKEND, COMPUTE, model.nbytes, step)
        ids = mx.random.randint(0, model.config.vocab_size, (1, tokens), key=mx.random.key(0))
        mx.eval(ids)
        reset_peak_memory()
        before, held = mx.get_active_memory(), model.make_cache()
        mx.eval(model.forward(ids, held, last_only=True), held.arrays())
        above = peak_memory() - before
        assert held.nbytes == need.caches
        assert above <= need.caches + need.workspace, tokens
        # of experts it holds for any routing, of which even is the least
        loose = 12 if "moe" in kind else 10
        assert need.workspace < loose * (above - held.nbytes), f"{tokens}: the bound says nothing"


@pytest.mark.parametrize("kind", ["base", "4 bits", "moe"])
def test_decode_needs_weights_and_caches_and_at_most_a_tenth_more(kind, folders, monkeypatch):
    monkeypatch.setattr(load_module.Model, "tokenizer", _NoText())
    model = load(folders[kind])
    before, held = mx.get_active_memory() - model.nbytes, model.make_cache()
    ids = [i % model.config.vocab_size for i in range(700)]
    for i, _ in enumerate(generate(model, ids, max_tokens=12, sampling=Sampling(), stop=(), cache=held)):
        if i == 0:
            reset_peak_memory()
    room = 0 if BACKEND == "cpu" else 1 << 20  # a GPU's pages, and what it has begun, count beside a model of 4 MB
    assert peak_memory() - before <= 1.1 * (model.nbytes + held.nbytes) + room


class _NoText:
    def detokenizer(self):
        return self

    def add(self, token):
        return ""

    def flush(self):
        return ""


def test_the_benchmark_tells_decode_from_prefill(tiny):
    speed = measure(load(tiny), BenchSpec(turns=1, turn_tokens=8, prefill=[1024], runs=1), "A text. ")
    assert speed.held_gb <= speed.decode_peak_gb <= 1.1 * speed.held_gb + 0.001
    assert speed.decode_peak_gb < speed.peak_gb


def test_what_does_not_fit_is_refused_with_the_figures_before_anything_is_read(tiny, monkeypatch):
    weights = Weights(tiny)
    need = weights.need(20_000, memory.SMALLEST_STEP)
    monkeypatch.setattr(Weights, "array", lambda self, name: pytest.fail(f"{name} was read"))
    monkeypatch.setattr(load_module, "memory_limit", lambda: need.total - 1)
    with pytest.raises(ResourceError) as e:
        load(tiny, context=20_000)
    gb = {k: f"{n / 1e9:.3g} GB" for k, n in (("w", need.weights), ("c", need.caches), ("p", need.workspace))}
    assert str(e.value) == (
        f"{tiny.name}: the weights need {gb['w']}, caches of 20000 tokens {gb['c']}, prefill at most {gb['p']} beside them; "
        f"usable are {(need.total - 1) / 1e9:.3g} GB"
    )
    with pytest.raises(pytest.fail.Exception):  # with less context it fits, and is read
        load(tiny, context=10_000)


def test_a_model_takes_smaller_steps_where_memory_is_short_and_gives_the_same_logits(tiny, monkeypatch):
    ids = mx.random.randint(0, 256, (1, 300), key=mx.random.key(0))
    roomy, weights = load(tiny), Weights(tiny)
    assert roomy.prefill_step == load_module.PREFILL_STEP
    for step in (256, 128):
        limit = weights.need(4096, step).total
        assert limit < weights.need(4096, 2 * step).total
        monkeypatch.setattr(load_module, "memory_limit", lambda limit=limit: limit)
        model = load(tiny, context=4096)
        assert model.prefill_step == step
        assert mx.allclose(model.forward(ids), roomy.forward(ids), atol=1e-3)


def _llama(**quantization) -> dict:
    return {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "hidden_act": "silu", **quantization}  # fmt: skip


def test_prefill_does_not_grow_with_the_prompt_beyond_its_scores():
    at = {n: memory.workspace_nbytes(_llama(), n, "BF16", "metal") for n in (32768, 131072)}
    one_layer = 2 * 8 * 128 * (131072 - 32768) * 2  # keys and values, which move to larger buffers
    assert at[131072] - at[32768] == memory.IN_FLIGHT * one_layer


def test_packed_matrices_count_only_where_they_are_unpacked():
    packed = _llama(quantization={"bits": 4, "group_size": 64, "mode": "affine"})
    metal, cuda = ([memory.workspace_nbytes(c, 8192, "BF16", b) for c in (_llama(), packed)] for b in ("metal", "cuda"))
    matrices = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) * 2  # of a layer, in bf16
    assert metal[1] == metal[0] == cuda[0]
    assert cuda[1] == cuda[0] + memory.IN_FLIGHT * matrices
