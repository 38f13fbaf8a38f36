"""A picture of what `benchmarks/engine.py` measured: tokens a second of both sides, with the range of the runs.

    python benchmarks/plot_engine.py RESULT.json [RESULT.json …] PICTURE.png

One panel a model of each file: prefill by length of the prompt, and decode.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"ours": "#0072b2", "mlx_lm": "#d55e00"}  # Okabe and Ito: told apart by the colour-blind
LABELS = {"ours": "this engine", "mlx_lm": "mlx-lm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    found = [(r, m) for path in args.results for r in [json.loads(path.read_text())] for m in r["models"]]
    figure, axes = plt.subplots(1, len(found), figsize=(3.6 * len(found), 3.4), squeeze=False)
    for axis, (result, model) in zip(axes[0], found, strict=True):
        panel(axis, result, model)
    axes[0][0].set_ylabel("tokens a second")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(args.picture, dpi=150)


def panel(axis: Any, result: dict[str, Any], model: dict[str, Any]) -> None:
    kinds = {f"prefill\n{n}": stats for n, stats in model["prefill"].items()} | {"decode": model["decode"]}
    for i, side in enumerate(("ours", "mlx_lm")):
        stats = [k[side] for k in kinds.values()]
        low = [s["median"] - s["low"] for s in stats]
        high = [s["high"] - s["median"] for s in stats]
        at = [x + 0.4 * i - 0.2 for x in range(len(kinds))]
        bars = axis.bar(
            at, [s["median"] for s in stats], 0.38, yerr=[low, high], color=COLOURS[side], label=LABELS[side], capsize=2
        )
        axis.bar_label(bars, [f"{s['median']:,.0f}" for s in stats], fontsize=7, padding=2)
    axis.set_yscale("log")
    axis.set_xticks(range(len(kinds)), list(kinds), fontsize=8)
    axis.set_title(f"{model['name']}, {model['bits']} bits\n{result['device']['device']}", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.15)


if __name__ == "__main__":
    main()
