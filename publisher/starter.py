"""The first variants.yaml of a model, and the JSON Schema that editors check it with."""

from __future__ import annotations

import json
import re
from pathlib import Path

from inference.checkpoint import read_json
from inference.errors import InputError

from .plan import quant_table
from .schema import Ladder

LADDER = (2, 3, 4, 5, 6, 8)
IMATRIX = "# Importance matrix: AWQ scaling for the rules that ask for it.\n"

PARTS = {
    "mtp": "mtp: drop      # the multi-token-prediction head: drop, keep, or split into mtp.safetensors\n",
    "vision": "vision: keep   # the vision tower, kept in bf16: keep or drop\n",
}

TEMPLATE = """\
# The ladder of {name}: `publish plan` shows what it comes to, {steps}`publish build --all` makes it,
# `publish push --all` releases it.
# Every key is described in docs/variants.md; `publish schema > variants.schema.json` lets an editor complete and check this file.

base:
{base}
{owner}
# Name of each repo on the Hub; {{base}} and {{id}} are filled in.
repo: "{{base}}-UD-{{id}}-mlx"

{recipe}
{imatrix}{parts}
{collection}variants:
{variants}"""

BUILT_IN = """\
# Built in: unsloth (attention outputs in bf16), unsloth_8bit_out, uniform, mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6,
# mxfp4, mxfp8, nvfp4; or one of your own under `recipes:`.
"""
RECIPE = f"{BUILT_IN}recipe: unsloth\n"
SIZES = f"""\
# A variant with a `size` gets its formats from the allocator, by what each costs on this very model: `publish calibrate`
# measures that once on this machine. A size is "5 GB", "fits 16 GB", "4.5 bpw", or as many bytes as a recipe takes.
# Instead, `bits: 4` in a variant follows a fixed recipe, which needs no calibration.
{BUILT_IN}# recipe: unsloth
"""


def starter(
    base: str, folder: Path, revision: str = "main", owner: str | None = None, imatrix: str | None = None
) -> str:
    """Text of a variants.yaml for `base`, a Hub id or a local folder. `folder` is where the file will lie.

    A ladder of sizes for the allocator; with an imatrix, which is all that a recipe asks for, one of a recipe.
    Raises InputError if the base is neither, or is of an architecture that is not supported.
    """
    path = Path(base).expanduser()
    parts = tuple(PARTS)  # a Hub id says nothing of its parts; both choices mean nothing where there is none
    if path.is_dir():
        parts = quant_table(read_json(path / "config.json")).PARTS
        name = path.resolve().name
        lines = f"  path: {json.dumps(_relative(path, folder))}"
    elif re.fullmatch(r"[A-Za-z0-9_.\-]+/[A-Za-z0-9_.\-]+", base) and not base.startswith("."):
        name = base.split("/")[1]
        lines = (
            f"  repo: {json.dumps(base)}\n"
            f"  revision: {json.dumps(revision)}   # resolved to a commit in variants.lock by the first build"
        )
    else:
        raise InputError(f"{base}: no such folder, and not a Hub id (owner/name)")
    return TEMPLATE.format(
        name=name,
        steps="" if imatrix else "`publish calibrate` measures what bits cost, ",
        base=lines,
        owner=f"\n# Hub user or organization that the repos belong to.\nowner: {json.dumps(owner)}\n"
        if owner
        else "\n# Hub user or organization that the repos belong to; `publish push` needs it.\n# owner: \n",
        recipe=RECIPE if imatrix else SIZES,
        imatrix=_imatrix(imatrix, folder),
        parts="".join(["\n", *chosen]) if (chosen := [PARTS[p] for p in PARTS if p in parts]) else "",
        collection=f"collection:\n  title: {json.dumps(f'{name} for MLX'[:60])}\n\n" if owner else "",
        variants="".join(
            f"  Q{bits}_K_XL: {{bits: {bits}}}\n" if imatrix else f"  Q{bits}_K_XL: {{size: as unsloth {bits}}}\n"
            for bits in LADDER
        ),
    )


def _imatrix(given: str | None, folder: Path) -> str:
    if given is None:
        return (
            "# An importance matrix in GGUF form switches AWQ scaling on, for the rules of a recipe that ask for it:\n"
            "# imatrix: ./imatrix.gguf\n"
        )
    path = Path(given).expanduser()
    if path.is_file():
        return f"{IMATRIX}imatrix:\n  path: {json.dumps(_relative(path, folder))}\n"
    found = re.fullmatch(r"([A-Za-z0-9_.\-]+/[A-Za-z0-9_.\-]+)/(.+)", given)
    if not found or given.startswith((".", "/", "~")):
        raise InputError(f"{given}: no such file, and not OWNER/REPO/FILE on the Hub")
    return f"{IMATRIX}imatrix:\n  repo: {json.dumps(found[1])}\n  file: {json.dumps(found[2])}\n"


def _relative(path: Path, folder: Path) -> str:
    """The path from the YAML file's folder where that is shorter to read, else absolute."""
    path, folder = path.resolve(), folder.resolve()
    return f"./{path.relative_to(folder)}" if path.is_relative_to(folder) else str(path)


def json_schema() -> str:
    """JSON Schema (draft 2020-12) of variants.yaml, from the same model that checks it."""
    schema = Ladder.model_json_schema(mode="validation")
    # a bare string is accepted where a source is: a Hub id or a path
    for model, key in ((schema, "base"), (schema, "imatrix"), (schema["$defs"]["VariantSpec"], "imatrix")):
        spec = model["properties"][key]
        kinds = spec.pop("anyOf", None) or [{"$ref": spec.pop("$ref")}]
        model["properties"][key] = {"anyOf": [{"type": "string"}, *kinds], **spec}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "variants.yaml"}
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
