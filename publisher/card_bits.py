"""The bit table of a card, read back from the packed files: safetensors headers and config.json, not the recipe.

What the files cannot say comes from elsewhere and is checked against them: which matrices were scaled (AWQ) from the
rules in manifest.json, the reasons from the recipe in variants.yaml, as far as it still gives the same formats.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inference.checkpoint import (
    Checkpoint,
    QuantSpec,
    TensorInfo,
    count,
    read_checkpoint,
    read_header,
    read_quantization,
)
from inference.errors import CheckpointError, InputError
from inference.layout import Part, Target
from quant.recipe import LAYER_SETS, Recipe, Rule, TensorPlan, layer_of, resolve
from quant.shards import MTP_FILE
from quant.tables import scalable

from .plan import quant_table
from .schema import Manifest, RuleInput

CHANGED = "the recipe in variants.yaml has changed since this build"
NEVER = "not quantized"


@dataclass(frozen=True)
class Packed:
    """One tensor as it is stored. target: its unpacked form; spec None: not quantized; nbytes: scales included."""

    target: Target
    spec: QuantSpec | None
    nbytes: int

    @property
    def format(self) -> str:
        return self.spec.label() if self.spec else self.target.dtype.lower()


@dataclass(frozen=True)
class BitRow:
    """One line of the table. layers: empty where the line holds every layer of its tensors."""

    cls: str  # its tensors' class
    label: str
    format: str  # 4-bit, mxfp4, bf16
    awq: bool
    mode: str | None
    group_size: int | None
    layers: str
    tensors: int
    params: int
    nbytes: int
    why: str
    passthrough: bool
    probe: str = ""  # what its class was measured to cost as a whole, on the first row of the class

    @property
    def bits(self) -> str:
        return f"{self.format} + AWQ" if self.awq else self.format

    @property
    def bpw(self) -> float:
        return 8 * self.nbytes / self.params


def read_packed(folder: Path, pruned: Checkpoint | None = None) -> tuple[dict[str, Any], list[Packed]]:
    """config.json and every tensor of a variant's folder. Raises CheckpointError where headers and config disagree.

    pruned: what stands for the headers where the weights are not here any more.
    """
    checkpoint = pruned or read_checkpoint(folder)
    tensors = dict(checkpoint.tensors)
    side = folder / MTP_FILE
    if side.is_file() and all(t.file != side for t in tensors.values()):
        tensors.update({t.name: t for t in read_header(side)[0]})
    default, modules = read_quantization(checkpoint.config)
    packed = []
    for name, info in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind in ("scales", "biases") and f"{stem}.weight" in tensors and f"{stem}.scales" in tensors:
            continue
        part = _part(name)
        scales = tensors.get(f"{stem}.scales") if kind == "weight" else None
        if scales is None:
            packed.append(Packed(Target(name, info.shape, info.dtype, info, part=part), None, info.nbytes))
            continue
        spec = modules.get(stem, default)
        packed.append(_unpack(name, info, scales, tensors.get(f"{stem}.biases"), spec, part))
    return checkpoint.config, packed


def _part(name: str) -> Part:
    return "vision" if name.startswith("vision_tower.") else "mtp" if name.startswith("mtp.") else "text"


def _unpack(
    name: str, codes: TensorInfo, scales: TensorInfo, biases: TensorInfo | None, spec: QuantSpec | None, part: Part
) -> Packed:
    if spec is None:
        raise CheckpointError(f"{codes.file.name}: {name} has scales, but config.json gives it no format")
    shape = (*codes.shape[:-1], codes.shape[-1] * 32 // spec.bits)
    dtype = scales.dtype if spec.mode == "affine" else "BF16"
    found = [(t.name, t.dtype, t.shape) for t in (codes, scales, biases) if t is not None]
    if found != spec.parts(name, shape, dtype):
        raise CheckpointError(f"{codes.file.name}: {name}: shapes are not those of {spec.label()}, as config.json says")

    nbytes = codes.nbytes + scales.nbytes + (biases.nbytes if biases else 0)
    return Packed(Target(name, shape, dtype, codes, part=part), spec, nbytes)


def bit_rows(
    config: dict[str, Any], packed: Sequence[Packed], manifest: Manifest, recipe: Recipe, bits: int, group_size: int
) -> list[BitRow]:
    """The table, in the order of the family's classes, then vision and MTP.

    recipe, bits, group_size: today's, for the reasons. Raises InputError where the files are not what the manifest's
    rules give.
    """
    table = quant_table(config)
    targets, inputs = [p.target for p in packed], manifest.inputs
    applied = Recipe(inputs.recipe, tuple(map(_rule, inputs.rules)))
    scaled = inputs.imatrix is not None and bool(inputs.awq_exponent)
    plans = resolve(applied, inputs.bits, inputs.group_size, targets, table.CLASSES, scalable(table.AWQ_GROUPS), scaled)
    for plan, p in zip(plans, packed, strict=True):
        if plan.spec != p.spec:
            want = plan.spec.label() if plan.spec else p.target.dtype.lower()
            raise InputError(f"{p.target.name}: is stored in {p.format}, but the rules in manifest.json give {want}")
    whys = _reasons(plans, recipe, bits, group_size, targets, table.CLASSES)
    order = {cls.label: i for i, cls in enumerate(table.CLASSES)}
    members: dict[str, list[tuple[Packed, TensorPlan, str]]] = {}
    for row in zip(packed, plans, whys, strict=True):
        members.setdefault(row[1].cls, []).append(row)
    dense = {cls.label for cls in table.CLASSES if cls.dense}
    out: list[BitRow] = []
    for cls in sorted(members, key=lambda c: (order.get(c, len(order)), c.lower(), c)):
        out += _class_rows(cls, members[cls], cls in dense)
    # what no rule names goes last, as one block
    return [r for r in out if not r.passthrough] + [r for r in out if r.passthrough]


def _rule(r: RuleInput) -> Rule:
    layers: str | tuple[int, ...] | None = r.layers
    if r.layers is not None and r.layers not in LAYER_SETS:
        layers = tuple(int(i) for i in r.layers.split(",") if i)
    return Rule(r.match, r.bits, r.group_size, r.mode, r.awq, layers=layers, optional=True)


def _reasons(
    plans: Sequence[TensorPlan], recipe: Recipe, bits: int, group_size: int, targets: Sequence[Target], classes: Any
) -> list[str]:
    """Why each tensor has its format; a reason holds only where today's recipe decides the tensor by the same rule."""
    lenient = replace(recipe, rules=tuple(replace(r, optional=True) for r in recipe.rules))
    try:
        today = resolve(lenient, bits, group_size, targets, classes)
    except InputError:
        return [CHANGED if p.rule else "" for p in plans]
    return [
        CHANGED if (t.rule, t.spec) != (p.rule, p.spec) else t.why for p, t in zip(plans, today, strict=True)
    ]  # fmt: skip


def _class_rows(cls: str, members: Sequence[tuple[Packed, TensorPlan, str]], dense: bool) -> list[BitRow]:
    """One line a format. Where formats differ within a class, a line names its projections and layers."""
    leaves: dict[str, set[int | None]] = {}
    split: dict[tuple[Any, ...], dict[str, list[tuple[Packed, TensorPlan, str]]]] = {}
    for m in members:
        leaf = m[0].target.module.rpartition(".")[2] if m[0].target.part == "text" else cls
        leaves.setdefault(leaf, set()).add(layer_of(m[0].target.name))
        split.setdefault((m[0].format, m[0].spec, m[1].awq), {}).setdefault(leaf, []).append(m)
    rows: list[BitRow] = []
    for (fmt, spec, awq), by_leaf in split.items():
        merged: dict[str, list[str]] = {}  # layers → leaves
        for leaf, found in by_leaf.items():
            mine = {layer_of(p.target.name) for p, _, _ in found}
            whole = mine == leaves[leaf] or found[0][0].target.part != "text"
            text = "" if whole or None in mine else layer_text(i for i in mine if i is not None)
            merged.setdefault(text, []).append(leaf)
        for layers, names in merged.items():
            own = [m for n in names for m in by_leaf[n]]
            named = all(p.target.part == "text" for p, _, _ in own) and set(names) != leaves.keys()
            rows.append(
                BitRow(
                    cls=cls,
                    label=_prefix(cls) + ", ".join(sorted(names)) if named else cls,
                    format=fmt,
                    awq=awq,
                    mode=spec.mode if spec else None,
                    group_size=spec.group_size if spec else None,
                    layers=layers,
                    tensors=len(own),
                    params=sum(p.target.params for p, _, _ in own),
                    nbytes=sum(p.nbytes for p, _, _ in own),
                    why="; ".join(dict.fromkeys(w for _, _, w in own if w)) or NEVER,
                    passthrough=dense or not any(t.rule for _, t, _ in own),
                )
            )
    return sorted(rows, key=lambda r: (r.label != cls, r.label, -r.nbytes, r.format, r.layers))


def _prefix(cls: str) -> str:
    """`self_attn.` of `self_attn.q/k/v_proj`, `experts ` of `experts gate_proj, up_proj`; else nothing."""
    head, dot, _ = cls.partition(".")
    if dot:
        return head + dot
    head, space, _ = cls.partition(" ")
    return head + space if space and not head.endswith(",") and head != cls else ""


def layer_text(layers: Iterable[int]) -> str:
    """`layers 0–3, 7`: sorted, runs of three or more as a range."""
    numbers = sorted(set(layers))
    runs: list[list[int]] = []
    for i in numbers:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    parts = [f"{r[0]}–{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"


def check_manifest(folder: Path, manifest: Manifest, packed: Sequence[Packed], gone: Container[str] = ()) -> None:
    """The folder holds the tensors that its manifest lists (names, types, shapes and sizes; hashing is `verify`'s)."""
    for entry in manifest.files:
        path = folder / entry.path
        if entry.path in gone:
            continue
        if entry.path.endswith(".safetensors") and (not path.is_file() or path.stat().st_size != entry.size):
            raise InputError(f"{folder.name}/{entry.path}: is missing or not as long as manifest.json says")
    stored = sum(p.nbytes for p in packed)
    if (manifest.nbytes, manifest.params) != (stored, sum(count(p.target.shape) for p in packed)):
        raise InputError(
            f"{folder.name}: the files hold {stored} bytes of tensors, manifest.json says {manifest.nbytes}"
        )
