"""The benchmark: a multi-turn chat and prefill at stated lengths, on one loaded model.

The protocol of the reference cards: decode is the steady state of the last turn, when the caches hold the whole chat.
Greedy, and stop tokens are ignored, so that every model generates the same number of tokens. One warm-up run is thrown
away; of the others median, lowest and highest are kept. Memory is measured in the warm-up run, since emptying the
allocator's cache between prefill and decode would cost time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from inference.backend import device_info, mx, peak_memory, reset_peak_memory
from inference.errors import InputError
from inference.generate import Sampling, Token, generate
from inference.load import Model

from . import __version__
from .protocol import CHAT
from .schema import BenchSpec, Device, Speed, Stat

QUESTION = 64  # tokens of a question and what the template puts around a turn, generously


def measure(
    model: Model, spec: BenchSpec, text: str, tick: Callable[[int, int], None] = lambda done, total: None
) -> Speed:
    """text: whose tokens fill the prefill prompts. tick: called with (runs done, runs in all).

    Lengths beyond the model's context are left out. Raises InputError if the chat does not fit into it.
    """
    reset_peak_memory()
    decode, ttft = [], []
    memory = _Memory()
    prefill: dict[int, list[float]] = {n: [] for n in spec.prefill if n < model.config.max_position_embeddings}
    ids = model.tokenizer.encode(text)
    for run in range(spec.runs + 1):
        last = _chat(model, spec, None if run else memory)
        speeds = {n: _prefill(model, ids, n) for n in prefill}
        tick(run + 1, spec.runs + 1)
        if run:
            if last.timing.decode_tps:
                decode.append(last.timing.decode_tps)
            ttft.append(last.timing.ttft_s)
            for n, tps in speeds.items():
                prefill[n].append(tps)
    return Speed(
        decode_tps=_stat(decode),
        prefill_tps={n: s for n, v in prefill.items() if (s := _stat(v))},
        ttft_s=_stat(ttft),
        peak_gb=_gb(max(memory.peak, peak_memory())),
        decode_peak_gb=_gb(memory.decode),
        held_gb=_gb(memory.held),
    )


def context(spec: BenchSpec) -> int:
    """Tokens that the protocol needs room for, about: of the longest prompt, or of the whole chat."""
    return max(*spec.prefill, spec.turns * (spec.turn_tokens + QUESTION))


def device() -> Device:
    info = device_info()
    return Device(
        name=info.device,
        backend=info.backend,
        os=info.os,
        memory_gb=round(info.memory_bytes / 1e9, 1),
        mlx=info.mlx,
        tool=f"mlx-publish {__version__}",
        blas=info.blas,
    )


@dataclass
class _Memory:
    """Bytes. peak: before the last turn's decode; decode: most during it; held: weights and caches when it ends."""

    peak: int = 0
    decode: int = 0
    held: int = 0


def _chat(model: Model, spec: BenchSpec, memory: _Memory | None) -> Token:
    """The last token of the last turn. memory: is filled in, where it is to be measured."""
    tokenizer, cache = model.tokenizer, model.make_cache()
    messages: list[dict[str, Any]] = []
    plain = ""
    token = None
    for turn in range(spec.turns):
        question = CHAT[turn % len(CHAT)]
        messages.append({"role": "user", "content": question})
        plain += question + "\n"
        shared = None
        if tokenizer.template is not None:
            prompt = tokenizer.encode_chat(messages, enable_thinking=False)
            history = tokenizer.encode_chat(messages, add_generation_prompt=False, enable_thinking=False)
            shared = len(history) if prompt[: len(history)] == history else None
        else:
            prompt = tokenizer.encode(plain)
        context = model.config.max_position_embeddings
        if len(prompt) + spec.turn_tokens > context:
            raise InputError(
                f"bench: turn {turn + 1} needs {len(prompt) + spec.turn_tokens} tokens, the model's context is {context}; "
                "lower bench.turns or bench.turn_tokens"
            )
        answer = []
        for token in generate(
            model, prompt, max_tokens=spec.turn_tokens, sampling=Sampling(), stop=(), cache=cache, checkpoint_at=shared
        ):
            if memory and len(answer) == 0:
                memory.peak = max(memory.peak, peak_memory())
                reset_peak_memory()
            answer.append(token.text)
        if memory:
            memory.decode, memory.held = peak_memory(), model.nbytes + cache.nbytes
            memory.peak = max(memory.peak, memory.decode)
        messages.append({"role": "assistant", "content": "".join(answer)})
        plain += "".join(answer) + "\n"
    assert token is not None
    return token


def _prefill(model: Model, ids: Sequence[int], length: int) -> float:
    """Prompt tokens a second for a prompt of this length, logits of its last token included."""
    prompt = (list(ids) * (length // len(ids) + 1))[:length]
    cache, tokens = model.make_cache(), mx.array([prompt])
    start = time.perf_counter()
    mx.eval(model.forward(tokens, cache, last_only=True), cache.arrays())
    return length / (time.perf_counter() - start)


def _gb(nbytes: int) -> float:
    return round(nbytes / 1e9, 3)


def _stat(values: list[float]) -> Stat | None:
    if not values:
        return None
    return Stat(
        median=float(f"{statistics.median(values):.4g}"), low=float(f"{min(values):.4g}"), high=float(f"{max(values):.4g}"),
        runs=len(values),
    )  # fmt: skip
