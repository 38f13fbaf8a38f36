"""Our figures of divergence are llama-perplexity's: the same weights and tokens give what a recorded run of it printed.

The record (`benchmarks/record_llama_perplexity.py`) is of a float32 GGUF of the bundled base and of a coarse copy of it,
with a float32 cache. What is left between the two: llama.cpp leaves out tokens to which the base gives less than e⁻¹⁶,
keeps the base's log-probabilities in steps of 16/65535, so that each is off by up to 1.2e-4, and prints six digits
(percentages: three).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coarse_base import write_coarse

from inference.backend import mx
from inference.load import load
from inference.tokenizer import Tokenizer
from publisher.evaluate import measure_folder
from publisher.schema import Divergence

FIXTURES = Path(__file__).parent / "fixtures"
RECORD: dict[str, Any] = json.loads((FIXTURES / "llama-perplexity.json").read_text())
FIGURES: dict[str, float] = RECORD["figures"]
STEP = 16 / 65535 / 2  # nats: how far a stored log-probability of the base may be off
PRINTED = 1e-6


@pytest.fixture(scope="module")
def other(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coarse(tiny, tmp_path_factory.mktemp("llama-perplexity") / "coarse")


@pytest.fixture(scope="module")
def found(tiny: Path, other: Path) -> Divergence:
    text, windows, context = FIXTURES / RECORD["text"], RECORD["windows"], RECORD["context"]
    return measure_folder(tiny, other, text, windows, context, cache=other.parent / "teacher")


def test_llama_cpp_read_the_same_tokens(tiny: Path) -> None:
    used = windows_of(tiny).astype("<i4")
    assert hashlib.sha256(used.tobytes()).hexdigest() == RECORD["tokens_sha256"]


def test_llama_cpp_finds_no_divergence_of_the_base_from_itself() -> None:
    assert RECORD["control"]["mean"] == pytest.approx(0, abs=PRINTED)
    assert RECORD["control"]["max"] < STEP


def test_the_mean_divergence_is_that_of_llama_perplexity(found: Divergence, tiny: Path, other: Path) -> None:
    assert found.kld is not None
    assert found.positions == RECORD["windows"] * (RECORD["context"] // 2 - 1)
    assert found.nonfinite == 0
    assert found.kld.value == pytest.approx(FIGURES["mean"], abs=5e-5)
    assert found.kld.value - left_out(tiny, other) == pytest.approx(FIGURES["mean"], abs=2 * PRINTED)


def test_its_distribution_is_that_of_llama_perplexity(found: Divergence) -> None:
    assert found.kld_p999 is not None
    assert found.kld_median == pytest.approx(FIGURES["median"], abs=STEP)
    assert found.kld_p99 == pytest.approx(FIGURES["p99"], abs=STEP)
    assert found.kld_p999.value == pytest.approx(FIGURES["p99_9"], abs=STEP)
    assert found.kld_max == pytest.approx(FIGURES["max"], abs=STEP)


def test_agreement_and_perplexity_are_those_of_llama_perplexity(found: Divergence) -> None:
    assert found.top1 is not None
    assert found.dp_rms is not None
    assert found.ln_ppl_ratio is not None
    assert 100 * found.top1.value == pytest.approx(FIGURES["same_top_percent"], abs=1e-3)
    assert 100 * found.dp_rms.value == pytest.approx(FIGURES["rms_dp_percent"], abs=2e-3)
    assert found.ln_ppl_ratio.value == pytest.approx(FIGURES["ln_ppl_ratio"], abs=STEP / 10)
    assert found.ppl == pytest.approx(FIGURES["ppl"], rel=1e-5)
    assert found.ppl_base == pytest.approx(FIGURES["ppl_base"], rel=STEP / 10)


def windows_of(base: Path) -> np.ndarray:
    ids = Tokenizer.load(base).encode((FIXTURES / RECORD["text"]).read_text())
    return np.array(ids[: RECORD["windows"] * RECORD["context"]], np.int32).reshape(RECORD["windows"], -1)


def left_out(base: Path, other: Path) -> float:
    """Mean of the divergence's terms over the tokens that llama-perplexity does not count."""
    tokens = mx.array(windows_of(base))
    scored = slice(RECORD["context"] // 2, -1)
    logits = [load(folder, mx.float32).forward(tokens)[:, scored] for folder in (base, other)]
    p, q = (np.array(x - mx.logsumexp(x, axis=-1, keepdims=True)) for x in logits)
    return float(np.where(p <= -16, np.exp(p) * (p - q), 0).sum(-1).mean())
