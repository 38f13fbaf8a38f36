"""KL divergence against size: solvers, allocations and recipes on one model, every row built and measured by the product.

    python benchmarks/quality.py BASE OUT --text evaluation.txt --calibration calibration.txt [--plans u4-rtn u4-gptq …]

BASE: an original checkpoint folder. OUT: an empty or earlier folder; rows.json there holds what is measured, and a row
that is there is not measured again. --processes: so many rows are built at once (a GPU waits for Python, cores do not).

Plans:  u4-rtn u4-ls u4-gptq    every matrix at 4 bits, group 64, by a solver
        u4-awq1.0  u4-awqs      nearest, after AWQ folds of that exponent (s: searched a group); u4-awq1.0-ls likewise
        a-u4                    allocated, at the bytes of uniform 4 bits
        unsloth4  a-unsloth4    the published recipe as it is, and allocated at its bytes
        s4.5                    allocated at so many bits a weight
Windows and scoring are those of `llama-perplexity --kl-divergence` (512 tokens, second half), computed in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

SOLVED = [f"u{b}-{s}" for b in (2, 3, 4, 5, 6, 8) for s in ("rtn", "ls", "gptq")]
ALLOCATED = ["a-u3", "a-u4", "s3.0", "s5.0", "s6.0", *(f"{p}unsloth{n}" for n in (2, 3, 4) for p in ("", "a-"))]


def variant(plan: str) -> dict:
    if m := re.fullmatch(r"u(\d)-awq(s|[\d.]+)(-ls)?", plan):
        exponent = "search" if m[2] == "s" else float(m[2])
        return {"bits": int(m[1]), "recipe": "awq", "awq_exponent": exponent, "solver": "ls" if m[3] else "rtn"}
    if m := re.fullmatch(r"u(\d)-(rtn|ls|gptq)", plan):
        return {"bits": int(m[1]), "recipe": "uniform", "solver": m[2], "imatrix": False}
    if m := re.fullmatch(r"a-(u|unsloth)(\d)", plan):
        return {"size": f"as {'uniform' if m[1] == 'u' else 'unsloth'} {m[2]}", "imatrix": False}
    if m := re.fullmatch(r"unsloth(\d)", plan):
        return {"bits": int(m[1]), "recipe": "unsloth"}
    if m := re.fullmatch(r"s([\d.]+)", plan):
        return {"size": f"{m[1]} bpw", "imatrix": False}
    raise SystemExit(f"{plan}: no such plan")


def project(folder: Path, args: argparse.Namespace, plans: list[str], imatrix: Path | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    awq = "*.{q_proj,k_proj,v_proj,in_proj_qkv,in_proj_z,gate_proj,up_proj,down_proj}"
    value = {
        "base": {"path": str(args.base.resolve()), "name": args.base.name},
        "calibration": {
            "text": str(args.calibration.resolve()), "chat": False, "tokens": args.tokens, "context": 512,
            "fisher_tokens": args.fisher_tokens,
        },
        "recipes": {
            "awq": {"rules": [{"match": awq, "bits": "N", "awq": True}, {"match": "*", "bits": "N"}]},
        },
        "variants": {p: variant(p) for p in plans},
    }  # fmt: skip
    if imatrix:
        value["imatrix"] = {"path": str(imatrix)}
    path = folder / "variants.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def publish(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "publisher", *words], check=True, stdout=subprocess.DEVNULL)


def one(args: argparse.Namespace, plan: str, statistics: Path) -> None:
    """Build and measure one plan in a folder of its own; the row is printed as JSON."""
    from publisher.evaluate import measure_folder

    work = args.out / "work" / plan
    imatrix = statistics / "imatrix.gguf" if "awq" in plan or plan.startswith("unsloth") else None
    file = project(work, args, [plan], imatrix)
    held = work / "build" / "statistics"
    if not held.exists():
        held.parent.mkdir(parents=True, exist_ok=True)
        held.symlink_to(statistics.parent)
    if not (work / "build" / "base.json").exists():
        shutil.copy(statistics.parent.parent / "base.json", work / "build" / "base.json")
    started = time.perf_counter()
    publish("build", plan, "--skip", "smoke", "--skip", "bench", "--skip", "card", "--file", str(file), "-q")
    wall = time.perf_counter() - started
    folder = work / "build" / plan
    found = measure_folder(args.base, folder, args.text, args.windows, 512, args.out / "teacher")
    manifest = json.loads((folder / "manifest.json").read_text())
    allocation = manifest.get("allocation") or {}
    row = {
        "plan": plan,
        "weights_hash": manifest["weights_hash"],
        "text_nbytes": manifest["text_nbytes"],
        "bpw": 8 * manifest["text_nbytes"] / manifest["text_params"],
        "kld": found.kld.value,
        "low": found.kld.low,
        "high": found.kld.high,
        "p999": found.kld_p999.value if found.kld_p999 else None,
        "top1": found.top1.value,
        "predicted": allocation.get("predicted_kld"),
        "rules": allocation.get("rules"),
        "windows": found.window_kld,
        "build_s": round(wall, 1),
    }
    print(json.dumps(row))
    if not args.keep:
        shutil.rmtree(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--plans", nargs="*", default=SOLVED + ALLOCATED)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--fisher-tokens", type=int, default=32768)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the built folders")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    rows_path = args.out / "rows.json"
    common = args.out / "calibration"
    file = project(common, args, ["a-u4"], None)
    if not args.one:
        started = time.perf_counter()
        publish("calibrate", "--file", str(file))
        print(f"calibrated in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    statistics = next(p.parent for p in (common / "build" / "statistics").glob("*/statistics.json"))
    if args.one:
        one(args, args.one, statistics)
        return
    rows = {r["plan"]: r for r in json.loads(rows_path.read_text())} if rows_path.exists() else {}
    todo = [p for p in args.plans if p not in rows]
    running: list[tuple[str, subprocess.Popen]] = []
    while todo or running:
        while todo and len(running) < args.processes:
            plan = todo.pop(0)
            command = [sys.executable, __file__, *sys.argv[1:], "--one", plan]
            running.append((plan, subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)))
        for plan, process in list(running):
            if process.poll() is None:
                continue
            running.remove((plan, process))
            out = process.stdout.read() if process.stdout else ""
            if process.returncode:
                print(f"{plan}: failed", file=sys.stderr, flush=True)
                continue
            row = rows[plan] = json.loads(out.splitlines()[-1])
            rows_path.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
            mb, ci = row["text_nbytes"] / 1e6, f"{row['low']:.5f}-{row['high']:.5f}"
            print(
                f"{plan:14} {mb:8.2f} MB {row['bpw']:.3f} bpw  KLD {row['kld']:.5f} ({ci})  built in {row['build_s']} s",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.2)


if __name__ == "__main__":
    main()
