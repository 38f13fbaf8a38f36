"""What a build's limits are on this machine, and which share of each a whole build of six variants reaches.

    python benchmarks/build_rates.py WORK [--layers 32] [--bits 2,3,4,5,6,8] [--jobs N] [--discard] [--json OUT]

Makes a checkpoint of Qwen3.5-9B's shapes in WORK/base (`make_checkpoint.py --repeat`; kept, and used again if its layers
are as many) and measures (a) writing and reading at WORK, (b) `mx.quantize` for each format on the device, and on a CPU
`quant.nearest` for all of them together, (c) sha256 and BLAKE3 on one core. Then (d) it builds six `unsloth` variants in
one pass in a process of its own, rounding to nearest. A limit's time is what the build would take if nothing else took
any; its share is that over the build's wall time. The share of the largest is how much of this machine a build uses.

--discard: each output file is cut to nothing once it is complete and hashed, so that the disk need hold the base and
what is being written; files are 1 GB then. Or choose a WORK in memory (/dev/shm). The results say which it was. Needs
only the installed project.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from inference.backend import BACKEND, device_info, mx, peak_memory
from inference.checkpoint import ITEMSIZE, count, read_checkpoint
from inference.families import names_of
from quant import convert as convert_module
from quant import nearest, qwen3_5
from quant.builtin import BUILTIN
from quant.convert import Job, convert
from quant.job import Key, Lane
from quant.recipe import TensorPlan, resolve
from quant.shards import SHARD_BYTES, Record, ShardWriter
from quant.stream import default_jobs
from quant.tables import scalable

HERE = Path(__file__).parent
GROUP = 64
BLOCK = 8 << 20  # bytes; a band
DISCARDED_SHARD = 1_000_000_000  # bytes
PROBE = 4 << 30  # bytes written and read to know the disk, at most
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bits", default="2,3,4,5,6,8")
    parser.add_argument("--jobs", type=int, default=default_jobs())
    parser.add_argument("--discard", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    bits = [int(b) for b in args.bits.split(",")]
    if args.child:
        sys.stdout.write("\n" + json.dumps(build(args.work, bits, args.jobs, args.discard)) + "\n")
        return
    base_s = make_base(args.work / "base", args.layers)
    rates = {**disk_rates(args.work), **hash_rates(), "quantize_gb_s": quantize_rates(bits)}
    if BACKEND == "cpu":
        rates["nearest_together_gb_s"] = together_rate(bits)
    load = os.getloadavg()[0]
    done = in_child(sys.argv[1:])
    out = {
        "what": "limits of a build of six variants and the share of each that it reaches",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": asdict(device_info()), "cores": os.cpu_count(), "os": platform.platform(), "load_before": round(load, 2),
        "layers": args.layers, "bits": bits, "group_size": GROUP, "jobs": args.jobs,
        "outputs": "cut to nothing once hashed" if args.discard else f"kept on {filesystem(args.work)}",
        "base_made_s": base_s, "rates": rates, "build": done, "limits": limits(rates, done, args.jobs),
    }  # fmt: skip
    text = json.dumps(out, indent=1) + "\n"
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    for name, limit in out["limits"].items():
        sys.stderr.write(f"{name:28s} {limit['least_s']:8.2f} s  {limit['share']:6.1%} of the build\n")


def make_base(base: Path, layers: int) -> float | None:
    """Seconds it took, None if it was there."""
    config = base / "config.json"
    if config.is_file() and (base / "model.safetensors.index.json").is_file():
        if json.loads(config.read_text())["text_config"]["num_hidden_layers"] == layers:
            return None
        shutil.rmtree(base)
    started = time.perf_counter()
    command = [sys.executable, str(HERE / "make_checkpoint.py"), str(base)]
    subprocess.run([*command, "--preset", "9b", "--layers", str(layers), "--repeat"], check=True, stdout=sys.stderr)
    return round(time.perf_counter() - started, 1)


def disk_rates(work: Path) -> dict[str, float]:
    """GB/s of writing a file to the end (fsync included), and of reading it again after it left the page cache."""
    nbytes = min(PROBE, shutil.disk_usage(work).free // 4) // BLOCK * BLOCK
    block, path = np.random.default_rng(0).bytes(BLOCK), work / "probe.bin"
    try:
        started = time.perf_counter()
        with open(path, "wb", buffering=0) as f:
            for _ in range(nbytes // BLOCK):
                f.write(block)
            os.fsync(f.fileno())
            written = time.perf_counter() - started
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer, started = bytearray(BLOCK), time.perf_counter()
        with open(path, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
        read = time.perf_counter() - started
    finally:
        path.unlink(missing_ok=True)
    return {"write_gb_s": round(nbytes / written / 1e9, 3), "read_gb_s": round(nbytes / read / 1e9, 3)}


def hash_rates() -> dict[str, float]:
    """GB/s on one thread: of files, and of tensors."""
    block = bytes(BLOCK)
    return {
        "sha256_gb_s": rate(lambda: hashlib.sha256(block).digest(), BLOCK),
        "blake3_gb_s": rate(lambda: blake3(block).digest(), BLOCK),
    }


def quantize_rates(bits: list[int]) -> dict[str, float]:
    """GB/s of bfloat16 read, on one stream of the device, for each width; a GPU gets a matrix of its own size."""
    rows = 1024 if BACKEND == "cpu" else 12288
    w = mx.random.normal((rows, 4096), dtype=mx.float32).astype(mx.bfloat16)
    mx.eval(w)
    return {str(b): rate(lambda b=b: mx.eval(mx.quantize(w, GROUP, b)), w.nbytes) for b in bits}


def together_rate(bits: list[int]) -> float:
    """GB/s of bfloat16 times formats, on one core, of `quant.nearest` with all widths at once."""
    w = mx.random.normal((1024, 4096)).astype(mx.bfloat16)
    patterns = np.array(w.view(mx.uint16))
    return rate(lambda: nearest.quantize(patterns, GROUP, bits), patterns.nbytes * len(bits))


def rate(work: Callable[[], object], nbytes: int) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return round(nbytes / statistics.median(times) / 1e9, 3)


def in_child(arguments: list[str]) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, __file__, *arguments, "--child"], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def build(work: Path, bits: list[int], jobs: int, discard: bool) -> dict[str, Any]:
    """Six variants in one pass: seconds, bytes, peaks, and how much work of each kind there was."""
    base, out = work / "base", work / "out"
    shutil.rmtree(out, ignore_errors=True)
    checkpoint = read_checkpoint(base)
    shard = DISCARDED_SHARD if discard else SHARD_BYTES
    ladder = [
        Job(f"{b}bit", plans(base, b), out / str(b), base, checkpoint.config, mtp="drop", max_shard_bytes=shard)
        for b in bits
    ]
    quantized, hashed = work_of(ladder)
    if discard:
        discard_outputs()
    cpu, started = cpu_s(), time.perf_counter()
    done = convert(ladder, at_once=jobs)
    wall = time.perf_counter() - started
    shutil.rmtree(out)
    read, written = done[0].bytes_read, sum(d.bytes_written for d in done)
    return {
        "wall_s": round(wall, 2), "cpu_s": round(cpu_s() - cpu, 2), "bytes_read": read, "bytes_written": written,
        "tensor_bytes_hashed": read + hashed, "bf16_bytes_quantized": quantized,
        "peak_host_gb": round(peak_host() / 1e9, 3),
        "peak_device_gb": round(peak_memory() / 1e9, 3),
    }  # fmt: skip


def plans(base: Path, bits: int) -> list[TensorPlan]:
    checkpoint = read_checkpoint(base)
    targets = names_of(checkpoint.config).targets(checkpoint)
    return resolve(BUILTIN["unsloth"], bits, GROUP, targets, qwen3_5.CLASSES, scalable(qwen3_5.AWQ_GROUPS), False)


def work_of(ladder: list[Job]) -> tuple[dict[str, int], int]:
    """(bf16 bytes to quantize at each width, bytes of stored tensors to hash), where equal results count once."""
    distinct: dict[tuple[str, Key], TensorPlan] = {}
    for lane in map(Lane, ladder):
        distinct |= {(p.target.name, lane.key(p)): p for p in lane.plans}
    quantized: Counter[str] = Counter()
    hashed = 0
    for plan in distinct.values():
        if plan.spec:
            quantized[str(plan.spec.bits)] += 2 * plan.target.params
        if plan.spec or plan.target.op == "plus_one" or plan.target.dtype != plan.target.source.dtype:
            hashed += sum(ITEMSIZE[dtype] * count(shape) for _, dtype, shape in plan.stored())
    return dict(sorted(quantized.items())), hashed


def discard_outputs() -> None:
    """Cut every shard to nothing as soon as its last byte is written and hashed, and ask for no disk for them."""
    commit = ShardWriter.commit

    def discarding(self: ShardWriter, record: Record) -> None:
        commit(self, record)
        shard = self.layout.groups[len(self.records) - 1][0].shard
        if len(self.records) == len(self.targets) or self.layout.groups[len(self.records)][0].shard != shard:
            os.truncate(self.folder / self.layout.shards[shard].name, 0)

    ShardWriter.commit = discarding
    convert_module._check_disk = lambda *_: None


def limits(rates: dict[str, Any], done: dict[str, Any], jobs: int) -> dict[str, dict[str, float]]:
    """Seconds that the build would take if only this counted, and their share of its wall time."""
    quantize = sum(n / 1e9 / rates["quantize_gb_s"][b] for b, n in done["bf16_bytes_quantized"].items())
    cores = os.cpu_count() or 1
    least = {
        "read": done["bytes_read"] / 1e9 / rates["read_gb_s"],
        "write": done["bytes_written"] / 1e9 / rates["write_gb_s"],
        "BLAKE3 of the source, 1 core": done["bytes_read"] / 1e9 / rates["blake3_gb_s"],
        "BLAKE3 of tensors, all cores": done["tensor_bytes_hashed"] / 1e9 / rates["blake3_gb_s"] / cores,
        "sha256 of files, all cores": done["bytes_written"] / 1e9 / rates["sha256_gb_s"] / cores,
    }
    if BACKEND == "cpu":
        threads, nbytes = min(jobs, cores), sum(done["bf16_bytes_quantized"].values())
        least[f"mx.quantize, {threads} cores"] = quantize / threads
        least[f"quant.nearest, {threads} cores"] = nbytes / 1e9 / rates["nearest_together_gb_s"] / threads
    else:
        least["mx.quantize"] = quantize
    least["CPU time, all cores"] = done["cpu_s"] / cores
    return {k: {"least_s": round(s, 2), "share": round(s / done["wall_s"], 3)} for k, s in least.items()}


def peak_host() -> int:
    """Most memory this process held, bytes. (The kernel hands ru_maxrss on from whoever started it; VmHWM it does not.)"""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def filesystem(path: Path) -> str:
    """Type of the filesystem that holds a path, as Linux names it."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return "the disk"
    held = [m for m in mounts if path.resolve().is_relative_to(m[0])]
    return max(held, key=lambda m: len(m[0]))[1] if held else "the disk"


if __name__ == "__main__":
    main()
