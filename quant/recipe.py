"""Recipes: which tensor gets which format, and why. Pure data and pure functions, no MLX.

A recipe is an ordered list of rules; the first rule whose pattern matches a tensor decides it. `resolve` turns a recipe
and the tensors of a model into one `TensorPlan` a tensor, which drives the build, the plan's figures and the card's table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from typing import Literal

from inference.checkpoint import AFFINE_BITS, QuantSpec
from inference.errors import CheckpointError, InputError
from inference.layout import Target

BASE = re.compile(r"N(?:\+([0-9]))?")  # a rule's bits as an expression of the variant's base bits
MAX_ALTERNATIVES = 256  # of one pattern
DENSE = "bf16"  # a rule's bits: keep the tensor in the model's own type
# "use_more_bits" of llama.cpp (src/llama-quant.cpp), as mlx-lm's mixed_* recipes apply it to layer i of n
LAYER_SETS = {"use_more_bits": lambda i, n: i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2}


class RuleError(InputError):
    """A recipe does not fit a model. rule: index of the rule at fault, None where one is missing."""

    def __init__(self, message: str, rule: int | None = None) -> None:
        super().__init__(message)
        self.rule = rule


@dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    match: glob over module paths (`*` crosses dots, `{a,b}` are alternatives), e.g. `*.self_attn.{q,k,v}_proj`.
    bits: a number of AFFINE_BITS, `bf16`, or `N`, `N+1` … of the variant's base bits, snapped to what MLX can store.
    group_size: None takes the variant's. mode: one of inference.checkpoint.MODES.
    awq: scale the input channels before rounding where an imatrix is named. why: the reason, printed on the card.
    layers: restrict to a set of LAYER_SETS or to these layer numbers. optional: matching nothing is no error.
    """

    match: str
    bits: int | str
    group_size: int | None = None
    mode: str = "affine"
    awq: bool = False
    why: str = ""
    layers: str | tuple[int, ...] | None = None
    optional: bool = False


@dataclass(frozen=True)
class Recipe:
    """A named list of rules, and what a variant built by it must show.

    awq_exponent: s = E[x²]^(exponent / 2), so 1.0 scales by the root mean square and 0 switches AWQ off; "search" finds
    one for every group of matrices (`quant.awq_search`).
    smoke_kld: largest mean KL divergence from BF16 (nats a token) that the smoke test lets pass, by base bits.
    kld_ceiling: the same over the evaluation text, for a release; bits that it does not name have none.
    solver: how codes are chosen (`quant.solve.SOLVERS`).
    """

    name: str
    rules: tuple[Rule, ...]
    awq_exponent: float | Literal["search"] = 1.0
    smoke_kld: tuple[tuple[int, float], ...] = ((2, 3.0), (3, 1.0), (4, 0.5), (5, 0.3), (6, 0.2), (8, 0.2))
    origin: str = ""  # where the rules and their reasons come from
    kld_ceiling: tuple[tuple[int, float], ...] = ()
    solver: str = "rtn"


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one tensor: its format (None: kept in `target.dtype`), whether its input is scaled, and why."""

    target: Target
    spec: QuantSpec | None
    awq: bool
    why: str
    rule: str  # the pattern that decided
    cls: str  # tensor class, the row of the card's table

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales and biases included."""
        if self.spec is None:
            return self.target.nbytes
        return self.spec.nbytes(self.target.shape, self.target.dtype)

    def stored(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of every tensor written for it, in file order."""
        if self.spec is None:
            return [(self.target.name, self.target.dtype, self.target.shape)]
        return self.spec.parts(self.target.name, self.target.shape, self.target.dtype)


@dataclass(frozen=True)
class TensorClass:
    """A row of the card's table: the tensors of one role. dense: never quantized, no rule is asked."""

    label: str
    match: str
    dense: bool = False


def snap(bits: int) -> int:
    """The nearest format that MLX stores: 7 becomes 8, and nothing is above 8 (quantization.md: `snap`)."""
    return min((b for b in AFFINE_BITS if b >= bits), default=8)


def rule_bits(rule: Rule, base_bits: int) -> int | None:
    """Bits of a rule for a variant's base bits N; None keeps the tensor unquantized."""
    if rule.bits == DENSE:
        return None
    if isinstance(rule.bits, int):
        return rule.bits
    found = BASE.fullmatch(rule.bits)
    if not found:
        raise InputError(f"rule {rule.match}: bits {rule.bits!r}: expected 2, 3, 4, 5, 6, 8, bf16, N or N+1 …")
    return snap(base_bits + int(found[1] or 0))


def resolve(
    recipe: Recipe,
    base_bits: int,
    group_size: int,
    targets: Sequence[Target],
    classes: Sequence[TensorClass],
    scalable: Iterable[str] = (),
    with_awq: bool = False,
) -> list[TensorPlan]:
    """One plan a tensor, in the order of `targets`.

    classes: the family's table. scalable: globs of the modules whose input channels AWQ can scale; with_awq: an imatrix
    is named. Vision and MTP tensors stay in the model's type unless a rule whose pattern starts with `vision_tower.` or
    `mtp.` names them. Raises InputError for a pattern that matches nothing (unless optional), for a tensor that no rule
    names, and for a format that the tensor's shape cannot take or that MLX does not have. A rule whose tensors all go to
    earlier rules is no error: that is how a recipe is overridden.
    """
    layers = 1 + max((i for t in targets if t.part == "text" and (i := layer_of(t.name)) is not None), default=-1)
    used: set[int] = set()
    plans: list[TensorPlan] = []
    for target in targets:
        cls = class_of(target, classes)
        if cls.dense and target.part == "text":
            plans.append(TensorPlan(target, None, False, "", "", cls.label))
            continue
        matching = _matching(recipe, target, layers)
        used.update(matching)
        if not matching:
            if target.part == "text":
                raise RuleError(f"recipe {recipe.name}: no rule names {target.module}; add one, or a final `*`")
            plans.append(TensorPlan(target, None, False, "", "", cls.label))
            continue
        index = matching[0]
        rule = recipe.rules[index]
        spec = _spec(recipe, index, base_bits, group_size, target)
        awq = bool(spec) and rule.awq and with_awq and any(matches(g, target.module) for g in scalable)
        plans.append(TensorPlan(target, spec, awq, rule.why, rule.match, cls.label))
    for index, rule in enumerate(recipe.rules):
        if index not in used and not rule.optional:
            raise RuleError(f"recipe {recipe.name}: pattern {rule.match!r} matches no tensor of this model", index)
    return plans


@lru_cache(maxsize=1 << 14)
def matches(pattern: str, module: str) -> bool:
    """Whether a rule's pattern names this module path. A leading `*.` also matches nothing: `*.lm_head` names `lm_head`."""
    return any(p.fullmatch(module) or p.fullmatch(f".{module}") for p in _compile(pattern))


@lru_cache(maxsize=1024)
def _compile(pattern: str) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(translate(p)) for p in _braces(pattern))


def _braces(pattern: str) -> list[str]:
    """The patterns that a brace pattern stands for. Raises InputError beyond MAX_ALTERNATIVES."""
    choices = 1
    for group in re.findall(r"\{([^{}]*)\}", pattern):
        choices *= group.count(",") + 1
        if choices > MAX_ALTERNATIVES:
            raise InputError(f"rule {pattern[:60]}…: stands for more than {MAX_ALTERNATIVES} patterns")
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [p for choice in found[1].split(",") for p in _braces(head + choice.strip() + tail)]


def layer_of(name: str) -> int | None:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def class_of(target: Target, classes: Sequence[TensorClass]) -> TensorClass:
    if target.part != "text":
        return TensorClass("vision tower" if target.part == "vision" else "MTP head", "*", True)
    for cls in classes:
        if matches(cls.match, target.module):
            return cls
    raise InputError(f"{target.name}: belongs to no tensor class of this family")


def _matching(recipe: Recipe, target: Target, layers: int) -> list[int]:
    """Rules that name this tensor, in order; the first decides."""
    found = []
    for index, rule in enumerate(recipe.rules):
        if target.part == "vision" and not rule.match.startswith("vision_tower."):
            continue
        if target.part == "mtp" and not rule.match.startswith("mtp."):
            continue
        if rule.layers is not None:
            layer = layer_of(target.name)
            if layer is None:
                # mlx-lm takes a module outside the layers for layer 0; here it is simply in no set
                continue
            chosen = LAYER_SETS[rule.layers](layer, layers) if isinstance(rule.layers, str) else layer in rule.layers
            if not chosen:
                continue
        if matches(rule.match, target.module):
            found.append(index)
    return found


def _spec(recipe: Recipe, index: int, base_bits: int, group_size: int, target: Target) -> QuantSpec | None:
    rule = recipe.rules[index]
    bits = rule_bits(rule, base_bits)
    if bits is None:
        return None
    where = f"recipe {recipe.name}: {rule.match}"
    if len(target.shape) < 2 or not target.name.endswith(".weight"):
        raise RuleError(f"{where}: {target.name} is no matrix and cannot be quantized", index)
    group = rule.group_size or group_size
    if target.shape[-1] % group:
        raise RuleError(
            f"{where}: {target.module} has {target.shape[-1]} columns, no multiple of group size {group}; give it "
            "bits: bf16 or a smaller group_size",
            index,
        )
    try:
        return QuantSpec(bits, group, rule.mode)
    except CheckpointError as e:
        raise RuleError(f"{where}: {e}", index) from None


def applied_layers(rule: Rule) -> str | None:
    """The layer restriction as text, for the manifest and the card."""
    if rule.layers is None or isinstance(rule.layers, str):
        return rule.layers
    return ",".join(map(str, rule.layers))
