"""Text ↔ token ids, the chat template, and text that streams.

`tokenizer.json` is read by the `tokenizers` library; nothing else defines the vocabulary. Chat templates are programs
from strangers: they run in the sandbox of `inference.sandbox`, with the same extensions and functions that
`transformers` gives them. Everything that can be wrong with these files is one CheckpointError.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import tokenizers

from .checkpoint import read_json
from .errors import CheckpointError
from .sandbox import TEMPLATE_ERRORS, Metered
from .strict import parse_json, read_file

MAX_TOKENIZER_BYTES = 100 << 20  # the largest published are about 35 MB
MAX_TEMPLATE_BYTES = 256 << 10  # published ones are below 50 kB; compiling takes up to a hundred times as much memory
WORK = 20_000_000  # units of the sandbox for one rendering, about a second; a template takes a few thousand a message
WORK_BY_SIZE = 500  # more of them for each character of the messages
TEXT = 4 << 20  # bytes that a template may add to the messages
GROWTH = 64  # largest factor by which normalizers and decoders may make a text longer; published ones make 3 of 1
ESCAPED_LETTER = re.compile(rb"\\u00(?:[46][1-9a-fA-F]|[57][0-9aA]|5[fF])")  # no writer of JSON spells letters so
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")  # variables of a template


@dataclass
class Tokenizer:
    """A model's tokenizer. `stop_ids` end a generation; `template` is the chat template's source, if any."""

    folder: Path
    stop_ids: frozenset[int]
    template: str | None
    special: dict[str, str]  # bos_token, eos_token, …: text, where defined
    _tokenizer: tokenizers.Tokenizer

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Raises CheckpointError if a file is missing or malformed."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        data = read_file(path, MAX_TOKENIZER_BYTES)
        _check_charsmaps(path, data)
        with _library(f"{path.name}: not a tokenizer"):
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
            # a stranger's settings of these would cut texts short, or fill them up to any length
            tokenizer.no_truncation()
            tokenizer.no_padding()
            parts = [x.__getstate__() for x in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder) if x]
        _check_growth(path, parts)
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        special = {key: text for key in SPECIAL_TOKENS if (text := _token_text(config, key)) is not None}
        stop = _stop_ids(folder, tokenizer, special.get("eos_token"))
        return cls(folder, stop, _template(folder, config), special, tokenizer)

    @property
    def vocab_size(self) -> int:
        """Ids that have a text; the model's vocabulary can be larger (padded)."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        with _library("tokenizer.json: cannot encode the text"):
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and of each the characters [start, end) of the text that it stands for."""
        with _library("tokenizer.json: cannot encode the text"):
            found = self._tokenizer.encode(text, add_special_tokens=False)
            return found.ids, found.offsets

    def bos(self) -> int | None:
        """The BOS id if this tokenizer begins a text with it: by `add_bos_token` of tokenizer_config.json, else by what
        tokenizer.json adds. Raises CheckpointError if it should and there is none."""
        path = self.folder / "tokenizer_config.json"
        wanted = read_json(path).get("add_bos_token") if path.is_file() else None
        text = self.special.get("bos_token")
        token = self._tokenizer.token_to_id(text) if text is not None else None
        if wanted is True and token is None:
            raise CheckpointError(
                "tokenizer_config.json: add_bos_token is true, but bos_token is not in tokenizer.json"
            )
        if isinstance(wanted, bool):
            return token if wanted else None
        return token if token is not None and self.encode("a", add_special_tokens=True)[:1] == [token] else None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        with _library("tokenizer.json: cannot decode ids", silent=False):
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for messages ({"role", "content"}, …); variables (tools, enable_thinking, …) go to the template.

        Raises CheckpointError if there is no template or it fails.
        """
        if self.template is None:
            raise CheckpointError(f"{self.folder.name}: has no chat template")
        given = {"tools": None, "documents": None, **self.special, **variables}
        try:
            env = _Sandbox([list(messages), given])
            template = env.template_class.from_code(env, _compiled(self.template), env.make_globals(None))
            return env.run(template, messages=list(messages), add_generation_prompt=add_generation_prompt, **given)
        except TEMPLATE_ERRORS as e:
            first_line = (str(e).splitlines() or [""])[0]
            raise CheckpointError(
                f"{self.folder.name}: chat template: {type(e).__name__}: {first_line[:200]}"
            ) from None

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        return self.encode(self.render_chat(messages, add_generation_prompt=add_generation_prompt, **variables))

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self)


class Detokenizer:
    """Ids one by one → text as soon as it is certain.

    Text that ends inside a UTF-8 character is held back until the character is whole. Only the ids since the last two
    such points are decoded again, so the cost of a token does not grow. The texts joined, `flush` last, are the text
    of all ids at once.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # since the last but one point
        self._settled = 0  # of these, how many are in text already given out

    def add(self, token: int) -> str:
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith("�"):
            return ""
        del self._ids[: self._settled]  # what stays gives the decoder the context that it needs (leading spaces)
        self._settled = len(self._ids)
        return text

    def flush(self) -> str:
        """What was held back, with � for a character that never became whole."""
        text = self._new_text()
        self._ids, self._settled = [], 0
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._settled])
        return self._tokenizer.decode(self._ids)[len(before) :]


def _token_text(config: dict[str, Any], key: str) -> str | None:
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"tokenizer_config.json: {key}: found {value!r}, expected a string")
    return value


def _stop_ids(folder: Path, tokenizer: tokenizers.Tokenizer, eos_token: str | None) -> frozenset[int]:
    """eos_token_id of generation_config.json, and the tokenizer's own eos_token."""
    ids: set[int] = set()
    path = folder / "generation_config.json"
    if path.is_file():
        value = read_json(path).get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(v) is int and v >= 0 for v in values):
            raise CheckpointError(f"generation_config.json: eos_token_id: found {value!r}, expected ids")
        ids.update(values)
    if eos_token is not None:
        token = tokenizer.token_to_id(eos_token)
        if token is None:
            raise CheckpointError(f"tokenizer_config.json: eos_token {eos_token!r} is not in tokenizer.json")
        ids.add(token)
    return frozenset(ids)


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else `chat_template` of tokenizer_config.json (of several, the one named default)."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return read_file(path, MAX_TEMPLATE_BYTES).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{path.name}: not UTF-8") from None
    value = config.get("chat_template")
    if isinstance(value, list):
        value = next((x.get("template") for x in value if isinstance(x, dict) and x.get("name") == "default"), None)
        if value is None:
            raise CheckpointError("tokenizer_config.json: chat_template: none of the templates is named default")
    if value is not None and not isinstance(value, str):
        raise CheckpointError("tokenizer_config.json: chat_template: expected a string")
    return value


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, which marks the assistant's part for training; here just its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(Metered):
    """As `transformers.utils.chat_template_utils` sets it up, with a budget by the size of what is given to the template."""

    what = "chat"

    def __init__(self, given: Any) -> None:
        super().__init__(
            work=WORK,
            output=TEXT,
            template_bytes=MAX_TEMPLATE_BYTES,
            globals_=("range", "dict", "cycler", "joiner", "namespace"),
            # `random` and `pprint` give another text each time
            filters_=jinja2.filters.FILTERS.keys() - {"random", "pprint"},
            functions={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
            filters={"tojson": _tojson},
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        size = self.weigh(given)
        self.work = self.left = WORK + WORK_BY_SIZE * size
        self.output += 4 * size


@lru_cache(maxsize=8)
def _compiled(template: str) -> CodeType:
    """The code of a template, kept: compiling takes fifteen times as long as rendering a short conversation. No budget
    is evaded, as nothing is computed while compiling. Raises what a template can raise."""
    return _Sandbox([]).compile(template)


@contextmanager
def _library(what: str, silent: bool = True) -> Iterator[None]:
    """Whatever the tokenizers library raises, its panics included, as one CheckpointError.

    A panic also writes where it happened to the process's stderr, which is closed to it meanwhile (silent).
    """
    try:
        with _silence() if silent else nullcontext():
            yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as e:  # noqa: BLE001 - Exception itself, and PanicException, which is none
        raise CheckpointError(f"{what} ({str(e)[:120]})") from None


_one_at_a_time = threading.RLock()  # there is one stderr


@contextmanager
def _silence() -> Iterator[None]:
    with _one_at_a_time:
        try:
            kept = os.dup(2)
        except OSError:  # there is none
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _check_charsmaps(path: Path, data: bytes) -> None:
    """Raises CheckpointError for a normalizer's table that is shorter than it says: the library would ask for up to 8 GB
    for it, and where there are none that ends the process without a word."""
    if b"precompiled_charsmap" not in data and not ESCAPED_LETTER.search(data):
        return
    try:
        stack = [parse_json(data)]
    except ValueError as e:
        raise CheckpointError(f"{path.name}: not JSON ({e})") from None
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            table = value.get("precompiled_charsmap")
            if isinstance(table, str):
                try:
                    raw = base64.b64decode(table, validate=True)
                except ValueError:
                    raise CheckpointError(f"{path.name}: precompiled_charsmap: expected base64") from None
                if len(raw) < 4 or int.from_bytes(raw[:4], "little") > len(raw) - 4:
                    raise CheckpointError(f"{path.name}: precompiled_charsmap: shorter than it says")
            stack += [v for k, v in value.items() if k != "model"]
        elif isinstance(value, list):
            stack += value


def _check_growth(path: Path, parts: Sequence[bytes]) -> None:
    """Raises CheckpointError where replacements in a row would make much of little: forty times `a` → `aa` is a terabyte.

    parts: normalizer, pre-tokenizer and decoder as the library writes them.
    """
    for part in parts:
        growth = 1.0
        stack = [json.loads(part)]
        while stack:
            step = stack.pop()
            if isinstance(step, dict):
                content = step.get("content", step.get("prepend"))
                if step.get("type") == "ByteLevel":
                    growth *= 2  # a character for each byte, most of them of two bytes
                if step.get("type") in ("Replace", "Prepend") and isinstance(content, str):
                    pattern = step.get("pattern")
                    found = pattern.get("String") if isinstance(pattern, dict) else None
                    # a regular expression may match nothing at all, between any two characters
                    growth *= max(1.0, len(content.encode()) / len(found.encode()) if found else 1 + len(content))
            stack += step.values() if isinstance(step, dict) else step if isinstance(step, list) else ()
        if growth > GROWTH:
            raise CheckpointError(
                f"{path.name}: its replacements make {growth:.3g} characters of one, expected at most {GROWTH}"
            )


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Iterable[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's own escaping of HTML characters."""
    pair = None if separators is None else tuple(separators)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)  # type: ignore[arg-type]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if any(c.isdigit() for c in form):
        raise jinja2.TemplateError("strftime_now: a width in a form of time")
    return datetime.datetime.now().strftime(form)
