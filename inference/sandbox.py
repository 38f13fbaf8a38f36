"""Jinja with a limit on the work that a template of a stranger may cause, however it goes about it.

One budget a rendering; when it is spent, rendering ends with an error. Counted, never timed, so that equal templates fail
equally: each turn of a loop, call, filter and test costs STEP; text and lists cost their size whenever they are made,
compared or handed on, before they are made where the size can be told. The text of a loop's body counts at each turn.
Beside it a template has at most `template_bytes`, a rendering `output`, an integer INT_BITS. Callable are macros, blocks,
the functions named as globals, and a list of harmless methods of text, lists and mappings.

What may be reached, and what an expression may print, is for subclasses to narrow.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from types import BuiltinMethodType, MethodType, NoneType
from typing import Any

import jinja2
from jinja2 import TemplateRuntimeError, Undefined, nodes, pass_context
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner
from jinja2.visitor import NodeTransformer

STEP = 50  # units; so a loop ends after 200 thousand turns, within about a second
INT_BITS = 4096
INDENT = 16  # of tojson
NODES = 20_000  # of a template's syntax; about 10 kB of memory each while Python compiles. The card has 2200
DIGITS = re.compile(r"\d+")
# What a template can raise while it is compiled and while it runs: Jinja's errors, and whatever its expressions do to our
# values. AssertionError and SyntaxError come from compiling names and nesting that Jinja did not expect.
TEMPLATE_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip


def words(text: str) -> frozenset[str]:
    """The names in a text, separated by spaces."""
    return frozenset(text.split())


# text, lists and mappings: what reads them
METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (
        str,
        words(
            "capitalize casefold center count endswith find format format_map index isalnum isalpha isascii "
            "isdecimal isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip partition "
            "removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines "
            "startswith strip swapcase title upper zfill"
        ),
    ),
    (list, frozenset(("copy", "count", "index"))),
    (tuple, frozenset(("count", "index"))),
    (dict, frozenset(("copy", "get", "items", "keys", "values"))),
    (float, frozenset(("is_integer",))),
)
BOUND = {LoopContext: ("cycle", "changed"), Cycler: ("next", "reset")}
# what can make much of little: the cost is the product of value and arguments
AMPLIFIERS = words(
    "batch center indent join ljust lstrip replace rjust round rstrip slice strip tojson trim wordwrap zfill"
)


class Metered(ImmutableSandboxedEnvironment):
    """An environment for one rendering of `work` units. functions, filters: ours, beside `globals_` and `filters_` of
    Jinja's own."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(
        self,
        *,
        work: int,
        output: int,
        template_bytes: int,
        globals_: Iterable[str],
        filters_: Iterable[str],
        functions: Mapping[str, Callable[..., Any]],
        filters: Mapping[str, Callable[..., Any]],
        **options: Any,
    ) -> None:
        super().__init__(finalize=self._finalize, optimized=False, **options)  # nothing is computed while compiling
        self.work = self.left = work
        self.output, self.template_bytes = output, template_bytes
        self.globals = {k: self.globals[k] for k in globals_} | dict(functions)
        self.filters = {k: self._metered(k, self.filters[k]) for k in sorted(filters_)}
        self.filters |= {k: self._metered(k, f) for k, f in filters.items()}
        self.filters |= {"§cost": self._cost, "§each": self.each, "§weighed": self._weighed, "§concat": self._concat}
        self.tests = {k: self._metered("", f) for k, f in self.tests.items()}

    def run(self, template: jinja2.Template, **values: Any) -> str:
        """The text of a template. Raises what a template can raise."""
        out, nbytes = [], 0
        for chunk in template.generate(**values):
            nbytes += len(chunk.encode())
            if nbytes > self.output:
                raise TemplateRuntimeError(f"the {self.what} would be larger than {self.output >> 20} MiB")
            out.append(chunk)
        return "".join(out)

    what = "text"  # that is rendered, for messages

    # ------------------------------------------------------------------------------------------ the budget

    def spend(self, units: int) -> None:
        """Take units off the budget. Raises TemplateRuntimeError where it has none left."""
        self.left -= max(units, 0)
        if self.left < 0:
            raise TemplateRuntimeError(
                f"takes more work than a {self.what} may ({self.work} units): an endless loop, or huge text"
            )

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each for STEP units. Raises as `spend`."""
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
        return "".join(str(self.printable(v)) for v in values)

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
            if name == "tojson" and not all(x <= INDENT for x in rest if isinstance(x, int)):
                raise TemplateRuntimeError(f"tojson indents by {INDENT} at most")  # once more for each level
            result = f(*args, **kwargs)
            if isinstance(result, Iterator):
                return self.each(result)
            if isinstance(result, str):
                result = str(result)  # Markup, of `e` and `tojson`, has methods that nobody looked at
            self.spend(self.weigh(result))
            return result

        return run

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        where = f"template {name!r}" if name else "the template"
        if len(source) > self.template_bytes:
            raise TemplateRuntimeError(f"{where} is larger than {self.template_bytes >> 10} KiB")
        tree = super()._parse(source, name, filename)
        if sum(1 for _ in tree.find_all(nodes.Node)) > NODES:
            raise TemplateRuntimeError(f"{where} holds more than {NODES} expressions and statements")
        return _Metering().visit(tree)

    def _load_template(self, name: str, globals: Any) -> Any:
        self.spend(STEP)
        return super()._load_template(name, globals)

    # ------------------------------------------------------------------------------------------ values

    @pass_context
    def _finalize(self, context: Context, value: Any) -> Any:
        """What an expression prints. (With a context, so that Jinja calls it at each turn and never ahead.)"""
        value = self.printable(value)
        self.spend(self.weigh(value))
        return value

    def printable(self, value: Any) -> Any:
        """The value as it is printed; raises for what must not be."""
        return value

    # ------------------------------------------------------------------------------------------ calls and operators

    def is_safe_callable(self, obj: Any) -> bool:
        if isinstance(obj, Macro | BlockReference | LoopContext | Joiner | Undefined | _Format):
            return True
        if isinstance(obj, MethodType):
            return any(isinstance(obj.__self__, kind) and obj.__name__ in names for kind, names in BOUND.items())
        if isinstance(obj, BuiltinMethodType):
            return any(isinstance(obj.__self__, kind) and obj.__name__ in names for kind, names in METHODS)
        return any(obj is f for f in self.globals.values())

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
        self.spend(self.weigh(args) * max(1, text.count("%(")) + self.widths(text))
        if "*" in text:
            raise TemplateRuntimeError("a width in a format must be written out, not *")

    def widths(self, spec: str) -> int:
        """Sum of all numbers in a format."""
        found = DIGITS.findall(spec)
        return len(spec) + (sum(map(int, found)) if all(len(d) < 10 for d in found) else self.work + 1)

    def wrap_str_format(self, value: Any) -> Any:
        if isinstance(value, MethodType | BuiltinMethodType) and value.__name__ in ("format", "format_map"):
            return _Format(self, str(value.__self__), value.__name__) if isinstance(value.__self__, str) else None
        return None


class _Format:
    """`"…".format` as templates get it."""

    def __init__(self, env: Metered, text: str, name: str) -> None:
        self._env, self._text, self._name = env, text, name

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._name == "format_map":
            if kwargs or len(args) != 1 or not isinstance(args[0], dict):
                raise TypeError("format_map() takes one mapping")
            args, kwargs = (), args[0]
        self._env.spend(len(self._text))
        return _Formatter(self._env).vformat(self._text, args, kwargs)


class _Formatter(SandboxedFormatter):
    def __init__(self, env: Metered) -> None:
        super().__init__(env)
        self._sandbox = env

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._sandbox.spend(self._sandbox.weigh(value))
        return super().convert_field(self._sandbox.printable(value), conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        self._sandbox.spend(STEP + self._sandbox.weigh(value) + self._sandbox.widths(format_spec))
        return super().format_field(self._sandbox.printable(value), format_spec)


class _Metering(NodeTransformer):
    """Makes a parsed template pay: bodies as they run, iterables, comparisons, slices and `~`."""

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, float) and not math.isfinite(node.value):  # Jinja would compile it to the name `inf`
            raise TemplateRuntimeError(f"line {node.lineno}: a number too large")
        return node

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
