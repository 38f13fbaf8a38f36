"""What the AWQ fold alone does to a model's logits: in float32, and as it is stored in the model's own type.

    python benchmarks/fold_error.py BASE IMATRIX [--tokens 512] [--json OUT]

Nothing is quantized. Three folders are written from BASE and run in float32: folded and stored in float32, folded and
stored in bfloat16, and not folded but stored in bfloat16 (norms are rounded as 1 + w there). Each is compared with the
original over the first tokens of the smoke test's text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from inference.backend import device_info, mx
from inference.checkpoint import read_checkpoint
from inference.divergence import kld
from inference.families import names_of
from inference.load import load
from quant import qwen3_5
from quant.awq import folds
from quant.builtin import BUILTIN
from quant.convert import Job, convert, unquantized
from quant.imatrix import read_imatrix
from quant.recipe import resolve
from quant.tables import scalable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("imatrix", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.base)
    targets = names_of(checkpoint.config).targets(checkpoint)
    plans = resolve(BUILTIN["unsloth"], 4, 64, targets, qwen3_5.CLASSES, scalable(qwen3_5.AWQ_GROUPS), True)
    scales = folds(plans, read_imatrix(args.imatrix, checkpoint.config), 1.0, qwen3_5.AWQ_GROUPS)
    model = load(args.base)
    text = files("publisher").joinpath("smoke_text.txt").read_text(encoding="utf-8")
    tokens = mx.array([model.tokenizer.encode(text)[: args.tokens]])
    original = model.forward(tokens)[0]
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name, dtype, used in (("folded", "F32", scales), ("folded", "BF16", scales), ("not folded", "BF16", {})):
            job = Job(
                "x", unquantized(plans, dtype), Path(work) / f"{dtype}{len(used)}", args.base, checkpoint.config, used
            )
            (done,) = convert([replace(job, mtp="drop")])
            logits = load(done.folder).forward(tokens)[0]
            rows.append(
                {
                    "what": f"{name}, stored as {dtype}",
                    "max_diff": float(mx.abs(logits - original).max().item()),
                    "mean_kld": float(kld(original, logits).mean().item()),
                }
            )
    for row in rows:
        print(f"{row['what']:28} largest difference {row['max_diff']:.2e}  mean KL {row['mean_kld']:.2e} nats")
    if args.json:
        result = {"base": args.base.name, "tokens": tokens.shape[1], "device": vars(device_info()), "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
