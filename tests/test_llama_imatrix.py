"""An imatrix of ours is one of llama.cpp's: what its tools read out of it was recorded, and what they collect themselves.

The record (`benchmarks/record_llama_imatrix.py`) is of the bundled base over the same tokens, in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from inference.checkpoint import read_json
from inference.tokenizer import Tokenizer
from publisher.calibrate import collect
from quant.imatrix import read_imatrix

FIXTURES = Path(__file__).parent / "fixtures"
RECORD: dict[str, Any] = json.loads((FIXTURES / "llama-imatrix.json").read_text())


@pytest.fixture(scope="module")
def ours(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = Tokenizer.load(tiny).encode((FIXTURES / RECORD["text"]).read_text())
    windows = np.array(ids[: RECORD["windows"] * RECORD["context"]]).reshape(RECORD["windows"], -1)
    return collect(tiny, tmp_path_factory.mktemp("imatrix"), windows.tolist(), fisher_tokens=0).folder / "imatrix.gguf"


@pytest.fixture(scope="module")
def means(ours: Path) -> dict[str, np.ndarray]:
    """E[x²] by gguf name, as the `gguf` package reads the file."""
    found = {t.name: np.array(t.data, np.float64).ravel() for t in GGUFReader(ours).tensors}
    names = {n.removesuffix(".counts") for n in found if n.endswith(".counts")}
    assert all((found[f"{n}.counts"] == RECORD["windows"] * RECORD["context"]).all() for n in names)
    return {n: found[f"{n}.in_sum2"] / found[f"{n}.counts"] for n in names}


def test_llama_imatrix_reads_every_matrix_out_of_our_file(means: dict[str, np.ndarray]) -> None:
    read = RECORD["ours_as_llama_cpp_reads_it"]
    assert means.keys() == read.keys()
    for name, mean in means.items():
        assert mean.size == read[name]["n"], name
        assert mean.sum() == pytest.approx(read[name]["total"], abs=0.005, rel=1e-4), name
        assert mean.max() == pytest.approx(read[name]["max"], abs=5e-5, rel=1e-4), name
        assert mean.min() == pytest.approx(read[name]["min"], abs=5e-5, rel=1e-4), name


def test_llama_imatrix_collects_the_same_over_the_same_tokens(means: dict[str, np.ndarray]) -> None:
    collected = RECORD["collected_by_llama_imatrix"]
    assert means.keys() == collected.keys()
    for name, mean in means.items():
        assert collected[name]["tokens"] == RECORD["windows"] * RECORD["context"]
        assert mean.sum() == pytest.approx(collected[name]["total"], rel=1e-4), name
        assert mean.max() == pytest.approx(collected[name]["max"], rel=1e-4), name
        centre = (mean * np.arange(mean.size)).sum() / mean.sum()  # channels in llama.cpp's order, `ssm_out` tiled
        assert centre == pytest.approx(collected[name]["centre"], rel=1e-4), name


def test_llama_quantize_takes_our_file_for_a_type_that_needs_one(means: dict[str, np.ndarray]) -> None:
    made = RECORD["llama_quantize"]
    assert made["entries"] == len(means)
    assert made["without_weights"] == ["token_embd.weight"]  # an embedding is looked up: there is nothing to weight
    assert made["tensors"][made["type"]] > len(means) / 2


def test_our_file_is_read_back_as_what_was_written(ours: Path, tiny: Path, means: dict[str, np.ndarray]) -> None:
    back = read_imatrix(ours, read_json(tiny / "config.json"))
    prefix = "language_model.model.layers.3."
    np.testing.assert_array_equal(
        back.importance[prefix + "mlp.down_proj"], means["blk.3.ffn_down.weight"].astype("f4")
    )
    np.testing.assert_array_equal(
        back.importance[prefix + "self_attn.q_proj"], means["blk.3.attn_q.weight"].astype("f4")
    )
    assert back.missing == ()
