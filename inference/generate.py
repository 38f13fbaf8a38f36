"""Prompt in, tokens out: prefill in pieces, decode with one step always in flight, sampling on the device.

    for token in generate(model, ids, max_tokens=100, sampling=Sampling(temperature=0.7, top_p=0.9, seed=1)):
        print(token.text, end="")

While Python looks at token n, the device computes token n + 1 already. The order of sampling is that of
`transformers`, whose `generation_config.json` models ship: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .backend import mx
from .cache import Cache
from .errors import InputError
from .load import Model


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Raises InputError for values that have no meaning.

    temperature 0: the most likely one, other filters then change nothing. top_k 0, top_p 1, min_p 0 and
    repetition_penalty 1 are off. repetition_penalty (arXiv 1909.05858) covers the prompt and all that was generated.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, good, expected in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "≥ 0"),
            ("top_k", self.top_k, self.top_k >= 0, "≥ 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "> 0"),
            ("seed", self.seed, 0 <= self.seed < 1 << 64, "in [0, 2^64)"),
        ):
            if not good:
                raise InputError(f"{name} {value}: must be {expected}")


@dataclass(frozen=True)
class Timing:
    """Up to and including one token. decode_s counts from the first token on, for generated - 1 tokens."""

    prompt_tokens: int
    cached_tokens: int  # of these, found in the cache and not prefilled
    prefill_s: float
    ttft_s: float
    generated: int
    decode_s: float

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens per second, without the cached ones."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s

    @property
    def decode_tps(self) -> float | None:
        return (self.generated - 1) / self.decode_s if self.generated > 1 and self.decode_s > 0 else None


@dataclass(frozen=True)
class Token:
    """One generated token. text is what became certain with it: empty inside a UTF-8 character and for a stop token."""

    id: int
    text: str
    finish: Literal["stop", "length"] | None
    timing: Timing


def generate(
    model: Model,
    prompt: Sequence[int],
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Iterable[int] | None = None,
    cache: Cache | None = None,
    prefill_step: int | None = None,
    checkpoint_at: int | None = None,
) -> Iterator[Token]:
    """Tokens that follow the prompt, the last one with `finish` set.

    stop: ids that end the text, by default the tokenizer's; an empty one runs to max_tokens. cache: of an earlier
    call, its longest usable prefix of the prompt is not computed again. prefill_step: tokens that run at once, by default
    the model's. checkpoint_at: a length of the prompt that
    the next call can return to, if it will differ from there on (see `chat`).
    Raises InputError for an empty prompt, one beyond the model's context, or ids outside its vocabulary.
    """
    prompt = list(prompt)
    prefill_step = model.prefill_step if prefill_step is None else prefill_step
    _check_prompt(model, prompt, max_tokens, prefill_step)
    sampling = sampling or Sampling()
    stop = model.tokenizer.stop_ids if stop is None else frozenset(stop)
    return _generate(
        model, prompt, max_tokens, sampling, stop, cache or model.make_cache(), prefill_step, checkpoint_at
    )


def chat(
    model: Model,
    messages: Sequence[dict[str, Any]],
    *,
    cache: Cache | None = None,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    **variables: Any,
) -> Iterator[Token]:
    """The assistant's answer to messages; variables such as enable_thinking go to the chat template.

    Pass the same cache with the grown list of messages: only what is new is prefilled. Templates write an assistant's
    turn differently once it is history (without its thoughts), so the cache keeps a state from before the answer.
    """
    tokenizer = model.tokenizer
    prompt = tokenizer.encode_chat(messages, **variables)
    history = tokenizer.encode_chat(messages, add_generation_prompt=False, **variables)
    shared = len(history) if prompt[: len(history)] == history else None
    return generate(
        model, prompt, max_tokens=max_tokens, sampling=sampling, cache=cache, checkpoint_at=shared
    )  # fmt: skip


def _check_prompt(model: Model, prompt: list[int], max_tokens: int, prefill_step: int) -> None:
    if not prompt:
        raise InputError("the prompt has no tokens")
    if max_tokens < 1 or prefill_step < 1:
        raise InputError(f"max_tokens {max_tokens}, prefill_step {prefill_step}: must be at least 1")
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if len(prompt) + max_tokens > context:
        raise InputError(f"{len(prompt)} prompt tokens and {max_tokens} new ones exceed the context of {context}")
    if min(prompt) < 0 or max(prompt) >= vocab:
        bad = next(t for t in prompt if not 0 <= t < vocab)
        raise InputError(f"token id {bad} is outside the vocabulary of {vocab}")


def _generate(
    model: Model,
    prompt: list[int],
    max_tokens: int,
    sampling: Sampling,
    stop: frozenset[int],
    cache: Cache,
    prefill_step: int,
    checkpoint_at: int | None,
) -> Iterator[Token]:
    start = time.perf_counter()
    cached = cache.reuse(prompt)
    logits = _prefill(model, prompt, cache, prefill_step, checkpoint_at)
    prefilled = time.perf_counter()
    sampler = _Sampler(sampling, prompt, model.config.vocab_size)
    y = sampler(logits)
    mx.async_eval(y)
    detokenizer = model.tokenizer.detokenizer()
    first = 0.0
    for n in range(1, max_tokens + 1):
        upcoming = None
        if n < max_tokens:  # runs while y is looked at; wasted once, if y is a stop token
            upcoming = sampler(model.step(y[:, None], cache)[:, -1])
            mx.async_eval(upcoming)
        token = int(y.item())  # type: ignore[arg-type]
        now = time.perf_counter()
        first = first or now
        if upcoming is not None:
            cache.tokens.append(token)
        finish: Literal["stop", "length"] | None = "stop" if token in stop else "length" if n == max_tokens else None
        text = "" if finish == "stop" else detokenizer.add(token)
        if finish:
            text += detokenizer.flush()
        timing = Timing(len(prompt), cached, prefilled - start, first - start, n, now - first)
        yield Token(token, text, finish, timing)
        if finish or upcoming is None:
            return
        y = upcoming


def _prefill(model: Model, prompt: list[int], cache: Cache, prefill_step: int, checkpoint_at: int | None) -> mx.array:
    """Feed what the cache lacks of the prompt, in pieces; logits [1, V] of its last token, evaluated."""
    logits = None
    while cache.length < len(prompt):
        end = min(len(prompt), cache.length + prefill_step)
        if checkpoint_at is not None and cache.length < checkpoint_at < end:
            end = checkpoint_at
        piece = prompt[cache.length : end]
        hidden = model.hidden(mx.array([piece]), cache, last_only=True)
        cache.tokens.extend(piece)
        if end < len(prompt):
            mx.eval(cache.arrays())
        else:
            logits = model.logits(hidden)[:, -1]
            mx.eval(logits, cache.arrays())
        if end == checkpoint_at:
            cache.checkpoint()
    assert logits is not None
    return logits


class _Sampler:
    """logits [1, V] → token [1], all on the device; remembers seen tokens and the random state."""

    def __init__(self, sampling: Sampling, prompt: list[int], vocab_size: int) -> None:
        self.sampling = sampling
        self.key = mx.random.key(sampling.seed) if sampling.temperature > 0 else None
        self.seen: mx.array | None = None
        if sampling.repetition_penalty != 1:
            seen = mx.zeros((1, vocab_size), mx.bool_)
            seen[:, mx.array(sorted(set(prompt)))] = True
            self.seen = seen

    def __call__(self, logits: mx.array) -> mx.array:
        logits = logits.astype(mx.float32)
        if self.seen is not None:
            logits = penalise(logits, self.seen, self.sampling.repetition_penalty)
        if self.key is None:
            y = mx.argmax(logits, axis=-1)
        else:
            self.key, key = mx.random.split(self.key)
            y = mx.random.categorical(filter_logits(logits, self.sampling), key=key)
        if self.seen is not None:
            self.seen = self.seen | (mx.arange(logits.shape[-1]) == y[:, None])
        return y


def penalise(logits: mx.array, seen: mx.array, penalty: float) -> mx.array:
    """Divide the positive and multiply the negative logits of seen tokens; [1, V], bool [1, V] → [1, V]."""
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: mx.array, s: Sampling) -> mx.array:
    """Scaled by temperature, −inf for every token that top-k, top-p and min-p exclude, in this order. [1, V] float32.

    top-k keeps k tokens (and those tied with the last); top-p the fewest whose probabilities, renormalised after
    top-k, reach top_p; min-p those at least min_p times as likely as the first. The most likely token always stays.
    """
    logits = logits / s.temperature
    if 0 < s.top_k < logits.shape[-1]:
        least = mx.min(mx.topk(logits, s.top_k, axis=-1), axis=-1, keepdims=True)
        logits = mx.where(logits < least, -mx.inf, logits)
    if s.top_p < 1:
        order = mx.argsort(-logits, axis=-1)
        p = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1, precise=True)
        drop = mx.cumsum(p, axis=-1, inclusive=False) >= s.top_p  # what comes before reaches top_p already
        logits = mx.put_along_axis(
            logits, order, mx.where(drop, -mx.inf, mx.take_along_axis(logits, order, -1)), axis=-1
        )
    if s.min_p > 0:
        logits = mx.where(logits < logits.max(axis=-1, keepdims=True) + math.log(s.min_p), -mx.inf, logits)
    return logits
