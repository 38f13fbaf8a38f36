"""Seconds that solving takes at the shapes of a real model, on this machine: one tensor of every shape, by every solver.

    python benchmarks/solve_cost.py [--preset 9b | one] [--bits 4] [--json OUT]

`one` is one small matrix, for a CPU.

Weights and Hessians are random (time does not depend on them). The totals multiply each shape by how often it occurs.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from inference.backend import device_info, mx, peak_memory
from inference.checkpoint import QuantSpec
from quant import hessians
from quant.solve import Moments, solve

# rows, columns, how often; `input`: tensors with the same letter share one Hessian a layer
SHAPES = {
    "9b": [
        ("in_proj_qkv", 8192, 4096, 24, "a"), ("in_proj_z", 4096, 4096, 24, "a"), ("out_proj", 4096, 4096, 24, "b"),
        ("q_proj", 8192, 4096, 8, "c"), ("k/v_proj", 1024, 4096, 16, "c"), ("o_proj", 4096, 4096, 8, "d"),
        ("gate/up_proj", 12288, 4096, 64, "e"), ("down_proj", 4096, 12288, 32, "f"),
        ("embed/lm_head", 248320, 4096, 2, "g"),
    ],
    "one": [("matrix", 2048, 1024, 1, "a")],
}  # fmt: skip
FACTORS = {"9b": {4096: 24 + 24 + 8 + 8 + 32 + 2, 12288: 32}, "one": {1024: 1}}
BAND = 16384  # rows at once: 128 MiB of bf16 at 4096 columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="9b", choices=SHAPES)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    spec = QuantSpec(args.bits, 64)
    factors, seconds = {}, {}
    for k in FACTORS[args.preset]:
        x = np.random.default_rng(0).normal(size=(k + 512, k)).astype(np.float32)
        hessian = np.array(mx.array(x).T @ mx.array(x)) / len(x)
        hessians.factorize(hessian[:512, :512], 0.02)  # kernels compiled
        started = time.perf_counter()
        part = hessians.factorize(hessian, 0.02)
        seconds[k] = time.perf_counter() - started
        factors[k] = Moments(np.diagonal(hessian).copy(), hessians.factor_of([part]))
        print(f"factorize {k:6}: {seconds[k]:.2f} s", flush=True)
    total: dict[str, float] = {"factorize": sum(n * seconds[k] for k, n in FACTORS[args.preset].items())}
    rows = []
    for name, n, k, times, _ in SHAPES[args.preset]:
        band = min(n, BAND)
        w = mx.random.normal((band, k)).astype(mx.bfloat16) * 0.02
        mx.eval(w)
        row: dict[str, object] = {"tensor": name, "rows": n, "columns": k, "count": times}
        for solver in ("rtn", "ls", "gptq"):
            solve(w[:256], factors[k], spec, solver)
            started = time.perf_counter()
            solve(w, factors[k], spec, solver)
            took = (time.perf_counter() - started) * n / band
            row[solver] = round(took, 4)
            total[solver] = total.get(solver, 0.0) + took * times
        rows.append(row)
        print(row, flush=True)
    total = {k: round(v, 1) for k, v in total.items()}
    print("a whole model, seconds a variant (factorizing: once for all variants):", total)
    print(f"peak {peak_memory() / 1e9:.2f} GB on {device_info().device}")
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "device": asdict(device_info()),
                    "factorize_s": seconds,
                    "rows": rows,
                    "total": total,
                    "peak_gb": round(peak_memory() / 1e9, 2),
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
