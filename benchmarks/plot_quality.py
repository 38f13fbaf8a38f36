"""KLD against size, from the rows of quality.py and gguf_rows.py: a picture and a Markdown table.

python benchmarks/plot_quality.py benchmarks/results/quality_NAME.json OUT.png [--gguf benchmarks/results/gguf_NAME.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# series: which plans, label, colour (Okabe-Ito), marker
SERIES = (
    ("u{}-rtn", "mlx-lm, uniform (nearest)", "#999999", "s"),
    ("u{}-ls", "uniform, least squares", "#56B4E9", "v"),
    ("u{}-gptq", "uniform, gptq", "#0072B2", "o"),
    ("unsloth{}", "`unsloth` as published", "#CC79A7", "D"),
    ("a-", "allocated, gptq", "#D55E00", "^"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path)
    args = parser.parse_args()
    rows = json.loads(args.rows.read_text())["rows"]
    gguf = json.loads(args.gguf.read_text())["rows"] if args.gguf else []
    fig, ax = plt.subplots(figsize=(8, 5), dpi=120)
    for pattern, label, colour, marker in SERIES:
        found = sorted((r for r in rows if _is(r["plan"], pattern)), key=lambda r: r["text_nbytes"])
        if not found:
            continue
        x, y = [r["text_nbytes"] / 1e6 for r in found], [r["kld"] for r in found]
        error = [[r["kld"] - r["low"] for r in found], [r["high"] - r["kld"] for r in found]]
        ax.errorbar(x, y, yerr=error, color=colour, marker=marker, label=label, linewidth=1, capsize=2, markersize=5)
    if gguf:
        found = sorted(gguf, key=lambda r: r["text_bytes"])
        ax.plot([r["text_bytes"] / 1e6 for r in found], [r["kld"] for r in found], "x--", color="#000000",
                label="llama.cpp, imatrix", linewidth=1)  # fmt: skip
    ax.set_yscale("log")
    ax.set_xlabel("text bytes (MB): all stored tensors but vision and MTP")
    ax.set_ylabel("mean KL divergence from BF16 (nats a token)")
    ax.grid(visible=True, which="both", alpha=0.2)
    ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(args.out, metadata={"Software": None})
    base = {r["plan"].split("-")[0]: r["kld"] for r in rows if r["plan"].endswith("-rtn")}
    print("| plan | MB | bits a weight | KLD (95 %) | p99.9 | top-1 | of nearest | predicted |")
    print("|---|---|---|---|---|---|---|---|")
    for r in sorted(rows, key=lambda r: (r["text_nbytes"], -r["kld"])):
        near = base.get(r["plan"].split("-")[0]) or base.get(r["plan"].removeprefix("a-"))
        ratio = f"{r['kld'] / near:.3f}" if near else ""
        predicted = f"{r['predicted']:.4g}" if r.get("predicted") else ""
        kld = f"{_digits(r['kld'])} ({_digits(r['low'])}-{_digits(r['high'])})"
        print(
            f"| {r['plan']} | {r['text_nbytes'] / 1e6:.2f} | {r['bpw']:.2f} | {kld} | {_digits(r['p999'])} "
            f"| {100 * r['top1']:.2f} % | {ratio} | {predicted} |"
        )
    if gguf:
        _against(rows, gguf)


def _against(rows: list[dict], gguf: list[dict]) -> None:
    """Each allocated plan against the best of the GGUF rows at its bytes, interpolated on log KLD over bytes."""
    front: list[dict] = []
    for r in sorted(gguf, key=lambda r: r["text_bytes"]):
        if not front or r["kld"] < front[-1]["kld"]:
            front.append(r)
    print("\n| plan | bits a weight | KLD | best GGUF at these bytes | ratio |\n|---|---|---|---|---|")
    for r in sorted((r for r in rows if _is(r["plan"], "a-")), key=lambda r: r["text_nbytes"]):
        for a, b in itertools.pairwise(front):
            if a["text_bytes"] <= r["text_nbytes"] <= b["text_bytes"]:
                t = (r["text_nbytes"] - a["text_bytes"]) / (b["text_bytes"] - a["text_bytes"])
                best = math.exp(math.log(a["kld"]) * (1 - t) + math.log(b["kld"]) * t)
                at = f"{_digits(best)} ({a['name']} to {b['name']})"
                print(f"| {r['plan']} | {r['bpw']:.2f} | {_digits(r['kld'])} | {at} | {r['kld'] / best:.2f} |")


def _is(plan: str, pattern: str) -> bool:
    if pattern == "a-":
        return plan.startswith("a-") or (plan.startswith("s") and plan[1].isdigit())
    head, tail = pattern.split("{}")
    return plan.startswith(head) and plan.endswith(tail) and plan[len(head) : len(plan) - len(tail)].isdigit()


def _digits(x: float) -> str:
    return f"{x:.3g}"


if __name__ == "__main__":
    main()
