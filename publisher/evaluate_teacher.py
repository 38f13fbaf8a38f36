"""What the base in BF16 says over a corpus, computed once and kept: the teacher of every evaluation.

out/teacher/<key>/hidden.safetensors holds its final states at the scored positions, in float32: a few KB a token, from
which logits are made again; control.json how far the base is from itself when it is computed another way; greedy.json
its greedy continuations. The key is a hash of the base's text tensors, its config, the tokens and the arithmetic, so
nothing is ever found again that was computed from anything else. A pass holds one layer at a time.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from inference.backend import BACKEND, mx
from inference.divergence import compare, first_choices
from inference.errors import CheckpointError, ResourceError
from inference.generate import Sampling, generate
from inference.load import hidden_states_streamed, load, load_head

from .evaluate_corpora import Corpus, Window
from .evaluate_figures import divergence, greedy
from .schema import Continuations, Divergence, Greedy, Teacher
from .store import digest, read_result, sha256_file, write_bytes, write_model

# Bump with a reason when the same base would give other states.
# 2: on CUDA some rows of experts had been others' (`inference.linear`)
TEACHER_VERSION = 2
COMPUTE = "float32"
BATCH_TOKENS = 2048  # of windows that pass a layer together, padding included
WAVE_TOKENS = 1 << 17  # whose states are in memory together: 2 GB at a hidden size of 4096
CONTROL_STEP = 48  # tokens; not a multiple of the delta rule's chunks, so that they are cut elsewhere

Tick = Callable[[int, int], None]


def _quiet(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Reference:
    """The base: its folder, and the hash of its text tensors and config. root: the folder that keeps what it said."""

    folder: Path
    identity: str
    root: Path

    def key(self, corpus: Corpus) -> str:
        return digest([TEACHER_VERSION, self.identity, corpus.key, COMPUTE, BACKEND])

    def place(self, key: str) -> Path:
        return self.root / key[:16]

    def states(self, corpus: Corpus, tick: Tick = _quiet) -> mx.array:
        """Final states at the scored positions, [positions, H], found again or computed and kept."""
        key = self.key(corpus)
        found = _read_states(self.place(key), key)
        if found is None:
            found = final_states(self.folder, corpus.windows, tick=tick)
            _write_states(self.place(key), key, self.folder.name, corpus.name, found)
        return found

    def control(self, corpus: Corpus, tick: Tick = _quiet) -> Divergence:
        """The base against itself, window by window in pieces of CONTROL_STEP tokens with a cache: the noise floor."""
        key = self.key(corpus)
        path = self.place(key) / "control.json"
        known = read_result(path, Divergence)
        if known is not None and known.teacher == key:
            return known
        other = final_states(self.folder, corpus.windows, CONTROL_STEP, tick)
        found = self.measure(corpus, other, self.folder)
        write_model(path, found)
        return found

    def measure(self, corpus: Corpus, states: mx.array, folder: Path) -> Divergence:
        """The final states of the model in `folder` at the scored positions against the base's."""
        heads = load_head(self.folder, mx.float32), load_head(folder, mx.float32)
        found = compare(self.states(corpus), heads[0], states, heads[1], corpus.targets)
        return divergence(found, corpus.sizes, corpus.name, self.key(corpus), corpus.context)

    def greedy_control(self, said: Continuations, max_tokens: int) -> Greedy:
        """How long the base agrees with its own continuations when they are computed another way."""
        path = self.place(said.key) / "greedy_control.json"
        known = read_result(path, Greedy)
        if known is not None and known.lengths == [len(t) for t in said.tokens]:
            return known
        found = agreement(self.folder, said, max_tokens, CONTROL_STEP)
        write_model(path, found)
        return found

    def continuations(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Continuations:
        """Greedy continuations in float32. Raises ResourceError if the whole base does not fit."""
        asked = [list(p) for p in prompts]
        key = digest([TEACHER_VERSION, self.identity, asked, max_tokens, COMPUTE, BACKEND])
        path = self.place(key) / "greedy.json"
        known = read_result(path, Continuations)
        if known is not None and known.key == key:
            return known
        try:
            with out_of_memory(self.folder.name):
                tokens = _continue(self.folder, asked, max_tokens)
        finally:
            gc.collect()
            mx.clear_cache()
        found = Continuations(key=key, prompts=asked, tokens=tokens)
        write_model(path, found)
        return found


@contextmanager
def out_of_memory(name: str) -> Iterator[None]:
    """MLX's failed allocations as ResourceError."""
    try:
        yield
    except MemoryError:
        raise ResourceError(f"{name}: out of memory") from None
    except RuntimeError as e:  # what MLX raises when an allocation fails, on every backend
        if "alloc" not in str(e).lower() and "memory" not in str(e).lower():
            raise
        raise ResourceError(f"{name}: out of memory ({str(e).splitlines()[0][:120]})") from None


def final_states(folder: Path, windows: Sequence[Window], step: int | None = None, tick: Tick = _quiet) -> mx.array:
    """Final states of a model at the scored positions of windows, [positions, H] in float32, one layer at a time.

    step: each window by itself, in pieces of so many tokens; else many pass together. Peak: a layer, and the states of
    WAVE_TOKENS tokens.
    """
    batches = [[w] for w in windows] if step else _batches(windows)
    waves = _waves(batches)
    out = []
    done = 0
    for wave in waves:
        tokens = [_padded(batch) for batch in wave]

        def passed(layer: int, start: int = done) -> None:
            tick(start + layer + 1, (layer + 2) * len(waves))

        states = hidden_states_streamed(folder, tokens, compute=mx.float32, step=step, after_layer=passed)
        for batch, state in zip(wave, states, strict=True):
            out += [state[i][mx.array(w.scored)].astype(mx.float32) for i, w in enumerate(batch)]
        mx.eval(out)
    found = mx.concatenate(out)
    mx.eval(found)
    return found


def agreement(folder: Path, said: Continuations, max_tokens: int, step: int | None = None) -> Greedy:
    """How long a model's own greedy continuation is BF16's.

    One pass over prompt and continuation tells: until the first difference both have the same tokens before them, so
    its free-running choice there is its first choice here.
    """
    windows = [
        Window((*prompt, *tokens[:-1]), tuple(range(len(prompt) - 1, len(prompt) + len(tokens) - 1)))
        for prompt, tokens in zip(said.prompts, said.tokens, strict=True)
    ]
    states = final_states(folder, windows, step)
    choices = first_choices(load_head(folder, mx.float32), states)
    agreed, at = [], 0
    for tokens in said.tokens:
        same = choices[at : at + len(tokens)] == np.array(tokens)
        agreed.append(len(tokens) if same.all() else int(same.argmin()))
        at += len(tokens)
    return greedy(agreed, [len(t) for t in said.tokens], max_tokens)


def _continue(folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    model = load(folder, mx.float32)
    return [[t.id for t in generate(model, p, max_tokens=max_tokens, sampling=Sampling())] for p in prompts]


def _batches(windows: Sequence[Window]) -> list[list[Window]]:
    """Windows behind each other, as many as fill BATCH_TOKENS when all are as long as the longest."""
    out: list[list[Window]] = []
    longest = 0
    for w in windows:
        longest = max(longest, len(w.tokens))
        if out and (len(out[-1]) + 1) * longest <= BATCH_TOKENS:
            out[-1].append(w)
        else:
            out.append([w])
            longest = len(w.tokens)
    return out


def _padded(batch: Sequence[Window]) -> mx.array:
    """Tokens [B, T], shorter windows filled up behind their end: no position reads what comes after it, and none of the
    filling is scored."""
    longest = max(len(w.tokens) for w in batch)
    return mx.array([[*w.tokens, *[0] * (longest - len(w.tokens))] for w in batch])


def _waves(batches: Sequence[list[Window]]) -> list[list[list[Window]]]:
    out: list[list[list[Window]]] = [[]]
    size = 0
    for batch in batches:
        tokens = sum(len(w.tokens) for w in batch)
        if out[-1] and size + tokens > WAVE_TOKENS:
            out.append([])
            size = 0
        out[-1].append(batch)
        size += tokens
    return out


def _write_states(folder: Path, key: str, base: str, corpus: str, states: mx.array) -> None:
    data = np.ascontiguousarray(np.array(states), "<f4")
    header = json.dumps(
        {"hidden": {"dtype": "F32", "shape": list(data.shape), "data_offsets": [0, data.nbytes]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    pieces = (len(header).to_bytes(8, "little"), header, memoryview(data.tobytes()))
    sha = sha256()
    for piece in pieces:
        sha.update(piece)
    write_bytes(folder / "hidden.safetensors", *pieces)
    teacher = Teacher(
        key=key, base=base, corpus=corpus, positions=data.shape[0], hidden_size=data.shape[1],
        nbytes=sum(len(p) for p in pieces), sha256=sha.hexdigest(),
    )  # fmt: skip
    write_model(folder / "teacher.json", teacher)  # last: without it nothing is believed


def _read_states(folder: Path, key: str) -> mx.array | None:
    """What was kept under this key; None if there is nothing, or not what was written."""
    teacher, path = read_result(folder / "teacher.json", Teacher), folder / "hidden.safetensors"
    if teacher is None or teacher.key != key or not path.is_file() or path.stat().st_size != teacher.nbytes:
        return None
    if sha256_file(path) != teacher.sha256:
        return None
    loaded = mx.load(str(path))
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: no safetensors file; delete it")
    return loaded["hidden"]
