"""Every file on disk that this tool reads or writes, as frozen pydantic models: one place for their shape.

variants.yaml → `Ladder`; variants.lock → `Lock`; out/<ID>/manifest.json → `Manifest`; out/results/<weights hash>/ →
`BuildRecord`, `Smoke`, `Bench`, `Quality`; out/receipts/ → `Receipt`; out/history/ → `History`. An unknown key is an
error everywhere. Units stand in the names: nbytes, _s, _gb (1e9 bytes), tps (tokens a second).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator, model_validator

from .sizes import parse_size

Bits = Literal[2, 3, 4, 5, 6, 8]
GroupSize = Literal[32, 64, 128]
Solver = Literal["rtn", "ls", "gptq"]
AwqExponent = Annotated[float, Field(ge=0, le=2)] | Literal["search"]
Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
VariantId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")]
HubId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]+/[A-Za-z0-9_.\-]+$", max_length=96)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Blake3 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


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
    awq_exponent: AwqExponent | None = Field(
        default=None, description="scales are E[x²]^(exponent/2): 1 the reference, 0 none, search one for each group"
    )
    solver: Solver | None = Field(
        default=None, description="how codes are chosen: rtn (nearest), ls (least squares), gptq; default: rtn"
    )
    smoke_kld: dict[Bits, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        default=None, description="smoke test: largest mean KL divergence from BF16, nats a token, by base bits"
    )
    kld_ceiling: dict[Bits, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        default=None, description="release: largest mean KL divergence over the evaluation text, nats a token, by bits"
    )
    origin: str = Field(default="", description="where rules and reasons come from; printed on the card")


class FloorSpec(File):
    """A least width for the tensors that the allocator is free to choose for."""

    match: str = Field(min_length=1, description="glob over module paths; * crosses dots, {a,b} are alternatives")
    bits: Bits | Literal["bf16"] = Field(description="at least these bits")
    optional: bool = Field(False, description="matching nothing is no error")


class AllocationSpec(File):
    """What the allocator of `size:` variants may not choose."""

    pins: list[RuleSpec] = Field(default_factory=list, description="rules whose tensors are not allocated")
    floors: list[FloorSpec] = Field(default_factory=list, description="least bits by pattern; the first match decides")

    @field_validator("pins")
    @classmethod
    def _pins(cls, value: list[RuleSpec]) -> list[RuleSpec]:
        return [_pin(rule) for rule in value]


def _pin(rule: RuleSpec) -> RuleSpec:
    if isinstance(rule.bits, str) and rule.bits.startswith("N"):
        raise ValueError(f"expected bits of a pin as a number or bf16, found {rule.bits} for {rule.match}")
    if rule.awq:
        raise ValueError(f"expected no awq in a pin ({rule.match}): nothing is scaled where bits are allocated")
    return rule


class VariantSpec(File):
    """One rung of the ladder. What is absent is taken from the top of the file."""

    bits: Bits | None = Field(default=None, description="base bits N of the recipe; or give size")
    size: str | None = Field(
        default=None,
        description='instead of bits: "5 GB", "fits 16 GB", "4.5 bpw" or "as unsloth 4"; the allocator chooses the formats',
    )
    recipe: str | None = None
    rules: list[RuleSpec] = Field(
        default_factory=list, description="this variant's own rules, tried first; with size they are pins"
    )
    group_size: GroupSize | None = None
    awq_exponent: AwqExponent | None = None
    solver: Solver | None = Field(default=None, description="how this variant's codes are chosen")
    smoke_kld: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    kld_ceiling: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="release: largest mean KL divergence over the evaluation text, nats a token"
    )
    imatrix: Annotated[ImatrixSource | Literal[False], BeforeValidator(_source)] | None = Field(
        default=None, description="this variant's imatrix; false for none"
    )
    mtp: Literal["drop", "keep", "split"] | None = None
    vision: Literal["keep", "drop"] | None = None
    repo: HubId | None = Field(default=None, description="full repo id; default: owner and the name pattern")
    note: str = Field(default="", max_length=500, description="the variant's note in the collection")

    @field_validator("size")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        return value if value is None else parse_size(value).text

    @model_validator(mode="after")
    def _one(self) -> VariantSpec:
        if (self.bits is None) == (self.size is None):
            raise ValueError("expected either bits or size" + ("" if self.bits is None else ", not both"))
        if self.size is not None:
            if self.awq_exponent:
                raise ValueError("expected no awq_exponent with size: nothing is scaled where bits are allocated")
            for rule in self.rules:
                _pin(rule)
        return self


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


class EvaluationSpec(File):
    """What `publish eval` measures over."""

    text: str | None = Field(default=None, description="UTF-8 file with the evaluation text; default: bundled")
    chat: str | None = Field(default=None, description="JSON file with conversations; default: bundled")
    windows: Annotated[int, Field(ge=2, le=4096)] = Field(default=24, description="windows of the text, at most")
    context: Annotated[int, Field(ge=16, le=32768, multiple_of=2)] = Field(default=512, description="tokens a window")
    chat_context: Annotated[int, Field(ge=64, le=32768)] = Field(
        default=2048, description="tokens of a conversation that are used, at most"
    )
    greedy_tokens: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=64, description="tokens of each greedy continuation, at most"
    )


class CalibrationSpec(File):
    """What `publish calibrate` collects statistics over."""

    text: str | None = Field(default=None, description="UTF-8 file with the calibration text; default: bundled")
    chat: bool | str = Field(
        default=True, description="JSON file with conversations, true for the bundled ones, false for none"
    )
    tokens: Annotated[int, Field(ge=64, le=1 << 24)] = Field(
        default=131072, description="tokens at most; conversations take up to half of them"
    )
    context: Annotated[int, Field(ge=32, le=32768)] = Field(default=1024, description="tokens a window")
    fisher_tokens: Annotated[int, Field(ge=1, le=1 << 22)] = Field(
        default=32768, description="tokens that also run backwards, for the sensitivity of every output channel"
    )
    seed: Annotated[int, Field(ge=0, le=1 << 30)] = Field(default=0, description="of the labels that the model draws")


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


class SignSpec(File):
    """The optional signature of each repo, in the OpenSSF Model Signing format. No file that is pushed names these."""

    key: str | None = Field(
        default=None, description="private EC key in PEM; where it is named, `publish push` signs with it"
    )
    certificate: str | None = Field(default=None, description="certificate of that key, in PEM; put into the signature")
    chain: list[str] = Field(
        default_factory=list,
        description="certificates above it, in PEM: put into the signature, and trusted by `verify`",
    )
    public_key: str | None = Field(default=None, description="public EC key in PEM that `publish verify` checks with")


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
    solver: Solver | None = Field(
        default=None,
        description="how codes are chosen, whatever the recipe says; default: the recipe's, gptq with size",
    )
    recipes: dict[str, RecipeSpec] = Field(default_factory=dict, description="recipes of your own, by name")
    allocation: AllocationSpec = AllocationSpec()
    group_size: GroupSize = Field(default=64, description="weights that share a scale, unless a rule says otherwise")
    imatrix: Annotated[ImatrixSource, BeforeValidator(_source)] | None = None
    mtp: Literal["drop", "keep", "split"] = Field(default="drop", description="the multi-token-prediction head")
    vision: Literal["keep", "drop"] = Field(default="keep", description="the vision tower; kept in bf16")
    smoke: SmokeSpec = SmokeSpec()
    bench: BenchSpec = BenchSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    card: CardSpec = CardSpec()
    collection: CollectionSpec | None = None
    private_storage: str | None = Field(
        default=None,
        description='what the owner\'s private repos may hold together, e.g. "500 GB"; default: as its plan is documented',
    )
    sign: SignSpec | None = None
    variants: dict[VariantId, VariantSpec] = Field(min_length=1, description="the ladder, smallest first")

    @field_validator("private_storage")
    @classmethod
    def _storage(cls, value: str | None) -> str | None:
        if value is not None and parse_size(value).kind != "file":
            raise ValueError('expected bytes such as "500 GB" or "1 TB"')
        return value

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
    source_hash: str  # sha256 over the sorted (target name, BLAKE3 of its source bytes) of the tensors used
    files_hash: str  # over config.json and the files that are copied: tokenizer, template, processor, licence


class AllocationInput(File):
    """Where the rules of an allocated variant came from: told when they change, of no weight themselves."""

    size: str
    costs: Sha256


class BuildInputs(File):
    """Everything that the weights depend on; two builds with equal inputs have equal bytes."""

    base: BaseInput
    recipe: str
    bits: int
    group_size: int
    rules: list[RuleInput]
    assignment: Sha256  # over (module, format, awq) of every tensor: what the rules come to
    allocation: AllocationInput | None = None  # null where a recipe chose the formats
    awq_exponent: float | Literal["search"] | None  # null where no tensor is scaled
    imatrix: ImatrixInput | None
    mtp: str
    vision: str
    solver: str
    statistics: Sha256 | None = None  # key of what `publish calibrate` collected, where the solver uses it
    quant_version: int


class CostProbe(File):
    """A whole class of tensors rounded at one width: what that was expected to cost, and what it did."""

    label: str  # of the class
    bits: Bits
    group_size: GroupSize
    predicted: float  # nats of KL divergence a token
    measured: float


class Costs(File):
    """out/statistics/<key>/costs.json: what each format of each module was measured to cost on this model."""

    schema_version: Literal[1] = 1
    statistics: Sha256  # digest of the statistics
    solver: str  # that the errors are of
    version: int  # of the measurement
    modules: dict[
        str,
        dict[
            Annotated[str, StringConstraints(pattern=r"^[234568]/(32|64|128)$")],
            Annotated[float, Field(ge=0, allow_inf_nan=False)],
        ],
    ]  # module → "bits/group_size" → nats of mean KL divergence a token
    probes: list[CostProbe] = Field(default_factory=list)  # of the base as it is, over part of the calibration text
    probe_tokens: int = 0
    wall_s: float = 0


class Allocation(File):
    """The formats that the allocator chose, as rules. A frozen one is variants.allocations/<ID>.yaml; manifest.json holds
    the one that was built."""

    schema_version: Literal[1] = 1
    size: str  # as in variants.yaml
    constraints: Sha256  # of pins and floors
    budget_nbytes: int  # of the language model
    nbytes: int  # of the language model, as chosen
    workspace_nbytes: int | None = None  # that a memory size left for prefill
    predicted_kld: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # sum of the costs, nats a token
    costs: Sha256  # of costs.json
    statistics: Sha256
    solver: str
    version: int
    rules: list[RuleSpec]


class FileEntry(File):
    path: str
    size: int
    sha256: Sha256


class TensorEntry(File):
    name: str
    dtype: str
    shape: list[int]
    blake3: Blake3  # of its bytes


class CalibrationText(File):
    """A text that statistics were collected over, and what of it was used."""

    name: str  # text, chat; tokens: given as ids
    sha256: Sha256
    tokens: int


class CalibrationInput(File):
    """What the statistics of `inputs.statistics` were collected over, and how: for cards, and to collect them again."""

    texts: list[CalibrationText]
    tokens: int
    settings: CalibrationSpec  # texts of the user's own by their file's name


class Manifest(File):
    """What a variant's folder holds. Lists every file but README.md and itself; holds no clock and no host."""

    schema_version: Literal[2] = 2  # 2: tensors and source by BLAKE3, and so other `weights_hash` and `source_hash`
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
    allocation: Allocation | None = None  # of a variant made by size: its rules with their reasons
    awq_exponents: dict[str, dict[str, float]] = Field(default_factory=dict)  # searched: group → layer → it
    calibration: CalibrationInput | None = None  # where the solver used statistics


class BaseCache(File):
    """out/base.json: content hashes of the base, valid while size and time of its files stay. Never an input itself."""

    schema_version: Literal[2] = 2  # as of Manifest
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
    probes: list[CostProbe] = Field(default_factory=list)  # of costs.json, as it was then: measured on this model
    probe_tokens: int = 0
    versions: dict[str, str] = Field(default_factory=dict)  # of Python and the packages that built it


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
    decode_peak_gb: float | None = None  # most during the decode of the last turn; null in results of older versions
    held_gb: float | None = None  # weights and caches at its end: what decode cannot do without
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


class Interval(File):
    """A figure and its 95 % interval, by resampling whole windows."""

    value: float
    low: float
    high: float


class Divergence(File):
    """A model against the base in BF16 over one corpus. Figures are null where no scored position is finite."""

    corpus: str  # text or chat
    teacher: Sha256  # of the base, the tokens and the arithmetic: only figures of one teacher may be compared
    windows: int
    context: int  # tokens of the longest window
    positions: int  # scored
    nonfinite: int  # of these, left out of every figure
    kld: Interval | None  # mean, nats a token
    kld_median: float | None
    kld_p99: float | None
    kld_p999: Interval | None
    kld_max: float | None
    top1: Interval | None  # share of positions at which both prefer the same token
    dp_rms: Interval | None  # root of the mean squared change of the true token's probability
    ln_ppl_ratio: Interval | None  # ln(perplexity / perplexity of the base), paired
    ppl: float | None
    ppl_base: float | None
    window_positions: list[int]  # finite ones, a window
    window_kld: list[float | None]  # mean a window, for paired comparison
    window_top1: list[float | None]
    window_ln_ratio: list[float | None]


class Greedy(File):
    """Free-running greedy continuations against BF16's: how long they are the same."""

    prompts: int
    max_tokens: int
    agreed: list[int]  # tokens before the first difference, a prompt
    lengths: list[int]  # tokens of BF16's continuation
    mean: float
    median: float
    identical: float  # share of prompts whose whole continuation is the same


class Overlap(File):
    """Token sequences that evaluation and calibration text share; more than none is refused."""

    ngram: int  # tokens
    shared: int


class Quality(File):
    """What `publish eval` found about one set of weights."""

    schema_version: Literal[1] = 1
    version: int
    weights_hash: Sha256
    base_hash: str
    settings: str  # hash of corpora, windows, prompts, resampling
    nbytes: int  # of all stored tensors
    text_nbytes: int
    text_params: int
    bpw: float  # bits a weight of the language model
    corpora: list[Divergence]
    control: list[Divergence]  # BF16 against BF16 computed another way: the noise floor
    greedy: Greedy | None
    greedy_control: Greedy | None
    missing: list[str]  # what could not be measured, and why
    text_hash: Sha256  # of the evaluation text's bytes
    chat_hash: Sha256 | None
    calibration_hash: Sha256  # of the calibration's texts
    overlap: Overlap
    compute: str  # the type that all rows computed in
    device: Device
    wall_s: float
    measured_at: str


class Teacher(File):
    """out/teacher/<key>/teacher.json: what the states beside it are of."""

    schema_version: Literal[1] = 1
    key: Sha256
    base: str
    corpus: str
    positions: int
    hidden_size: int
    nbytes: int  # of hidden.safetensors
    sha256: Sha256


class Continuations(File):
    """out/teacher/<key>/greedy.json: BF16's greedy continuations."""

    schema_version: Literal[1] = 1
    key: Sha256
    prompts: list[list[int]]
    tokens: list[list[int]]


class Baseline(File):
    """A model of somebody else's recipe, measured as the variants are; its weights are not kept."""

    name: str
    recipe: str
    bits: int
    group_size: int
    imatrix: str | None
    inputs: Sha256  # hash of all that its weights depend on
    weights_hash: Sha256  # its quality lies below this hash, as a variant's does
    nbytes: int
    text_nbytes: int
    text_params: int


class Baselines(File):
    """out/baselines.json."""

    schema_version: Literal[1] = 1
    baselines: list[Baseline]


class StatisticsInput(File):
    """One stored input of one or more linears; `quant.statistics` reads it."""

    name: str
    file: str
    modules: list[str]
    columns: int
    experts: int | None
    hessian: Literal["one", "experts", "shared"]


class CalibrationRecord(File):
    """out/statistics/<key>/statistics.json: what went in, and what the files beside it hold."""

    schema_version: Literal[1] = 1
    version: int  # of the statistics
    key: Sha256  # over all that they depend on
    base: str
    base_hash: Sha256
    texts: list[CalibrationText]
    tokens: int
    windows: int
    context: int  # tokens of the longest window
    fisher_windows: int  # that also ran backwards
    fisher_tokens: int
    gradient_hessian: bool
    seed: int
    inputs: list[StatisticsInput]
    files: list[FileEntry]
    wall_s: float  # of the run that finished it
    resumed_steps: int  # done by runs before, which were killed
    peak_gb: float  # of the device; of the process where that is the CPU
    device: Device
    made_at: str

    @property
    def nbytes(self) -> int:
        return sum(f.size for f in self.files)


class ReleaseQuality(File):
    """How far released weights were from BF16, over the evaluation text."""

    teacher: Sha256  # only figures of one teacher may be compared
    positions: int
    kld: Interval


class Release(File):
    """Weights that stood in a repo. commit, pushed_at: null where no push from here put them there."""

    endpoint: str
    repo: str
    weights_hash: Sha256
    tool: str
    built_at: str | None  # of build.json; null where these weights were not built here
    inputs: BuildInputs
    nbytes: int  # of all stored tensors
    quality: ReleaseQuality | None = None
    commit: str | None = None
    tag: str | None = None
    pushed_at: str | None = None


class History(File):
    """out/history/<ID>.json: what was released of a variant, oldest first."""

    schema_version: Literal[2] = 2  # as of Manifest
    id: str
    releases: list[Release]

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, value: Any) -> Any:
        """It cannot be made again, so it is still read. Weights keep the hash that they were released by; the base's
        `source_hash`, which none of today compares with, counts as unknown ("")."""
        match value:
            case {"schema_version": 1, "releases": [*releases]}:
                return {**value, "schema_version": 2, "releases": [_without_source_hash(r) for r in releases]}
        return value


def _without_source_hash(release: Any) -> Any:
    match release:
        case {"inputs": {"base": {"source_hash": str()} as base} as inputs}:
            return {**release, "inputs": {**inputs, "base": {**base, "source_hash": ""}}}
    return release


class ProvenanceBase(File):
    """The base that was used. repo and commit: where it came from the Hub; else the hashes alone tell it."""

    name: str
    repo: str | None
    commit: str | None
    source_hash: str
    files_hash: str


class ProvenanceImatrix(File):
    """The imatrix that was used; repo, file and commit where it came from the Hub."""

    name: str
    sha256: str
    repo: str | None = None
    file: str | None = None
    commit: str | None = None


class Provenance(File):
    """out/<ID>/provenance/lock.json: what the rules of the variants.yaml beside it were applied to, and by what."""

    schema_version: Literal[2] = 2  # as of Manifest
    id: str
    weights_hash: Sha256
    tool: str
    base: ProvenanceBase
    imatrix: ProvenanceImatrix | None
    solver: str
    quant_version: int
    statistics: Sha256 | None  # key of what `publish calibrate` collected, where the solver used it
    calibration: CalibrationInput | None  # the texts of these, by hash, and the settings
    versions: dict[str, str]  # when it was built; empty where that was not recorded


class ReplacedFile(File):
    """Of somebody else's commit, replaced by a push that could not know of it. before: the commit that it was planned on."""

    path: str
    commit: str
    before: str


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
    pruned_at: str | None = None  # when the weights here were deleted, after the hub's were proven to be these
    replaced: list[ReplacedFile] = Field(default_factory=list)  # what `push --overwrite` has not been told to leave so


class LadderEntry(File):
    """What the last push that named a variant left on the hub."""

    id: str
    repo: str
    commit: str | None = None  # None: no push has ended well yet
    tag: str | None = None
    weights_hash: Sha256 | None = None
    waiting: bool = False  # made private by a push, to become public once all repos of a push are good
    error: str | None = None  # why the last push of it failed


class LadderReceipt(File):
    """Proof of a release: every repo of the ladder, and the collection."""

    schema_version: Literal[1] = 1
    endpoint: str
    repos: list[LadderEntry]
    collections: list[str] = Field(default_factory=list)  # slugs
    errors: dict[str, str] = Field(default_factory=dict)  # what else of the last push failed
    pushed_at: str
