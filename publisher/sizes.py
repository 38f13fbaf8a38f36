"""`size:` of a variant: what it says, and how many bytes that leaves for the language model. Pure, and without MLX.

"5 GB", "4.7 GiB", "650 MB"   bytes of all stored tensors, vision and MTP included where they are kept
"fits 16 GB"                  a machine's memory: language model, caches at CONTEXT tokens and the workspace of prefill
                              within MEMORY_SHARE of it
"4.5 bpw"                     bits per weight of the language model
"as unsloth 4"                as many bytes in the language model as that recipe takes with that N
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from inference.checkpoint import AFFINE_BITS
from inference.families import names_of
from inference.memory import SMALLEST_STEP, workspace_nbytes

CONTEXT = 8192  # tokens of context for which memory is stated
MEMORY_SHARE = Fraction(70, 100)  # of a machine's memory; macOS lets a GPU wire about two thirds to three quarters
PREFILL_TOKENS = 2048  # tokens a piece of the prompt; mlx-lm's default prefill_step_size
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
EXPECTED = 'expected a size such as "5 GB", "650 MB", "4.7 GiB", "fits 16 GB", "4.5 bpw" or "as unsloth 4"'
BYTES = re.compile(r"(fits )?([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(MB|GB|TB|MiB|GiB|TiB)")
BPW = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,6})?) ?bpw")
AS = re.compile(r"as ([A-Za-z0-9_.\-]+) ([0-9]+)")


@dataclass(frozen=True)
class Size:
    """A size as parsed. value: bytes of `file` and `memory`, bits a weight of `bpw`; recipe and bits: of `as`."""

    text: str
    kind: Literal["file", "memory", "bpw", "as"]
    value: Fraction = Fraction(0)
    recipe: str = ""
    bits: int = 0


@dataclass(frozen=True)
class Facts:
    """What a size is turned into bytes with. Bytes: `other` of vision and MTP, `caches` at CONTEXT tokens, `workspace` of
    prefill, `like` of the language model by the recipe of an `as`."""

    text_params: int
    other: int
    caches: int
    workspace: int
    like: int = 0


def parse_size(text: str) -> Size:
    """Raises ValueError, whose text begins with `expected`."""
    text = " ".join(text.split())
    if found := BYTES.fullmatch(text):
        value = Fraction(found[2]) * UNITS[found[3]]
        if value < 1:
            raise ValueError(EXPECTED)
        return Size(text, "memory" if found[1] else "file", value)
    if found := BPW.fullmatch(text):
        value = Fraction(found[1])
        if not 1 <= value <= 16:
            raise ValueError("expected 1 to 16 bits per weight (bpw)")
        return Size(text, "bpw", value)
    if found := AS.fullmatch(text):
        if int(found[2]) not in AFFINE_BITS:
            raise ValueError(f'expected N to be one of {", ".join(map(str, AFFINE_BITS))}, as in "as unsloth 4"')
        return Size(text, "as", recipe=found[1], bits=int(found[2]))
    raise ValueError(EXPECTED)


def text_budget(size: Size, facts: Facts) -> int:
    """Bytes that the language model may take; not positive where nothing is left."""
    if size.kind == "file":
        return int(size.value) - facts.other
    if size.kind == "memory":
        return int(size.value * MEMORY_SHARE) - facts.caches - facts.workspace
    if size.kind == "bpw":
        return int(size.value * facts.text_params / 8)
    return facts.like


def nominal_bits(size: Size, budget: int, text_params: int) -> int:
    """N of a variant that is made by size: that of an `as`, else the uniform width nearest to its bits per weight.

    A uniform width in groups of 64 stores half a bit a weight more than its name says. Cards, ceilings of the smoke test
    and tags go by N.
    """
    if size.kind == "as":
        return size.bits
    bpw = 8 * budget / text_params
    return min(AFFINE_BITS, key=lambda b: (abs(b + 0.5 - bpw), b))


def workspace_bound(config: dict[str, Any], step: int = PREFILL_TOKENS) -> int:
    """Bytes that a piece of `step` tokens takes beside weights and caches on Metal, at most, with CONTEXT tokens cached.

    config: the whole config.json. By the same function that this tool's engine loads by, which takes steps no larger than
    PREFILL_TOKENS there: what fits by this bound is not refused. Raises CheckpointError as `read_config` does.
    """
    dtype = str(names_of(config).read_config(config).dtype)
    return workspace_nbytes(config, CONTEXT, dtype, "metal", step)


def workspace_least(config: dict[str, Any]) -> int:
    """That of the smallest step, below which the engine refuses to load."""
    return workspace_bound(config, SMALLEST_STEP)
