"""Record the logits of `transformers` that the default suite compares with; run in the `parity` dependency group.

    python tests/parity/record_logits.py

Writes tests/fixtures/tiny-logits.npz from files of this repository alone: examples/tiny/model over 512 tokens of
tests/fixtures/evaluation.txt, in float32. Of the 4096 columns it keeps 64, evenly spaced, and the log-sum-exp of all,
which moves if any other column does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).parents[2]
TOKENS = 512
COLUMNS = 64


def hf_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """Logits [T, V] of `transformers` in float32."""
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def evaluation_ids(folder: Path, count: int = TOKENS) -> list[int]:
    text = (ROOT / "tests/fixtures/evaluation.txt").read_text(encoding="utf-8")
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"][:count]
    assert len(ids) == count
    return ids


def main() -> None:
    folder = ROOT / "examples/tiny/model"
    ids = evaluation_ids(folder)
    logits = hf_logits(folder, ids)
    columns = np.linspace(0, logits.shape[1] - 1, COLUMNS).astype(np.int32)
    top = logits.max(axis=1, keepdims=True)
    logsumexp = (top[:, 0] + np.log(np.exp(logits - top, dtype=np.float64).sum(axis=1))).astype(np.float32)
    np.savez_compressed(
        ROOT / "tests/fixtures/tiny-logits.npz",
        ids=np.array(ids, np.int32),
        columns=columns,
        logits=logits[:, columns],
        logsumexp=logsumexp,
        argmax=logits.argmax(axis=1).astype(np.int32),
        source=np.array(f"transformers {transformers.__version__}, torch {torch.__version__}, float32"),
    )


if __name__ == "__main__":
    main()
