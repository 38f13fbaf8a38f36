"""Jobs over small bases for the quantizer's tests, and a command that builds a ladder and kills itself on the way."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from calibrations import text_windows

from inference.backend import mx
from inference.checkpoint import read_checkpoint
from inference.families import names_of
from publisher.calibrate import collect
from quant import qwen3_5
from quant.awq import folds
from quant.builtin import BUILTIN
from quant.convert import Job, Progress, convert
from quant.imatrix import read_imatrix
from quant.moments import FromStatistics
from quant.recipe import TensorPlan, resolve
from quant.statistics import Statistics
from quant.tables import scalable

TINY_IMATRIX = Path(__file__).parents[1] / "examples/tiny/imatrix-tiny.gguf"
BAND = 32 << 10  # bytes: every matrix of the tiny base takes several


def plans(base: Path, bits: int, recipe: str = "unsloth_8bit_out", awq: bool = False) -> list[TensorPlan]:
    checkpoint = read_checkpoint(base)
    targets = names_of(checkpoint.config).targets(checkpoint)
    return resolve(BUILTIN[recipe], bits, 64, targets, qwen3_5.CLASSES, scalable(qwen3_5.AWQ_GROUPS), awq)


def job(
    base: Path, staging: Path, bits: int = 4, recipe: str = "unsloth_8bit_out", imatrix: Path | None = None, **more: Any
) -> Job:
    config = read_checkpoint(base).config
    planned = plans(base, bits, recipe, imatrix is not None)
    if imatrix is not None:
        more["folds"] = folds(planned, read_imatrix(imatrix, config), 1.0, qwen3_5.AWQ_GROUPS)
    return Job(f"{bits}bit", planned, staging, base, config, **more)


def ladder(base: Path, out: Path) -> list[Job]:
    """Three variants that share some formats, folds among them."""
    return [job(base, out / f"{bits}bit", bits, imatrix=TINY_IMATRIX if bits != 8 else None) for bits in (2, 4, 8)]


def calibrated(base: Path, out: Path) -> FromStatistics:
    """Statistics of a base with a tokenizer over a little text."""
    return FromStatistics(collect(base, out, text_windows(base), fisher_tokens=96))


def statistics_job(
    base: Path, staging: Path, known: FromStatistics, solver: str = "gptq", bits: int = 4, only: str = "3.self_attn."
) -> Job:
    """One variant by statistics; all but the modules with `only` in their path stays as it is, to be quick."""
    j = job(base, staging, bits, "uniform", solver=solver, moments=known)
    return replace(j, plans=[p if only in p.target.name else replace(p, spec=None) for p in j.plans])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def load_tensors(folder: Path) -> dict[str, mx.array]:
    out: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= mx.load(str(file))  # type: ignore[arg-type]
    return out


def main() -> None:
    """base out bands [statistics]: build the ladder, or one variant by those statistics, and die by SIGKILL once so many
    bands have been handed to the writers."""
    left = int(sys.argv[3])

    def die(_: Progress) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    base, out = Path(sys.argv[1]), Path(sys.argv[2])
    if len(sys.argv) > 4:
        convert([statistics_job(base, out, FromStatistics(Statistics(sys.argv[4])))], die)
    else:
        convert(ladder(base, out), die, BAND)


if __name__ == "__main__":
    main()
