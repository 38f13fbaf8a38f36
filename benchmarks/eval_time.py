"""Wall time of `publish eval` over six uniform variants of a base: 64 windows of 512 tokens, teacher included.

    python benchmarks/eval_time.py BASE [--windows 64] [--json OUT]

The variants (2, 3, 4, 5, 6 and 8 bits, rounded to nearest) are built first; that is not timed. Greedy continuations are cut
to one token, so that what is timed are the forward passes and the divergences over both corpora of the package.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from inference.backend import device_info

BITS = (2, 3, 4, 5, 6, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        variants = "".join(f"  B{b}: {{bits: {b}}}\n" for b in BITS)
        (Path(work) / "variants.yaml").write_text(
            f"base: {{path: {args.base.resolve()}}}\nrecipe: uniform\nsolver: rtn\n"
            f"evaluation: {{windows: {args.windows}, context: 512, greedy_tokens: 1}}\nvariants:\n{variants}"
        )
        publish(work, "build", "--all", "-q", *(a for step in ("smoke", "bench", "card") for a in ("--skip", step)))
        load, before, started = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        found = json.loads(publish(work, "eval", "--all", "--json"))
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    out = {
        "base": args.base.name, "device": asdict(device_info()), "cores": os.cpu_count(), "load_before": round(load, 2),
        "windows": args.windows, "context": 512, "variants": len(BITS), "wall_s": round(wall, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1), "results": found,
    }  # fmt: skip
    print({k: v for k, v in out.items() if k != "results"})
    if args.json:
        args.json.write_text(json.dumps({k: v for k, v in out.items() if k != "results"}, indent=1) + "\n")


def publish(folder: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "publisher", *arguments], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
