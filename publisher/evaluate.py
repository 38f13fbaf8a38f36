"""`publish eval`: how far variants are from the base in BF16, computed in float32, over text and conversations.

    measure_folder(base, folder, text_path)     one folder, for scripts

The teacher's final states are kept (`evaluate_teacher`); a variant passes one layer at a time, and logits of both are
made again for a few positions at a time. So the memory is that of a layer, of two output matrices and of the states.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from inference.checkpoint import Checkpoint, read_checkpoint
from inference.errors import InputError, ResourceError
from inference.families import names_of
from inference.tokenizer import Tokenizer
from quant.source import source_hash_of

from .base import ResolvedBase, known_source_hash, remember_source_hash, resolve_base
from .bench import device
from .build import refuse_faults, render_cards, require_built
from .evaluate_corpora import NGRAM, Corpus, chat_corpus, check_overlap, contents_of, read_conversations, text_corpus
from .evaluate_figures import Paired, paired
from .evaluate_teacher import COMPUTE, Reference, agreement, final_states, out_of_memory
from .protocol import QUALITY_VERSION, calibration_hash, calibration_sources, evaluation_sources, quality_settings
from .prune import require_weights
from .report import Report
from .schema import Continuations, Divergence, Greedy, Manifest, Overlap, Quality
from .source import Source, read_source
from .store import digest, exclusive, write_model
from .survey import quality_state, read_quality
from .variants import Project

if TYPE_CHECKING:
    from .hub import Hub


def measure_folder(
    base_folder: Path | str,
    folder: Path | str,
    text_path: Path | str | None = None,
    windows: int = 24,
    context: int = 512,
    cache: Path | str | None = None,
) -> Divergence:
    """The divergence of a built folder from its base over the windows of `llama-perplexity`; `.kld.value` is the mean.

    folder: in MLX layout, or an original checkpoint. text_path: UTF-8; None takes the package's text. cache: where the
    teacher's states are kept, by default mlx-publish/teacher in the user's cache folder.
    """
    base_folder, folder = Path(base_folder), Path(folder)
    checkpoint = read_checkpoint(base_folder)
    targets = [t for t in names_of(checkpoint.config).targets(checkpoint) if t.part == "text"]
    root = (
        Path(cache)
        if cache
        else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mlx-publish/teacher"
    )
    reference = Reference(base_folder, base_identity(checkpoint, source_hash_of(targets)), root)
    source = read_source(Path(text_path) if text_path else None, "text", "evaluation.txt")
    corpus = text_corpus(source, Tokenizer.load(base_folder), windows, context)
    return reference.measure(corpus, final_states(folder, corpus.windows), folder)


def base_identity(checkpoint: Checkpoint, source_hash: str) -> str:
    """source_hash: of the text tensors."""
    config = {k: v for k, v in checkpoint.config.items() if k != "_name_or_path"}
    return digest({"weights": source_hash, "config": config})


@dataclass(frozen=True)
class Subject:
    """What is measured: a folder that holds these weights."""

    name: str
    folder: Path
    weights_hash: str
    base_hash: str
    nbytes: int
    text_nbytes: int
    text_params: int


def evaluate_held(
    project: Project,
    ids: Sequence[str],
    hub: Callable[[], Hub],
    report: Report,
    force: bool = False,
    baselines: bool = False,
    cards: bool = True,
) -> list[str]:
    """Measure built variants whose quality is not current, and the baselines if asked for; returns what was measured.

    Each result is written as soon as it is there: a killed run goes on with the next. Raises GateRefused for a variant
    that is not built, InputError for texts that cannot be used, ResourceError where memory does not suffice. For a caller
    that holds the lock. cards: render them again, unless the caller does.
    """
    manifests = {id: require_built(project, id) for id in ids}
    base = resolve_base(project, hub, weights=True, progress=None)
    session = Session(project, base, report)
    measured = []
    for id, manifest in manifests.items():
        subject = _variant(project, manifest)
        reasons = quality_state(project, read_quality(project, manifest.weights_hash), subject.base_hash)
        if reasons or force:
            require_weights(project, manifest)
            session.measure(subject)
            measured.append(id)
    if baselines:
        from .evaluate_baselines import measure_baselines  # noqa: PLC0415 - it needs this module

        measured += measure_baselines(session, hub, force)
    if not measured:
        report.line("nothing to measure: all is current")
    elif cards:
        refuse_faults(render_cards(project, resolve_base(project, hub, weights=False)).faults)
    return measured


evaluate = exclusive("eval")(evaluate_held)


def compare_variants(project: Project, a: str, b: str) -> list[Paired]:
    """Variant a minus variant b, on each corpus that both were measured over. Raises InputError if there is none."""
    found = []
    for id in (a, b):
        manifest = require_built(project, id)
        quality = read_quality(project, manifest.weights_hash)
        if quality is None:
            raise InputError(f"{id}: quality not measured; run `publish eval {id}`")
        found.append(quality)
    control = {d.corpus: d for d in found[0].control}
    theirs = {d.corpus: d for d in found[1].corpora}
    pairs = [paired(d, theirs[d.corpus], control.get(d.corpus)) for d in found[0].corpora if d.corpus in theirs]
    out = [p for p in pairs if p]
    if not out:
        raise InputError(f"{a}, {b}: not measured over the same tokens; run `publish eval --force {a} {b}`")
    return out


class Session:
    """What all measurements of one run share: the teacher, the corpora, the greedy prompts. Made when first asked for."""

    def __init__(self, project: Project, base: ResolvedBase, report: Report) -> None:
        self.project, self.base, self.report = project, base, report
        self.missing: list[str] = []
        self._greedy_lost: str | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.base.folder)

    @cached_property
    def sources(self) -> tuple[Source, Source]:
        return evaluation_sources(self.project)

    @cached_property
    def calibration(self) -> list[list[int]]:
        """Tokens of the calibration's text and of each message of its conversations."""
        text, *chats = calibration_sources(self.project)
        out = [self.tokenizer.encode(text.text)]
        for chat in chats:
            out += contents_of(read_conversations(chat), self.tokenizer)
        return out

    @cached_property
    def reference(self) -> Reference:
        targets = [t for t in self.base.targets if t.part == "text"]
        known = known_source_hash(self.project, self.base, targets)
        if known is None:
            known = source_hash_of(targets)
            remember_source_hash(self.project, self.base, targets, known)
        return Reference(self.base.folder, base_identity(self.base.checkpoint, known), self.project.store.teacher)

    @cached_property
    def conversations(self) -> list[list[dict[str, str]]]:
        return read_conversations(self.sources[1])

    @cached_property
    def corpora(self) -> list[Corpus]:
        """Checked: none shares content with the calibration text."""
        spec, (text, chat) = self.project.ladder.evaluation, self.sources
        limit = names_of(self.base.checkpoint.config).read_config(self.base.checkpoint.config).max_position_embeddings
        if spec.context > limit:
            raise InputError(
                f"{self.project.at('evaluation', 'context')}: found {spec.context}, the model's context is {limit}"
            )
        corpora = [text_corpus(text, self.tokenizer, spec.windows, spec.context)]
        if self.tokenizer.template is None:
            self.missing.append("chat: the base has no chat template")
        else:
            try:
                corpora.append(chat_corpus(chat, self.conversations, self.tokenizer, min(spec.chat_context, limit)))
            except InputError as e:
                if spec.chat:
                    raise
                self.missing.append(f"chat: {e}")  # the package's conversations do not suit every template
        contents = [list(w.tokens) for w in corpora[0].windows]
        check_overlap(contents, text.where, self.calibration, self.tokenizer)
        if len(corpora) > 1:
            check_overlap(contents_of(self.conversations, self.tokenizer), chat.where, self.calibration, self.tokenizer)
        return corpora

    @cached_property
    def prompts(self) -> list[list[int]]:
        """The smoke test's prompts, and the first question of every conversation."""
        prompts = [self.tokenizer.encode(p) for p in self.project.ladder.smoke.prompts]
        if any(c.name == "chat" for c in self.corpora):
            for messages in self.conversations:
                first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
                if first:
                    prompts.append(self.tokenizer.encode_chat(messages[:first], enable_thinking=False))
        return [p for p in prompts if p]

    @cached_property
    def continuations(self) -> Continuations | None:
        """BF16's; None where the whole base does not fit into memory."""
        try:
            with self.report.bar("BF16: greedy continuations"):
                return self.reference.continuations(self.prompts, self.project.ladder.evaluation.greedy_tokens)
        except ResourceError as e:
            self.missing.append(f"greedy: BF16 in float32 does not fit: {str(e).split(': ', 1)[-1]}")
            return None

    @cached_property
    def control(self) -> list[Divergence]:
        out = []
        for corpus in self.corpora:
            with self.report.bar(f"BF16: {corpus.name}") as tick:
                self.reference.states(corpus, tick)
            with self.report.bar(f"BF16: {corpus.name}, control") as tick:
                out.append(self.reference.control(corpus, tick))
        return out

    @cached_property
    def greedy_control(self) -> Greedy | None:
        if self.continuations is None:
            return None
        return self.reference.greedy_control(self.continuations, self.project.ladder.evaluation.greedy_tokens)

    def measure(self, subject: Subject) -> Quality:
        """Measure, write the result, tell."""
        started = time.perf_counter()
        with out_of_memory(subject.name):
            control, said, greedy_control = self.control, self.continuations, self.greedy_control
            corpora = []
            for corpus in self.corpora:
                with self.report.bar(f"{subject.name}: {corpus.name}") as tick:
                    states = final_states(subject.folder, corpus.windows, tick=tick)
                    corpora.append(self.reference.measure(corpus, states, subject.folder))
            greedy = None
            if said is not None:
                with self.report.bar(f"{subject.name}: greedy"):
                    tokens = self.project.ladder.evaluation.greedy_tokens
                    greedy = agreement(subject.folder, said, tokens)
        text, chat = self.sources
        quality = Quality(
            version=QUALITY_VERSION,
            weights_hash=subject.weights_hash,
            base_hash=subject.base_hash,
            settings=quality_settings(self.project),
            nbytes=subject.nbytes,
            text_nbytes=subject.text_nbytes,
            text_params=subject.text_params,
            bpw=round(8 * subject.text_nbytes / subject.text_params, 4),
            corpora=corpora,
            control=control,
            greedy=greedy,
            greedy_control=greedy_control,
            missing=list(self.missing),
            text_hash=text.sha256,
            chat_hash=chat.sha256 if len(corpora) > 1 else None,
            calibration_hash=calibration_hash(self.project),
            overlap=Overlap(ngram=NGRAM, shared=0),
            compute=COMPUTE,
            device=device(),
            wall_s=round(time.perf_counter() - started, 3),
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_model(self.project.store.results(subject.weights_hash) / "quality.json", quality)
        kld = corpora[0].kld
        self.report.line(f"{subject.name}: KL {kld.value:.4g} ({kld.low:.4g} to {kld.high:.4g})" if kld else
                         f"{subject.name}: no finite position")  # fmt: skip
        return quality


def _variant(project: Project, manifest: Manifest) -> Subject:
    return Subject(
        manifest.id,
        project.store.variant(manifest.id),
        manifest.weights_hash,
        manifest.inputs.base.source_hash,
        manifest.nbytes,
        manifest.text_nbytes,
        manifest.text_params,
    )
