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
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from inference.backend import device_info, mx
from inference.blocks import rms_norm
from inference.checkpoint import QuantSpec
from inference.divergence import compare
from inference.families import family_of
from inference.linear import Dense, Linear
from inference.load import Weights, hidden_states_of
from inference.tokenizer import Tokenizer
from quant.hessians import damping, factor_of, factorize
from quant.sample import restored
from quant.solve import Moments, solve

CONTEXT, BATCH = 512, 4  # tokens of a window, windows at once
# matrices of a layer in the order of what they read; of those with one input, the first is listened to
STAGES = (
    (("q_proj", "k_proj", "v_proj"), ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")),
    (("o_proj",), ("out_proj",)),
    (("gate_proj", "up_proj"),),
    (("down_proj",),),
)


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

    def windows(path: Path, count: int) -> list[mx.array]:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
        whole = [ids[i : i + CONTEXT] for i in range(0, len(ids) - CONTEXT + 1, CONTEXT)][:count]
        return [mx.array(whole[i : i + BATCH]) for i in range(0, len(whole), BATCH)]

    calibration = windows(args.calibration, args.tokens // CONTEXT)
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
    """A base, some of whose matrices are what quantizing leaves of them. sums: Hessians of what is read meanwhile."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, mx.float32)
        self.changed: dict[str, mx.array] = {}
        self.sums: dict[str, mx.array] | None = None

    def array(self, name: str) -> mx.array:
        return self.changed[name] if name in self.changed else super().array(name)

    def linear(self, module: str) -> Linear:
        found = super().linear(module)
        assert isinstance(found, Dense)
        return found if self.sums is None else Tap(found.weight, found.bias, module, self.sums)


class Tap(Dense):
    """A matrix that adds up x xᵀ of what it reads, [K, K]."""

    __slots__ = ("module", "sums")

    def __init__(self, weight: mx.array, bias: mx.array | None, module: str, sums: dict[str, mx.array]) -> None:
        super().__init__(weight, bias)
        object.__setattr__(self, "module", module)
        object.__setattr__(self, "sums", sums)

    def __call__(self, x: mx.array) -> mx.array:
        if self.module.rpartition(".")[2] in {group[0] for stage in STAGES for group in stage}:
            flat = x.reshape(-1, x.shape[-1])
            before = self.sums.get(self.module)
            self.sums[self.module] = flat.T @ flat if before is None else before + flat.T @ flat
        return super().__call__(x)


def quantized(base: Path, batches: list[mx.array], spec: QuantSpec, follow: bool) -> Changed:
    """follow: inputs of what is quantized already, else those of the original."""
    weights = Changed(base)
    family = importlib.import_module(f"inference.{family_of(weights.raw_config)}.model")
    model, cfg = family.TextModel, weights.config
    tokens = sum(b.size for b in batches)
    states = [weights.linear(f"{model.prefix}embed_tokens").rows(b) for b in batches]
    for i in range(cfg.num_hidden_layers):
        for stage in STAGES if follow else (sum(STAGES, ()),):
            weights.sums = {}
            for _ in passed(family, weights, i, states):
                mx.eval(list(weights.sums.values()))
            members = {group[0]: group for group in stage}
            sums = {m: h for m, h in weights.sums.items() if m.rpartition(".")[2] in members}
            weights.sums = None
            if not follow:  # before anything of this layer changes
                after = list(passed(family, weights, i, states))
            for first, total in sums.items():
                parent, _, name = first.rpartition(".")
                change(weights, [f"{parent}.{n}" for n in members[name]], total, tokens, spec)
        states = list(passed(family, weights, i, states)) if follow else after
        print(f"layer {i}", end="\r", flush=True)
    head = model.output if not cfg.tie_word_embeddings else None
    if head:
        norm, hessian = weights.array(f"{model.prefix}norm.weight"), 0
        for x in states:
            flat = rms_norm(x, norm, cfg.rms_norm_eps).reshape(-1, x.shape[-1])
            hessian = hessian + flat.T @ flat
            mx.eval(hessian)
        change(weights, [head], hessian, tokens, spec)
    return weights


def passed(family: Any, weights: Changed, i: int, states: list[mx.array]) -> Iterator[mx.array]:
    """What leaves layer i, a batch at a time."""
    layer = family.TextModel.make_layer(weights.config, i, weights)
    kind = type(family.make_cache(weights.config).layers[i])
    for x in states:
        y = layer(x, kind())
        mx.eval(y)
        yield y


def change(weights: Changed, modules: list[str], total: Any, tokens: int, spec: QuantSpec) -> None:
    hessian = np.array(total) / tokens
    factor = factor_of([factorize(hessian, damping(len(hessian), tokens))])
    for module in modules:
        w = weights.array(f"{module}.weight").astype(mx.bfloat16)
        packed = solve(w, Moments(np.diagonal(hessian).copy(), factor), spec, "gptq")
        weights.changed[f"{module}.weight"] = restored(packed, spec)
    mx.eval(weights.changed)


class Judge:
    """Mean divergence of each window from the base."""

    def __init__(self, base: Path, batches: list[mx.array]) -> None:
        self.batches, self.base = batches, Weights(base, mx.float32)
        self.head, self.hidden = self.base.head(), hidden_states_of(self.base, batches)

    def __call__(self, weights: Weights) -> np.ndarray:
        head, out = weights.head(), []
        for tokens, ours, theirs in zip(
            self.batches, hidden_states_of(weights, self.batches), self.hidden, strict=True
        ):
            for row in range(len(tokens)):
                scored = slice(CONTEXT // 2, CONTEXT - 1)
                want = tokens[row, CONTEXT // 2 + 1 :].tolist()
                found = compare(theirs[row, scored], self.head, ours[row, scored], head, want)
                out.append(found.kld.mean())
        return np.array(out)


if __name__ == "__main__":
    main()
