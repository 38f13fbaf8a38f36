"""Small bases to collect statistics of, and a command that does so and kills itself on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from engine_checkpoints import MOE_CONFIG, write_moe

from inference.backend import mx
from inference.tokenizer import Tokenizer
from publisher.calibrate import collect

ROOT = Path(__file__).parents[1]
LAYER = "language_model.model.layers."
HEAD, EMBED = "language_model.lm_head", "language_model.model.embed_tokens"


def windows(count: int = 6, length: int = 48, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, MOE_CONFIG["text_config"]["vocab_size"], (count, length)).tolist()


def text_windows(base: Path) -> list[list[int]]:
    ids = Tokenizer.load(base).encode((ROOT / "publisher/data/calibration.txt").read_text(encoding="utf-8")[:3000])
    return [ids[i : i + 48] for i in range(0, 6 * 48, 48)]


def tied(folder: Path) -> Path:
    """A random base whose output is its embedding."""
    write_moe(folder)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.eval(list(tensors.values()))  # type: ignore[union-attr]
    del tensors["lm_head.weight"]  # type: ignore[arg-type]
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})  # type: ignore[arg-type]
    return folder


def main() -> None:
    """base out steps: collect, and die by SIGKILL after so many steps of the run."""
    left = int(sys.argv[3])

    def die(done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    collect(Path(sys.argv[1]), Path(sys.argv[2]), windows(), fisher_tokens=96, progress=die)


if __name__ == "__main__":
    main()
