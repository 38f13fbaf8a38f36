"""Record llama-perplexity's figures for the bundled tiny base against a coarse copy of it: tests/fixtures/llama-perplexity.json.

    python benchmarks/record_llama_perplexity.py --llama BIN

BIN is the folder of a built llama.cpp. Both models are written as float32 GGUFs and run with a float32 cache, so that llama.cpp
computes what this engine computes and only the arithmetic of the figures is compared; tests/test_llama_perplexity.py does that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

from gguf_model import write_gguf
from gguf_rows import Llama, read_tokens, version

ROOT = Path(__file__).parents[1]
WINDOWS, CONTEXT = 3, 512


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.coarse_base import write_coarse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, required=True, metavar="BIN")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/fixtures/llama-perplexity.json")
    args = parser.parse_args()
    llama, base, text = Llama(args.llama, 2), ROOT / "examples/tiny/model", ROOT / "tests/fixtures/evaluation.txt"
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_gguf(base, work / "base.gguf")
        write_gguf(write_coarse(base, work / "coarse"), work / "coarse.gguf")
        llama.log_probs(work / "base.gguf", text, work / "log-probs.bin", WINDOWS, CONTEXT)
        tokens = read_tokens(work / "log-probs.bin")
        recorded = {
            "llama_cpp": version(llama),
            "base": "examples/tiny/model, float32",
            "other": "tests/coarse_base.py, float32",
            "text": text.name,
            "windows": WINDOWS,
            "context": CONTEXT,
            "tokens_sha256": hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(),
            "control": llama.kl_divergence(work / "base.gguf", work / "log-probs.bin", CONTEXT),
            "figures": llama.kl_divergence(work / "coarse.gguf", work / "log-probs.bin", CONTEXT),
        }
    args.out.write_text(json.dumps(recorded, indent=1) + "\n")
    print(json.dumps(recorded, indent=1))


if __name__ == "__main__":
    main()
