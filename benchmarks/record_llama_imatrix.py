"""Record what llama.cpp makes of an imatrix that `publish calibrate` wrote: tests/fixtures/llama-imatrix.json.

    python benchmarks/record_llama_imatrix.py --llama BIN [--imatrix BASE=FILE.gguf …] [--log OUT.txt]

BIN is the folder of a built llama.cpp. For the bundled tiny base, over the first windows of tests/fixtures/evaluation.txt:
what `llama-imatrix --show-statistics` reads out of our file, what llama-imatrix collects itself over the same tokens in float32,
and whether llama-quantize takes our file for a type that is refused without one (IQ2_XS). Each --imatrix is a file of ours for
another base, read and quantized with in the same way; its outcome goes to the log only.

llama.cpp 0.5.0-dev (0c1e570) ends without writing out the log of --show-statistics: add
`common_log_flush(common_log_main());` before that `return 0;` in tools/imatrix/imatrix.cpp.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf_model import text_bytes, write_gguf
from gguf_rows import EXACT, Llama, version, windows_of

from publisher.calibrate import collect

ROOT = Path(__file__).parents[1]
WINDOWS, CONTEXT = 3, 512
TYPE = "IQ2_XS"  # llama-quantize refuses it without an imatrix for every matrix that it would give two bits
# layer, tensor, Σ E[x²], least, largest, mean, deviation, active, N
LINE = re.compile(r"^(?:\S+ I)? *(\d+|-)\t(\S+) *\t *(\S+)\t *(\S+)\t *(\S+)\t *\S+\t *\S+\t *\S+%\t *(\d+)\t", re.M)


def shown(llama: Llama, model: Path, imatrix: Path) -> dict[str, dict[str, float]]:
    """What `llama-imatrix --show-statistics` says of each matrix."""
    said = llama.run("imatrix", "-m", model, "--in-file", imatrix, "--show-statistics")
    out = {}
    for layer, name, total, least, largest, n in LINE.findall(said):
        stem = f"{name}.weight" if layer == "-" else f"blk.{layer}.{name}.weight"
        out[stem] = {"total": float(total), "min": float(least), "max": float(largest), "n": int(n)}
    if not out:
        raise SystemExit(f"llama-imatrix showed no matrix:\n{said[-1500:]}")
    return out


def quantized(llama: Llama, model: Path, imatrix: Path, out: Path) -> dict[str, Any]:
    """llama-quantize with the imatrix: how many entries it found, and what it made."""
    said = llama.run("quantize", "--imatrix", imatrix, model, out, TYPE, llama.threads)
    entries = re.search(r"loaded (\d+) importance matrix entries from \S+ computed on (\d+) chunks", said)
    if entries is None:
        raise SystemExit(f"llama-quantize loaded no imatrix:\n{said[-1500:]}")
    lacking = sorted(set(re.findall(r"did not find weights for (\S+)", said)))
    return {
        "type": TYPE,
        "entries": int(entries[1]),
        "chunks": int(entries[2]),
        "without_weights": lacking,
        "tensors": text_bytes(out)[2],
    }


def collected(imatrix: Path) -> dict[str, dict[str, float]]:
    """Of each matrix of an imatrix GGUF: tokens, sum and largest of E[x²], and the mean channel weighted by it (its order)."""
    from gguf import GGUFReader

    found = {t.name: np.array(t.data, np.float64) for t in GGUFReader(imatrix).tensors}
    out = {}
    for name in sorted(n.removesuffix(".counts") for n in found if n.endswith(".counts")):
        mean = found[f"{name}.in_sum2"].ravel() / found[f"{name}.counts"].ravel()
        out[name] = {
            "tokens": float(found[f"{name}.counts"].ravel()[0]),
            "total": float(f"{mean.sum():.7g}"),
            "max": float(f"{mean.max():.7g}"),
            "centre": float(f"{(mean * np.arange(mean.size)).sum() / mean.sum():.7g}"),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, required=True, metavar="BIN")
    parser.add_argument("--imatrix", action="append", default=[], metavar="BASE=FILE")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "tests/fixtures/llama-imatrix.json")
    args = parser.parse_args()
    llama, base, text = Llama(args.llama, 2), ROOT / "examples/tiny/model", ROOT / "tests/fixtures/evaluation.txt"
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        windows = windows_of(base, text, WINDOWS, CONTEXT)
        ours = collect(base, work / "ours", windows.tolist(), fisher_tokens=0).folder / "imatrix.gguf"
        write_gguf(base, work / "base.gguf")
        own = ("--chunks", WINDOWS, "-c", CONTEXT, "--process-output", *EXACT)
        llama.run("imatrix", "-m", work / "base.gguf", "-f", text, "-o", work / "theirs.gguf", *own)
        recorded = {
            "llama_cpp": version(llama),
            "base": "examples/tiny/model",
            "text": text.name,
            "windows": WINDOWS,
            "context": CONTEXT,
            "ours_as_llama_cpp_reads_it": shown(llama, work / "base.gguf", ours),
            "collected_by_llama_imatrix": collected(work / "theirs.gguf"),
            "llama_quantize": quantized(llama, work / "base.gguf", ours, work / "quantized.gguf"),
        }
        args.out.write_text(json.dumps(recorded, indent=1) + "\n")
        print(json.dumps(recorded["llama_quantize"]))
        log = []
        for pair in args.imatrix:
            other, file = map(Path, pair.split("=", 1))
            write_gguf(other, work / "other.gguf")
            read = shown(llama, work / "other.gguf", file)
            found = quantized(llama, work / "other.gguf", file, work / "quantized.gguf")
            log.append(
                f"{other.name}: {len(read)} matrices shown by llama-imatrix; llama-quantize: {json.dumps(found)}"
            )
            print(log[-1])
        if args.log:
            args.log.write_text("\n".join([version(llama), *log]) + "\n")


if __name__ == "__main__":
    main()
