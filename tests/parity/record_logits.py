"""Record the logits of `transformers` that the default suite compares with; run in the `parity` dependency group.

    python tests/parity/record_logits.py

Writes, from files of this repository alone and in float32,

- tests/fixtures/tiny-logits.npz: examples/tiny/model over 512 tokens of tests/fixtures/evaluation.txt
- tests/fixtures/llama-logits.npz: every random Llama of tests/llama_checkpoints.py over 96 random tokens, keys KIND.logits …

Of the columns of logits it keeps 64 (32), evenly spaced, and the log-sum-exp of all, which moves if any other column does.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from llama_checkpoints import KINDS, write_llama  # noqa: E402

TOKENS = 512
COLUMNS = 64
LLAMA_TOKENS = 96
LLAMA_COLUMNS = 32


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


def llama_ids() -> list[int]:
    return np.random.RandomState(1).randint(0, 256, LLAMA_TOKENS).tolist()


def recording(logits: np.ndarray, ids: list[int], columns: int) -> dict[str, np.ndarray]:
    kept = np.linspace(0, logits.shape[1] - 1, columns).astype(np.int32)
    top = logits.max(axis=1, keepdims=True)
    logsumexp = (top[:, 0] + np.log(np.exp(logits - top, dtype=np.float64).sum(axis=1))).astype(np.float32)
    return {
        "ids": np.array(ids, np.int32),
        "columns": kept,
        "logits": logits[:, kept],
        "logsumexp": logsumexp,
        "argmax": logits.argmax(axis=1).astype(np.int32),
        "source": np.array(f"transformers {transformers.__version__}, torch {torch.__version__}, float32"),
    }


def main() -> None:
    folder = ROOT / "examples/tiny/model"
    ids = evaluation_ids(folder)
    found = recording(hf_logits(folder, ids), ids, COLUMNS)
    np.savez_compressed(ROOT / "tests/fixtures/tiny-logits.npz", **found)
    llamas: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as tmp:
        for kind in KINDS:
            logits = hf_logits(write_llama(Path(tmp) / kind, kind), llama_ids())
            llamas |= {f"{kind}.{k}": v for k, v in recording(logits, llama_ids(), LLAMA_COLUMNS).items()}
    np.savez_compressed(ROOT / "tests/fixtures/llama-logits.npz", **llamas)


if __name__ == "__main__":
    main()
