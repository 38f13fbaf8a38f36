"""Where templates run: Jinja's sandbox, narrowed to data, and with a limit on the work that a template may cause.

Reach: a template sees the fields and properties of our dataclasses, the fields of our pydantic models, and a list of
harmless methods of text, lists and mappings. Every other attribute is refused before it is read (pydantic's own methods
unpickle and open files), and so is every callable but macros, blocks and the functions and filters named here. Filters
that would print another text each time (`random`, `pprint`) are left out.

Work: one budget a card, WORK units; when it is spent, rendering ends with an error. Counted, never timed, so that equal
templates fail equally: each turn of a loop, call, filter and test costs STEP; text and lists cost their size whenever
they are made, compared or handed on, before they are made where the size can be told. The text of a loop's body counts at
each turn. Beside it: a card has at most OUTPUT bytes, a template TEMPLATE_BYTES, an integer INT_BITS.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from dataclasses import fields, is_dataclass
from inspect import getattr_static
from types import BuiltinMethodType, MethodType, NoneType
from typing import Any

from jinja2 import BaseLoader, StrictUndefined, TemplateRuntimeError, Undefined, nodes, pass_context
from jinja2.environment import TemplateModule
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from .schema import File

WORK = 20_000_000  # units; a card of six variants takes about 80 thousand
STEP = 50  # units; so a loop ends after 200 thousand turns, within about a second
OUTPUT = 2 << 20  # bytes of a card; the gate lets no more pass either
TEMPLATE_BYTES = 1 << 20
INT_BITS = 4096
DIGITS = re.compile(r"\d+")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# text, lists and mappings: what reads them
METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (
        str,
        _words(
            "capitalize casefold center count endswith find format format_map index isalnum isalpha isascii "
            "isdecimal isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip partition "
            "removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines "
            "startswith strip swapcase title upper zfill"
        ),
    ),
    (list, frozenset(("count", "index"))),
    (tuple, frozenset(("count", "index"))),
    (dict, frozenset(("get", "items", "keys", "values"))),
    (float, frozenset(("is_integer",))),
)
# Jinja's own objects
NAMES: tuple[tuple[type, frozenset[str]], ...] = (
    (
        LoopContext,
        _words("index index0 revindex revindex0 first last length previtem nextitem depth depth0 cycle changed"),
    ),
    (Cycler, frozenset(("current", "next", "reset"))),
    (BlockReference, frozenset(("super",))),
)
BOUND = {LoopContext: ("cycle", "changed"), Cycler: ("next", "reset")}
GLOBALS = ("range", "dict", "cycler", "joiner", "namespace")
BUILTIN_FILTERS = _words(
    "abs attr batch capitalize center count d default dictsort e escape filesizeformat first float "
    "forceescape format groupby indent int items join last length list lower map max min reject "
    "rejectattr replace reverse round select selectattr slice sort string sum title tojson trim truncate "
    "unique upper urlencode wordcount wordwrap"
)
# what can make much of little: the cost is the product of value and arguments
AMPLIFIERS = _words(
    "batch center indent join ljust lstrip replace rjust round rstrip slice strip tojson trim wordwrap zfill"
)


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one card. filters: ours, beside BUILTIN_FILTERS."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, loader: BaseLoader, filters: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(
            loader=loader,
            undefined=StrictUndefined,
            autoescape=False,  # Markdown; the filters `cell`, `code` and `yaml` escape
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            finalize=self._finalize,
            optimized=False,  # nothing is computed while compiling
        )
        self.left = WORK
        self.globals = {k: self.globals[k] for k in GLOBALS}
        self.filters = {k: self._metered(k, self.filters[k]) for k in sorted(BUILTIN_FILTERS)}
        self.filters |= {k: self._metered("", f) for k, f in filters.items()}
        self.filters |= {"§cost": self._cost, "§each": self.each, "§weighed": self._weighed, "§concat": self._concat}
        self.tests = {k: self._metered("", f) for k, f in self.tests.items()}

    def text(self, name: str, **values: Any) -> str:
        """The rendered template. Raises what a template can raise."""
        out, nbytes = [], 0
        for chunk in self.get_template(name).generate(**values):
            nbytes += len(chunk.encode())
            if nbytes > OUTPUT:
                raise TemplateRuntimeError(f"the card would be larger than {OUTPUT >> 20} MiB")
            out.append(chunk)
        return "".join(out)

    # ------------------------------------------------------------------------------------------ the budget

    def spend(self, units: int) -> None:
        self.left -= max(units, 0)
        if self.left < 0:
            raise TemplateRuntimeError(f"takes more work than a card may ({WORK} units): an endless loop, or huge text")

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(STEP)
            yield item

    def weigh(self, value: Any) -> int:
        """About the size of a value as text; counting ends where the budget does."""
        total, stack = 0, [value]
        while stack and total <= self.left:
            x = stack.pop()
            total += 8
            if isinstance(x, str):
                total += len(x)
            elif isinstance(x, int):
                total += x.bit_length() // 8
            elif isinstance(x, range):
                total += 8 * len(x)
            elif isinstance(x, dict):
                stack += [*x.keys(), *x.values()]
            elif isinstance(x, list | tuple | KeysView | ValuesView | ItemsView):
                stack += x
        return total

    def _cost(self, units: int) -> None:
        self.spend(abs(units))

    def _weighed(self, value: Any) -> Any:
        self.spend(self.weigh(value))
        return value

    def _concat(self, values: list[Any]) -> str:
        self.spend(STEP + self.weigh(values))
        return "".join(str(self._printable(v)) for v in values)

    def _product(self, value: Any, args: Iterable[Any]) -> int:
        return self.weigh(value) * max([1, *(abs(a) if isinstance(a, int) else self.weigh(a) for a in args)])

    def _metered(self, name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test that pays. name: of a filter of Jinja's."""
        skip = 1 if hasattr(f, "jinja_pass_arg") else 0

        @functools.wraps(f)
        def run(*args: Any, **kwargs: Any) -> Any:
            value, rest = args[skip] if len(args) > skip else None, [*args[skip + 1 :], *kwargs.values()]
            self.spend(STEP + (self._product(value, rest) if name in AMPLIFIERS else self.weigh([value, *rest])))
            if name == "format":
                self._check_percent(value, rest)
            if name == "sum" and not all(isinstance(x, int | float | str | NoneType) for x in rest):
                raise TemplateRuntimeError("sum adds numbers")
            result = f(*args, **kwargs)
            if isinstance(result, Iterator):
                return self.each(result)
            if isinstance(result, str):
                result = str(result)  # Markup, of `e` and `tojson`, has methods that nobody looked at
            self.spend(self.weigh(result))
            return result

        return run

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > TEMPLATE_BYTES:
            raise TemplateRuntimeError(f"template {name!r} is larger than {TEMPLATE_BYTES >> 20} MiB")
        return _Metering().visit(super()._parse(source, name, filename))

    def _load_template(self, name: str, globals: Any) -> Any:
        self.spend(STEP)
        return super()._load_template(name, globals)

    # ------------------------------------------------------------------------------------------ values

    @pass_context
    def _finalize(self, context: Context, value: Any) -> Any:
        """What an expression prints. (With a context, so that Jinja calls it at each turn and never ahead.)"""
        value = self._printable(value)
        self.spend(self.weigh(value))
        return value

    def _printable(self, value: Any) -> Any:
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

    # ------------------------------------------------------------------------------------------ calls and operators

    def is_safe_callable(self, obj: Any) -> bool:
        if isinstance(obj, Macro | BlockReference | LoopContext | Joiner | Undefined | _Format):
            return True
        if isinstance(obj, MethodType):
            return any(isinstance(obj.__self__, kind) and obj.__name__ in names for kind, names in BOUND.items())
        if isinstance(obj, BuiltinMethodType):
            return any(isinstance(obj.__self__, kind) and obj.__name__ in names for kind, names in METHODS)
        return any(obj is self.globals[k] for k in GLOBALS)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if isinstance(__obj, BuiltinMethodType):
            owner = __obj.__self__
            amplifies = __obj.__name__ in AMPLIFIERS
            __self.spend(STEP + (__self._product(owner, given) if amplifies else __self.weigh([owner, *given])))
        else:
            __self.spend(STEP + __self.weigh(given))
        result = super().call(__context, __obj, *args, **kwargs)
        if not isinstance(result, range):  # paid for as it is run through
            __self.spend(__self.weigh(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self._check_percent(left, [right])
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > INT_BITS:
                raise TemplateRuntimeError(f"an integer may have {INT_BITS} bits at most")
        elif operator == "*":
            sizes = [abs(x) if isinstance(x, int) else self.weigh(x) for x in (left, right)]
            self.spend(max(sizes[0], 1) * max(sizes[1], 1))
        else:
            self.spend(self.weigh([left, right]))
        return super().call_binop(context, operator, left, right)

    def _check_percent(self, text: Any, args: list[Any]) -> None:
        """Pay for `text % args` before it is made."""
        text = str(text)
        self.spend(self.weigh(args) * max(1, text.count("%(")) + self._widths(text))
        if "*" in text:
            raise TemplateRuntimeError("a width in a format must be written out, not *")

    def _widths(self, spec: str) -> int:
        """Sum of all numbers in a format."""
        found = DIGITS.findall(spec)
        return len(spec) + (sum(map(int, found)) if all(len(d) < 10 for d in found) else WORK + 1)

    def wrap_str_format(self, value: Any) -> Any:
        if isinstance(value, MethodType | BuiltinMethodType) and value.__name__ in ("format", "format_map"):
            return _Format(self, str(value.__self__), value.__name__) if isinstance(value.__self__, str) else None
        return None


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
        return name in {f.name for f in fields(obj)} or isinstance(getattr_static(type(obj), name, None), property)
    if isinstance(obj, TemplateModule):
        return name in vars(obj)
    if isinstance(obj, Namespace):
        return True
    if isinstance(obj, tuple) and name in getattr(obj, "_fields", ()):  # of groupby
        return True
    return any(isinstance(obj, kind) and name in names for kind, names in (*METHODS, *NAMES))


class _Format:
    """`"…".format` as templates get it."""

    def __init__(self, env: Sandbox, text: str, name: str) -> None:
        self._env, self._text, self._name = env, text, name

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._name == "format_map":
            if kwargs or len(args) != 1 or not isinstance(args[0], dict):
                raise TypeError("format_map() takes one mapping")
            args, kwargs = (), args[0]
        self._env.spend(len(self._text))
        return _Formatter(self._env).vformat(self._text, args, kwargs)


class _Formatter(SandboxedFormatter):
    def __init__(self, env: Sandbox) -> None:
        super().__init__(env)
        self._sandbox = env

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._sandbox.spend(self._sandbox.weigh(value))
        return super().convert_field(self._sandbox._printable(value), conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        self._sandbox.spend(STEP + self._sandbox.weigh(value) + self._sandbox._widths(format_spec))
        return super().format_field(self._sandbox._printable(value), format_spec)


class _Metering(NodeTransformer):
    """Makes a parsed template pay: bodies as they run, iterables, comparisons, slices and `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._body(node)
        node.iter = _filter("each", node.iter)
        return node

    def _body(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        cost = STEP + sum(len(t.data) for t in node.find_all(nodes.TemplateData))
        charge = nodes.ExprStmt(_filter("cost", nodes.Const(cost, lineno=node.lineno)), lineno=node.lineno)
        node.body.insert(0, charge)
        return node

    visit_Macro = visit_CallBlock = visit_Block = visit_Template = _body

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter("weighed", node.expr)
        for operand in node.ops:
            operand.expr = _filter("weighed", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter("weighed", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter("concat", nodes.List(node.nodes, lineno=node.lineno))


def _filter(name: str, value: Any) -> nodes.Filter:
    """A filter of ours over an expression. Its § is no part of Jinja's language; `map("§…")` gets at it, to no avail."""
    return nodes.Filter(value, f"§{name}", [], [], None, None, lineno=value.lineno)
