"""llama.cpp's quantizations of a base, judged by this project's harness: true bytes, KL divergence against BF16.

    python benchmarks/gguf_rows.py BASE --llama BIN --text EVALUATION.txt --calibration CALIBRATION.txt --work DIR --json OUT.json

BASE is a Llama or dense Qwen3.5 checkpoint in the original layout, BIN the folder of a built llama.cpp (llama-quantize,
llama-imatrix, llama-perplexity; CPU build). Each row is quantized with an imatrix from BF16 weights, with llama-quantize's own
choice of types (its fallbacks for row widths that are no multiple of 256 included) and judged twice:

- `kld`: the codes dequantized to float32 and run by this engine in float32, so that only the weights differ;
- `kld_llama_perplexity`: llama-perplexity's own figure, where activations are rounded to 8 bits besides (float32 cache).

Windows and scoring are llama-perplexity's: consecutive windows of 512 tokens, second half scored, no BOS unless the tokenizer
adds one. Before any row the base itself is compared: tokens equal, largest difference of the two engines' log-probabilities in
float32 (llama.cpp stores them in steps of 16/65535). Bytes are those of all tensors in the file; vision and MTP are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf_model import text_bytes, write_dequantized, write_gguf

from inference.backend import device_info, mx
from inference.load import load
from inference.tokenizer import Tokenizer
from publisher.evaluate import measure_folder
from publisher.store import sha256_file

TYPES = ("Q2_K", "Q3_K_S", "IQ3_M", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
# the cache in float32 and plain attention, so that only weights (and llama.cpp's 8-bit activations) differ from the base
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32", "-b", "512", "-ub", "512")
ATTEMPTS = 3  # llama-perplexity may end before its log is written out; seen on a busy machine
STATISTICS = {
    "ppl": r"Mean PPL\(Q\) +: +(\S+)",
    "ppl_base": r"Mean PPL\(base\) +: +(\S+)",
    "ln_ppl_ratio": r"Mean ln\(PPL\(Q\)/PPL\(base\)\) +: +(\S+)",
    "ppl_ratio": r"Mean PPL\(Q\)/PPL\(base\) +: +(\S+)",
    "mean": r"Mean +KLD: +(\S+)",
    "median": r"Median +KLD: +(\S+)",
    "p99": r"99\.0% +KLD: +(\S+)",
    "p99_9": r"99\.9% +KLD: +(\S+)",
    "max": r"Maximum KLD: +(\S+)",
    "rms_dp_percent": r"RMS Δp +: +(\S+)",
    "same_top_percent": r"Same top p: +(\S+)",
}


@dataclass(frozen=True)
class Job:
    base: Path
    work: Path
    text: Path
    imatrix: Path
    windows: int
    context: int


@dataclass(frozen=True)
class Llama:
    """A built llama.cpp and how many threads it may use."""

    folder: Path
    threads: int

    def run(self, tool: str, *args: object) -> str:
        threads = () if tool == "quantize" else ("-t", self.threads)
        command = [str(self.folder / f"llama-{tool}"), *map(str, (*args, *threads))]
        waiting = os.environ | {"OMP_WAIT_POLICY": "passive"}  # threads that spin halve the speed of a busy machine
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=waiting)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
        return done.stdout + done.stderr

    def log_probs(self, model: Path, text: Path, out: Path, windows: int, context: int) -> None:
        """llama-perplexity's file of the base's log-probabilities."""
        self.run(
            "perplexity", "-m", model, "-f", text, "-c", context, "--chunks", windows,
            "--kl-divergence-base", out, *EXACT,
        )  # fmt: skip

    def kl_divergence(self, model: Path, base: Path, context: int) -> dict[str, float]:
        args = ("-m", model, "--kl-divergence-base", base, "--kl-divergence", "-c", context, *EXACT)
        for _ in range(ATTEMPTS):
            said = self.run("perplexity", *args)
            found = {key: re.search(pattern, said) for key, pattern in STATISTICS.items()}
            if all(found.values()):
                return {key: float(match[1]) for key, match in found.items() if match}
        raise SystemExit(f"llama-perplexity printed no {next(k for k, m in found.items() if not m)}:\n{said[-1500:]}")


def read_tokens(log_probs: Path) -> np.ndarray:
    """[windows, context] of llama-perplexity's file."""
    with open(log_probs, "rb") as f:
        context, _, windows = _head(f, log_probs.name)
        return np.fromfile(f, "<i4", windows * context).reshape(windows, context)


def read_log_probs(log_probs: Path) -> Iterator[np.ndarray]:
    """Log-probabilities of the scored positions, [context - 1 - context // 2, V] float32, window by window.

    A token more than 16 nats below the most probable one has its log-probability cut off there.
    """
    with open(log_probs, "rb") as f:
        context, vocab, windows = _head(f, log_probs.name)
        f.seek(4 * windows * context, os.SEEK_CUR)
        shape = context - 1 - context // 2, 2 * ((vocab + 1) // 2) + 4
        for _ in range(windows):
            stored = np.fromfile(f, "<u2", shape[0] * shape[1]).reshape(shape)
            head = np.ascontiguousarray(stored[:, :4]).view("<f4")  # step, least log-probability
            yield stored[:, 4 : 4 + vocab].astype(np.float32) * head[:, :1] + head[:, 1:]


def _head(f: BinaryIO, name: str) -> tuple[int, int, int]:
    magic, context, vocab, windows = struct.unpack("<8sIii", f.read(20))
    if magic != b"_logits_":
        raise SystemExit(f"{name}: no file of llama-perplexity's log-probabilities")
    return context, vocab, windows


def windows_of(base: Path, text: Path, windows: int, context: int) -> np.ndarray:
    """The first consecutive windows of the text, [windows, context]."""
    ids = Tokenizer.load(base).encode(text.read_text(encoding="utf-8"))
    if len(ids) < windows * context:
        raise SystemExit(f"{text.name}: {len(ids)} tokens, {windows} windows of {context} need {windows * context}")
    return np.array(ids[: windows * context], np.int32).reshape(windows, context)


def same_function(base: Path, tokens: np.ndarray, log_probs: Path) -> dict[str, float]:
    """How this engine's and llama.cpp's base agree, both in float32; the tokens have to be equal."""
    if not np.array_equal(read_tokens(log_probs), tokens):
        raise SystemExit("llama.cpp splits the text into other tokens")
    model = load(base, mx.float32)
    largest, total, count, klds = 0.0, 0.0, 0, []
    for row, want in zip(tokens, read_log_probs(log_probs), strict=True):
        logits = np.array(model.forward(mx.array(row)[None])[0, len(row) // 2 : -1])
        logits -= logits.max(-1, keepdims=True)
        got = logits - np.log(np.exp(logits).sum(-1, keepdims=True, dtype=np.float64))
        near = want > want.max(-1, keepdims=True) - 15.9  # the rest is cut off
        off = np.abs(got - want)[near]
        largest, total = max(largest, float(off.max())), total + float(off.sum())
        count += off.size
        klds.append(np.where(want > -16, np.exp(want) * (want - got), 0).sum(-1).mean())
    return {
        "kld_llama_cpp_to_ours": float(np.mean(klds)),
        "mean_difference": total / count,
        "largest_difference": largest,
        "step": 16 / 65535,
    }


def make_row(llama: Llama, job: Job, name: str, gguf: Path) -> dict[str, Any]:
    """Quantize the base and judge the dequantized codes."""
    kind, _, embedding = name.partition("+")
    more = ("--token-embedding-type", embedding) if embedding else ()
    llama.run("quantize", "--imatrix", job.imatrix, *more, job.work / "base.gguf", gguf, kind, llama.threads)
    nbytes, params, types = text_bytes(gguf)
    write_dequantized(job.base, gguf, job.work / "dequantized")
    found = measure_folder(
        job.base, job.work / "dequantized", job.text, job.windows, job.context, cache=job.work / "teacher"
    )
    if found.nonfinite or not (found.kld and found.kld_p999 and found.top1):
        raise SystemExit(f"{gguf.name}: {found.nonfinite} of {found.positions} positions are not finite")
    return {
        "name": name,
        "text_bytes": nbytes,
        "bpw": round(8 * nbytes / params, 4),
        "kld": found.kld.value,
        "kld_interval": [found.kld.low, found.kld.high],
        "kld_p99_9": found.kld_p999.value,
        "top1": found.top1.value,
        "tensors": types,
    }


def earlier(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run that was stopped has found, if it was of the same base, text and imatrix; else nothing."""
    if not path.is_file():
        return {}
    old = json.loads(path.read_text())
    return old if all(old.get(k) == v for k, v in result.items() if k != "device") else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--llama", type=Path, required=True, metavar="BIN")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="for the imatrix, if none is given")
    parser.add_argument("--imatrix", type=Path, help="an imatrix GGUF; default: made by llama-imatrix")
    parser.add_argument("--chunks", type=int, default=120, help="of 512 tokens, for the imatrix (default 120)")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--types", nargs="+", default=list(TYPES), help="Q4_K_M or, with another embedding, Q4_K_M+Q5_0"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True, help="folder for GGUFs, log-probabilities and states; kept")
    parser.add_argument("--json", type=Path, required=True, help="rows already there are kept, if of the same inputs")
    args = parser.parse_args()
    if not (args.imatrix or args.calibration):
        parser.error("--calibration or --imatrix is needed")
    llama, work = Llama(args.llama, args.threads), args.work
    work.mkdir(parents=True, exist_ok=True)
    imatrix = args.imatrix or work / "imatrix.gguf"
    write_gguf(args.base, work / "base.gguf", "F32")
    if not imatrix.exists():
        write_gguf(args.base, work / "base-bf16.gguf", "BF16")
        chunks = ("--chunks", args.chunks, "-b", 512, "-ub", 512)
        llama.run("imatrix", "-m", work / "base-bf16.gguf", "-f", args.calibration, "-o", imatrix, *chunks)
    job = Job(args.base, work, args.text, imatrix, args.windows, args.context)
    tokens = windows_of(args.base, args.text, args.windows, args.context)
    log_probs = work / "log-probs.bin"
    result: dict[str, Any] = {
        "base": args.base.name,
        "base_gguf_sha256": sha256_file(work / "base.gguf"),
        "device": asdict(device_info()),
        "llama_cpp": version(llama),
        "text": args.text.name,
        "text_sha256": sha256_file(args.text),
        "windows": args.windows,
        "context": args.context,
        "positions": tokens.shape[0] * (args.context - 1 - args.context // 2),
        "imatrix": args.imatrix.name
        if args.imatrix
        else f"{args.calibration.name}, {args.chunks} chunks of 512 tokens",
        "imatrix_sha256": sha256_file(imatrix),
    }
    old = earlier(args.json, result)
    if not (old and log_probs.is_file()):
        llama.log_probs(work / "base.gguf", args.text, log_probs, args.windows, args.context)
        old |= {
            "same_function": same_function(args.base, tokens, log_probs),
            "control": llama.kl_divergence(work / "base.gguf", log_probs, args.context),
        }
    result |= {"same_function": old["same_function"], "control": old["control"], "rows": []}
    print(json.dumps(result["same_function"]), json.dumps(result["control"]), flush=True)
    known = {row["name"]: row for row in old.get("rows", [])}
    for name in dict.fromkeys([*known, *args.types]):
        row = known.get(name) or make_row(llama, job, name, work / f"{name}.gguf")
        result["rows"].append(row)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name:8} {row['text_bytes'] / 1e6:9.3f} MB {row['bpw']:.3f} bpw  KLD {row['kld']:.5f}", flush=True)
    for row in result["rows"]:
        if "kld_llama_perplexity" not in row:
            own = llama.kl_divergence(work / f"{row['name']}.gguf", log_probs, args.context)
            row |= {"kld_llama_perplexity": own["mean"], "llama_perplexity": own}
            args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{row['name']:8} by llama-perplexity {row['kld_llama_perplexity']:.5f}", flush=True)


def version(llama: Llama) -> str:
    said = subprocess.run([llama.folder / "llama-perplexity", "--version"], capture_output=True, text=True, check=False)
    return next((line for line in (said.stderr + said.stdout).splitlines() if "version" in line), "unknown").strip()


if __name__ == "__main__":
    main()
