"""Six variants of each base folder, loaded by mlx-lm as they are: largest difference of its logits from this engine's.

    python benchmarks/mlx_lm_agreement.py BASE [BASE …] [--imatrix BASE_NAME=FILE …] [--tokens 256] [--json OUT]

Both sides compute in float32 (mlx-lm's parameters are cast after its own strict load). Needs the `test` group.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from inference.backend import device_info, mx
from inference.load import load

LADDER = {"Q2_K_XL": 2, "Q3_K_XL": 3, "Q4_K_XL": 4, "Q5_K_XL": 5, "Q6_K_XL": 6, "Q8_K_XL": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", type=Path, nargs="+")
    parser.add_argument("--imatrix", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    imatrices = dict(pair.split("=", 1) for pair in args.imatrix)
    rows = []
    for base in args.bases:
        with tempfile.TemporaryDirectory() as work:
            rows += compare(base.resolve(), Path(work), imatrices.get(base.name), args.tokens)
    for row in rows:
        print(
            f"{row['base']:16} {row['variant']:8} largest difference {row['max_diff']:.2e}, logits up to {row['max_logit']:.1f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"device": vars(device_info()), "rows": rows}, indent=1) + "\n")


def compare(base: Path, work: Path, imatrix: str | None, tokens: int) -> list[dict[str, object]]:
    from mlx_lm.utils import load_model

    lines = "".join(f"  {id}: {{bits: {bits}}}\n" for id, bits in LADDER.items())
    named = f"imatrix: {{path: {Path(imatrix).resolve()}}}\n" if imatrix else ""
    (work / "variants.yaml").write_text(f"base: {{path: {base}}}\n{named}variants:\n{lines}")
    skip = [a for step in ("smoke", "bench", "card") for a in ("--skip", step)]
    subprocess.run([sys.executable, "-m", "publisher", "build", "--all", "-q", *skip], cwd=work, check=True)
    rows = []
    for id in LADDER:
        ours = load(work / "build" / id)
        ids = mx.random.randint(0, ours.tokenizer.vocab_size, (1, tokens), key=mx.random.key(0))
        theirs, _ = load_model(work / "build" / id, strict=True)
        theirs.set_dtype(mx.float32)
        a, b = ours.forward(ids), theirs(ids)
        rows.append(
            {
                "base": base.name,
                "variant": id,
                "max_diff": float(mx.abs(a - b).max().item()),
                "max_logit": float(mx.abs(b).max().item()),
                "tokens": tokens,
            }
        )
        del ours, theirs
        mx.clear_cache()
    return rows


if __name__ == "__main__":
    main()
