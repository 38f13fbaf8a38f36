"""How cards write numbers and text: fixed rules, so that equal facts give equal bytes. Pure functions.

Anything that is absent or not finite is refused or written as `not measured: REASON`; no other spelling exists.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable
from typing import Any
from urllib.parse import quote as quote_url

from .schema import Interval, Stat
from .yaml_text import yaml_text

ABSOLUTE = re.compile(r"(?<![\w.:/~])(?:[A-Z]:)?[/\\](?:[^\s/\\:,'\"]+[/\\])+")


def portable(text: str) -> str:
    """One line, absolute paths cut down to their last part: folders of the machine are nobody's business."""
    return ABSOLUTE.sub("", " ".join(text.split()))


def not_measured(reason: str) -> str:
    return f"not measured: {portable(reason) or 'no reason recorded'}"


def size(nbytes: float) -> str:
    """Decimal units: `7.17 GB`, `13.6 MB`, `547 kB`, `12 bytes`. The one spelling, on cards and in the terminal."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.{_places(nbytes / unit)}f} {name}"
    return f"{nbytes:.0f} bytes"


def binary_size(nbytes: float) -> str:
    """Binary units: `6.68 GiB`, `13.0 MiB`."""
    for shift, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.{_places(nbytes / (1 << shift))}f} {name}"
    return f"{nbytes:.0f} bytes"


def _places(x: float) -> int:
    """Decimals that leave three figures."""
    return 2 if x < 10 else 1 if x < 100 else 0


def params(n: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= unit:
            return f"{n / unit:.{_places(n / unit)}f} {name}"
    return str(n)


def share(part: float, whole: float) -> str:
    percent = 100 * part / whole
    return "< 0.1 %" if 0 < percent < 0.05 else f"{percent:.1f} %"


def bpw(x: float) -> str:
    return f"{x:.2f}"


def rate(x: float) -> str:
    """Tokens a second: whole from 100, one decimal below, two below 1."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 1 else f"{x:.2f}"


def seconds(x: float) -> str:
    return f"{x:.2f} s" if x >= 1 else f"{1000 * x:.0f} ms" if x >= 0.01 else f"{1000 * x:.1f} ms"


def kld(x: float) -> str:
    """Nats a token."""
    return f"{x:.4f}" if abs(x) >= 0.01 or x == 0 else f"{x:.2g}"


def small(x: float) -> str:
    """A figure of any size in three digits, from 0.0001 down in two with an exponent: `0.0126`, `1.9e-12`."""
    if not math.isfinite(x):
        return not_measured("the result is not a finite number")
    return f"{x:.{_decimals(x)}f}" if abs(x) >= 1e-4 or x == 0 else re.sub(r"e-0+", "e-", f"{x:.1e}")


def _decimals(x: float) -> int:
    return max(0, 2 - math.floor(math.log10(abs(x)))) if x else 0


def interval(x: Interval) -> str:
    """`0.0126 [0.0121–0.0133]`: the ends with as many decimals as the value."""
    if abs(x.value) < 1e-4 or not all(map(math.isfinite, (x.value, x.low, x.high))):
        return f"{small(x.value)} [{small(x.low)}–{small(x.high)}]"
    n = _decimals(x.value)
    return f"{x.value:.{n}f} [{x.low:.{n}f}–{x.high:.{n}f}]"


def signed(x: Interval) -> str:
    """`+0.0062 [−0.0010, +0.0120]`, with signs, for what may lie on either side of zero."""
    value, low, high = (f"{v if abs(v) >= 5e-5 else 0.0:+.4f}".replace("-", "−") for v in (x.value, x.low, x.high))
    return f"{value} [{low}, {high}]"


def percent(x: float) -> str:
    return f"{100 * x:.2f} %"


def gigabytes(x: float) -> str:
    return f"{x:.1f} GB" if x >= 10 else f"{x:.2f} GB"


def stat(value: Stat | None, reason: str, unit: Callable[[float], str]) -> str:
    """`54.3 [53.9–54.6]`: median [lowest–highest]; one run says so."""
    if value is None:
        return not_measured(reason)
    if not all(math.isfinite(x) and x > 0 for x in (value.median, value.low, value.high)):
        return not_measured("the result is not a positive number")
    if value.runs == 1:
        return f"{unit(value.median)} (1 run)"
    return f"{unit(value.median)} [{unit(value.low)}–{unit(value.high)}]"


def number(value: float | None, reason: str, unit: Callable[[float], str]) -> str:
    if value is None:
        return not_measured(reason)
    return unit(value) if math.isfinite(value) else not_measured("the result is not a finite number")


def cell(text: Any) -> str:
    """Text for a Markdown table: one line, pipes escaped, no HTML."""
    one = " ".join(str(text).split()).replace("<", "&lt;")
    return re.sub(r"(?<!\\)(\\*)\|", lambda m: m[1] * 2 + r"\|", one)


def line(text: Any) -> str:
    """Text for a sentence: one line."""
    return " ".join(str(text).split())


def link(name: Any, url: str | None) -> str:
    """`[name](url)`, whatever is in the address; without one the name alone."""
    if not url:
        return line(name)
    address = re.sub(r"[\s()<>|\\\"'`\[\]]", lambda m: quote_url(m[0]), url)
    return f"[{line(name)}]({address})"


def code(text: Any) -> str:
    """A code span that holds the text whatever backticks are in it, fit for a table."""
    one = " ".join(str(text).split())
    fence = "`" * (1 + max((len(m) for m in re.findall("`+", one)), default=0))
    pad = " " if one[:1] == "`" or one[-1:] == "`" else ""
    return f"{fence}{pad}{one}{pad}{fence}".replace("|", r"\|")


def to_yaml(value: Any) -> str:
    """YAML in the given key order; each scalar on one line."""
    return yaml_text(_one_line(value), 10_000)


def _one_line(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _one_line(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_one_line(v) for v in value]
    return " ".join(value.split()) if isinstance(value, str) else value


def quote(text: Any) -> str:
    """A word of a shell command."""
    return shlex.quote(str(text))


def literal(text: Any) -> str:
    """A string literal of Python and JSON."""
    return json.dumps(str(text), ensure_ascii=False)


def pretty_date(stamp: str) -> str:
    """The day of an ISO 8601 time."""
    return stamp[:10]


FILTERS: dict[str, Callable[..., Any]] = {
    "bpw": bpw,
    "binary_size": binary_size,
    "cell": cell,
    "code": code,
    "date": pretty_date,
    "line": line,
    "link": link,
    "literal": literal,
    "params": params,
    "quote": quote,
    "share": share,
    "size": size,
    "yaml": to_yaml,
}
