"""The smoke test: does a variant load, compute and talk as its base does? One verdict on exactly these bytes.

Against the base in BF16, which is loaded once a run: the mean KL divergence over a fixed text stays below the recipe's
ceiling, and sampled continuations repeat themselves no more than the base's own. Damage that a divergence cannot show
(a flipped bit in one weight) is for `verify`, which compares hashes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inference.backend import mx
from inference.divergence import kld, nonfinite_count, top1_agreement
from inference.errors import CheckpointError, InputError
from inference.generate import Sampling, chat, generate
from inference.load import Model, hidden_states_streamed, load_head
from inference.tokenizer import Tokenizer

from .card_format import size
from .protocol import CHAT_TURN, smoke_text
from .schema import Check, SmokeSpec
from .variants import Project

NGRAM = 4  # tokens; repetition is the share of 4-grams that the same continuation held before
# A sound variant samples other tokens than its base, so its repetition differs by chance. The bound is the base's mean
# plus three standard errors of the difference of two means over the same number of prompts; a spread below FLOOR is not
# believed from a handful of samples, and a text that does little but repeat (LOOP) never passes.
ERRORS, FLOOR, LOOP = 3.0, 0.05, 0.9
CHAT_TOKENS = 48
ROWS = 64  # positions compared at once


@dataclass(frozen=True)
class Reference:
    """What the base does: logits over the fixed text, and how much its continuations repeat (None: it does not fit).

    The logits lie in host memory, where they do not count as the memory of a model that is benchmarked meanwhile.
    """

    tokens: tuple[int, ...]
    logits: np.ndarray  # float32 [T, V]
    repetition: tuple[float, ...] | None
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    passed: bool
    kld: float | None
    kld_tokens: int
    checks: list[Check]
    samples: list[str]


def reference(project: Project, model: Model) -> Reference:
    """From the loaded base."""
    tokens = _tokens(project, model.tokenizer)
    logits = _host(model.forward(mx.array([tokens]))[0])
    texts = [ids for ids, _ in _continuations(model, project.ladder.smoke)]
    return Reference(tuple(tokens), logits, tuple(map(repetition, texts)))


def reference_streamed(project: Project, folder: Path, reason: str) -> Reference:
    """From a base that does not fit into memory: its logits, one layer at a time; no continuations."""
    tokens = _tokens(project, Tokenizer.load(folder))
    hidden = hidden_states_streamed(folder, [mx.array([tokens])])[0]
    logits = _host(load_head(folder)(hidden)[0])
    return Reference(tuple(tokens), logits, None, reason)


def smoke(project: Project, model: Model, ref: Reference, ceiling: float) -> Verdict:
    """Judge a loaded variant."""
    checks = [Check(name="loads", passed=True, detail=f"{size(model.nbytes)} in memory")]
    logits = model.forward(mx.array([list(ref.tokens)]))[0]
    bad = nonfinite_count(logits)
    checks.append(
        Check(
            name="finite logits",
            passed=not bad,
            detail=f"{bad} of {len(ref.tokens)} positions are not finite",
        )
    )
    mean = None
    if not bad:
        mean, same = _compare(ref.logits, logits)
        checks.append(
            Check(
                name="divergence from BF16",
                passed=mean <= ceiling,
                detail=f"mean KL {mean:.4f} nats a token over {len(ref.tokens)} tokens, ceiling {ceiling:g}; "
                f"same first choice at {100 * same:.1f} %",
            )
        )
    samples: list[str] = []
    if not bad:
        pairs = _continuations(model, project.ladder.smoke)
        samples = [text for _, text in pairs]
        checks.append(_repeats([repetition(ids) for ids, _ in pairs], ref))
        checks.append(_chat_turn(model, project.ladder.smoke.seed))
    required = {"loads", "finite logits", "divergence from BF16"}
    passed = all(c.passed for c in checks if c.passed is not None) and required <= {c.name for c in checks}
    return Verdict(passed, mean, len(ref.tokens), checks, samples)


def not_loaded(error: Exception) -> Verdict:
    """The verdict on a variant that could not be loaded."""
    return Verdict(False, None, 0, [Check(name="loads", passed=False, detail=str(error))], [])


def repetition(ids: Sequence[int]) -> float:
    """Share of NGRAM-grams that occurred before in the same sequence; 0 for a sequence too short to tell."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _compare(ref: np.ndarray, got: mx.array) -> tuple[float, float]:
    """(mean KL in nats, share of equal first choices), a few positions at a time; [T, V] each."""
    divergence, same = 0.0, 0.0
    for i in range(0, len(ref), ROWS):
        mine, theirs = mx.array(ref[i : i + ROWS]), got[i : i + ROWS]
        divergence += float(kld(mine, theirs).sum())  # type: ignore[arg-type]
        same += float(top1_agreement(mine, theirs).sum())  # type: ignore[arg-type]
    return divergence / len(ref), same / len(ref)


def _host(logits: mx.array) -> np.ndarray:
    return np.array(logits.astype(mx.float32))


def _repeats(found: list[float], ref: Reference) -> Check:
    name, mean = "repetition", sum(found) / len(found)
    if ref.repetition is None:
        return Check(
            name=name,
            passed=None,
            detail=f"{100 * mean:.0f} % of {NGRAM}-grams repeated; base not compared: {ref.reason}",
        )
    bound = repetition_bound(ref.repetition)
    own = statistics.fmean(ref.repetition)
    return Check(
        name=name,
        passed=mean <= bound,
        detail=f"{100 * mean:.0f} % of {NGRAM}-grams repeated, BF16 {100 * own:.0f} % on the same prompts; "
        f"bound {100 * bound:.0f} %",
    )


def repetition_bound(own: Sequence[float]) -> float:
    """Largest mean repetition that can pass for chance beside the base's own (see ERRORS)."""
    mean = statistics.fmean(own)
    spread = max(statistics.stdev(own) if len(own) > 1 else 0.0, FLOOR)
    return max(mean, min(LOOP, mean + ERRORS * spread * (2 / len(own)) ** 0.5))


def _continuations(model: Model, spec: SmokeSpec) -> list[tuple[list[int], str]]:
    """(token ids, text) of one sampled continuation a prompt; the same seeds for every model."""
    out = []
    for i, prompt in enumerate(spec.prompts):
        sampling = Sampling(temperature=0.8, top_p=0.95, seed=spec.seed + i)
        ids = model.tokenizer.encode(prompt)
        if not ids:
            raise InputError(f"smoke.prompts: {prompt!r} has no tokens")
        tokens = list(generate(model, ids, max_tokens=spec.max_tokens, sampling=sampling, stop=()))
        out.append(([t.id for t in tokens], "".join(t.text for t in tokens)))
    return out


def _chat_turn(model: Model, seed: int) -> Check:
    name = "chat turn"
    if model.tokenizer.template is None:
        return Check(name=name, passed=None, detail="the base has no chat template")
    messages = [{"role": "user", "content": CHAT_TURN}]
    try:
        tokens = list(
            chat(model, messages, max_tokens=CHAT_TOKENS, sampling=Sampling(temperature=0.6, top_p=0.95, seed=seed))
        )
    except CheckpointError as e:
        return Check(name=name, passed=False, detail=str(e))
    return Check(
        name=name,
        passed=bool(tokens),
        detail=f"{len(tokens)} tokens through the template, ended by {tokens[-1].finish}",
    )


def _tokens(project: Project, tokenizer: Tokenizer) -> list[int]:
    tokens = tokenizer.encode(smoke_text(project))[: project.ladder.smoke.text_tokens]
    if len(tokens) < 32:
        raise InputError(f"smoke.text: {len(tokens)} tokens, expected at least 32")
    return tokens
