"""`publish chat`: a conversation in the terminal with a variant, through its own chat template."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference.checkpoint import read_json
from inference.errors import InputError
from inference.generate import Sampling, chat, generate
from inference.load import PREFILL_STEP, Model, Weights, load
from inference.tokenizer import Tokenizer

from .card_format import size
from .prune import require_weights
from .report import Report
from .schema import Manifest
from .store import read_model
from .variants import load_project

GENERATION_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
EXPECTED = "expected a variant's id, or a folder that holds one"
HELP = "Ctrl-D leaves; /new starts over"


def find_folder(file: Path, name: str) -> Path:
    """A variant of the ladder by id, or a folder by path. Raises InputError."""
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    if "/" in name:  # no id has one
        raise InputError(f"{name}: {'no config.json in it' if path.is_dir() else 'no such folder'}; {EXPECTED}")
    project = load_project(file)
    if path.is_dir() and name not in project.ladder.variants:
        raise InputError(f"{name}: no variant of {project.path.name}, and no config.json in the folder; {EXPECTED}")
    (id,) = project.select([name])
    folder = project.store.variant(id)
    if not (folder / "config.json").is_file():
        raise InputError(f"{id}: not built; run: publish build {id}")
    manifest = read_model(project.store.manifest(id), Manifest)
    if manifest:
        require_weights(project, manifest)
    return folder


def sampling_of(folder: Path, given: dict[str, Any]) -> Sampling:
    """The model's own sampling (generation_config.json) under what was given. Greedy if the model says do_sample false."""
    own: dict[str, Any] = {}
    path = folder / "generation_config.json"
    if path.is_file():
        config = read_json(path)
        if config.get("do_sample"):
            own = {k: config[k] for k in GENERATION_KEYS if isinstance(config.get(k), int | float)}
    values = {**own, **{k: v for k, v in given.items() if v is not None and k in (*GENERATION_KEYS, "seed")}}
    try:
        return Sampling(**values)
    except InputError as e:
        raise InputError(f"{folder.name}/generation_config.json or an option: {e}") from None


def talk(
    folder: Path,
    prompt: str | None,
    think: bool | None,
    given: dict[str, Any],
    echo: Callable[..., None],
    report: Report,
) -> list[dict[str, str]]:
    """One question, or a conversation until end of file; returns its turns. The caches stay, so that a turn prefills only
    what is new. Raises InputError where question and answer exceed the model's context, before weights are read."""
    sampling, max_tokens = sampling_of(folder, given), given["max_tokens"]
    variables = {} if think is None else {"enable_thinking": think}
    model = load(folder, context=_context(folder, prompt, max_tokens, variables))
    if prompt is not None:
        answer = _answer(model, [], prompt, model.make_cache(), sampling, max_tokens, variables, echo)
        return [{"question": prompt, "answer": answer}]
    if sys.stdin.isatty():
        report.line(f"{folder.name}: {size(model.nbytes)} in memory. {HELP}")
    messages: list[dict[str, Any]] = []
    turns: list[dict[str, str]] = []
    cache = model.make_cache()
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
            question = line.encode(errors="surrogateescape").decode(errors="replace").strip()
        except EOFError:
            return turns
        if question == "/new":
            messages, cache = [], model.make_cache()
        elif question:
            answer = _answer(model, messages, question, cache, sampling, max_tokens, variables, echo)
            turns.append({"question": question, "answer": answer})
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _context(folder: Path, prompt: str | None, max_tokens: int, variables: dict[str, Any]) -> int:
    """Tokens that memory must have room for: of the question, as the template puts it, and its answer; of a conversation,
    whose questions are not known yet, of one piece of prefill and an answer, as far as the model's context goes."""
    most = Weights(folder).config.max_position_embeddings
    if prompt is None:
        if max_tokens >= most:
            raise InputError(f"--max-tokens {max_tokens} exceeds the context of {most}")
        return min(most, PREFILL_STEP + max_tokens)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.template is None:
        tokens = len(tokenizer.encode(prompt))
    else:
        tokens = len(tokenizer.encode_chat([{"role": "user", "content": prompt}], **variables))
    if tokens + max_tokens > most:
        raise InputError(f"{tokens} prompt tokens and {max_tokens} new ones exceed the context of {most}")
    return tokens + max_tokens


def _answer(
    model: Model,
    messages: list[dict[str, Any]],
    question: str,
    cache: Any,
    sampling: Sampling,
    max_tokens: int,
    variables: dict[str, Any],
    echo: Callable[..., None],
) -> str:
    """Stream one answer; returns its text. A model without a chat template continues the text instead."""
    text: list[str] = []
    if model.tokenizer.template is None:
        tokens = generate(model, model.tokenizer.encode(question), max_tokens=max_tokens, sampling=sampling)
    else:
        asked = [*messages, {"role": "user", "content": question}]
        tokens = chat(model, asked, cache=cache, max_tokens=max_tokens, sampling=sampling, **variables)
    for token in tokens:
        text.append(token.text)
        echo(token.text, nl=False)
    echo("")
    return "".join(text)
