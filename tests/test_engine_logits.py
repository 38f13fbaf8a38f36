"""The engine's logits against those of `transformers`, recorded by tests/parity/record_logits.py."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from engine_checkpoints import write_moe

from inference import blocks
from inference.backend import BACKEND, mx
from inference.load import hidden_states_streamed, load, load_head

FIXTURES = Path(__file__).parent / "fixtures"
# Largest difference of a logit over 512 tokens. Measured in float32: 2.2e-5. A GPU computes in bfloat16.
TOLERANCE = 2e-3 if BACKEND == "cpu" else 0.6


@pytest.fixture(scope="module")
def model(tiny):
    return load(tiny)


@pytest.fixture(scope="module")
def recorded():
    return np.load(FIXTURES / "tiny-logits.npz")


def check(logits: mx.array, recorded, start: int = 0) -> None:
    """logits [1, T, V] of positions from `start` on."""
    got = np.array(logits[0].astype(mx.float32))
    rows = slice(start, start + len(got))
    assert np.abs(got[:, recorded["columns"]] - recorded["logits"][rows]).max() <= TOLERANCE
    logsumexp = np.array(mx.logsumexp(logits[0].astype(mx.float32), axis=-1))
    assert np.abs(logsumexp - recorded["logsumexp"][rows]).max() <= TOLERANCE
    if BACKEND == "cpu":
        assert (got.argmax(axis=1) == recorded["argmax"][rows]).all()


def test_tokenizer_reads_the_evaluation_text_as_transformers_does(model, recorded):
    text = (FIXTURES / "evaluation.txt").read_text(encoding="utf-8")
    assert model.tokenizer.encode(text)[:512] == recorded["ids"].tolist()


def test_prefill_agrees_with_transformers(model, recorded):
    ids = mx.array(recorded["ids"])[None]
    check(model.forward(ids), recorded)
    last = model.forward(ids, last_only=True)
    assert mx.abs(last - model.forward(ids)[:, -1:]).max().item() <= TOLERANCE


def test_token_by_token_agrees_with_transformers(model, recorded):
    cache = model.make_cache()
    out = [model.forward(mx.array([[int(t)]]), cache) for t in recorded["ids"][:140]]
    check(mx.concatenate(out, axis=1), recorded)


@pytest.mark.parametrize("points", [[1], [64], [65, 66], [511], [3, 70, 200, 201, 450]])
def test_split_prefill_agrees_with_transformers(model, recorded, points):
    ids, cache = recorded["ids"], model.make_cache()
    for start, end in zip([0, *points], [*points, len(ids)], strict=True):
        check(model.forward(mx.array(ids[start:end])[None], cache), recorded, start)


def test_long_prompts_are_worked_off_in_pieces(model, recorded, monkeypatch):
    monkeypatch.setattr(model, "prefill_step", 100)
    monkeypatch.setattr(blocks, "SCORE_BYTES", 4 * 4 * 512 * 30)  # blocks of 30 queries and more
    check(model.forward(mx.array(recorded["ids"])[None]), recorded)


def test_batches_do_not_mix(model, recorded):
    ids = mx.array(recorded["ids"][:200].reshape(2, 100))
    both = model.forward(ids)
    for i in range(2):
        assert mx.allclose(both[i : i + 1], model.forward(ids[i : i + 1]), atol=1e-4)


def test_filling_behind_the_end_changes_nothing(model, recorded):
    """How evaluation batches windows of different lengths."""
    ids = recorded["ids"].tolist()
    padded = mx.array([[*ids[:100]], [*ids[:37], *[0] * 63]])
    for row, n in ((0, 100), (1, 37)):
        assert mx.allclose(model.forward(padded)[row, :n], model.forward(mx.array(ids[:n])[None])[0], atol=1e-4)


def test_one_more_token_is_what_a_whole_pass_says(model, recorded):
    """The compiled step of decode: the same numbers, and the same cache behind it."""
    ids, cache = mx.array(recorded["ids"])[None], model.make_cache()
    model.forward(ids[:, :100], cache)
    for at in range(100, 104):
        check(model.step(ids[:, at : at + 1], cache), recorded, at)
    assert cache.length == 104
    check(model.forward(ids[:, 104:], cache), recorded, 104)


def test_the_step_of_many_experts_waits_for_nothing(tmp_path, monkeypatch):
    """A batch whose routed rows would be sorted by expert: sorting asks the device, which a compiled function cannot."""
    model = load(write_moe(tmp_path / "moe"))
    tokens, cache = mx.arange(24)[:, None] * mx.ones((1, 5), mx.int32), model.make_cache()
    model.forward(tokens, cache)
    monkeypatch.setattr("inference.linear.Sorting.of", lambda *a: pytest.fail("it would wait"))
    assert model.step(tokens[:, :1], cache).shape == (24, 1, model.config.vocab_size)


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
def test_the_step_can_be_compiled(tiny, recorded, monkeypatch):
    monkeypatch.setattr("inference.step.compiled", mx.compile)
    model = load(tiny)
    ids, cache = mx.array(recorded["ids"])[None], model.make_cache()
    model.forward(ids[:, :255], cache)
    for at in range(255, 258):  # the key cache grows at 256
        check(model.step(ids[:, at : at + 1], cache), recorded, at)


def test_streaming_layer_by_layer_gives_the_same_logits(tiny, model, recorded):
    batches = [mx.array(recorded["ids"][:64])[None], mx.array(recorded["ids"])[None]]
    short, whole = hidden_states_streamed(tiny, batches)
    head = load_head(tiny)
    check(head(short), recorded)
    check(head(whole), recorded)
    assert mx.allclose(whole, model.hidden(batches[1]), atol=1e-4)  # a loaded model fuses matrices that read one input
