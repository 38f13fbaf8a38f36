"""What a model needs, from its config alone, against what MLX holds while it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_checkpoints import write_moe, write_variant
from llama_checkpoints import write_llama

import inference.load as load_module
from inference import blocks, cache, gated_delta, memory
from inference.backend import BACKEND, mx, peak_memory, reset_peak_memory
from inference.checkpoint import QuantSpec
from inference.errors import ResourceError
from inference.generate import Sampling, generate
from inference.load import Weights, load
from publisher.bench import measure
from publisher.schema import BenchSpec

LENGTHS = (20, 600, 2048)
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
    assert memory.SCORE_BYTES == blocks.SCORE_BYTES
    assert memory.CHUNK == gated_delta.CHUNK
    assert memory.KV_STEP == cache.KV_STEP


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_the_weights_follow_from_the_config(kind, folders):
    weights = Weights(folders[kind])
    assert memory.weights_nbytes(weights.raw_config, COMPUTE) == weights.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_stays_within_weights_caches_and_the_stated_workspace(kind, folders):
    model = load(folders[kind])
    for tokens in (n for n in LENGTHS if n < model.config.max_position_embeddings):
        need = memory.need(model.raw_config, tokens, COMPUTE, model.nbytes)
        ids = mx.random.randint(0, model.config.vocab_size, (1, tokens), key=mx.random.key(0))
        mx.eval(ids)
        reset_peak_memory()
        before, held = mx.get_active_memory(), model.make_cache()
        mx.eval(model.forward(ids, held, last_only=True), held.arrays())
        above = peak_memory() - before
        assert held.nbytes == need.caches
        assert above <= need.caches + need.workspace, tokens
        # of experts it holds for any routing, of which even is the least
        loose = 32 if "moe" in kind else 16
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
    assert peak_memory() - before <= 1.1 * (model.nbytes + held.nbytes)


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
    need = weights.need(20_000)
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


def test_prefill_does_not_grow_with_the_prompt_beyond_its_scores():
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256, "rms_norm_eps": 1e-5,
              "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
              "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "hidden_act": "silu"}  # fmt: skip
    at = {n: memory.workspace_nbytes(config, n, "BF16") for n in (32768, 131072)}
    assert at[131072] - at[32768] == 2 * 8 * 128 * (131072 - 32768) * 2  # one layer's keys and values
