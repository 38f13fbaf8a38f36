"""Write an imatrix GGUF of plausible random values for an original Qwen3.5 checkpoint: for speed, memory and AWQ runs.

    python -m benchmarks.synthetic_imatrix MODEL OUT.gguf [--seed 0] [--chunks 100]

Only config.json is read. Matrices that share an input get the same statistics, a log-normal spread with a few outlier
channels; experts get unequal counts, one in 64 none at all. The values say nothing of the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from inference.checkpoint import read_json
from quant.imatrix import gguf_shapes, write_imatrix

CHUNK = 512  # tokens
# matrices that read one and the same vector, by the start of their gguf name
INPUTS = {
    "attn_q": "attn", "attn_k": "attn", "attn_v": "attn", "attn_qkv": "attn", "attn_gate": "attn", "ssm_alpha": "attn",
    "ssm_beta": "attn", "ffn_gate": "ffn", "ffn_up": "ffn", "ffn_gate_inp": "ffn", "ffn_gate_shexp": "ffn",
    "ffn_up_shexp": "ffn", "ffn_gate_inp_shexp": "ffn", "ffn_gate_exps": "exps", "ffn_up_exps": "exps",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunks", type=int, default=100)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    tokens = args.chunks * CHUNK
    shared: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, (nmat, k) in gguf_shapes(read_json(args.model / "config.json")).items():
        _, layer, kind, _ = name.split(".")
        key = f"{layer}.{INPUTS.get(kind, kind)}"
        if key not in shared:
            shared[key] = statistics(rng, nmat, k, tokens)
        sums[name] = shared[key]
    write_imatrix(args.out, sums, ["synthetic"], args.chunks, CHUNK)


def statistics(rng: np.random.Generator, nmat: int, k: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(in_sum2 [nmat, k], counts [nmat])"""
    mean = rng.lognormal(0.0, 0.7, (nmat, k))
    mean[:, rng.integers(0, k, max(1, k // 512))] *= 100  # outlier channels
    counts = np.full(nmat, tokens, np.float64)
    if nmat > 1:
        counts = np.floor(tokens * rng.dirichlet(np.ones(nmat)))
        counts[::64] = 0
    return (mean * counts[:, None]).astype(np.float32), counts.astype(np.float32)


if __name__ == "__main__":
    main()
