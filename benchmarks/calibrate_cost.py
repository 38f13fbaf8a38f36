"""What `publish calibrate` and allocating cost at real shapes on this machine: measured on a few layers, for all of them.

    python benchmarks/calibrate_cost.py WORK [--preset 9b | 35b-a3b] [--layers 8] [--tokens N [M]] [--json OUT]

Makes a random checkpoint of the preset's shapes in WORK/base (kept and reused), half of its layers recurrent and half
attention, and runs over it what the command runs: both passes of statistics, at two numbers of tokens, so that what a
token costs is told from what a layer costs (one number: the statistics are made for what follows, and their cost is not told);
then the prices. Every step is timed by itself, and a whole model's figure is
the sum over its layers of what a layer of that kind took, plus the embedding and the output matrix once. Prices of a
layer stand for those of all of its kind in the allocation of the whole model, which is solved as it is.

Experts: every solver on a band of one layer's stacks, and what `ls` and `gptq` leave of each expert's error, by how
many tokens the expert saw. Needs the `test` group's numpy alone; weights and tokens are random, which changes no time.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from inference.backend import device_info, mx, peak_memory, reset_peak_memory
from inference.checkpoint import QuantSpec, read_checkpoint
from inference.families import names_of
from inference.layout import Target, read_band
from publisher.calibrate import collect
from publisher.plan import quant_table
from quant import moments, sensitivity
from quant.allocate import Costs, allocate, demand
from quant.recipe import class_of, layer_of
from quant.sample import restored
from quant.solve import solve
from quant.statistics import Statistics

HERE = Path(__file__).parent
WHOLE = {"9b": (32, 4), "35b-a3b": (40, 4), "tiny": (8, 4), "moe-tiny": (4, 4)}  # layers, every how manieth attends
CONTEXT = 512
DEFAULT_TOKENS, DEFAULT_FISHER = 131072, 32768  # of which figures of a whole model are


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--preset", default="9b", choices=WHOLE)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=(8192, 24576), help="of one run or two; a quarter backwards"
    )
    parser.add_argument("--no-prices", action="store_true")
    parser.add_argument("--probe-tokens", type=int, default=sensitivity.PROBE_TOKENS, help="fewer for a try")
    parser.add_argument(
        "--repeat", action="store_true", help="weights repeat: made in seconds, no sense in experts' errors"
    )
    parser.add_argument("--make", action="store_true", help="write the checkpoints, measure nothing")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if len(args.tokens) > 2:
        parser.error("--tokens: one number or two")
    base, headers = args.work / "base", args.work / "whole"
    make(base, args.preset, args.layers, 2, *(["--repeat"] if args.repeat else []))
    make(
        headers,
        args.preset,
        WHOLE[args.preset][0],
        WHOLE[args.preset][1],
        "--headers-only",
        "--tokenizer-from",
        str(base),
    )
    if args.make:
        return
    sensitivity.PROBE_TOKENS = args.probe_tokens
    job = Job(base, headers, args.layers)
    out: dict[str, Any] = {
        "preset": args.preset,
        "layers": args.layers,
        "of": WHOLE[args.preset][0],
        "device": asdict(device_info()),
    }

    def keep() -> None:
        if args.json:
            args.json.write_text(json.dumps(out, indent=1) + "\n")

    statistics, out["statistics"] = passes(job, args.work, args.tokens)
    keep()
    if not args.no_prices:
        found, out["prices"] = prices(job, statistics)
        keep()
        out["allocation"] = allocation(job, found)
        keep()
    if job.experts:
        out["experts"] = experts(job, statistics)
        keep()
    print(json.dumps({k: v for k, v in out.items() if k != "device"}, indent=1))


def make(folder: Path, preset: str, layers: int, interval: int, *more: str) -> None:
    if (folder / "model.safetensors.index.json").is_file():
        return
    command = [
        sys.executable,
        str(HERE / "make_checkpoint.py"),
        str(folder),
        "--preset",
        preset,
        "--no-vision",
        "--no-mtp",
    ]
    subprocess.run([*command, "--layers", str(layers), "--interval", str(interval), *more], check=True)


class Job:
    """The base that is measured and the whole model that it stands for."""

    def __init__(self, base: Path, whole: Path, layers: int) -> None:
        self.base, self.layers = base, layers
        self.checkpoint, self.whole = read_checkpoint(base), read_checkpoint(whole)
        self.config = self.checkpoint.config
        self.targets = _text(self.checkpoint)
        self.classes = quant_table(self.config).CLASSES
        self.kinds: list[str] = self.config["text_config"]["layer_types"]
        self.all_kinds: list[str] = self.whole.config["text_config"]["layer_types"]
        self.experts: int = self.config["text_config"].get("num_experts", 0)
        self.vocab: int = self.config["text_config"]["vocab_size"]

    def windows(self, tokens: int) -> list[list[int]]:
        rng = np.random.default_rng(tokens)
        # as in text: a few tokens are frequent
        p = 1.0 / np.arange(1, self.vocab + 1)
        return rng.choice(self.vocab, (tokens // CONTEXT, CONTEXT), p=p / p.sum()).tolist()

    def count(self, kind: str) -> float:
        """How many layers of the whole model one measured layer of this kind stands for."""
        return self.all_kinds.count(kind) / self.kinds.count(kind)


def _text(checkpoint: Any) -> list[Target]:
    return [t for t in names_of(checkpoint.config).targets(checkpoint) if t.part == "text"]


# ------------------------------------------------------------------------------------------------ statistics


class Clock:
    """Progress that remembers when each step was done."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, done: int, total: int) -> None:
        self.times.append(time.perf_counter())


def passes(job: Job, work: Path, tokens: Sequence[int]) -> tuple[Statistics, dict[str, Any]]:
    """Both passes at each number of tokens. Seconds of a step are a + b · tokens, told from two of these."""
    runs = []
    statistics: Statistics | None = None
    for n in tokens:
        shutil.rmtree(work / "statistics", ignore_errors=True)
        reset_peak_memory()
        clock = Clock()
        statistics = collect(job.base, work, job.windows(n), n // 4, progress=clock)
        runs.append(np.diff(clock.times))
        print(f"statistics of {n} tokens: {sum(runs[-1]):.1f} s, peak {peak_memory() / 1e9:.2f} GB", flush=True)
    assert statistics
    if len(tokens) == 1:
        return statistics, {
            "tokens": list(tokens), "seconds": [round(float(sum(runs[0])), 1)],
            "peak_device_gb": round(peak_memory() / 1e9, 2), "peak_host_gb": host_peak(),
        }  # fmt: skip
    names = [
        "embed",
        *("layer" for _ in job.kinds),
        "head",
        "fisher-head",
        *("fisher-layer" for _ in job.kinds),
        "fisher-embed",
    ]
    kinds = ["", *job.kinds, "", "", *reversed(job.kinds), ""]
    short, long = tokens
    whole = 0.0
    steps_out = []
    for name, kind, a, b in zip(names, kinds, *runs, strict=True):
        back = name.startswith("fisher")
        each = max(0.0, (b - a) / (long - short) * (4 if back else 1))  # seconds a token of its pass
        fixed = max(0.0, b - each * (long / 4 if back else long))
        seconds = fixed + each * (DEFAULT_FISHER if back else DEFAULT_TOKENS)
        whole += seconds * (job.count(kind) if kind else 1)
        steps_out.append(
            {
                "step": name,
                "kind": kind,
                "seconds": [round(float(a), 3), round(float(b), 3)],
                "at_default": round(seconds, 3),
            }
        )
    measured = sum(p.stat().st_size for p in statistics.folder.iterdir())
    per_layer: dict[str, float] = {}
    for path in statistics.folder.glob("*layer-*.safetensors"):
        kind = job.kinds[int(path.stem[-4:])]
        per_layer[kind] = per_layer.get(kind, 0.0) + path.stat().st_size
    disk = measured + sum(size * (job.count(kind) - 1) for kind, size in per_layer.items())
    return statistics, {
        "tokens": list(tokens), "steps": steps_out, "seconds": [round(float(sum(r)), 1) for r in runs],
        "whole_s_at_131072_tokens": round(whole, 1), "disk_gb": round(measured / 1e9, 2), "whole_disk_gb": round(disk / 1e9, 2),
        "peak_device_gb": round(peak_memory() / 1e9, 2), "peak_host_gb": host_peak(),
    }  # fmt: skip


def host_peak() -> float:
    return round(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9, 2
    )


# ------------------------------------------------------------------------------------------------ prices


class Timed:
    """A function, with the seconds that its calls took by a key."""

    def __init__(self, function: Callable[..., Any], key: Callable[..., Any]) -> None:
        self.function, self.key, self.seconds = function, key, {}

    def __call__(self, *args: Any, **more: Any) -> Any:
        started = time.perf_counter()
        try:
            return self.function(*args, **more)
        finally:
            self.seconds.setdefault(self.key(*args), []).append(time.perf_counter() - started)


def prices(job: Job, statistics: Statistics) -> tuple[sensitivity.Sensitivity, dict[str, Any]]:
    known = moments.FromStatistics(statistics)
    windows = job.windows(sensitivity.PROBE_TOKENS)
    ticks: list[tuple[str, float]] = [("", time.perf_counter())]

    def tick(what: str, done: int, total: int) -> None:
        ticks.append((what, time.perf_counter()))
        # all of it: a run that is cut off has told what it measured
        print(f"prices: {what} {done}/{total} after {ticks[-1][1] - ticks[0][1]:.1f} s", flush=True)

    reset_peak_memory()
    factors = Timed(moments.factorize, lambda hessian, damp: len(hessian))
    moments.factorize = factors
    try:
        found = sensitivity.measure(job.base, job.targets, job.classes, known, windows, "gptq", tick)
    finally:
        moments.factorize = factors.function
    wall, device = ticks[-1][1] - ticks[0][1], peak_memory()
    chosen = [t for t in job.targets if t.name.endswith(".weight") and known.knows(t.module)]
    took = np.diff([at for _, at in ticks])
    groups = sensitivity.sharing(chosen, known)
    errors, probes = took[: len(groups)], took[len(groups) :]
    whole_errors, by_class = 0.0, {}
    for group, seconds in zip(groups, errors, strict=True):
        layer = layer_of(group[0].name)
        name = " + ".join(dict.fromkeys(class_of(t, job.classes).label for t in group))
        by_class.setdefault(name, []).append(float(seconds))
        whole_errors += seconds * (job.count(job.kinds[layer]) if layer is not None else 1)
    embedded, layers, compared = probes[0], probes[1 : len(job.kinds) + 1], probes[len(job.kinds) + 1 :]
    whole_probes = float(embedded + compared.sum())
    whole_probes += sum(float(s) * job.count(kind) for s, kind in zip(layers, job.kinds, strict=True))
    return found, {
        "seconds": round(wall, 1), "errors_s": round(float(errors.sum()), 1), "probes_s": round(float(probes.sum()), 1),
        "factorize_s": {str(k): [len(v), round(sum(v), 2)] for k, v in factors.seconds.items()},
        "errors_by_class_s": {k: [len(v), round(sum(v), 2)] for k, v in by_class.items()},
        "probes_by_step_s": {"embedding": round(float(embedded), 2), "layers": [round(float(s), 2) for s in layers],
                             "compared": [round(float(s), 2) for s in compared]},
        "whole_errors_s": round(float(whole_errors), 1), "whole_probes_s": round(whole_probes, 1),
        "whole_s": round(float(whole_errors) + whole_probes, 1),
        "peak_device_gb": round(device / 1e9, 2), "peak_host_gb": host_peak(),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ allocation


def allocation(job: Job, found: sensitivity.Sensitivity) -> dict[str, Any]:
    """Seconds to choose the formats of the whole model at a few sizes."""
    targets = _text(job.whole)
    places = {k: [i for i, v in enumerate(job.kinds) if v == k] for k in set(job.kinds)}
    modules: dict[str, Any] = {}
    for t in targets:
        layer, name = layer_of(t.name), t.module
        if layer is not None:
            like = places[job.all_kinds[layer]]
            name = name.replace(f".layers.{layer}.", f".layers.{like[layer % len(like)]}.")
        if name in found.modules:
            # a random model's layers cost nearly the same, which is the hardest for the search; no two are equal
            modules[t.module] = {f: c * (1 + 0.01 * (layer or 0)) for f, c in found.modules[name].items()}
    costs = Costs(modules)
    started = time.perf_counter()
    wanted = demand(targets, job.classes, costs)
    params = sum(t.params for t in targets)
    rows = []
    for bits in (3.0, 3.5, 4.5, 5.5, 6.6):
        at = time.perf_counter()
        chosen = allocate(wanted, int(bits * params / 8), costs)
        rows.append(
            {
                "bits": bits,
                "seconds": round(time.perf_counter() - at, 2),
                "over_bound": round(chosen.predicted / max(chosen.bound, 1e-30) - 1, 6),
                "exact": chosen.exact,
            }
        )
    return {"tensors": len(wanted.items), "rows": rows, "seconds": round(time.perf_counter() - started, 2)}


# ------------------------------------------------------------------------------------------------ experts


def experts(job: Job, statistics: Statistics) -> list[dict[str, Any]]:
    """Each solver on stacks of one layer, a band of experts at a time as the pass has it, at 4 bits."""
    known = moments.FromStatistics(statistics)
    spec, out = QuantSpec(4, 64), []
    stacks = [
        t
        for t in job.targets
        if layer_of(t.name) == 0 and t.module in statistics and statistics.input(t.module).experts
    ]
    for target in stacks:
        n, rows, columns = target.shape
        band = min(n, max(1, (64 << 20) // (2 * rows * columns)))
        counts = np.asarray(statistics.tokens(target.module))
        quiet, loud = int(np.argmin(counts)), int(np.argmax(counts))
        row: dict[str, Any] = {
            "tensor": target.module, "shape": list(target.shape), "hessian": statistics.input(target.module).hessian,
            "tokens": [int(counts.min()), int(np.median(counts)), int(counts.max())], "unseen": int((counts == 0).sum()),
        }  # fmt: skip
        reset_peak_memory()
        w = mx.array(read_band(target, 0, band)).view(mx.bfloat16)
        mx.eval(w)
        started = time.perf_counter()
        ready = known.moments(target.module, slice(0, band), None, True)
        row["factorize_s"] = round((time.perf_counter() - started) * n / band, 2)
        for solver in ("rtn", "ls", "gptq"):
            solve(w[:1], known.moments(target.module, slice(0, 1), None, True), spec, solver)
            started = time.perf_counter()
            solve(w, ready, spec, solver)
            row[f"{solver}_s"] = round((time.perf_counter() - started) * n / band, 2)
        row["peak_device_gb"], row["peak_host_gb"] = round(peak_memory() / 1e9, 2), host_peak()
        for name, e in (("quietest", quiet), ("busiest", loud)):
            row[name] = {"tokens": int(counts[e]), **_left(target, known, e, spec)}
        out.append(row)
        print(row, flush=True)
    return out


def _left(target: Target, known: moments.FromStatistics, expert: int, spec: QuantSpec) -> dict[str, float]:
    """Error under the expert's own damped Hessian, as part of what rounding to nearest leaves."""
    w = mx.array(read_band(target, expert, expert + 1)).view(mx.bfloat16)
    ready = known.moments(target.module, slice(expert, expert + 1), None, True)
    assert ready
    assert ready.factor
    e = {}
    for solver in ("rtn", "ls", "gptq"):
        back = restored(solve(w, ready, spec, solver), spec)
        delta = (w.astype(mx.float32) - back)[0]
        e[solver] = float(((delta @ ready.factor.hessian[0]) * delta).sum())
    return {s: round(e[s] / e["rtn"], 4) for s in ("ls", "gptq")}


if __name__ == "__main__":
    main()
