"""How long commands take that do no work with MLX: each in a process of its own, on a small built ladder.

    python benchmarks/startup.py LADDER_FOLDER [--before TREE] [--runs 9] [--json OUT]

TREE: another checkout of this repository, measured in turns with this one.

wall: as a person waits for it; cpu: user and system seconds of the process, which other work on the machine changes less.
Medians, lowest and highest, after one run that warms the file cache. `python -c pass` is what Python itself takes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PUBLISH = "from publisher.cli import main; main(prog_name='publish')"
COMMANDS = {
    "python -c pass": None,
    "publish --help": ["--help"],
    "publish status": ["status"],
    "publish plan": ["plan"],
    "publish card --check": ["card", "--all", "--check"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ladder", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    trees = {"before": args.before.resolve(), "now": ROOT} if args.before else {"now": ROOT}
    pairs = {f"{name}, {tree}": (name, trees[tree]) for name in COMMANDS for tree in trees}
    rows: dict[str, list[tuple[float, float]]] = {title: [] for title in pairs}
    load = os.getloadavg()[0]
    for run in range(args.runs + 1):
        for title, (name, tree) in pairs.items():
            arguments = COMMANDS[name]
            env = os.environ | {"PYTHONPATH": str(tree)}
            code = ["-c", "pass"] if arguments is None else ["-c", PUBLISH, *arguments]
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run([sys.executable, *code], cwd=args.ladder, env=env, stdout=subprocess.DEVNULL, check=True)
            after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
            if run:
                rows[title].append((wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    out = {
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "load": round(load, 2),
        "runs": args.runs,
        "ms": {},
    }
    for name, times in rows.items():
        out["ms"][name] = {
            what: {f.__name__: round(1000 * f(values)) for f in (statistics.median, min, max)}
            for what, values in (("wall", [w for w, _ in times]), ("cpu", [c for _, c in times]))
        }
        print(name, out["ms"][name])
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
