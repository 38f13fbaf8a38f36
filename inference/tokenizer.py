"""Text ↔ token ids, the chat template, and text that streams.

`tokenizer.json` is read by the `tokenizers` library; nothing else defines the vocabulary. Chat templates are programs
from strangers: they run in Jinja's immutable sandbox, with the same extensions and functions that `transformers`
gives them. Everything that can be wrong with these files is one CheckpointError.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor
import tokenizers

from .checkpoint import read_json
from .errors import CheckpointError

MAX_TEMPLATE_BYTES = 1_000_000  # published templates are below 50 kB
STEPS = 1_000_000  # turns of `range` in one rendering; a template takes a few a message
TEXT = 4_000_000  # characters of one value
WIDE = re.compile(r"\d{4}")  # a width or precision in a format string
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")  # variables of a template
# What a template can raise while it runs: Jinja's errors and whatever its expressions do to our values.
TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
)  # fmt: skip


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
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # noqa: BLE001 - the library raises Exception itself
            raise CheckpointError(f"{path.name}: not a tokenizer ({str(e)[:120]})") from None
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        special = {key: text for key in SPECIAL_TOKENS if (text := _token_text(config, key)) is not None}
        stop = _stop_ids(folder, tokenizer, special.get("eos_token"))
        return cls(folder, stop, _template(folder, config), special, tokenizer)

    @property
    def vocab_size(self) -> int:
        """Ids that have a text; the model's vocabulary can be larger (padded)."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and of each the characters [start, end) of the text that it stands for."""
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
            template = _environment().from_string(self.template)
            return _bounded(
                template.generate(messages=list(messages), add_generation_prompt=add_generation_prompt, **given)
            )
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
    if path.is_file():
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"{path.name}: larger than {MAX_TEMPLATE_BYTES} bytes")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{path.name}: not UTF-8") from None
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {x.get("name"): x.get("template") for x in value if isinstance(x, dict)}
        value = named.get("default")
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


class _Plus(jinja2.visitor.NodeTransformer):
    """a ~ b → a | string + b | string: one operator to watch over."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Expr:
        self.generic_visit(node)
        texts: list[jinja2.nodes.Expr] = [
            jinja2.nodes.Filter(n, "string", [], [], None, None, lineno=node.lineno) for n in node.nodes
        ]
        total = texts[0]
        for text in texts[1:]:
            total = jinja2.nodes.Add(total, text, lineno=node.lineno)
        return total


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a bound on the work of one rendering: STEPS turns of `range`, TEXT characters in one value."""

    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.steps = 0
        self.globals["range"] = self._range

    def _parse(self, *source: Any) -> jinja2.nodes.Template:
        return _Plus().visit(super()._parse(*source))

    def _range(self, *bounds: int) -> Iterator[int]:
        for i in jinja2.sandbox.safe_range(*bounds):
            self.steps += 1
            if self.steps > STEPS:
                raise OverflowError(f"more than {STEPS} turns of loops")
            yield i

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        texts = [v for v in (left, right) if isinstance(v, str | list | tuple)]
        numbers = [v for v in (left, right) if isinstance(v, int)]
        if operator == "*" and texts and numbers and len(texts[0]) * max(numbers) > TEXT:
            raise OverflowError(f"a value of more than {TEXT} characters")
        if operator == "+" and sum(map(len, texts)) > TEXT:
            raise OverflowError(f"a value of more than {TEXT} characters")
        if operator == "**" and len(numbers) == 2 and abs(left).bit_length() * max(right, 0) > TEXT:
            raise OverflowError("a number that is too large")
        if operator == "%" and isinstance(left, str) and WIDE.search(left):
            raise OverflowError("a width of more than three digits")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(__obj, "__name__", "")
        wide = name in ("center", "ljust", "rjust", "zfill") and args and isinstance(args[0], int) and args[0] > TEXT
        owner = getattr(__obj, "__self__", None)
        if wide or (name in ("format", "format_map") and isinstance(owner, str) and WIDE.search(owner)):
            raise OverflowError(f"a value of more than {TEXT} characters")
        return super().call(__context, __obj, *args, **kwargs)


def _bounded(parts: Iterable[str]) -> str:
    """The text of a rendering, which ends when it grows beyond TEXT."""
    text, size = [], 0
    for part in parts:
        text.append(part)
        size += len(part)
        if size > TEXT:
            raise OverflowError(f"more than {TEXT} characters")
    return "".join(text)


def _bounded_format(value: str, *args: Any, **kwargs: Any) -> str:
    if WIDE.search(value):
        raise OverflowError("a width of more than three digits")
    return value % (kwargs or args)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """As `transformers.utils.chat_template_utils` sets it up, with bounds. One environment renders once."""
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    env.filters["tojson"] = _tojson
    env.filters["format"] = _bounded_format
    for name in ("center", "wordwrap", "pprint", "random", "batch", "slice"):  # they pad or are not deterministic
        del env.filters[name]
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


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
    raise jinja2.TemplateError(message)
