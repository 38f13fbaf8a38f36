"""What is built loads in the published mlx-lm, strictly, and computes there what this engine computes.

Both compute in float32: bfloat16, whose rounding (2⁻⁸) hides differences of the layout, is what mlx-lm would take anywhere
and this engine on a GPU. mlx-lm's parameters are cast after loading; codes stay as they are stored.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import engine_checkpoints
import pytest
from conftest import EXAMPLE, run_here, write_ladder

from inference.backend import mx
from inference.checkpoint import read_quantization
from inference.divergence import kld
from inference.load import load

IDS = ["Q2_K_XL", "Q3_K_XL", "Q4_K_XL", "Q5_K_XL", "Q6_K_XL", "Q8_K_XL"]
RECIPES = {
    "uniform3": "{bits: 3, recipe: uniform, group_size: 32}",
    "mixed_3_6": "{bits: 3, recipe: mixed_3_6}",
    "mxfp4": "{bits: 4, recipe: mxfp4}",
    "mxfp8": "{bits: 8, recipe: mxfp8}",
    "nvfp4": "{bits: 4, recipe: nvfp4}",
    "mtp_split": "{bits: 4, mtp: split}",
    "unsloth4": "{bits: 4}",
}
ROWS = "variants:\n" + "".join(f"  {id}: {spec}\n" for id, spec in RECIPES.items())
BUILD = ("build", "--all", "--skip", "smoke", "--skip", "bench", "--skip", "card", "-q")
TOLERANCE = 1e-4  # of the logits' own spread; float32 through four layers in another order of sums gives below 1e-5
TOKENS = [[(7 * i * i + 3 * i) % 4000 + 20 for i in range(48)]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory, quick_yaml) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_ladder(folder, quick_yaml.partition("variants:\n")[0] + ROWS)
    run_here(*BUILD, cwd=folder).ok()
    return folder / "build"


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    with pytest.MonkeyPatch.context() as patch:
        config = json.loads(json.dumps(engine_checkpoints.MOE_CONFIG))
        config["text_config"]["vocab_size"] = 4096
        patch.setattr(engine_checkpoints, "MOE_CONFIG", config)
        base = engine_checkpoints.write_moe(folder / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        shutil.copy(EXAMPLE / "model" / name, base / name)
    rows = "".join(line for line in ROWS.splitlines(True) if "mtp_split" not in line)
    (folder / "variants.yaml").write_text("base: ./moe\n" + rows)
    run_here(*BUILD, cwd=folder).ok()
    return folder / "build"


def assert_agrees(folder: Path) -> None:
    from mlx_lm.utils import load_model

    theirs, _ = load_model(folder, strict=True)
    theirs.set_dtype(mx.float32)
    ours = load(folder, mx.float32)
    tokens = mx.array(TOKENS)
    want, got = theirs(tokens), ours.forward(tokens)
    spread = float(want.max() - want.min())
    assert spread > 1
    assert float(mx.abs(got - want).max()) < TOLERANCE * spread
    assert float(kld(want[0], got[0]).max()) < 1e-5  # a float32 KL of equal logits is noise of 1e-6
    _assert_formats(folder, theirs)


def _assert_formats(folder: Path, model) -> None:
    """mlx-lm reads every module in the format that config.json gives it, and no other module is quantized."""
    default, named = read_quantization(json.loads((folder / "config.json").read_text()))
    assert default is not None
    found = {path: (m.bits, m.group_size, m.mode) for path, m in model.named_modules() if hasattr(m, "bits")}
    want = {p: (s.bits, s.group_size, s.mode) for p, s in named.items() if s and p.startswith("language_model.")}
    assert found == want


@pytest.mark.parametrize("id", IDS)
def test_mlx_lm_loads_the_example_strictly_and_computes_the_same(id, built):
    assert_agrees(built / "build" / id)


@pytest.mark.parametrize("id", RECIPES)
def test_mlx_lm_agrees_for_every_format(id, dense):
    assert_agrees(dense / id)


@pytest.mark.parametrize("id", [i for i in RECIPES if i != "mtp_split"])
def test_mlx_lm_agrees_for_a_mixture_of_experts(id, moe):
    assert_agrees(moe / id)


def test_mlx_lm_generates_what_this_engine_generates(built):
    from mlx_lm import generate as mlx_generate
    from mlx_lm import load as mlx_load

    from inference.generate import Sampling, generate

    folder = built / "build/Q8_K_XL"
    theirs, tokenizer = mlx_load(str(folder))
    theirs.set_dtype(mx.float32)
    ours = load(folder, mx.float32)
    ids = ours.tokenizer.encode("The package manager")
    assert ids == tokenizer.encode("The package manager")
    text = "".join(t.text for t in generate(ours, ids, max_tokens=16, sampling=Sampling(), stop=()))
    assert len(text) > 20
    assert mlx_generate(theirs, tokenizer, prompt=ids, max_tokens=16) == text.removeprefix(
        " "
    )  # its detokenizer trims it
