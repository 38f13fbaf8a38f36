"""Where card templates run: Jinja's sandbox with a budget (`inference.sandbox`), narrowed to data.

Reach: a template sees the fields and properties of our dataclasses, the fields of our pydantic models, and a list of
harmless methods of text, lists and mappings. Every other attribute is refused before it is read (pydantic's own methods
unpickle and open files), and so is every callable but macros, blocks and the functions and filters named here. Filters
that would print another text each time (`random`, `pprint`) are left out.

Work: WORK units a card, which has at most OUTPUT bytes; a template TEMPLATE_BYTES.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from inspect import getattr_static
from types import CodeType, NoneType
from typing import Any

from jinja2 import BaseLoader, BytecodeCache, StrictUndefined, TemplateRuntimeError, Undefined
from jinja2.bccache import Bucket
from jinja2.environment import TemplateModule
from jinja2.runtime import BlockReference, LoopContext, TemplateReference
from jinja2.utils import Cycler, Namespace

from inference.sandbox import METHODS, Metered, words

from .card_notes import CARD_BYTES
from .schema import File

WORK = 20_000_000  # units; a card of six variants takes about 80 thousand
OUTPUT = CARD_BYTES
TEMPLATE_BYTES = 256 << 10  # the built-in ones have 20 kB; compiling takes up to a hundred times as much memory

# Jinja's own objects
NAMES: tuple[tuple[type, frozenset[str]], ...] = (
    (
        LoopContext,
        words("index index0 revindex revindex0 first last length previtem nextitem depth depth0 cycle changed"),
    ),
    (Cycler, frozenset(("current", "next", "reset"))),
    (BlockReference, frozenset(("super",))),
)
GLOBALS = ("range", "dict", "cycler", "joiner", "namespace")
BUILTIN_FILTERS = words(
    "abs attr batch capitalize center count d default dictsort e escape filesizeformat first float "
    "forceescape format groupby indent int items join last length list lower map max min reject "
    "rejectattr replace reverse round select selectattr slice sort string sum title tojson trim truncate "
    "unique upper urlencode wordcount wordwrap"
)
COMPILED = 32  # templates that a process keeps; one is built in


class Compiled(BytecodeCache):
    """By name and text what was compiled in this process, so that the cards of a ladder compile their template once: it
    takes nine tenths of a card's time. No budget is evaded, as nothing is computed while compiling."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], CodeType] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        bucket.code = self._known.get((bucket.key, bucket.checksum))

    def dump_bytecode(self, bucket: Bucket) -> None:
        if len(self._known) >= COMPILED:
            self._known.pop(next(iter(self._known)))
        if bucket.code:
            self._known[bucket.key, bucket.checksum] = bucket.code


_compiled = Compiled()


class Sandbox(Metered):
    """An environment for one card. filters: ours, beside BUILTIN_FILTERS."""

    what = "card"

    def __init__(self, loader: BaseLoader, filters: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(
            work=WORK,
            output=OUTPUT,
            template_bytes=TEMPLATE_BYTES,
            globals_=GLOBALS,
            filters_=BUILTIN_FILTERS,
            functions={},
            filters=filters,
            loader=loader,
            bytecode_cache=_compiled,
            undefined=StrictUndefined,
            autoescape=False,  # Markdown; the filters `cell`, `code` and `yaml` escape
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )

    def text(self, name: str, **values: Any) -> str:
        """The rendered template. Raises what a template can raise."""
        return self.run(self.get_template(name), **values)

    def printable(self, value: Any) -> Any:
        """No `None`, no `nan`, no `<object at 0x…>`."""
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            raise TemplateRuntimeError(f"the value printed here is missing ({value})")
        if not isinstance(value, str | int | float | Undefined):
            kind = type(value).__name__
            raise TemplateRuntimeError(
                f"a {kind} cannot be printed: name one of its fields, or use a filter such as join"
            )
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not _readable(obj, attr):
            return False
        # nothing but data in our own objects, whatever a field is declared as
        return not _ours(obj) or _ours(value) or isinstance(value, NoneType | str | int | float | tuple | list | dict)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, Undefined):
            return super().getattr(obj, attribute)
        if _readable(obj, attribute):
            try:
                value = getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
            if wrapped := self.wrap_str_format(value):
                return wrapped
            return value if self.is_safe_attribute(obj, attribute, value) else self.unsafe_undefined(obj, attribute)
        if isinstance(obj, dict | TemplateReference):
            try:
                return obj[attribute]
            except LookupError:
                pass
        known = attribute in dir(type(obj))
        return self.unsafe_undefined(obj, attribute) if known else self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        key: Any = argument
        if isinstance(obj, str | list | tuple | dict | range | TemplateReference | Undefined):
            if isinstance(argument, tuple):
                self.spend(self.weigh(argument))
            try:
                return obj[key]
            except (TypeError, LookupError):
                pass
        return self.getattr(obj, argument) if isinstance(argument, str) else self.undefined(obj=obj, name=key)


def _ours(value: Any) -> bool:
    """One of our models, or of our dataclasses."""
    if isinstance(value, type):
        return False
    return isinstance(value, File) or (is_dataclass(value) and type(value).__module__.startswith("publisher."))


def _readable(obj: Any, name: str) -> bool:
    """Whether templates may read this attribute; decided without reading it."""
    if name.startswith("_"):
        return False
    if isinstance(obj, File):
        return name in type(obj).model_fields
    if _ours(obj):
        return name in _fields(type(obj)) or isinstance(getattr_static(type(obj), name, None), property)
    if isinstance(obj, TemplateModule):
        return name in vars(obj)
    if isinstance(obj, Namespace):
        return True
    if isinstance(obj, tuple) and name in getattr(obj, "_fields", ()):  # of groupby
        return True
    return any(isinstance(obj, kind) and name in names for kind, names in (*METHODS, *NAMES))


@functools.cache
def _fields(kind: type) -> frozenset[str]:
    return frozenset(f.name for f in fields(kind))
