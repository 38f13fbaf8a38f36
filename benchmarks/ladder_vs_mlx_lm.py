"""Wall time of a ladder built in one pass against one `mlx_lm.convert` a variant, on the same checkpoint and formats.

    python -m benchmarks.ladder_vs_mlx_lm MODEL [--work DIR] [--bits 2,3,4,5,6,8] [--imatrix FILE] [--runs N] [--out FILE.json]

Every build runs in a process of its own, the two sides in turn, `--runs` times. wall_s runs from after its imports to
the last byte written, process_s is the whole process as a person waits for it, cpu_s its CPU time without the imports;
the peak is the process's. mlx-lm gets a predicate with the very formats of the plan. Both
write the language model alone, as mlx-lm leaves out vision tower and MTP head; `--whole` has the ladder write these,
too. The ladder also hashes the source, every tensor and every file, and waits until all of it is on the disk (fsync);
mlx-lm does not. Outputs are removed as soon as they are measured, so that the disk holds one
ladder at most. The file is written after every build, so that a run that is cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inference.backend import device_info
from inference.checkpoint import read_checkpoint
from inference.families import names_of
from quant import qwen3_5
from quant.awq import folds
from quant.builtin import BUILTIN
from quant.convert import Job, convert, finish
from quant.imatrix import read_imatrix
from quant.recipe import TensorPlan, resolve
from quant.tables import scalable

RECIPE = "unsloth"
GROUP = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("ladder-work"))
    parser.add_argument("--bits", default="2,3,4,5,6,8")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    bits = [int(b) for b in args.bits.split(",")]
    if args.child:
        result = (
            ours(args.model, args.work, bits, args.imatrix, args.whole)
            if args.child == "ours"
            else theirs(args.model, args.work, bits[0])
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        sys.stdout.write("\n" + json.dumps({**result, "peak_gb": round(peak / 1e9, 3)}) + "\n")
        return
    sys.stdout.write(json.dumps(compare(args, bits), indent=1) + "\n")


def compare(args: argparse.Namespace, bits: list[int]) -> dict[str, Any]:
    args.work.mkdir(parents=True, exist_ok=True)
    out: dict[str, Any] = {
        "what": f"{len(bits)} variants in one pass against as many mlx_lm.convert runs",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": args.model.name,
        "params": sum(t.nbytes for t in read_checkpoint(args.model).tensors.values()) // 2,
        "recipe": RECIPE, "group_size": GROUP, "bits": bits, "awq": args.imatrix is not None,
        "ladder_writes": "vision tower and MTP head, too" if args.whole else "what mlx-lm writes",
        "device": asdict(device_info()), "cores": os.cpu_count(), "mlx_lm": version("mlx-lm"), "runs": [],
    }  # fmt: skip
    for _ in range(args.runs):
        run: dict[str, Any] = {"ladder": child("ours", args, ",".join(map(str, bits))), "mlx_lm_convert": []}
        out["runs"].append(run)
        shutil.rmtree(args.work / "ours")
        for b in bits:
            run["mlx_lm_convert"].append(child("theirs", args, str(b)))
            shutil.rmtree(args.work / "theirs")
            if args.out:
                args.out.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
        out["summary"] = summary(out["runs"])
        if args.out:
            args.out.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    return out


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each measure: medians of the ladder and of the sum of the single runs, of their ratio, and the ratio's range."""
    out = {}
    for key in ("wall_s", "process_s", "cpu_s"):
        ours = [r["ladder"][key] for r in runs]
        theirs = [sum(c[key] for c in r["mlx_lm_convert"]) for r in runs]
        ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
        out[key] = {
            "ladder": round(statistics.median(ours), 2), "mlx_lm_convert": round(statistics.median(theirs), 2),
            "ratio": round(statistics.median(ratios), 2), "least": round(min(ratios), 2), "most": round(max(ratios), 2),
        }  # fmt: skip
    return out


def child(which: str, args: argparse.Namespace, bits: str) -> dict[str, Any]:
    """Run one build in a process of its own; the JSON on its last line, and the load of the machine before and after it."""
    shutil.rmtree(args.work / which, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.ladder_vs_mlx_lm",
        str(args.model),
        "--work",
        str(args.work),
        "--bits",
        bits,
    ]
    command += ["--child", which] + (["--imatrix", str(args.imatrix)] if args.imatrix else [])
    command += ["--whole"] if args.whole else []
    load = round(os.getloadavg()[0], 2)
    started = time.perf_counter()
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    process_s = round(time.perf_counter() - started, 2)
    return {
        **json.loads(run.stdout.splitlines()[-1]),
        "process_s": process_s,
        "load": [load, round(os.getloadavg()[0], 2)],
    }


def plans_of(model: Path, bits: int, awq: bool) -> list[TensorPlan]:
    checkpoint = read_checkpoint(model)
    targets = names_of(checkpoint.config).targets(checkpoint)
    return resolve(BUILTIN[RECIPE], bits, GROUP, targets, qwen3_5.CLASSES, scalable(qwen3_5.AWQ_GROUPS), awq)


def ours(model: Path, work: Path, bits: list[int], imatrix: Path | None, whole: bool) -> dict[str, Any]:
    started, cpu = time.perf_counter(), time.process_time()
    config = read_checkpoint(model).config
    statistics = read_imatrix(imatrix, config) if imatrix else None
    jobs = []
    for b in bits:
        plans = [p for p in plans_of(model, b, statistics is not None) if whole or p.target.part == "text"]
        scales = folds(plans, statistics, 1.0, qwen3_5.AWQ_GROUPS) if statistics else {}
        jobs.append(Job(f"{b}bit", plans, work / "ours" / f".staging-{b}", model, config, scales))
    done = convert(jobs)
    for job in jobs:
        finish(job.staging, work / "ours" / job.variant)
    return {
        "wall_s": round(time.perf_counter() - started, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "bytes_read": done[0].bytes_read,
        "bytes_written": sum(d.bytes_written for d in done),
    }


def theirs(model: Path, work: Path, bits: int) -> dict[str, Any]:
    from mlx_lm import convert as mlx_lm_convert

    specs = {p.target.module: p.spec for p in plans_of(model, bits, False)}

    def predicate(path: str, module: Any, *_: Any) -> bool | dict[str, Any]:
        spec = specs.get(path)
        return spec is not None and {"bits": spec.bits, "group_size": spec.group_size}

    started, cpu = time.perf_counter(), time.process_time()
    mlx_lm_convert(
        str(model), str(work / "theirs"), quantize=True, q_bits=bits, q_group_size=GROUP, quant_predicate=predicate
    )
    written = sum(f.stat().st_size for f in (work / "theirs").glob("*.safetensors"))
    return {
        "bits": bits,
        "wall_s": round(time.perf_counter() - started, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "bytes_written": written,
    }


if __name__ == "__main__":
    main()
