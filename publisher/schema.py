"""Every file on disk that this tool reads or writes, as frozen pydantic models: one place for their shape.

variants.yaml → `Ladder`; variants.lock → `Lock`; out/<ID>/manifest.json → `Manifest`; out/results/<weights hash>/ →
`BuildRecord`, `Smoke`, `Bench`; out/receipts/ → `Receipt`. An unknown key is an error everywhere. Units stand in the
names: nbytes, _s, _gb (1e9 bytes), tps (tokens a second).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator, model_validator

Bits = Literal[2, 3, 4, 5, 6, 8]
GroupSize = Literal[32, 64, 128]
Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
VariantId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")]
HubId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]+/[A-Za-z0-9_.\-]+$", max_length=96)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class File(BaseModel):
    """Base of all models: immutable, and strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


# ---------------------------------------------------------------------------------------------- variants.yaml


def _source(value: Any) -> Any:
    """A bare string is a local path when it starts like one, else a Hub id."""
    if isinstance(value, str):
        return {"path": value} if value.startswith((".", "/", "~")) else {"repo": value}
    return value


class Base(File):
    """The unquantized model: a local folder, or a Hub repo at a revision."""

    repo: HubId | None = Field(default=None, description="Hub id of the original model, e.g. Qwen/Qwen3.5-9B")
    revision: str = Field(default="main", description="branch, tag or commit; resolved to a commit in variants.lock")
    path: str | None = Field(default=None, description="local folder, relative to variants.yaml")
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]+$", max_length=96)] | None = Field(
        default=None, description="what cards call a base that is only a folder; default: the folder's name"
    )

    @model_validator(mode="after")
    def _one(self) -> Base:
        # a path may stand beside a repo: the folder is then a download of that repo, and cards name the repo
        if self.repo is None and self.path is None:
            raise ValueError("expected a Hub id (owner/name) or a path")
        return self


class ImatrixSource(File):
    """Importance statistics in GGUF form: a local file, or a file of a Hub repo."""

    path: str | None = Field(default=None, description="local file, relative to variants.yaml")
    repo: HubId | None = Field(default=None, description="Hub id of the repo that holds the file")
    file: str | None = Field(default=None, description="file name in that repo")
    revision: str = Field(default="main", description="branch, tag or commit of that repo")

    @model_validator(mode="after")
    def _one(self) -> ImatrixSource:
        if (self.path is None) == (self.repo is None) or (self.repo is None) != (self.file is None):
            raise ValueError("expected either path, or repo and file")
        return self


class RuleSpec(File):
    """One rule of a recipe; the first that matches a tensor decides."""

    match: str = Field(min_length=1, description="glob over module paths; * crosses dots, {a,b} are alternatives")
    bits: Bits | Literal["bf16"] | Annotated[str, StringConstraints(pattern=r"^N(\+[0-9])?$")] = Field(
        description="2, 3, 4, 5, 6, 8, bf16, or N, N+1 … of the variant's base bits (7 becomes 8)"
    )
    group_size: Literal[16, 32, 64, 128] | None = Field(
        default=None, description="weights a group; default: the variant's"
    )
    mode: Mode = Field(default="affine", description="number format of the codes")
    awq: bool = Field(False, description="scale input channels before rounding, where an imatrix is named")
    why: str = Field(default="", description="the reason, printed on the card")
    layers: Literal["use_more_bits"] | list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="restrict to these layer numbers, or to llama.cpp's use_more_bits set"
    )
    optional: bool = Field(False, description="matching nothing is no error")


class RecipeSpec(File):
    """A recipe of the user's own."""

    extends: str | None = Field(default=None, description="recipe whose rules follow after these")
    rules: list[RuleSpec] = Field(default_factory=list, description="tried in order")
    awq_exponent: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=None, description="scales are E[x²]^(exponent/2); 1 is the reference, 0 none"
    )
    smoke_kld: dict[Bits, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        default=None, description="smoke test: largest mean KL divergence from BF16, nats a token, by base bits"
    )
    origin: str = Field(default="", description="where rules and reasons come from; printed on the card")


class VariantSpec(File):
    """One rung of the ladder. What is absent is taken from the top of the file."""

    bits: Bits = Field(description="base bits N of the recipe")
    recipe: str | None = None
    rules: list[RuleSpec] = Field(default_factory=list, description="this variant's own rules, tried first")
    group_size: GroupSize | None = None
    awq_exponent: Annotated[float, Field(ge=0, le=2)] | None = None
    smoke_kld: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    imatrix: Annotated[ImatrixSource | Literal[False], BeforeValidator(_source)] | None = Field(
        default=None, description="this variant's imatrix; false for none"
    )
    mtp: Literal["drop", "keep", "split"] | None = None
    vision: Literal["keep", "drop"] | None = None
    repo: HubId | None = Field(default=None, description="full repo id; default: owner and the name pattern")
    note: str = Field(default="", max_length=500, description="the variant's note in the collection")


class SmokeSpec(File):
    """The smoke test."""

    prompts: list[str] = Field(
        default=[
            "The quick brown fox",
            "In order to install the package,",
            "def main():",
            "The difference between the two is",
            "First, open the file and",
        ],
        min_length=1,
        max_length=16,
    )
    max_tokens: Annotated[int, Field(ge=32, le=1024)] = 48
    seed: int = 0
    text: str | None = Field(default=None, description="file with the fixed text for the divergence; default: bundled")
    text_tokens: Annotated[int, Field(ge=32, le=8192)] = 512


class BenchSpec(File):
    """The benchmark's protocol."""

    turns: Annotated[int, Field(ge=1, le=16)] = 4
    turn_tokens: Annotated[int, Field(ge=1, le=4096)] = Field(default=128, description="tokens generated a turn")
    prefill: list[Annotated[int, Field(ge=1, le=131072)]] = Field(default=[128, 512, 2048], min_length=1)
    runs: Annotated[int, Field(ge=1, le=50)] = 3


class CollectionSpec(File):
    """The Hub collection that lists the ladder."""

    title: str = Field(min_length=1, max_length=60)
    description: str = Field(default="", max_length=150)


class CardSpec(File):
    """What the card says beside the measured."""

    templates: str | None = Field(default=None, description="folder whose blocks override the built-in template's")
    tags: list[str] = Field(default_factory=list)
    license: str | None = Field(default=None, description="only where the base's own card names none")
    intro: str = Field(default="", description="a paragraph under the lead")
    tool_url: Annotated[str, StringConstraints(pattern=r"^https://\S+$", max_length=200)] | None = Field(
        default=None, description="where people find this tool; the cards link it"
    )


class Ladder(File):
    """variants.yaml: a base model and the ladder of variants to publish."""

    base: Annotated[Base, BeforeValidator(_source)]
    owner: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]+$", max_length=64)] | None = Field(
        default=None, description="Hub user or organization that the repos belong to"
    )
    repo: str = Field(
        default="{base}-UD-{id}-mlx", description="pattern of the repo names; {base} and {id} are filled in"
    )
    quantized_by: str | None = Field(default=None, description="default: owner")
    output: str = Field(default="build", description="folder for everything built, relative to variants.yaml")
    recipe: str = Field(default="unsloth", description="default recipe of the variants")
    recipes: dict[str, RecipeSpec] = Field(default_factory=dict, description="recipes of your own, by name")
    group_size: GroupSize = Field(default=64, description="weights that share a scale, unless a rule says otherwise")
    imatrix: Annotated[ImatrixSource, BeforeValidator(_source)] | None = None
    mtp: Literal["drop", "keep", "split"] = Field(default="drop", description="the multi-token-prediction head")
    vision: Literal["keep", "drop"] = Field(default="keep", description="the vision tower; kept in bf16")
    smoke: SmokeSpec = SmokeSpec()
    bench: BenchSpec = BenchSpec()
    card: CardSpec = CardSpec()
    collection: CollectionSpec | None = None
    variants: dict[VariantId, VariantSpec] = Field(min_length=1, description="the ladder, smallest first")

    @field_validator("repo")
    @classmethod
    def _pattern(cls, value: str) -> str:
        if set("{}") & set(value.replace("{base}", "").replace("{id}", "")):
            raise ValueError("expected a name in which only {base} and {id} are filled in")
        if not re.fullmatch(r"[A-Za-z0-9_.\-]+", value.replace("{base}", "b").replace("{id}", "i")):
            raise ValueError("expected letters, digits, '.', '_' and '-' around {base} and {id}")
        return value


# ---------------------------------------------------------------------------------------------- variants.lock


class LockedBase(File):
    repo: str
    revision: str
    commit: str


class LockedFile(File):
    repo: str
    file: str
    revision: str
    commit: str
    sha256: Sha256


class Lock(File):
    """What was resolved from the Hub, and nothing else: a floating revision becomes a commit here."""

    schema_version: Literal[1] = 1
    base: LockedBase | None = None
    imatrix: list[LockedFile] = Field(default_factory=list)


# ---------------------------------------------------------------------------------------------- manifest.json


class RuleInput(File):
    """A rule as it was applied: bits resolved, reasons left out (they do not change weights)."""

    match: str
    layers: str | None = None
    bits: int | Literal["bf16"]
    group_size: int | None
    mode: str
    awq: bool


class ImatrixInput(File):
    name: str
    sha256: str


class BaseInput(File):
    """name: Hub id, or the folder's name. commit: of the Hub repo, if it came from one.

    A hash is empty where it is not known yet: before the first build, or before the base is downloaded.
    """

    name: str
    commit: str | None
    source_hash: str  # sha256 over the sorted (target name, sha256 of its source bytes) of the tensors used
    files_hash: str  # over config.json and the files that are copied: tokenizer, template, processor, licence


class BuildInputs(File):
    """Everything that the weights depend on; two builds with equal inputs have equal bytes."""

    base: BaseInput
    recipe: str
    bits: int
    group_size: int
    rules: list[RuleInput]
    assignment: Sha256  # over (module, format, awq) of every tensor: what the rules come to
    awq_exponent: float | None  # null where no tensor is scaled
    imatrix: ImatrixInput | None
    mtp: str
    vision: str
    solver: str
    quant_version: int


class FileEntry(File):
    path: str
    size: int
    sha256: Sha256


class TensorEntry(File):
    name: str
    dtype: str
    shape: list[int]
    sha256: Sha256


class Manifest(File):
    """What a variant's folder holds. Lists every file but README.md and itself; holds no clock and no host."""

    schema_version: Literal[1] = 1
    tool: str  # "mlx-publish 0.1.0"
    id: str
    inputs: BuildInputs
    weights_hash: Sha256
    params: int  # logical parameters stored
    text_params: int
    nbytes: int  # of all stored tensors
    text_nbytes: int  # without vision and MTP
    files: list[FileEntry]
    tensors: list[TensorEntry]


class BaseCache(File):
    """out/base.json: content hashes of the base, valid while size and time of its files stay. Never an input itself."""

    schema_version: Literal[1] = 1
    files: dict[str, list[int]]  # name → [bytes, mtime in ns]
    hashes: dict[str, str]  # hash of the set of target names → source hash


# ---------------------------------------------------------------------------------------------- results


class Device(File):
    """Where a figure was measured."""

    name: str  # chip, GPU or processor
    backend: str  # metal, cuda, cpu
    os: str
    memory_gb: float
    mlx: str
    tool: str
    blas: str | None = None


class BuildRecord(File):
    schema_version: Literal[1] = 1
    weights_hash: Sha256
    built_at: str  # UTC, ISO 8601
    wall_s: float  # of the whole run, all variants of it
    variants: list[str]  # built in the same run
    bytes_read: int
    bytes_written: int
    peak_gb: float
    device: Device


class Check(File):
    name: str
    passed: bool | None  # null: could not be checked
    detail: str


class Smoke(File):
    schema_version: Literal[1] = 1
    version: int  # of the smoke test itself
    weights_hash: Sha256
    base_hash: str
    settings: str  # hash of prompts, text, seed, tokens
    ceiling: float
    passed: bool
    kld: float | None  # mean, nats a token, against BF16
    kld_tokens: int
    checks: list[Check]
    samples: list[str]
    device: Device
    measured_at: str


class Stat(File):
    median: float
    low: float
    high: float
    runs: int


class Speed(File):
    """One model's figures; null: not measured, `reason` says why."""

    decode_tps: Stat | None = None
    prefill_tps: dict[int, Stat] = Field(default_factory=dict)  # by prompt length
    ttft_s: Stat | None = None
    peak_gb: float | None = None
    reason: str | None = None


class Bench(File):
    schema_version: Literal[1] = 1
    version: int
    weights_hash: Sha256
    base_hash: str
    run: str  # id of the run; figures of one run may be compared
    compute: str  # type that both rows computed in: bfloat16, float32 (the CPU backend, whatever is stored)
    settings: str
    protocol: BenchSpec
    variant: Speed
    bf16: Speed
    device: Device
    measured_at: str


class Receipt(File):
    """Proof of one push."""

    schema_version: Literal[1] = 1
    id: str
    repo: str
    endpoint: str
    commit: str
    pull_request: int | None = None
    weights_hash: Sha256
    files: list[FileEntry]
    pushed_at: str
    tag: str | None = None
