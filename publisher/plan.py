"""What a ladder comes to before a weight is read: formats, bytes, bits per weight, memory, disk. Pure, and without MLX."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from inference.checkpoint import Checkpoint, QuantSpec, count
from inference.errors import InputError
from inference.families import family_of, names_of
from inference.layout import Target
from quant.recipe import Recipe, RuleError, TensorPlan, applied_layers, resolve, rule_bits
from quant.tables import scalable

from .allocation import ALLOCATED, Sized, Sources, sized
from .schema import BaseInput, BuildInputs, ImatrixInput, RuleInput
from .sizes import CONTEXT
from .store import digest
from .variants import Project

INTERPRETER = 250_000_000  # Python, MLX and the tables of a large model; measured 0.15 to 0.2 GB
BANDS = 400_000_000  # `quant.convert`: source, float32 and packed forms of the bands in flight
OTHER_FILES = 30_000_000  # tokenizer, licence, card: an allowance, not a measurement
AGAIN = "run publish allocate {} --freeze, or delete the frozen file"


@dataclass(frozen=True)
class ClassRow:
    """Tensors of one class and one format in one variant."""

    cls: str
    format: str
    awq: bool
    group_size: int | None
    tensors: int
    params: int
    nbytes: int


@dataclass(frozen=True)
class VariantPlan:
    """One variant before it is built. nbytes counts all stored tensors, text_* only those of the language model."""

    id: str
    repo: str
    recipe: str
    bits: int
    plans: tuple[TensorPlan, ...]
    rows: tuple[ClassRow, ...]
    nbytes: int
    params: int
    text_nbytes: int
    text_params: int
    run_nbytes: int  # text weights and caches at CONTEXT tokens: what running it takes, workspace aside
    applied: Recipe | None = None  # whose rules made `plans`; None: made by size and not allocated yet
    sized: Sized | None = (
        None  # of a variant made by size. While it is not allocated, the bytes are those of its budget
    )

    @property
    def bpw(self) -> float:
        """Bits per weight of everything stored."""
        return 8 * self.nbytes / self.params

    @property
    def text_bpw(self) -> float:
        """Bits per weight of the language model: what a label such as Q4 speaks of."""
        return 8 * self.text_nbytes / self.text_params


def quant_table(config: dict[str, Any]) -> ModuleType:
    """The family's table in `quant/`: CLASSES, AWQ_GROUPS, IMATRIX_NAMES."""
    return importlib.import_module(f"quant.{family_of(config)}")


def plan_variant(
    project: Project, id: str, checkpoint: Checkpoint, targets: Sequence[Target], found: Sources | None = None
) -> VariantPlan:
    """found: what is on disk for a variant made by size. Raises InputError where recipe or size do not fit the model."""
    table = quant_table(checkpoint.config)
    kept = select_targets(project, id, targets)
    size = sized(project, id, checkpoint, kept, table, found or Sources()) if project.size(id) else None
    bits = size.bits if size else project.variant(id).bits
    recipe = size.recipe if size else project.recipe(id)
    assert bits is not None
    try:
        plans = _resolve(project, id, kept, table, recipe, bits, size) if recipe else []
    except InputError:
        if not (size and size.source == "built"):
            raise
        # what was built is of another model: nothing to go by, and no mistake
        size, recipe, plans = replace(size, allocation=None, recipe=None, source=""), None, []
    names = names_of(checkpoint.config)
    caches = names.cache_nbytes(names.read_config(checkpoint.config), CONTEXT)
    text_nbytes = sum(p.nbytes for p in plans if p.target.part == "text")
    nbytes = sum(p.nbytes for p in plans)
    if size and not recipe:
        text_nbytes = min(size.budget, sum(t.nbytes for t in kept if t.part == "text"))
        nbytes = text_nbytes + size.other
    return VariantPlan(
        id=id,
        repo=project.repo(id),
        recipe=recipe.name if recipe else ALLOCATED,
        bits=bits,
        plans=tuple(plans),
        rows=tuple(class_rows(plans, [c.label for c in table.CLASSES])),
        nbytes=nbytes,
        params=sum(t.params for t in kept),
        text_nbytes=text_nbytes,
        text_params=sum(t.params for t in kept if t.part == "text"),
        run_nbytes=text_nbytes + caches,
        applied=recipe,
        sized=size,
    )


def _resolve(
    project: Project,
    id: str,
    kept: Sequence[Target],
    table: ModuleType,
    recipe: Recipe,
    bits: int,
    size: Sized | None,
) -> list[TensorPlan]:
    try:
        plans = resolve(
            recipe,
            bits,
            project.group_size(id),
            kept,
            table.CLASSES,
            scalable(table.AWQ_GROUPS),
            project.imatrix(id) is not None and recipe.awq_exponent != 0,
        )
    except RuleError as e:
        if size and size.source == "frozen":
            raise InputError(f"{project.frozen_path(id)}: does not fit this model ({e}); {AGAIN.format(id)}") from None
        raise InputError(f"{project.at(*project.rule_keys(id, e.rule))}: {e}") from None
    if size and size.allocation:
        taken = sum(p.nbytes for p in plans if p.target.part == "text")
        if taken != size.allocation.nbytes:  # of another model
            raise InputError(
                f"{project.at('variants', id, 'size')}: the allocation takes {taken} bytes of this model, not the "
                f"{size.allocation.nbytes} that it was made for; {AGAIN.format(id)}"
            )
    return plans


def select_targets(project: Project, id: str, targets: Sequence[Target]) -> list[Target]:
    """The tensors that a variant stores: MTP and vision by its choice."""
    drop = {part for part, choice in (("mtp", project.mtp(id)), ("vision", project.vision(id))) if choice == "drop"}
    return [t for t in targets if t.part not in drop]


def class_rows(plans: Sequence[TensorPlan], order: Sequence[str] = ()) -> list[ClassRow]:
    """Plans grouped by class and format, in the order of `order` (labels), what it does not name last."""
    groups: dict[tuple[str, QuantSpec | str, bool], list[TensorPlan]] = {}
    for p in plans:
        groups.setdefault((p.cls, p.spec or p.target.dtype.lower(), p.awq), []).append(p)
    rows = [
        ClassRow(
            cls,
            form if isinstance(form, str) else form.label(),
            awq,
            None if isinstance(form, str) else form.group_size,
            len(members),
            sum(p.target.params for p in members),
            sum(p.nbytes for p in members),
        )
        for (cls, form, awq), members in groups.items()
    ]
    rank = {label: i for i, label in enumerate(order)}
    return sorted(rows, key=lambda r: rank.get(r.cls, len(rank)))


def build_inputs(
    project: Project,
    plan: VariantPlan,
    base: BaseInput,
    imatrix: ImatrixInput | None,
    statistics: str | None,
    version: int,
) -> BuildInputs:
    """All that the weights of a variant depend on. An imatrix that scales no tensor and weighs no error is no
    input. statistics: key of what `publish calibrate` collects; it is one where the solver uses it."""
    recipe = plan.applied
    assert recipe is not None, "a variant that is not allocated has no inputs"
    scaled = any(p.awq for p in plan.plans)
    return BuildInputs(
        base=base,
        recipe=recipe.name,
        bits=plan.bits,
        group_size=project.group_size(plan.id),
        rules=rule_inputs(recipe, plan.bits),
        assignment=assignment(plan.plans),
        allocation=plan.sized.input() if plan.sized else None,
        awq_exponent=recipe.awq_exponent if scaled else None,
        imatrix=imatrix if scaled or project.solves_by_imatrix(plan.id) else None,
        mtp=project.mtp(plan.id),
        vision=project.vision(plan.id),
        solver=project.solver(plan.id),
        statistics=statistics if project.solves_by_statistics(plan.id) else None,
        quant_version=version,
    )


def rule_inputs(recipe: Recipe, base_bits: int) -> list[RuleInput]:
    return [
        RuleInput(
            match=r.match,
            layers=applied_layers(r),
            bits=rule_bits(r, base_bits) or "bf16",
            group_size=r.group_size,
            mode=r.mode,
            awq=r.awq,
        )
        for r in recipe.rules
    ]


def assignment(plans: Sequence[TensorPlan]) -> str:
    """Hash of what each tensor becomes: the part of a recipe that the bytes depend on."""
    return digest(
        sorted(
            [p.target.name, [p.spec.bits, p.spec.group_size, p.spec.mode] if p.spec else None, p.awq, p.target.dtype]
            for p in plans
        )
    )


def build_memory(plans: Sequence[VariantPlan]) -> int:
    """Bytes of memory that building these variants together takes at most, by the bound of `quant.convert`.

    INTERPRETER, bands in flight, and the scales and biases of the largest weight in each distinct format.
    """
    by_target: dict[str, dict[tuple[Any, ...], int]] = {}
    for plan in plans:
        for p in plan.plans:
            if p.spec is not None:
                codes = count(p.stored()[0][2]) * 4
                by_target.setdefault(p.target.name, {})[(p.spec, p.awq)] = p.nbytes - codes
    buffers = max((sum(formats.values()) for formats in by_target.values()), default=0)
    return INTERPRETER + BANDS + buffers


def disk_needed(plans: Sequence[VariantPlan]) -> int:
    """Bytes that building these variants writes before anything old is removed."""
    return sum(p.nbytes + OTHER_FILES for p in plans)
