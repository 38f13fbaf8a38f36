"""The vision tower that a variant ships is the original's: mlx-vlm loads it strictly and computes the same features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
mlx_vlm = pytest.importorskip("mlx_vlm")

TINY = Path(__file__).parents[2] / "examples" / "tiny"
GRID = (1, 8, 12)  # frames, rows and columns of 16-pixel patches: an image of 192 × 128
PATCH = 3 * 2 * 16 * 16  # channels × frames a patch × height × width


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit variant with its vision tower, built by the command line."""
    from click.testing import CliRunner

    from publisher.cli import main

    folder = tmp_path_factory.mktemp("vision")
    (folder / "variants.yaml").write_text(
        f"base: {{path: {TINY / 'model'}}}\nimatrix: {{path: {TINY / 'imatrix-tiny.gguf'}}}\nvariants:\n  Q4: {{bits: 4}}\n"
    )
    args = ["build", "Q4", "--file", str(folder / "variants.yaml"), "--skip", "smoke", "--skip", "bench", "--quiet"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    return folder / "build" / "Q4"


def test_mlx_vlm_loads_the_variant_strictly_and_its_tower_gives_the_original_features(variant: Path) -> None:
    import mlx.core as mx
    from mlx_vlm.utils import load_model

    pixels = np.random.default_rng(0).standard_normal((GRID[0] * GRID[1] * GRID[2], PATCH)).astype(np.float32)
    original = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(TINY / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        out = original.model.visual(torch.from_numpy(pixels), grid_thw=torch.tensor([GRID]))
    expected = (out.pooler_output if hasattr(out, "pooler_output") else out).numpy()

    model = load_model(variant, strict=True)
    model.vision_tower.set_dtype(mx.float32)
    got = model.vision_tower(mx.array(pixels), mx.array([GRID]))
    got = np.array(got[0] if isinstance(got, tuple) else got)
    assert got.shape == expected.shape == (GRID[1] * GRID[2] // 4, 256)
    scale = np.abs(expected).max()
    assert scale > 0
    assert np.abs(got - expected).max() / scale < 2e-4


def test_mlx_vlm_and_the_engine_agree_on_the_text_logits(variant: Path) -> None:
    import mlx.core as mx
    from mlx_vlm.utils import load_model

    from inference.load import load

    tokens = mx.array([[11, 42, 7, 300, 5, 1200, 64, 9] * 8])
    theirs = load_model(variant, strict=True)
    theirs.language_model.set_dtype(mx.float32)
    expected = np.array(theirs.language_model(tokens).logits)
    got = np.array(load(variant).forward(tokens))
    assert np.abs(got - expected).max() < 2e-3 * max(1.0, np.abs(expected).max())
