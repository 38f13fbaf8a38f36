"""Prefill, decode and time to first token of this engine and of mlx-lm, side by side in one process.

    python -m benchmarks.engine FOLDER [FOLDER …] [--bits 16,4]          checkpoints: bases, or variants as built
    python -m benchmarks.engine --shape 9b [--layers 32] --bits 16,4     random weights in real shapes
        [--lengths 128,512,2048] [--decode 128] [--runs 3] [--slow-runs 2] [--ttft 32768] [--ttft-mlx-lm]
        [--only ours|mlx-lm] [--mlx-lm-float32] [--json OUT]

--bits: of a base, 16 is the base itself; any other width is built first, uniform, by `publish build`. A folder that is
quantized already is taken as it is.

Both sides run with one MLX and, on the CPU, one BLAS (`inference.backend` loads it before mlx-lm imports MLX). Sides
alternate; the first run of each is thrown away, of the others median, lowest and highest are kept. mlx-lm runs as its
users run it: strict load, its own `generate_step` with prompts in pieces of 2048 and its own asynchronous loop. Neither
side turns tokens into text. On the CPU this engine computes in float32 and mlx-lm in the checkpoint's type;
--mlx-lm-float32 adds mlx-lm cast to float32.

The machine's limits are measured in the same run: a copy (bytes read and written), a matrix times a vector (bytes read)
and a square product in the type this engine computes in. Shares of them:

- prefill: 2 floating-point operations a weight used and token, over the product's rate;
- decode: bytes of the weights a token uses, over the faster of copy and matrix-vector rate. `matrices` is the rate of
  decode if a token were its matrix products alone, each measured as the engine runs it.

--ttft N: time to first token of a prompt of N tokens, and the memory above the weights while it runs (peak − before).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import random_variant
from inference.backend import BACKEND, compute_dtype, device_info, mx, reset_peak_memory
from inference.checkpoint import read_checkpoint
from inference.families import names_of
from inference.generate import Sampling, generate
from inference.linear import Dense, Packed
from inference.load import Model, load

PROMPT = 128  # tokens before the decoded ones
SLOW_S = 3.0  # a prefill that takes longer counts as slow
Stat = dict[str, Any]  # figures by name, or one `error`


def main() -> None:
    args = arguments()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": asdict(device_info()),
        "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "mlx_lm": version("mlx-lm"),
        "limits": limits(), "models": [],
    }  # fmt: skip
    print(device_info(), f"load {result['load']}")
    print("limits:", ", ".join(f"{k} {v:.4g}" for k, v in result["limits"].items()), flush=True)
    for name, bits, folder, release in models(args):
        result["models"].append({"name": name, "bits": bits, **measure(folder, release, args, result["limits"])})
        show(result["models"][-1])
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--shape", choices=sorted(random_variant.make_checkpoint.PRESETS))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bits", type=_numbers, default=[16])
    parser.add_argument("--lengths", type=_numbers, default=[128, 512, 2048])
    parser.add_argument("--decode", type=int, default=128, help="tokens to generate, at least 2")
    parser.add_argument("--runs", type=int, default=3, help="after one warm-up run")
    parser.add_argument("--slow-runs", type=int, help=f"the same, for a prefill that took over {SLOW_S} s to warm up")
    parser.add_argument("--ttft", type=int, metavar="TOKENS")
    parser.add_argument("--ttft-mlx-lm", action="store_true", help="mlx-lm too, once and without warm-up")
    parser.add_argument("--only", choices=("ours", "mlx-lm"))
    parser.add_argument("--mlx-lm-float32", action="store_true")
    parser.add_argument("--work", type=Path, help="where checkpoints are written; default: /dev/shm, if there is one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if bool(args.folders) == bool(args.shape):
        parser.error("give either folders or --shape")
    return args


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def models(args: argparse.Namespace) -> Iterable[tuple[str, int | None, Path, Callable[[], None]]]:
    """(name, bits, folder, what frees the folder once it is loaded), each made when it is asked for."""
    shm = Path("/dev/shm")
    work = args.work or (shm if shm.is_dir() else None)
    for folder in args.folders or [None]:
        for bits in args.bits:
            with ExitStack() as stack:
                temp = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work)))
                if folder is None:
                    started = time.perf_counter()
                    path = random_variant.write(random_variant.config_of(args.shape, args.layers), temp / "model", bits)
                    print(f"{args.shape} in {bits} bits written in {time.perf_counter() - started:.1f} s", flush=True)
                    yield args.shape, bits, path, stack.close
                elif read_checkpoint(folder).mlx:
                    yield folder.name, None, folder, stack.close
                    break
                else:
                    yield folder.name, bits, folder if bits == 16 else built(folder, temp, bits), stack.close


def built(base: Path, work: Path, bits: int) -> Path:
    """The folder of a variant with every matrix in `bits` bits, rounded to nearest."""
    (work / "variants.yaml").write_text(
        f"base: {{path: {base.resolve()}}}\nrecipe: uniform\nsolver: rtn\nvariants:\n  V: {{bits: {bits}}}\n"
    )
    command = [sys.executable, "-m", "publisher", "build", "--all", "-q", "--file", str(work / "variants.yaml")]
    subprocess.run([*command, *(a for step in ("smoke", "bench", "card") for a in ("--skip", step))], check=True)
    return work / "build" / "V"


# ---------------------------------------------------------------------------------------------------- the two sides


class Ours:
    name = "ours"

    def __init__(self, folder: Path) -> None:
        self.model = load(folder)
        self.model.__dict__["tokenizer"] = _NoText()
        self.nbytes = self.model.nbytes

    def first_token(self, prompt: list[int]) -> float:
        """Seconds from the prompt to its first token."""
        return next(iter(generate(self.model, prompt, max_tokens=1, sampling=Sampling(), stop=()))).timing.ttft_s

    def decode(self, prompt: list[int], tokens: int) -> float:
        """Tokens a second, of those after the first."""
        last = list(generate(self.model, prompt, max_tokens=tokens, sampling=Sampling(), stop=()))[-1]
        return last.timing.decode_tps or 0.0


class _NoText:
    """In place of a tokenizer, for models that have none."""

    stop_ids: frozenset[int] = frozenset()

    def detokenizer(self) -> _NoText:
        return self

    def add(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class MlxLm:
    name = "mlx_lm"

    def __init__(self, folder: Path, *, float32: bool = False) -> None:
        from mlx.utils import tree_flatten
        from mlx_lm.generate import generate_step
        from mlx_lm.utils import load_model

        self.generate_step = generate_step
        self.model, _ = load_model(folder, strict=True)
        if float32:
            self.name = "mlx_lm_float32"
            self.model.set_dtype(mx.float32)
        mx.eval(self.model.parameters())
        self.nbytes = sum(x.nbytes for _, x in tree_flatten(self.model.parameters()))

    def first_token(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        # with 0 tokens asked for it ends once the first is computed, and starts no second
        list(self.generate_step(mx.array(prompt), self.model, max_tokens=0))
        return time.perf_counter() - start

    def decode(self, prompt: list[int], tokens: int) -> float:
        times = [time.perf_counter() for _ in self.generate_step(mx.array(prompt), self.model, max_tokens=tokens)]
        return (len(times) - 1) / (times[-1] - times[0])


Side = Ours | MlxLm


def sides_of(folder: Path, args: argparse.Namespace) -> list[Side]:
    sides: list[Side] = []
    if args.only != "mlx-lm":
        sides.append(Ours(folder))
    if args.only != "ours":
        sides.append(MlxLm(folder))
        if args.mlx_lm_float32:
            sides.append(MlxLm(folder, float32=True))
    return sides


# ---------------------------------------------------------------------------------------------------- measuring


def measure(folder: Path, release: Callable[[], None], args: argparse.Namespace, limit: Stat) -> dict[str, Any]:
    config = read_checkpoint(folder).config
    cfg = names_of(config).read_config(config)
    used = weights_a_token(config)
    sides = sides_of(folder, args)
    release()
    out: dict[str, Any] = {
        "layers": cfg.num_hidden_layers, "weights_gb": {s.name: round(s.nbytes / 1e9, 4) for s in sides}, "prefill": {},
    }  # fmt: skip
    for n in args.lengths:
        ids = prompt(n, cfg.vocab_size)
        row = alternate(
            sides, lambda s, ids=ids: len(ids) / s.first_token(ids), args, slow=lambda tps, n=n: n / tps > SLOW_S
        )
        for figures in row.values():
            if "median" in figures:
                figures["share"] = round(2 * used * figures["median"] / (limit["matmul_tflops"] * 1e12), 4)
        out["prefill"][n] = row
    ids = prompt(PROMPT, cfg.vocab_size)
    out["decode"] = alternate(sides, lambda s: s.decode(ids, args.decode), args)
    ours = next((s.model for s in sides if isinstance(s, Ours)), None)
    if ours is not None:
        nbytes, seconds = matrices(ours, getattr(cfg, "num_experts_per_tok", 0))
        fastest = max(limit["copy_gbs"], limit["gemv_gbs"]) * 1e9
        for figures in out["decode"].values():
            if "median" in figures:
                figures["share"] = round(nbytes * figures["median"] / fastest, 4)
        out["matrices"] = {"bytes": nbytes, "tps": round(1 / seconds, 2), "gbs": round(nbytes / seconds / 1e9, 1)}
    if args.ttft:
        out["ttft"] = {"tokens": args.ttft}
        ids = prompt(args.ttft, cfg.vocab_size)
        for side in sides:
            if isinstance(side, Ours) or (args.ttft_mlx_lm and "median" in out["decode"][side.name]):
                out["ttft"][side.name] = long_prompt(side, ids)
    return out


def prompt(tokens: int, vocabulary: int) -> list[int]:
    """The same random ids for every side and run."""
    return mx.random.randint(0, vocabulary, (tokens,), key=mx.random.key(tokens)).tolist()  # type: ignore[return-value]


def alternate(
    sides: list[Side],
    run: Callable[[Side], float],
    args: argparse.Namespace,
    slow: Callable[[float], bool] = lambda value: False,
) -> dict[str, Stat]:
    """What `run` gives of each side, in turns; the first of each is the warm-up.

    cpu_s: processor seconds of a whole run (for decode its prompt included), which other work on the machine changes least.
    A side whose backend cannot do it (mlx-lm's experts in bfloat16 on the CPU) has its error in place of figures.
    """
    values: dict[str, list[float]] = {s.name: [] for s in sides}
    cpu: dict[str, list[float]] = {s.name: [] for s in sides}
    runs, failed = {}, {}
    for side in sides:
        try:
            first = run(side)
            runs[side.name] = args.slow_runs if args.slow_runs and slow(first) else args.runs
        except RuntimeError as e:
            failed[side.name] = {"error": str(e).splitlines()[0]}
    for i in range(max(runs.values(), default=0)):
        for side in sides if i % 2 else reversed(sides):
            if i < runs.get(side.name, 0):
                started = time.process_time()
                values[side.name].append(run(side))
                cpu[side.name].append(time.process_time() - started)
    return {
        name: failed[name] if name in failed else {**stat(v), "cpu_s": round(statistics.median(cpu[name]), 3)}
        for name, v in values.items()
    }


def stat(values: list[float]) -> Stat:
    return {
        "median": round(statistics.median(values), 3),
        "low": round(min(values), 3),
        "high": round(max(values), 3),
        "runs": len(values),
    }


def long_prompt(side: Side, ids: list[int]) -> Stat:
    """mlx-lm's one run is also its warm-up: seconds of compiling among minutes of work."""
    if isinstance(side, Ours):
        side.first_token(ids[: max(1, len(ids) // 8)])
    reset_peak_memory()
    before = mx.get_active_memory()
    seconds = side.first_token(ids)
    above = mx.get_peak_memory() - before
    return {
        "seconds": round(seconds, 3),
        "above_weights_gb": round(above / 1e9, 3),
        "peak_gb": round((side.nbytes + above) / 1e9, 3),
    }


def weights_a_token(config: dict[str, Any]) -> float:
    """Weights of the matrices that one token of a prompt is multiplied with: chosen experts only, no embedding, no logits."""
    names = names_of(config)
    cfg = names.read_config(config)
    total = 0.0
    for name, shape in names.text_shapes(cfg).items():
        if ".layers." in name and len(shape) > 1 and shape[-1] > 1:
            size = 1
            for n in shape:
                size *= n
            total += size * (cfg.num_experts_per_tok / cfg.num_experts if len(shape) == 3 else 1)
    return total


def matrices(model: Model, chosen: int) -> tuple[int, float]:
    """Bytes that decode reads of the weights for a token, and seconds of those products alone, after each other."""
    text = model.text
    linears: dict[int, Dense | Packed] = {}

    def collect(value: Any, seen: set[int]) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Dense | Packed):
            linears[id(value)] = value
        elif isinstance(value, list | tuple):
            for v in value:
                collect(v, seen)
        elif type(value).__module__.startswith("inference.") and hasattr(value, "__dict__"):
            for v in vars(value).values():
                collect(v, seen)

    collect(text, set())
    if text.lm_head is not text.embed_tokens:
        linears.pop(id(text.embed_tokens))
    dtype = compute_dtype(mx.bfloat16)
    calls: list[Callable[[], mx.array]] = []
    nbytes = 0
    for linear in linears.values():
        columns = (
            linear.weight.shape[-1] if isinstance(linear, Dense) else linear.scales.shape[-1] * linear.spec.group_size
        )
        if linear.weight.ndim == 3:
            experts = mx.random.permutation(linear.weight.shape[0])[:chosen]
            x = mx.random.normal((chosen, 1, columns)).astype(dtype)
            calls.append(lambda m=linear, x=x, e=experts: m.gather(x, e))
            nbytes += linear.nbytes * chosen // linear.weight.shape[0]
        else:
            x = mx.random.normal((1, 1, columns)).astype(dtype)
            calls.append(lambda m=linear, x=x: m(x))
            nbytes += linear.nbytes
        mx.eval(x)
    return nbytes, seconds_of(lambda: [call() for call in calls])


# ---------------------------------------------------------------------------------------------------- the machine


def limits() -> Stat:
    """GB/s of a copy (read and written) and of a matrix times a vector (read), TFLOP/s of a square product."""
    gpu = BACKEND != "cpu"
    dtype = compute_dtype(mx.bfloat16)
    x = mx.zeros(((1 << 30 if gpu else 1 << 27) // dtype.size,), dtype)
    copy = 2 * x.nbytes / seconds_of(lambda: -x) / 1e9
    w, v = x.reshape(-1, 4096), mx.zeros((4096,), dtype)
    gemv = x.nbytes / seconds_of(lambda: w @ v) / 1e9
    n = 8192 if gpu else 2048
    a = mx.random.normal((n, n)).astype(dtype)
    mx.eval(a)
    product = 2 * n**3 / seconds_of(lambda: a @ a) / 1e12
    mx.clear_cache()
    return {"copy_gbs": round(copy, 1), "gemv_gbs": round(gemv, 1), "matmul_tflops": round(product, 4)}


def seconds_of(function: Callable[[], Any], runs: int = 7) -> float:
    """Median of `runs` evaluations after two that warm up."""
    times = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        mx.eval(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


# ---------------------------------------------------------------------------------------------------- showing


def show(model: dict[str, Any]) -> None:
    print(f"\n{model['name']}, {model['bits']} bits, {model['layers']} layers, weights {model['weights_gb']} GB")
    rows = [(f"prefill {n}", row) for n, row in model["prefill"].items()] + [("decode", model["decode"])]
    for name, row in rows:
        text = [
            f"{side} {s['error']}" if "error" in s
            else f"{side} {s['median']:.5g} ({s['low']:.5g} to {s['high']:.5g}, {s['runs']} runs, {s['cpu_s']} CPU s"
            + (f", {s['share']:.1%} of the limit)" if "share" in s else ")")
            for side, s in row.items()
        ]  # fmt: skip
        if "ours" in row:
            text += [f"{row['ours']['median'] / s['median']:.2f} × {side}"
                     for side, s in row.items() if side != "ours" and "median" in s]  # fmt: skip
        print(f"  {name:13} tokens/s: {'; '.join(text)}")
    if "matrices" in model:
        print(f"  matrices alone: {model['matrices']['tps']} tokens/s, {model['matrices']['gbs']} GB/s")
    for side, s in model.get("ttft", {}).items():
        if side != "tokens":
            print(f"  first of {model['ttft']['tokens']} tokens, {side}: {s['seconds']} s, "
                  f"{s['above_weights_gb']} GB above the weights, peak {s['peak_gb']} GB")  # fmt: skip
    sys.stdout.flush()


if __name__ == "__main__":
    main()
