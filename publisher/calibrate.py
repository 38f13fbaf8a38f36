"""`publish calibrate`: statistics of the base over a calibration text, kept by the hash of all that they depend on.

out/statistics/<key>/ holds what `quant.statistics` reads, an `imatrix.gguf` for llama.cpp's tools, and `statistics.json`,
which says what went in. The key covers the base's weights and config, the texts, the tokenizer and its template, the
settings and STATISTICS_VERSION: equal keys are never collected twice, unequal ones never share. Work under way lies in
<key>.part and goes on after a kill.
"""

from __future__ import annotations

import importlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.checkpoint import read_checkpoint
from inference.errors import InputError
from inference.families import family_of, names_of
from inference.layout import Target
from inference.tokenizer import Tokenizer
from quant.source import source_hash_of
from quant.statistics import STATISTICS_VERSION, Statistics

from .base import ResolvedBase, known_source_hash, remember_source_hash, resolve_base
from .card_format import size
from .costing import current, measure_costs, solver_of
from .evaluate_corpora import read_conversations
from .protocol import CALIBRATION_CHAT, CALIBRATION_TEXT
from .report import Report
from .schema import CalibrationRecord, CalibrationSpec, CalibrationText, Costs, FileEntry, StatisticsInput
from .source import Source, read_source
from .store import digest, exclusive, read_result, sha256_file, write_model
from .variants import Project

if TYPE_CHECKING:
    from .hub import Hub

FISHER_TOKENS = CalibrationSpec().fisher_tokens
RECORD, IMATRIX, PART = "statistics.json", "imatrix.gguf", ".part"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibrated:
    """What `publish calibrate` leaves. fresh: some of it was measured now, not found."""

    folder: Path
    record: CalibrationRecord
    fresh: bool
    costs: Costs


@exclusive("calibrate")
def calibrate(project: Project, hub: Callable[[], Hub], report: Report, force: bool = False) -> Calibrated:
    """Collect the statistics that variants.yaml asks for, or find them. Raises InputError for texts that do not serve."""
    base = resolve_base(project, hub, True, report.nbytes)
    text, chat = sources(project)
    tokenizer = Tokenizer.load(base.folder)
    spec = project.ladder.calibration
    windows, parts = windows_of(spec, tokenizer, text, chat)
    key = _key(project, base, base_hash(project, base), text, chat)
    final = project.store.statistics / key[:16]
    known = read_result(final / RECORD, CalibrationRecord)
    if known and known.key == key and not force:
        statistics = Statistics(final)  # raises if it is damaged
        fresh = current(statistics, solver_of(project)) is None
        report.line(f"statistics {final.name}: current" + (", nothing to do" if not fresh else ""))
        costs = measure_costs(project, base, statistics, windows, report)
        return Calibrated(final, known, fresh, costs)
    _sweep(project.store.statistics, keep=final.name + PART)
    report.line(
        f"{base.name}: {sum(map(len, windows))} tokens in {len(windows)} windows, "
        f"{_fisher_windows(windows, spec.fisher_tokens)} of them backwards, too"
    )
    with report.bar("calibrate") as tick:
        job = _Job(base.folder, base.name, base_hash(project, base), key, windows, parts, spec.fisher_tokens, spec.seed)
        record = _collect(job, final, lambda done, total: tick(done, total))
    report.line(f"statistics {final.name}: {record.wall_s:.0f} s, {size(record.nbytes)} on disk")
    return Calibrated(final, record, True, measure_costs(project, base, Statistics(final), windows, report, force))


def find(project: Project, base: ResolvedBase, read: bool = False) -> Statistics | None:
    """The finished statistics that today's variants.yaml asks for, or None.

    read: hash the base's weights if their hash is not remembered; else such a base has none. Raises CheckpointError if
    they are damaged.
    """
    key = key_of(project, base, read)
    if key is None:
        return None
    folder = project.store.statistics / key[:16]
    record = read_result(folder / RECORD, CalibrationRecord)
    return Statistics(folder) if record and record.key == key else None


def key_of(project: Project, base: ResolvedBase, read: bool = False) -> str | None:
    """Key of the statistics that today's variants.yaml asks for; None while the base's weights are not known."""
    if not base.weights or (not read and known_source_hash(project, base, _text(base.targets)) is None):
        return None
    return _key(project, base, base_hash(project, base), *sources(project))


def collect(
    base_folder: Path | str,
    out: Path | str,
    token_batches: Sequence[Sequence[int]],
    fisher_tokens: int = FISHER_TOKENS,
    gradient_hessian: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Statistics of a base over windows of token ids, below out/statistics; found there if they were collected before.

    fisher_tokens: how many tokens also run backwards (0: none, and there is no `fisher`). gradient_hessian: keep
    `hessian_g` of every module, too.
    """
    folder = Path(base_folder)
    checkpoint = read_checkpoint(folder)
    windows = [list(map(int, w)) for w in token_batches if len(w)]
    if not windows:
        raise InputError(f"{folder.name}: no tokens to collect statistics over")
    found = source_hash_of(_text(names_of(checkpoint.config).targets(checkpoint)))
    parts = [CalibrationText(name="tokens", sha256=digest(windows), tokens=sum(map(len, windows)))]
    key = digest(
        {
            "version": STATISTICS_VERSION, "base": found, "config": _own(checkpoint.config), "windows": parts[0].sha256,
            "fisher_tokens": fisher_tokens, "gradient_hessian": gradient_hessian, "seed": seed,
        }
    )  # fmt: skip
    final = Path(out) / "statistics" / key[:16]
    known = read_result(final / RECORD, CalibrationRecord)
    if not known or known.key != key:
        job = _Job(folder, folder.name, found, key, windows, parts, fisher_tokens, seed, gradient_hessian)
        _collect(job, final, progress)
    return Statistics(final)


# ------------------------------------------------------------------------------------------------ texts


def sources(project: Project) -> tuple[Source, Source | None]:
    """Calibration text and conversations, the user's or the package's; no conversations if they are not wanted."""
    spec = project.ladder.calibration
    text = read_source(project.local(spec.text) if spec.text else None, "calibration.text", CALIBRATION_TEXT)
    if spec.chat is False:
        return text, None
    path = project.local(spec.chat) if isinstance(spec.chat, str) else None
    return text, read_source(path, "calibration.chat", CALIBRATION_CHAT)


def windows_of(
    spec: CalibrationSpec, tokenizer: Tokenizer, text: Source, chat: Source | None
) -> tuple[list[list[int]], list[CalibrationText]]:
    """Windows of `context` tokens: of the text, each with a BOS first if the tokenizer begins a text with one, and of the
    conversations as the template writes them. Conversations take at most half of the tokens; of a text that is longer
    than needed, windows are spread over all of it.

    Raises InputError for a text of too few tokens, CheckpointError for a template that fails.
    """
    room = max(1, spec.tokens // spec.context)
    spoken: list[list[int]] = []
    if chat is not None:
        conversations = read_conversations(chat)
        if tokenizer.template is not None:
            ids = [
                t
                for messages in conversations
                for t in tokenizer.encode_chat(messages, add_generation_prompt=False, enable_thinking=False)
            ]
            spoken = _spread(_cut(ids, spec.context, None), room // 2)
    bos = tokenizer.bos()
    written = _spread(_cut(tokenizer.encode(text.text), spec.context, bos), room - len(spoken))
    if not written:
        raise InputError(f"{text.where}: found no text, expected at least {spec.context} tokens of it")
    parts = [CalibrationText(name="text", sha256=text.sha256, tokens=sum(map(len, written)))]
    if chat is not None and spoken:
        parts.append(CalibrationText(name="chat", sha256=chat.sha256, tokens=sum(map(len, spoken))))
    return written + spoken, parts


def _cut(ids: list[int], context: int, bos: int | None) -> list[list[int]]:
    """Whole windows; a text shorter than one is one."""
    step = context if bos is None else context - 1
    head = [] if bos is None else [bos]
    whole = [head + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)]
    return whole or ([head + ids] if ids else [])


def _spread(windows: list[list[int]], count: int) -> list[list[int]]:
    if len(windows) <= count:
        return windows
    return [windows[i * len(windows) // count] for i in range(count)]


def _fisher_windows(windows: Sequence[Sequence[int]], tokens: int) -> int:
    """Windows that together have about so many tokens; at least one if any are wanted."""
    mean = sum(map(len, windows)) / len(windows)
    return min(len(windows), max(1, round(tokens / mean))) if tokens else 0


# ------------------------------------------------------------------------------------------------ identity


def base_hash(project: Project, base: ResolvedBase) -> str:
    """Content hash of the base's language model; read once and remembered."""
    targets = _text(base.targets)
    known = known_source_hash(project, base, targets)
    if known is None:
        known = source_hash_of(targets)
        remember_source_hash(project, base, targets, known)
    return known


def _key(project: Project, base: ResolvedBase, source: str, text: Source, chat: Source | None) -> str:
    spec = project.ladder.calibration.model_dump(mode="json", exclude={"text", "chat"})
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return digest(
        {
            "version": STATISTICS_VERSION,
            "base": source,
            "config": _own(base.checkpoint.config),
            "tokenizer": [[n, sha256_file(base.folder / n)] for n in files if (base.folder / n).is_file()],
            "text": text.sha256,
            "chat": chat.sha256 if chat else None,
            "settings": spec,
        }
    )


def _own(config: dict[str, Any]) -> str:
    return digest({k: v for k, v in config.items() if k != "_name_or_path"})


def _text(targets: Sequence[Target]) -> list[Target]:
    return [t for t in targets if t.part == "text"]


def _sweep(folder: Path, keep: str) -> None:
    """Remove work under way whose inputs are no longer asked for."""
    for left in folder.glob(f"*{PART}") if folder.is_dir() else ():
        if left.name != keep and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)


# ------------------------------------------------------------------------------------------------ the work


@dataclass(frozen=True)
class _Job:
    base: Path
    name: str
    base_hash: str
    key: str
    windows: list[list[int]]
    parts: list[CalibrationText]
    fisher_tokens: int
    seed: int
    gradient_hessian: bool = False


def _collect(job: _Job, final: Path, progress: Progress | None) -> CalibrationRecord:
    """Both passes into <key>.part, then the record, then one rename."""
    from inference.backend import BACKEND, peak_memory, reset_peak_memory  # noqa: PLC0415 - MLX only for the work itself
    from inference.load import Weights  # noqa: PLC0415
    from quant.collect import Plan, discard_work  # noqa: PLC0415
    from quant.collect import collect as run  # noqa: PLC0415
    from quant.imatrix import imatrix_sums, write_imatrix  # noqa: PLC0415

    from .bench import device  # noqa: PLC0415

    started = time.perf_counter()
    reset_peak_memory()
    weights = Weights(job.base)
    vocab = weights.config.vocab_size
    if any(not 0 <= t < vocab for w in job.windows for t in w):
        raise InputError(f"{job.name}: its tokenizer gives ids beyond the model's vocabulary of {vocab}")
    family = importlib.import_module(f"inference.{family_of(weights.raw_config)}.model")
    fisher_windows = _fisher_windows(job.windows, job.fisher_tokens)
    plan = Plan(job.windows, fisher_windows, job.gradient_hessian, job.seed)
    staging = final.with_name(final.name + PART)
    done = run(weights, family, plan, staging, job.key, progress)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    record = CalibrationRecord(
        version=STATISTICS_VERSION,
        key=job.key,
        base=job.name,
        base_hash=job.base_hash,
        texts=job.parts,
        tokens=sum(map(len, job.windows)),
        windows=len(job.windows),
        context=max(map(len, job.windows)),
        fisher_windows=fisher_windows,
        fisher_tokens=done.fisher_tokens,
        gradient_hessian=job.gradient_hessian,
        seed=job.seed,
        inputs=[StatisticsInput(**i) for i in done.inputs],
        files=[FileEntry(path=f.path, size=f.size, sha256=f.sha256) for f in done.files],
        wall_s=0,
        resumed_steps=done.resumed,
        peak_gb=round((rss if BACKEND == "cpu" else peak_memory()) / 1e9, 3),
        device=device(),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_model(staging / RECORD, record)
    names = [f"{p.name} {p.sha256[:12]}" for p in job.parts]
    sums = imatrix_sums(Statistics(staging), weights.raw_config)
    write_imatrix(staging / IMATRIX, sums, names, record.windows, record.context)
    entry = FileEntry(path=IMATRIX, size=(staging / IMATRIX).stat().st_size, sha256=sha256_file(staging / IMATRIX))
    wall = round(time.perf_counter() - started, 3)
    record = record.model_copy(update={"files": [*record.files, entry], "wall_s": wall})
    write_model(staging / RECORD, record)
    discard_work(staging)
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
    return record
