"""Whether `gptq` should see the inputs that a matrix gets from quantized predecessors, in place of the original's.

    python -m benchmarks.quantized_predecessors BASE --text evaluation.txt --calibration calibration.txt
        [--bits 3,4] [--tokens 32768] [--windows 24] [--json OUT]

Dense models. Every linear of the decoder and the output matrix is quantized in groups of 64 by `gptq`, once with E[x xᵀ] of
the original's inputs, once with E[x̂ x̂ᵀ] of those that come from what was quantized before: queries, keys and values of a
layer, then its output matrix, gate and up, then down, then the next layer. The embedding stays as it is, norms are not
undone. Then the divergence from the original, float32, windows and scoring as `llama-perplexity` has them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from inference.backend import device_info, mx
from inference.blocks import rms_norm
from inference.checkpoint import QuantSpec
from inference.divergence import compare
from inference.families import family_of
from inference.load import Weights, hidden_states_of
from inference.taps import Reading, Recorder, TappedWeights
from inference.tokenizer import Tokenizer
from publisher.evaluate_corpora import Window, text_corpus
from publisher.source import read_source
from quant.hessians import damping, factor_of, factorize
from quant.sample import restored
from quant.solve import Moments, solve
from quant.sums import Sums

CONTEXT, BATCH = 512, 4  # tokens of a window, windows at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--bits", type=lambda text: [int(n) for n in text.split(",")], default=[3, 4])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.base)

    def windows(path: Path, count: int) -> list[Window]:
        return list(text_corpus(read_source(path, str(path), ""), tokenizer, count, CONTEXT).windows)

    calibration = batches(windows(args.calibration, args.tokens // CONTEXT))
    judge = Judge(args.base, windows(args.text, args.windows))
    out: dict[str, Any] = {
        "device": asdict(device_info()), "base": args.base.name, "tokens": args.tokens, "windows": args.windows, "rows": [],
    }  # fmt: skip
    for bits in args.bits:
        for inputs in ("original", "quantized"):
            started = time.perf_counter()
            weights = quantized(args.base, calibration, QuantSpec(bits, 64), inputs == "quantized")
            seconds = round(time.perf_counter() - started, 1)
            klds = judge(weights)
            row = {
                "bits": bits,
                "inputs": inputs,
                "kld": float(klds.mean()),
                "windows": klds.tolist(),
                "seconds": seconds,
            }
            out["rows"].append(row)
            print({k: v for k, v in row.items() if k != "windows"}, flush=True)
            if args.json:
                args.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


class Changed(Weights):
    """A base, some of whose matrices are what quantizing leaves of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, mx.float32)
        self.changed: dict[str, mx.array] = {}

    def array(self, name: str) -> mx.array:
        return self.changed[name] if name in self.changed else super().array(name)


def quantized(base: Path, batches: list[mx.array], spec: QuantSpec, follow: bool) -> Changed:
    """follow: inputs of what is quantized already, else those of the original."""
    weights = Changed(base)
    family = importlib.import_module(f"inference.{family_of(weights.raw_config)}.model")
    model, cfg = family.TextModel, weights.config
    states = [weights.linear(f"{model.prefix}embed_tokens").rows(b) for b in batches]
    for i, entry in enumerate(family.make_cache(cfg).layers):
        after, sums = passed(model, weights, i, type(entry), states)
        for stage in range(len(sums)):
            change(weights, sums[stage], spec)
            if follow:  # all that comes after it reads something else now
                after, sums = passed(model, weights, i, type(entry), states)
        states = after
        print(f"layer {i}", end="\r", flush=True)
    if not cfg.tie_word_embeddings:
        norm, head = weights.array(f"{model.prefix}norm.weight"), Sums([model.output], cfg.hidden_size, None, "one")
        for x in states:
            head.add(Reading(rms_norm(x, norm, cfg.rms_norm_eps), None))
        change(weights, head, spec)
    return weights


def passed(
    model: Any, weights: Changed, i: int, memory: type, states: list[mx.array]
) -> tuple[list[mx.array], list[Sums]]:
    """What leaves layer i, and what its matrices read, in the order of their calls."""
    recorder, out, sums = Recorder(), [], {}
    layer = model.make_layer(weights.config, i, TappedWeights(weights, recorder))
    for x in states:
        recorder.reset()
        out.append(layer(x, memory()))
        for reading in recorder.readings:
            if reading.name not in sums:
                sums[reading.name] = Sums(reading.modules, reading.x.shape[-1], None, "one")
            sums[reading.name].add(reading)
        mx.eval(out[-1])
    return out, list(sums.values())


def change(weights: Changed, read: Sums, spec: QuantSpec) -> None:
    tokens = int(read.counts[0])
    hessian = np.array(read.hessians[0]) / tokens
    factor = factor_of([factorize(hessian, damping(len(hessian), tokens))])
    for module in read.modules:
        w = weights.array(f"{module}.weight").astype(mx.bfloat16)
        packed = solve(w, Moments(np.diagonal(hessian).copy(), factor), spec, "gptq")
        weights.changed[f"{module}.weight"] = restored(packed, spec)
    mx.eval(weights.changed)


class Judge:
    """Mean divergence of each window from the base."""

    def __init__(self, base: Path, windows: list[Window]) -> None:
        self.windows, self.base = windows, Weights(base, mx.float32)
        self.head, self.hidden = self.base.head(), self.states(self.base)

    def states(self, weights: Weights) -> list[mx.array]:
        """Of every window, the positions that are scored."""
        found = mx.concatenate(hidden_states_of(weights, batches(self.windows)))
        return [x[mx.array(w.scored)] for x, w in zip(found, self.windows, strict=True)]

    def __call__(self, weights: Weights) -> np.ndarray:
        head, pairs = weights.head(), zip(self.hidden, self.states(weights), self.windows, strict=True)
        return np.array([compare(a, self.head, b, head, w.targets).kld.mean() for a, b, w in pairs])


def batches(windows: list[Window]) -> list[mx.array]:
    return [mx.array([w.tokens for w in windows[i : i + BATCH]]) for i in range(0, len(windows), BATCH)]


if __name__ == "__main__":
    main()
