"""A whole 9B-shaped ladder on this machine: wall time, peak memory, bytes read and written.

    python benchmarks/ladder_9b.py WORK [--layers 32] [--json OUT]

Makes a random checkpoint of Qwen3.5-9B's shapes in WORK/base (19.3 GB; kept and reused) and a synthetic imatrix, then runs
`publish build` on six variants with AWQ, smoke test and benchmark left out: in one run if the disk has room for all, else
in two runs of three, deleting the first three in between. Figures are those of the child process as the kernel counts
them (ru_maxrss) and of build.json. Needs only the installed project.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
LADDER = {"Q2_K_XL": 2, "Q3_K_XL": 3, "Q4_K_XL": 4, "Q5_K_XL": 5, "Q6_K_XL": 6, "Q8_K_XL": 8}
ROOM = 54e9  # bytes for six variants of all 32 layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    base, imatrix = args.work / "base", args.work / "imatrix.gguf"
    if not (base / "model.safetensors.index.json").is_file():
        run("make_checkpoint.py", str(base), "--preset", "9b", "--layers", str(args.layers))
    if not imatrix.is_file():
        run("synthetic_imatrix.py", str(base), str(imatrix))
    ids = list(LADDER)
    room = shutil.disk_usage(args.work).free > ROOM * (args.layers + 8) / 40
    runs = [ids] if room else [ids[:3], ids[3:]]
    results = []
    for part in runs:
        results.append(build(args.work, part))
        if not room:
            shutil.rmtree(args.work / "build")
    out = {
        "machine": {"cpu": cpu(), "cores": os.cpu_count(), "os": platform.platform()},
        "layers": args.layers,
        "runs": results,
    }
    print(json.dumps(out, indent=1))
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


def run(script: str, *args: str) -> None:
    subprocess.run([sys.executable, str(HERE / script), *args], check=True)


def build(work: Path, ids: list[str]) -> dict[str, object]:
    """One `publish build` of these variants, timed from outside."""
    variants = "".join(f"  {id}: {{bits: {LADDER[id]}}}\n" for id in ids)
    (work / "variants.yaml").write_text(f"base: {{path: base}}\nimatrix: ./imatrix.gguf\nvariants:\n{variants}")
    command = [
        sys.executable,
        "-m",
        "publisher",
        "build",
        "--all",
        "--skip",
        "smoke",
        "--skip",
        "bench",
        "--skip",
        "card",
    ]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=work, check=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    scale = 1 if sys.platform == "darwin" else 1024
    records = [json.loads(p.read_text()) for p in sorted((work / "build" / "results").glob("*/build.json"))]
    return {
        "variants": ids,
        "wall_s": round(wall, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_gib": round(after.ru_maxrss * scale / (1 << 30), 3),
        "bytes_read": records[0]["bytes_read"],
        "bytes_written": sum(r["bytes_written"] for r in records),
        "nbytes": {id: json.loads((work / "build" / id / "manifest.json").read_text())["nbytes"] for id in ids},
        "device": records[0]["device"],
    }


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
