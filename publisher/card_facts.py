"""What cards are made of, gathered from disk once for the whole ladder: `gather` → `Facts`.

A figure enters only with its proof: a result counts if it lies in, and names, the hash of the weights that are in the
variant's folder now. What is missing is kept as the reason why, so that a card can say it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from inference.checkpoint import read_checkpoint
from inference.errors import CheckpointError, InputError
from inference.families import names_of
from inference.strict import parse_json, read_file
from quant.builtin import BUILTIN
from quant.recipe import Recipe, matches

from .allocation import allocation_recipe
from .card_bits import BitRow, Packed, bit_rows, check_manifest, read_packed
from .card_history import releases
from .card_metadata import FRONT_BYTES, HEADER, LICENSE_ID
from .card_notes import Notes, read_notes
from .card_quality import Entry, Standings, measured_entries, standings
from .hub_types import HUGGING_FACE
from .plan import quant_table, rule_inputs
from .prune import described, pruned
from .schema import Bench, BuildInputs, BuildRecord, CardSpec, FileEntry, Manifest, Release, Smoke
from .sizes import CONTEXT, workspace_bound
from .store import read_model, read_result
from .survey import quality_state, read_quality
from .variants import Project
from .yaml_text import yaml_text

LANGUAGE = re.compile(r"[A-Za-z][A-Za-z\-]{1,19}")
GGUF_LABEL = re.compile(r"I?Q[1-8]_(K(_(S|M|L|XL))?|[01]|XXS|XS|NL|S|M)|MXFP4(_MOE)?")
MAX_SIDE_BYTES = 50 << 20  # of a README, a tokenizer_config.json; the largest published have about 1 MB
SAMPLING = ("temperature", "top_p", "top_k", "min_p")  # of generation_config.json
DAMAGED = "this variant's folder is damaged"
NO_EVAL = "eval was not run"


@dataclass(frozen=True)
class License:
    """id as the Hub knows it; inherited: from the base's own card, else given in variants.yaml."""

    id: str
    name: str | None
    link: str | None
    inherited: bool


@dataclass(frozen=True)
class Original:
    """The base's files, where they were at hand. size: of the files; nbytes: of the tensors in them."""

    size: int
    nbytes: int
    params: int
    shards: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Base:
    name: str
    repo: str | None
    license: License | None
    language: tuple[str, ...]
    original: Original | None

    @property
    def short(self) -> str:
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class Contents:
    """What the packed files of a built variant hold."""

    manifest: Manifest
    rows: tuple[BitRow, ...]
    weights: tuple[FileEntry, ...]  # the safetensors files
    license_file: str | None
    model_type: str
    tags: tuple[str, ...]  # of the family, as its table in `quant/` has them
    credit: tuple[str, str, str]  # name, link and deed of who made the family
    question: str  # of the usage snippets
    parts: tuple[str, ...]  # of the family: text, vision, mtp
    context: int | None  # tokens
    nbytes: int
    params: int
    text_nbytes: int
    text_params: int
    vision: bool
    mtp: bool
    caches: int  # bytes at sizes.CONTEXT tokens
    workspace: int  # bytes of prefill at most, from shapes
    modules: tuple[str, ...] = field(default=(), repr=False)  # of all stored tensors
    sampling: dict[str, float] = field(default_factory=dict)
    thinking: bool = False  # its chat template knows enable_thinking

    @property
    def size(self) -> int:
        """Bytes of the weight files, headers included."""
        return sum(f.size for f in self.weights)

    @property
    def bpw(self) -> float:
        return 8 * self.nbytes / self.params

    @property
    def text_bpw(self) -> float:
        return 8 * self.text_nbytes / self.text_params


@dataclass(frozen=True)
class Variant:
    """One rung. contents None: `missing` says why. smoke, bench None: `no_smoke`, `no_bench` say why.

    error: what is wrong with a folder that holds a damaged variant, in one line; such a variant has no card, and
    `render` raises it. Its siblings' cards say that it is damaged.
    """

    id: str
    repo: str
    bits: int
    gguf: str | None  # label of the GGUF file of the same name
    contents: Contents | None
    missing: str
    error: str | None
    build: BuildRecord | None
    smoke: Smoke | None
    no_smoke: str
    bench: Bench | None
    no_bench: str
    no_quality: str  # why there is no current quality; empty where there is
    strategy: str  # the built-in recipe it goes back to, or its own name
    pure: bool  # built by the built-in recipe's rules and no others
    origin: str
    origin_known: bool  # the recipe in variants.yaml is still the one that was built
    fragment: str  # variants.yaml that gives these weights again
    notes: Notes | None  # of the README.md that is there
    releases: tuple[Release, ...]  # oldest first, these weights last; empty where there are none

    @property
    def owned(self) -> bool:
        """The repo has an owner, so that it has an address on the Hub."""
        return "/" in self.repo

    @property
    def url(self) -> str | None:
        """Where a card links it to; None while it has no owner, or is not built."""
        return f"{HUGGING_FACE}/{self.repo}" if self.owned and self.contents else None

    @property
    def name(self) -> str:
        return self.repo.rpartition("/")[2]


@dataclass(frozen=True)
class Facts:
    """Everything that the cards of a ladder say."""

    base: Base
    quantized_by: str | None
    card: CardSpec
    variants: tuple[Variant, ...]
    standings: Standings  # what was measured of the variants' quality, and of foreign models'

    def variant(self, id: str) -> Variant:
        return next(v for v in self.variants if v.id == id)

    @property
    def errors(self) -> dict[str, str]:
        """What is wrong with each damaged variant, by id: these have no card."""
        return {v.id: v.error for v in self.variants if v.error is not None}


def gather(project: Project, base_folder: Path | None) -> Facts:
    """Read what there is. base_folder: the original (a folder or a snapshot), or None if it is not at hand.

    Without it the base's licence, language and size are unknown; the licence then comes from `card.license`. A variant
    whose folder is damaged is kept with its `error`, so that its siblings' cards can still be made. Raises InputError for
    a `card.license` that contradicts the base's own card.
    """
    ladder = project.ladder
    variants, entries = zip(*(_variant(project, id) for id in ladder.variants), strict=True)
    return Facts(
        base=_base(project, base_folder),
        quantized_by=ladder.quantized_by or ladder.owner,
        card=ladder.card,
        variants=variants,
        standings=standings([*entries, *measured_entries(project)]),
    )


# ---------------------------------------------------------------------------------------------- the base


def _base(project: Project, folder: Path | None) -> Base:
    front = front_matter(folder / "README.md") if folder else {}
    own, given = _license(front, project.ladder.base.repo), project.ladder.card.license
    if given is not None and not LICENSE_ID.fullmatch(given):
        raise InputError(f"{project.path.name}: card.license: found {given!r}, expected an id such as apache-2.0")
    if own and given and own.id != given:
        raise InputError(f"{project.path.name}: card.license: found {given!r}, but the base's own card says {own.id!r}")
    language = front.get("language", [])
    language = [language] if isinstance(language, str) else language if isinstance(language, list) else []
    return Base(
        name=project.base_name,
        repo=project.ladder.base.repo,
        license=own or (License(given, None, None, False) if given else None),
        language=tuple(x for x in language if isinstance(x, str) and LANGUAGE.fullmatch(x)),
        original=_original(folder) if folder else None,
    )


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML header of a card, every scalar as text (`language: no` is Norwegian); empty if there is none."""
    try:
        found = HEADER.match(read_file(path, MAX_SIDE_BYTES).decode("utf-8-sig"))
        small = found is not None and len(found[2]) <= FRONT_BYTES
        value = yaml.load(found[2], Loader=yaml.BaseLoader) if found and small else None
    except (CheckpointError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _license(front: dict[str, Any], repo: str | None) -> License | None:
    """license, license_name and license_link; nothing else of the base's card is taken over but its languages."""
    id, name, link = (front.get(k) for k in ("license", "license_name", "license_link"))
    if isinstance(id, list) and len(id) == 1:
        id = id[0]
    if not isinstance(id, str) or not LICENSE_ID.fullmatch(id):
        return None
    name = " ".join(name.split()) if isinstance(name, str) and name.strip() else None
    if not isinstance(link, str) or not re.fullmatch(r"https://\S+|LICENSE(\.\w+)?", link):
        link = None
    if link and not link.startswith("https://") and repo:
        link = f"{HUGGING_FACE}/{repo}/blob/main/{link}"
    return License(id, name, link, True)


def _original(folder: Path) -> Original | None:
    try:
        tensors = read_checkpoint(folder).tensors.values()
    except CheckpointError:
        return None
    files = {t.file for t in tensors}
    return Original(
        size=sum(f.stat().st_size for f in files),
        nbytes=sum(t.nbytes for t in tensors),
        params=sum(math.prod(t.shape) for t in tensors),
        shards=len(files),
        dtypes=tuple(sorted({t.dtype for t in tensors})),
    )


# ---------------------------------------------------------------------------------------------- the variants


def _variant(project: Project, id: str) -> tuple[Variant, Entry]:
    spec, recipe = project.variant(id), project.recipe(id)
    contents, missing, error = None, "not built", None
    try:
        contents = _contents(project, id)
    except InputError as e:
        missing, error = DAMAGED, str(e)
    except OSError as e:
        missing, error = DAMAGED, f"{id}: cannot be read ({e.strerror or e}); run `publish build {id}`"
    store = project.store
    build = smoke = bench = None
    no_smoke = no_bench = missing
    if contents:
        weights_hash = contents.manifest.weights_hash
        folder = store.results(weights_hash)
        build, _ = _result(folder / "build.json", BuildRecord, weights_hash)
        smoke, no_smoke = _result(folder / "smoke.json", Smoke, weights_hash)
        bench, no_bench = _result(folder / "bench.json", Bench, weights_hash)
    inputs = contents.manifest.inputs if contents else None
    if contents:
        recipe = _applied(project, id, contents.manifest)
    bits = spec.bits or (inputs.bits if inputs else _nominal(project, id))
    known = inputs is None or (inputs.recipe == recipe.name and inputs.rules == rule_inputs(recipe, bits))
    strategy = _strategy(project, inputs.recipe if inputs else recipe.name)
    repo = project.repo(id)
    gguf = id if GGUF_LABEL.fullmatch(id) else None
    quality, no_quality = None, missing
    if contents:
        quality = read_quality(project, contents.manifest.weights_hash)
        no_quality = "; ".join(quality_state(project, quality, contents.manifest.inputs.base.source_hash))
    entry = Entry(
        name=id,
        recipe=None,
        nbytes=contents.nbytes if contents else None,
        text_nbytes=contents.text_nbytes if contents else None,
        text_params=contents.text_params if contents else None,
        sound=smoke is None or smoke.passed,
        quality=None if no_quality else quality,
        why=NO_EVAL if contents and quality is None else no_quality,
    )
    variant = Variant(
        id=id,
        repo=repo,
        bits=inputs.bits if inputs else bits,
        gguf=f"UD-{gguf}" if gguf and f"UD-{id}" in repo else gguf,
        contents=contents,
        missing=missing,
        error=error,
        build=build,
        smoke=smoke,
        no_smoke=no_smoke,
        bench=bench,
        no_bench=no_bench,
        strategy=strategy,
        pure=bool(inputs) and strategy in BUILTIN and inputs.rules == rule_inputs(BUILTIN[strategy], inputs.bits),
        origin=recipe.origin,
        origin_known=known,
        no_quality=entry.why,
        fragment=_fragment(project, id, inputs, contents) if inputs and contents else "",
        notes=read_notes(store.variant(id) / "README.md"),
        releases=releases(project, id, contents.manifest) if contents else (),
    )
    return variant, entry


def _contents(project: Project, id: str) -> Contents | None:
    folder = project.store.variant(id)
    manifest = read_model(project.store.manifest(id), Manifest)
    if manifest is None:
        return None
    if manifest.id != id:
        raise InputError(f"{id}/manifest.json: is of variant {manifest.id}; delete the folder to build it again")
    gone = pruned(project, manifest)
    config, packed = read_packed(folder, described(folder, manifest) if gone else None)
    check_manifest(folder, manifest, packed, gone.files if gone else ())
    bits = project.variant(id).bits or manifest.inputs.bits
    rows = bit_rows(config, packed, manifest, _applied(project, id, manifest), bits, project.group_size(id))
    text = [p for p in packed if p.target.part == "text"]
    names = [f.path for f in manifest.files]
    family, hyper = quant_table(config), names_of(config).read_config(config)
    return Contents(
        manifest=manifest,
        rows=tuple(rows),
        weights=tuple(sorted((f for f in manifest.files if f.path.endswith(".safetensors")), key=lambda f: f.path)),
        license_file=next((n for n in sorted(names) if n.upper().startswith("LICENSE")), None),
        model_type=str(config["model_type"]),
        tags=tuple(family.CARD_TAGS),
        credit=family.CARD_CREDIT,
        question=family.CARD_QUESTION,
        parts=tuple(family.PARTS),
        context=_context(config),
        nbytes=_total(packed),
        params=sum(p.target.params for p in packed),
        text_nbytes=_total(text),
        text_params=sum(p.target.params for p in text),
        vision=any(p.target.part == "vision" for p in packed),
        mtp=any(p.target.part == "mtp" for p in packed),
        caches=names_of(config).cache_nbytes(hyper, CONTEXT),
        workspace=workspace_bound(config),
        modules=tuple(p.target.module for p in packed),
        sampling=_sampling(folder / "generation_config.json"),
        thinking=any("enable_thinking" in _text(folder / n) for n in ("chat_template.jinja", "tokenizer_config.json")),
    )


def _nominal(project: Project, id: str) -> int:
    """N of a variant that is made by size and not built, as far as it can be known without its plan."""
    size = project.size(id)
    return size.bits if size and size.bits else 8


def _applied(project: Project, id: str, manifest: Manifest) -> Recipe:
    """The recipe whose reasons the table gives: today's, or the allocation that was built."""
    if project.size(id) and manifest.allocation:
        return allocation_recipe(project, id, manifest.allocation)
    return project.recipe(id)


def _context(config: dict[str, Any]) -> int | None:
    inner = config.get("text_config")
    found = (inner if isinstance(inner, dict) else config).get("max_position_embeddings")
    return found if type(found) is int and found > 0 else None


def _total(packed: list[Packed]) -> int:
    return sum(p.nbytes for p in packed)


def _text(path: Path) -> str:
    try:
        return read_file(path, MAX_SIDE_BYTES).decode()
    except (CheckpointError, UnicodeDecodeError):
        return ""


def _sampling(path: Path) -> dict[str, float]:
    """Sampling parameters that the base recommends; empty where it names none or decodes greedily."""
    try:
        value = parse_json(_text(path))
    except ValueError:
        return {}
    if not isinstance(value, dict) or not value.get("do_sample"):
        return {}
    found = {k: value[k] for k in SAMPLING if k in value}
    good = {"temperature": lambda v: 0 <= v < 100, "top_p": lambda v: 0 < v <= 1, "min_p": lambda v: 0 <= v <= 1}
    return {
        k: v
        for k, v in found.items()
        if type(v) in (int, float) and math.isfinite(v) and good.get(k, lambda v: 0 <= v < 1e6)(v)
    }


def _result(path: Path, kind: Any, weights_hash: str) -> tuple[Any, str]:
    """(the result, "") or (None, why there is none)."""
    found = read_result(path, kind)
    if found is None:
        return None, f"{path.name} cannot be read" if path.is_file() else f"{path.stem} was not run"
    if found.weights_hash != weights_hash:
        return None, "measured on other bytes"
    return found, ""


def _strategy(project: Project, name: str) -> str:
    """The built-in recipe that a recipe extends, directly or not; else the recipe's own name."""
    seen: set[str] = set()
    while name not in seen and (own := project.ladder.recipes.get(name)) and own.extends:
        seen.add(name)
        name = own.extends
    return name


def _fragment(project: Project, id: str, inputs: BuildInputs, contents: Contents) -> str:
    """variants.yaml that builds these weights again: rules as applied, base and imatrix pinned, no local path.

    Rules and options for what the model does not have are left out.
    """
    ladder = project.ladder
    base: dict[str, Any] = {"path": f"./{inputs.base.name}"}
    if ladder.base.repo == inputs.base.name:
        base = {"repo": inputs.base.name} | ({"revision": inputs.base.commit} if inputs.base.commit else {})
    out: dict[str, Any] = {"base": base}
    if inputs.imatrix:
        source, name = project.imatrix(id), Path(inputs.imatrix.name).name
        locked = [f for f in project.lock().imatrix if f.sha256 == inputs.imatrix.sha256]
        if locked:
            out["imatrix"] = {"repo": locked[0].repo, "file": locked[0].file, "revision": locked[0].commit}
        elif source and source.repo:
            out["imatrix"] = {"repo": source.repo, "file": source.file, "revision": source.revision}
        else:
            out["imatrix"] = {"path": f"./{name}"}
    rules = []
    for r in inputs.rules:
        if not any(matches(r.match, m) for m in contents.modules):
            continue
        rule: dict[str, Any] = {"match": r.match, "bits": r.bits}
        if r.group_size is not None:
            rule["group_size"] = r.group_size
        if r.mode != "affine":
            rule["mode"] = r.mode
        if r.awq:
            rule["awq"] = True
        if r.layers is not None:
            rule["layers"] = [int(i) for i in r.layers.split(",") if i] if r.layers[:1].isdigit() else r.layers
        rules.append(rule | {"optional": True})
    recipe: dict[str, Any] = {"rules": rules}
    if inputs.awq_exponent is not None:
        recipe["awq_exponent"] = inputs.awq_exponent
    name = f"{inputs.recipe}-as-built" if inputs.recipe in BUILTIN else inputs.recipe
    if contents.manifest.calibration:
        settings = contents.manifest.calibration.settings.model_dump(mode="json", exclude_none=True)
        out["calibration"] = {
            k: f"./{v}" if k in ("text", "chat") and isinstance(v, str) else v for k, v in settings.items()
        }
    kept = {"mtp": inputs.mtp, "vision": inputs.vision}
    out |= {
        "solver": inputs.solver,
        "group_size": inputs.group_size,
        **{part: choice for part, choice in kept.items() if part in contents.parts},
        "recipes": {name: recipe},
        "variants": {id: {"bits": inputs.bits, "recipe": name}},
    }
    return yaml_text(out, 1000, flow=None)
