"""The divergence of built variants as mlx-lm itself loads and runs them, beside what `publish eval` measures.

    python benchmarks/through_mlx_lm.py BASE VARIANT_FOLDER [VARIANT_FOLDER …] --text evaluation.txt [--windows 24]

mlx-lm loads each folder strictly; its parameters are then cast to float32, as the evaluation computes. The teacher is
this engine's BF16. Needs the `test` group.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from inference.backend import mx
from inference.divergence import kld
from inference.load import hidden_states_streamed, load_head
from inference.tokenizer import Tokenizer
from publisher.evaluate import measure_folder
from publisher.evaluate_corpora import text_corpus
from publisher.source import read_source


def main() -> None:
    from mlx_lm.utils import load_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    source = read_source(args.text, "text", "evaluation.txt")
    windows = text_corpus(source, Tokenizer.load(args.base), args.windows, 512).windows
    tokens = [mx.array([w.tokens]) for w in windows]
    head = load_head(args.base, mx.float32)
    states = hidden_states_streamed(args.base, tokens, compute=mx.float32)
    rows = []
    for folder in args.folders:
        model, _ = load_model(folder, strict=True)
        model.set_dtype(mx.float32)
        found = []
        for window, ids, state in zip(windows, tokens, states, strict=True):
            scored = mx.array(window.scored)
            d = kld(head(state[0][scored]), model(ids)[0][scored])
            mx.eval(d)
            found.append(np.array(d))
        theirs = float(np.concatenate(found).mean())
        ours = measure_folder(args.base, folder, args.text, args.windows)
        assert ours.kld
        rows.append({"folder": folder.name, "mlx_lm": theirs, "engine": ours.kld.value})
        print(f"{folder.name:16} KLD through mlx-lm {theirs:.6f}, through this engine {ours.kld.value:.6f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
