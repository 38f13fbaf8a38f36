"""What each repo carries to be built again, to the same bytes, by somebody who has the repo alone: the folder provenance/.

    variants.yaml                   a ladder of this one variant: rules with literal bits, settings, no path of a machine
    variants.allocations/ID.yaml    its frozen allocation, where it was made by size
    lock.json                       what these were applied to: base, imatrix and texts by hash; tool and packages
    results/*.json                  what is on record for these weights

All follows from the manifest, from what is on record and from variants.lock; today's variants.yaml only adds what no byte
depends on (reasons). So it is written where the card is, and is stale where it would be written otherwise now. A local
file is named by its name alone, as if it lay beside: `rebuild` asks where it is.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quant.recipe import Recipe, Rule, rule_bits

from .allocation import frozen_text
from .base import imatrix_name
from .plan import rule_inputs
from .schema import (
    Bench,
    BuildInputs,
    BuildRecord,
    CalibrationSpec,
    ImatrixInput,
    LockedFile,
    Manifest,
    Provenance,
    ProvenanceBase,
    ProvenanceImatrix,
    Quality,
    RuleInput,
    RuleSpec,
    Smoke,
)
from .store import discard_leftovers, model_text, read_result, write_bytes
from .variants import Project, to_spec
from .verify import PROVENANCE
from .yaml_text import yaml_text

FOLDER = "provenance"
LADDER, LOCK = f"{FOLDER}/variants.yaml", f"{FOLDER}/lock.json"
RESULTS = {"build": BuildRecord, "smoke": Smoke, "bench": Bench, "quality": Quality}
# these read the source, compute and choose the codes; MLX has its backends as packages of their own
PACKAGES = ("mlx", "mlx-cpu", "mlx-metal", "mlx-cuda-13", "numpy", "safetensors", "gguf", "tokenizers")
HEAD = """\
# How {id} of this repo was made, resolved: every rule with its bits, every revision a commit. lock.json beside this file
# says what it was applied to. `publish verify --rebuild FOLDER` builds the variant again from these two and compares.
"""


def expected(project: Project, manifest: Manifest) -> dict[str, bytes]:
    """Path in the variant's folder → content, of every file of the provenance as it would be now."""
    id = manifest.id
    files = {LADDER: ladder_text(project, manifest).encode(), LOCK: model_text(lock(project, manifest)).encode()}
    if manifest.allocation:
        files[frozen_name(id)] = frozen_text(id, manifest.allocation).encode()
    for name, kind in RESULTS.items():
        path = project.store.results(manifest.weights_hash) / f"{name}.json"
        found = read_result(path, kind)
        if found is not None and found.weights_hash == manifest.weights_hash:
            files[f"{FOLDER}/results/{name}.json"] = path.read_bytes()
    return files


def frozen_name(id: str) -> str:
    """Path in the repo of the allocation that a variant made by size was built with."""
    return f"{FOLDER}/variants.allocations/{id}.yaml"


def versions() -> dict[str, str]:
    """Of Python and of the packages that have a part in a build's bytes, here and now."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def faults(folder: Path, files: Mapping[str, bytes]) -> list[str]:
    """What of the provenance in a variant's folder is not what it would be now. files: as `expected`."""
    out = []
    for path, data in files.items():
        try:
            if (folder / path).is_symlink() or (folder / path).read_bytes() != data:
                out.append(f"{path} is not what it would be now")
        except OSError:
            out.append(f"{path} is missing")
    return out + [f"{path} is of other results" for path in _left(folder, files)]


def write(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Bring the provenance in a variant's folder up to date; returns whether anything changed."""
    changed = False
    for path, data in files.items():
        target = folder / path
        discard_leftovers(target)
        if target.is_symlink() or not target.is_file() or target.read_bytes() != data:
            write_bytes(target, data)
            changed = True
    for path in list(_left(folder, files)):
        (folder / path).unlink()
        changed = True
    return changed


def _left(folder: Path, files: Mapping[str, bytes]) -> Iterator[str]:
    """Files of an earlier provenance that there would be none of now."""
    found = (p.relative_to(folder).as_posix() for p in sorted((folder / FOLDER).rglob("*")) if not p.is_dir())
    return (path for path in found if PROVENANCE.fullmatch(path) and path not in files)


# ------------------------------------------------------------------------------------------------ the lock


def lock(project: Project, manifest: Manifest) -> Provenance:
    """What the weights were made of, and by what."""
    inputs = manifest.inputs
    record = read_result(project.store.results(manifest.weights_hash) / "build.json", BuildRecord)
    base = project.ladder.base
    return Provenance(
        id=manifest.id,
        weights_hash=manifest.weights_hash,
        tool=manifest.tool,
        base=ProvenanceBase(
            name=inputs.base.name,
            repo=inputs.base.name if inputs.base.commit or base.repo == inputs.base.name else None,
            commit=inputs.base.commit,
            source_hash=inputs.base.source_hash,
            files_hash=inputs.base.files_hash,
        ),
        imatrix=_imatrix(project, manifest.id, inputs.imatrix) if inputs.imatrix else None,
        solver=inputs.solver,
        quant_version=inputs.quant_version,
        statistics=inputs.statistics,
        calibration=manifest.calibration,
        versions=record.versions if record and record.weights_hash == manifest.weights_hash else {},
    )


def _imatrix(project: Project, id: str, used: ImatrixInput) -> ProvenanceImatrix:
    found = _locked(project, id, used)
    where = {"repo": found.repo, "file": found.file, "commit": found.commit} if found else {}
    return ProvenanceImatrix(name=used.name, sha256=used.sha256, **where)


def _locked(project: Project, id: str, used: ImatrixInput) -> LockedFile | None:
    """The file of the Hub that an imatrix came from; None for one that was a local file."""
    source = project.imatrix(id)
    if source is not None and source.path and imatrix_name(source) == used.name:
        return None
    return next((f for f in project.lock().imatrix if f.sha256 == used.sha256), None)


# ------------------------------------------------------------------------------------------------ the ladder


def ladder_text(project: Project, manifest: Manifest) -> str:
    """variants.yaml of this variant alone."""
    body = yaml_text(_ladder(project, manifest), 110, flow=None)
    return HEAD.format(id=manifest.id) + body


def _ladder(project: Project, manifest: Manifest) -> dict[str, Any]:
    id, inputs = manifest.id, manifest.inputs
    out: dict[str, Any] = {"base": _base(project, inputs), "group_size": inputs.group_size, "solver": inputs.solver}
    if inputs.imatrix:
        found = _locked(project, id, inputs.imatrix)
        out["imatrix"] = (
            {"repo": found.repo, "file": found.file, "revision": found.commit}
            if found
            else {"path": _beside(inputs.imatrix.name)}
        )
    out |= {"mtp": inputs.mtp, "vision": inputs.vision}
    if inputs.statistics:
        out["calibration"] = _calibration(project, manifest)
    if manifest.allocation is None:
        recipe = _resolved(project, id, inputs)
        own = {"origin": recipe.origin} if recipe.origin else {}
        rules = [_rule(rule) for rule in recipe.rules]
        out["recipe"] = inputs.recipe
        out["recipes"] = {inputs.recipe: {**own, "awq_exponent": recipe.awq_exponent, "rules": rules}}
        out["variants"] = {id: {"bits": inputs.bits}}
        return out
    size = manifest.allocation.size
    like = project.size(id)
    if like and like.text == size and like.recipe in project.ladder.recipes:
        rules = [_rule(replace(r, bits=rule_bits(r, like.bits) or "bf16")) for r in project.like(id).rules]
        out["recipes"] = {like.recipe: {"rules": rules}}
    pins, floors = [_rule(r) for r in project.pins(id)], [f.model_dump(exclude_defaults=True) for f in _floors(project)]
    out["allocation"] = {"pins": pins, "floors": floors}
    out["variants"] = {id: {"size": size}}
    return out


def _base(project: Project, inputs: BuildInputs) -> dict[str, Any]:
    base = inputs.base
    if base.commit:
        return {"repo": base.name, "revision": base.commit}
    path = _beside(base.name)
    return {"repo": base.name, "path": path} if project.ladder.base.repo == base.name else {"path": path}


def _beside(name: str) -> str:
    """A local file or folder by its name alone."""
    return f"./{name.rpartition('/')[2]}"


def _calibration(project: Project, manifest: Manifest) -> dict[str, Any]:
    """The settings of the calibration; texts of the user's own by their name."""
    spec: CalibrationSpec = manifest.calibration.settings if manifest.calibration else project.ladder.calibration
    names = {k: _beside(v) for k in ("text", "chat") if isinstance(v := getattr(spec, k), str)}
    return spec.model_copy(update=names).model_dump(mode="json", exclude_defaults=True)


def _floors(project: Project) -> list[Any]:
    return list(project.ladder.allocation.floors)


def _resolved(project: Project, id: str, inputs: BuildInputs) -> Recipe:
    """The recipe as it was applied, bits literal: with today's reasons where today's rules are still these."""
    exponent = 0.0 if inputs.awq_exponent is None else inputs.awq_exponent  # none: nothing was scaled
    today = project.recipe(id)
    if not project.size(id) and rule_inputs(today, inputs.bits) == inputs.rules:
        rules = tuple(replace(r, bits=rule_bits(r, inputs.bits) or "bf16") for r in today.rules)
        return replace(today, name=inputs.recipe, rules=rules, awq_exponent=exponent)
    return Recipe(inputs.recipe, tuple(map(_applied, inputs.rules)), exponent)


def _applied(rule: RuleInput) -> Rule:
    layers: str | tuple[int, ...] | None = rule.layers
    if rule.layers and rule.layers[0].isdigit():
        layers = tuple(int(i) for i in rule.layers.split(","))
    # whether it had to match something was seen when it was applied
    return Rule(rule.match, rule.bits, rule.group_size, rule.mode, rule.awq, layers=layers, optional=True)


def _rule(rule: Rule) -> dict[str, Any]:
    spec: RuleSpec = to_spec(rule)
    return spec.model_dump(mode="json", exclude_defaults=True)
