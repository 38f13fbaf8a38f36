"""What a model is measured over: windows of tokens, and which positions of them count.

text: the tokens of a text in consecutive windows, of which the second half is scored, as `llama-perplexity
--kl-divergence` does it: of n tokens the predictions of n/2 + 1 … n − 1, a BOS in place of each window's first token if
the tokenizer adds one. chat: whole conversations through the chat template, scored where the assistant speaks.

Texts are a user's or the package's own; what is wrong with one is one line that names it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from inference.errors import InputError
from inference.tokenizer import Tokenizer

from .source import Source
from .store import digest

MAX_CONVERSATIONS = 1000
NGRAM = 32  # tokens; texts that share a run of so many share content
ROLES = ("system", "user", "assistant")
SHOWN = 60  # characters of a shared passage in a message


@dataclass(frozen=True)
class Window:
    """tokens, and the positions whose prediction (of the token behind) is scored."""

    tokens: tuple[int, ...]
    scored: tuple[int, ...]

    @property
    def targets(self) -> list[int]:
        return [self.tokens[i + 1] for i in self.scored]


@dataclass(frozen=True)
class Corpus:
    name: str  # text or chat
    windows: tuple[Window, ...]

    @cached_property
    def key(self) -> str:
        """Hash of the tokens and of the positions that count."""
        return digest([[list(w.tokens), list(w.scored)] for w in self.windows])

    @property
    def targets(self) -> list[int]:
        return [t for w in self.windows for t in w.targets]

    @property
    def sizes(self) -> list[int]:
        return [len(w.scored) for w in self.windows]

    @property
    def context(self) -> int:
        return max(len(w.tokens) for w in self.windows)


def text_corpus(source: Source, tokenizer: Tokenizer, windows: int, context: int) -> Corpus:
    """At most `windows` windows of `context` tokens. Raises InputError for a text that has not even two."""
    ids = tokenizer.encode(source.text)
    bos = tokenizer.bos()
    if bos is not None:
        ids = [bos, *ids]
    count = min(windows, len(ids) // context)
    if count < 2:
        raise InputError(f"{source.where}: {len(ids)} tokens, expected at least 2 windows of {context}")
    scored = tuple(range(context // 2, context - 1))
    out = []
    for i in range(count):
        tokens = ids[i * context : (i + 1) * context]
        if bos is not None:
            tokens[0] = bos
        out.append(Window(tuple(tokens), scored))
    return Corpus("text", tuple(out))


def read_conversations(source: Source) -> list[list[dict[str, str]]]:
    """Lists of {"role", "content"}: an array of them, or of objects with `messages`. Raises InputError."""
    where = source.where
    try:
        value = json.loads(source.text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not JSON ({str(e)[:100]})") from None
    if not isinstance(value, list) or not 2 <= len(value) <= MAX_CONVERSATIONS:
        raise InputError(f"{where}: expected an array of 2 to {MAX_CONVERSATIONS} conversations, found {_kind(value)}")
    return [_messages(entry, f"{where}[{i}]") for i, entry in enumerate(value)]


def _messages(entry: Any, where: str) -> list[dict[str, str]]:
    messages = entry.get("messages") if isinstance(entry, dict) else entry
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: expected a list of messages, found {_kind(messages)}")
    out = []
    for i, m in enumerate(messages):
        role, content = (m.get("role"), m.get("content")) if isinstance(m, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str) or not content.strip():
            raise InputError(
                f"{where}[{i}]: expected role ({', '.join(ROLES)}) and content (text), found {str(m)[:60]!r}"
            )
        out.append({"role": role, "content": content})
    if not any(m["role"] == "assistant" for m in out):
        raise InputError(f"{where}: the assistant says nothing in it")
    return out


def chat_corpus(
    source: Source, conversations: Sequence[Sequence[dict[str, str]]], tokenizer: Tokenizer, context: int
) -> Corpus:
    """Each conversation as the template writes it, cut at `context` tokens; those left without a scored token are out.

    Scored: tokens of the assistant's texts, and the token that ends each of them. Raises InputError where the template
    does not show these texts, CheckpointError where it fails.
    """
    windows = []
    for i, messages in enumerate(conversations):
        text = tokenizer.render_chat(messages, add_generation_prompt=False, enable_thinking=False)
        spans = _spans(text, messages, f"{source.where}[{i}]")
        ids, offsets = tokenizer.encode_offsets(text)
        ids, offsets = ids[:context], offsets[:context]
        scored = []
        for j in range(1, len(ids)):
            start, end = offsets[j]
            spoken = any(a <= start < b for a, b in spans)
            ends = ids[j] in tokenizer.stop_ids and any(offsets[j - 1][1] == start == b for _, b in spans)
            if (spoken and end > start) or ends:
                scored.append(j - 1)
        if scored:
            windows.append(Window(tuple(ids), tuple(scored)))
    if len(windows) < 2:
        raise InputError(f"{source.where}: fewer than 2 conversations have a token to score within {context} tokens")
    return Corpus("chat", tuple(windows))


def _spans(text: str, messages: Sequence[dict[str, str]], where: str) -> list[tuple[int, int]]:
    """Where the assistant's texts lie in the rendered conversation, in characters."""
    spans, at = [], 0
    for m in messages:
        content = m["content"].strip()
        found = text.find(content, at)
        if found < 0:
            if m["role"] != "assistant":
                continue  # a template may leave out or rewrite a system message
            raise InputError(f"{where}: the base's chat template does not show the assistant's text {content[:40]!r}")
        at = found + len(content)
        if m["role"] == "assistant":
            spans.append((found, at))
    return spans


def contents_of(conversations: Sequence[Sequence[dict[str, str]]], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokens of every message by itself: what a chat template writes around them is the same in all conversations."""
    return [tokenizer.encode(m["content"]) for messages in conversations for m in messages]


def check_overlap(
    contents: Sequence[Sequence[int]], where: str, calibration: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> None:
    """Raises InputError if evaluation and calibration share a run of NGRAM tokens: quality would be measured on what
    the weights were fitted to. where: names the evaluation's text."""
    theirs = np.unique(np.concatenate([_hashes(ids, NGRAM) for ids in calibration]))
    shared, first = 0, None
    for ids in contents:
        hits = np.flatnonzero(_among(_hashes(ids, NGRAM), theirs))
        shared += len(hits)
        if first is None and len(hits):
            first = list(ids[hits[0] : hits[0] + NGRAM])
    if first is not None:
        passage = " ".join(tokenizer.decode(first).split())[:SHOWN]
        raise InputError(
            f"{where}: shares {shared} runs of {NGRAM} tokens with the calibration's texts, the first {passage!r}; take "
            "another text"
        )


def _among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which values are known; `known` sorted, so that it is not sorted again for each message."""
    at = np.searchsorted(known, values)
    return known[np.minimum(at, len(known) - 1)] == values if len(known) else np.zeros(len(values), bool)


def _hashes(tokens: Sequence[int], n: int) -> np.ndarray:
    """64-bit hash of every run of n tokens."""
    ids = np.asarray(tokens, np.uint64)
    if len(ids) < n:
        return np.zeros(0, np.uint64)
    rng = np.random.default_rng(n)
    factors = rng.integers(0, 1 << 63, n, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    mixed = (ids + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    out = np.zeros(len(ids) - n + 1, np.uint64)
    for i, f in enumerate(factors):
        out += mixed[i : i + len(out)] * f
    return out


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} entries"
    return "nothing" if value is None else type(value).__name__
