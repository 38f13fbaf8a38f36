"""The engine against live `transformers` in float32; needs the `parity` dependency group.

    python -m pytest tests/parity -m parity

The small checkpoint is taken from $PUBLISH_SHARED or ../shared, SmolLM2 (benchmarks/make_smollm2.py) from $PUBLISH_SMOLLM2;
either is skipped where it is not named or not there.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import transformers
from engine_checkpoints import write_moe
from llama_checkpoints import KINDS, write_llama
from record_logits import ROOT, TOKENS, evaluation_ids, hf_logits, llama_ids

from inference.backend import mx
from inference.load import load

pytestmark = pytest.mark.parity
TOLERANCE = 2e-3  # of a logit, float32; measured: 2.2e-5 tiny, 1.8e-5 small, 1.2e-4 SmolLM2
SHARED = Path(os.environ.get("PUBLISH_SHARED") or ROOT.parent / "shared")


def check(folder: Path, ids: list[int]) -> None:
    """Whole prefill, token by token, and split at points around a chunk and at a random one."""
    expected = hf_logits(folder, ids)
    model = load(folder)

    def worst(pieces: list[list[int]]) -> float:
        cache = model.make_cache()
        got = [np.array(model.forward(mx.array([p]), cache)[0].astype(mx.float32)) for p in pieces]
        return float(np.abs(np.concatenate(got) - expected).max())

    assert worst([ids]) <= TOLERANCE
    assert worst([[i] for i in ids]) <= TOLERANCE
    for at in (1, 63, 64, 65, 311, len(ids) - 1):
        assert worst([ids[:at], ids[at:]]) <= TOLERANCE


def test_tiny_agrees_with_transformers(tiny):
    check(tiny, evaluation_ids(tiny))


def test_small_agrees_with_transformers():
    folder = SHARED / "models/qwen3.5-small"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    check(folder, evaluation_ids(folder))


def test_moe_agrees_with_transformers(tmp_path):
    folder = write_moe(tmp_path / "moe")
    check(folder, np.random.default_rng(0).integers(0, 240, TOKENS).tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_llama_agrees_with_transformers(kind, tmp_path):
    folder = write_llama(tmp_path / kind, kind)
    check(folder, np.random.default_rng(0).integers(0, 256, 400).tolist())


def test_smollm2_agrees_with_transformers():
    folder = Path(os.environ.get("PUBLISH_SMOLLM2") or "nowhere")
    if not folder.is_dir():
        pytest.skip("PUBLISH_SMOLLM2 names no folder")
    ids = evaluation_ids(folder, 256)
    expected = hf_logits(folder, ids)
    model = load(folder)
    cache = model.make_cache()
    pieces = [ids[:100], ids[100:101], ids[101:]]
    got = [np.array(model.forward(mx.array([p]), cache)[0].astype(mx.float32)) for p in pieces]
    assert np.abs(np.concatenate(got) - expected).max() <= TOLERANCE


def test_recorded_llama_logits_are_those_of_this_transformers(tmp_path):
    recorded = np.load(ROOT / "tests/fixtures/llama-logits.npz")
    for kind in KINDS:
        got = hf_logits(write_llama(tmp_path / kind, kind), llama_ids())
        assert recorded[f"{kind}.ids"].tolist() == llama_ids()
        assert np.abs(got[:, recorded[f"{kind}.columns"]] - recorded[f"{kind}.logits"]).max() < 2e-4


def test_recorded_logits_are_those_of_this_transformers(tiny):
    recorded = np.load(ROOT / "tests/fixtures/tiny-logits.npz")
    got = hf_logits(tiny, recorded["ids"].tolist())
    assert np.abs(got[:, recorded["columns"]] - recorded["logits"]).max() < 2e-4


def test_chat_prompt_is_that_of_transformers(tiny):

    theirs = transformers.AutoTokenizer.from_pretrained(tiny)
    ours = load(tiny).tokenizer
    messages = [
        {"role": "user", "content": "Grüße <b>你好</b> 👋"},
        {"role": "assistant", "content": "ok\n"},
        {"role": "user", "content": [{"type": "text", "text": "part"}]},
    ]
    for options in ({}, {"enable_thinking": False}, {"add_generation_prompt": False}):
        options = {"add_generation_prompt": True} | options
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.render_chat(messages, **options) == expected
        assert ours.encode(expected) == theirs(expected, add_special_tokens=False)["input_ids"]
