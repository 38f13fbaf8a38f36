"""`size:` variants: from bytes, pins and measured costs to a recipe, and the choice frozen as data.

Where an allocation comes from, first what is there: the frozen file beside variants.yaml; the costs that `publish
calibrate` measured; what was built already, while those costs are away. `sized` decides and reads nothing; `sources` and
`freeze` touch the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from inference.checkpoint import Checkpoint
from inference.errors import InputError
from inference.families import names_of
from inference.layout import Target
from inference.strict import read_file
from quant.allocate import PINS, Allocated, Demand, allocate, demand
from quant.allocate import Costs as CostTable
from quant.recipe import Recipe, Rule, RuleError, resolve

from .costing import COSTS, current, solver_of
from .schema import Allocation, AllocationInput, Bench, Costs, Manifest
from .sizes import CONTEXT, Facts, Size, nominal_bits, text_budget, workspace_bound, workspace_least
from .store import digest, read_model, read_result, write_text
from .variants import Project, explain, parse_yaml, to_rule, to_spec
from .yaml_text import yaml_text

if TYPE_CHECKING:
    from .base import ResolvedBase

ALLOCATED = "allocated"  # what manifests and cards call the recipe of such a variant
ORIGIN = "formats chosen by this tool's allocator, by what each was measured to cost on this model"
UNKNOWN = "not allocated: run publish calibrate"
MAX_BYTES = 2_000_000  # of a frozen file
GB = 1e9


@dataclass(frozen=True)
class Sources:
    """What is on disk for a size. workspace: bytes that prefill was measured to take, if this model was benchmarked."""

    frozen: Allocation | None = None
    costs: CostTable | None = None
    built: Allocation | None = None
    workspace: int | None = None


@dataclass(frozen=True)
class Sized:
    """What a size comes to. budget and least: bytes of the language model; other: of vision and MTP as kept.

    allocation and recipe None: nothing was measured yet. source: frozen, costs or built.
    """

    size: Size
    bits: int  # N by which cards and ceilings go
    budget: int
    least: int
    other: int
    allocation: Allocation | None = None
    recipe: Recipe | None = None
    source: str = ""

    def input(self) -> AllocationInput | None:
        return AllocationInput(size=self.allocation.size, costs=self.allocation.costs) if self.allocation else None


# ------------------------------------------------------------------------------------------------ decide


def sized(
    project: Project, id: str, checkpoint: Checkpoint, targets: Sequence[Target], table: ModuleType, found: Sources
) -> Sized:
    """targets: those that the variant stores. table: the family's, in `quant/`.

    Raises InputError for a budget that nothing fits, for pins and floors that do not fit the model, and for a frozen
    allocation that was made for something else.
    """
    size = project.size(id)
    assert size is not None
    pins, floors = project.pins(id), project.floors()
    wanted = _demand(project, id, targets, table, None)
    params = sum(t.params for t in targets if t.part == "text")
    left = workspace(size, checkpoint.config, found)
    budget = text_budget(size, _facts(project, id, size, checkpoint, targets, table, wanted.other, left, params))
    _check(project, id, size, budget, wanted)
    out = Sized(size, nominal_bits(size, budget, params), budget, wanted.least, wanted.other)
    constraints = digest([[_rule_key(r) for r in (*pins, *PINS)], [[f.match, f.bits] for f in floors]])
    if found.frozen:
        _check_frozen(project, id, found.frozen, size, constraints)
        return _with(out, project, id, found.frozen, "frozen")
    if found.costs:
        wanted = _demand(project, id, targets, table, found.costs)
        if budget < wanted.least:  # the smallest formats were not measured
            _check(project, id, size, budget, wanted)
        chosen = allocate(wanted, budget, found.costs)
        made = _allocation(size, constraints, budget, left if size.kind == "memory" else None, chosen, found.costs)
        return _with(out, project, id, made, "costs")
    if found.built and (found.built.size, found.built.constraints) == (size.text, constraints):
        return _with(out, project, id, found.built, "built")
    return out


def _facts(
    project: Project,
    id: str,
    size: Size,
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    table: ModuleType,
    other: int,
    workspace: int,
    params: int,
) -> Facts:
    like = 0
    if size.kind == "as":
        text = [t for t in targets if t.part == "text"]
        try:
            # rules for vision and MTP find nothing here, and that is no mistake
            recipe = project.like(id)
            lenient = replace(recipe, rules=tuple(replace(r, optional=True) for r in recipe.rules))
            plans = resolve(lenient, size.bits, project.group_size(id), text, table.CLASSES)
        except RuleError as e:
            raise InputError(f"{project.at('variants', id, 'size')}: {e}") from None
        like = sum(p.nbytes for p in plans)
    names = names_of(checkpoint.config)
    caches = names.cache_nbytes(names.read_config(checkpoint.config), CONTEXT)
    return Facts(params, other, caches, workspace, like)


def workspace(size: Size, config: dict[str, Any], found: Sources) -> int:
    """Bytes to leave for prefill: measured if it was, else the bound from shapes; never less than what the engine asks for
    before it loads. What a variant was frozen or built for stays as long as it is enough, so that its own benchmark does
    not make it stale."""
    if size.kind != "memory":
        return 0
    enough = max(found.workspace or 0, workspace_least(config))
    known = (a.workspace_nbytes for a in (found.frozen, found.built) if a and a.size == size.text)
    own = next((nbytes for nbytes in known if nbytes is not None), None)
    if own is not None and own >= enough:
        return own
    return workspace_bound(config) if found.workspace is None else enough


def _demand(project: Project, id: str, targets: Sequence[Target], table: ModuleType, costs: CostTable | None) -> Demand:
    try:
        return demand(targets, table.CLASSES, costs, project.pins(id), project.floors(), project.group_size(id))
    except RuleError as e:
        raise InputError(f"{project.at(*project.rule_keys(id, e.rule))}: {e}") from None
    except InputError as e:
        raise InputError(f"{project.at('variants', id, 'size')}: {e}") from None


def _check(project: Project, id: str, size: Size, budget: int, wanted: Demand) -> None:
    if budget >= wanted.least:
        return
    where = f"{project.at('variants', id, 'size')}: found {size.text!r}, which leaves"
    left = f"{max(budget, 0) / GB:.3g} GB" if budget > 0 else "nothing"
    raise InputError(
        f"{where} {left} for the language model; the smallest possible takes {_up(wanted.least)} GB"
        + (f", and vision and MTP {_up(wanted.other)} GB" if wanted.other and size.kind == "file" else "")
    )


def _up(nbytes: int) -> str:
    """GB with four digits, rounded up: what is asked for must be enough."""
    text = f"{nbytes / GB:.4g}"
    return text if float(text) * GB >= nbytes else f"{float(text) * (1 + 1e-3):.4g}"


def _check_frozen(project: Project, id: str, frozen: Allocation, size: Size, constraints: str) -> None:
    path = project.frozen_path(id)
    again = f"run publish allocate {id} --freeze, or delete the file"
    if frozen.size != size.text:
        raise InputError(
            f"{_name(path)}: frozen for size {frozen.size!r}, {project.path.name} says {size.text!r}; {again}"
        )
    if frozen.constraints != constraints:
        raise InputError(f"{_name(path)}: frozen under other pins and floors; {again}")


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _allocation(
    size: Size, constraints: str, budget: int, workspace: int | None, chosen: Allocated, costs: CostTable
) -> Allocation:
    return Allocation(
        size=size.text,
        constraints=constraints,
        budget_nbytes=budget,
        nbytes=chosen.nbytes,
        workspace_nbytes=workspace,
        predicted_kld=chosen.predicted,
        costs=costs.digest,
        statistics=costs.statistics,
        solver=costs.solver,
        version=costs.version,
        rules=[to_spec(r) for r in chosen.rules],
    )


def _with(out: Sized, project: Project, id: str, allocation: Allocation, source: str) -> Sized:
    return replace(out, allocation=allocation, recipe=allocation_recipe(project, id, allocation), source=source)


def allocation_recipe(project: Project, id: str, allocation: Allocation) -> Recipe:
    """An allocation as a recipe: its rules, and of the variant's named recipe what is beside the rules (ceilings)."""
    rules = tuple(map(to_rule, allocation.rules))
    return replace(project.recipe(id), name=ALLOCATED, rules=rules, awq_exponent=0.0, origin=ORIGIN)


def _rule_key(rule: Rule) -> list[object]:
    return [rule.match, rule.bits, rule.group_size, rule.mode, list(rule.layers) if rule.layers else None]


# ------------------------------------------------------------------------------------------------ on disk


def sources(
    project: Project, id: str, base: ResolvedBase, manifest: Manifest | None, read: bool = False, frozen: bool = True
) -> Sources:
    """What there is for a variant made by size; nothing for one made by a recipe.

    read: hash the weights of a base whose files changed, if costs are to be told from those of another. frozen: look for a
    frozen file, too.
    """
    size = project.size(id)
    if size is None:
        return Sources()
    return Sources(
        read_frozen(project, id) if frozen else None,
        read_costs(project, base, read),
        manifest.allocation if manifest else None,
        measured_workspace(project, base) if size.kind == "memory" else None,
    )


def read_costs(project: Project, base: ResolvedBase, read: bool = False) -> CostTable | None:
    """The costs that were measured for this base and calibration, or None. Raises InputError if they do not parse."""
    if next(project.store.statistics.glob("*/costs.json"), None) is None:
        return None
    from .calibrate import find  # noqa: PLC0415 - tokenizers, only where there is something to find

    statistics = find(project, base, read)
    if statistics is None:
        return None
    read_model(statistics.folder / COSTS, Costs)  # raises if it does not parse
    found = current(statistics, solver_of(project))
    if found is None:
        return None
    own = digest(found.model_dump(mode="json"))
    return CostTable(found.modules, found.statistics, found.solver, found.version, own)


def measured_workspace(project: Project, base: ResolvedBase) -> int | None:
    """The most that a benchmark of this model took beside weights; None if none was run. Caches count as workspace here,
    which errs on the safe side: those at CONTEXT tokens come on top."""
    found = []
    for id in project.ladder.variants:
        manifest = read_result(project.store.manifest(id), Manifest)
        if manifest is None or manifest.inputs.base.name != base.name:
            continue
        bench = read_result(project.store.results(manifest.weights_hash) / "bench.json", Bench)
        if bench and bench.weights_hash == manifest.weights_hash and bench.variant.peak_gb is not None:
            found.append(int(bench.variant.peak_gb * GB) - manifest.text_nbytes)
    return max(found, default=None)


def read_frozen(project: Project, id: str) -> Allocation | None:
    """The frozen allocation of a variant, or None. Raises InputError (one line) if it does not parse."""
    path = project.frozen_path(id)
    if not path.exists():
        return None
    data = read_file(path, MAX_BYTES)
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        raise InputError(f"{_name(path)}: cannot be read ({e.__class__.__name__})") from None
    value, lines = parse_yaml(text, _name(path))
    try:
        return Allocation.model_validate(value)
    except ValidationError as e:
        raise InputError(explain(e, lines, _name(path), Allocation)) from None


def freeze(project: Project, id: str, allocation: Allocation) -> Path:
    """Write an allocation beside variants.yaml, to be committed: from now on it is the variant's, whatever is measured."""
    path = project.frozen_path(id)
    write_text(path, frozen_text(id, allocation))
    return path


def frozen_text(id: str, allocation: Allocation) -> str:
    """A frozen allocation, as YAML."""
    value = allocation.model_dump(mode="json", exclude_none=True)
    value["rules"] = [r.model_dump(mode="json", exclude_defaults=True) for r in allocation.rules]
    body = yaml_text(value, 110, flow=None)
    return f"# Formats of {id}, as `publish allocate {id} --freeze` found them. Builds use them as they are.\n" + body
