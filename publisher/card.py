"""Model cards: `gather` reads the facts, `render` makes README text of them, `check_card` finds what must not be in it.

Rendering is pure: equal facts and templates give equal bytes (no clock, no disk but the templates). Templates run in the
sandbox of `card_sandbox`; an undefined name, a missing value or a non-finite number is an error with file and line.

A folder of the user's own holds a `card.md.j2` that extends `builtin/card.md.j2` and overrides blocks. It sees `card`
(`card_view.View`), `facts` (`card_facts.Facts`) and the filters of `card_format.FILTERS`.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import jinja2
import yaml

from inference.errors import InputError
from inference.sandbox import TEMPLATE_ERRORS
from inference.strict import read_file

from .card_facts import Facts, gather
from .card_figure import Figure
from .card_format import FILTERS
from .card_metadata import metadata_faults
from .card_notes import CardFault, split, with_notes
from .card_quality_view import quality_name, quality_view
from .card_sandbox import TEMPLATE_BYTES, Sandbox
from .card_view import row_label, view

__all__ = ["Facts", "Figure", "check_card", "figure", "gather", "machine_paths", "render", "snippets"]

ENTRY = "card.md.j2"
BUILTIN = "builtin/"
SNIPPET = re.compile(r"^<!-- snippet: ([\w-]+) -->\n(`{3,})(\w+)\n(.*?)^\2$", re.M | re.S)


def render(facts: Facts, id: str, templates: Path | None = None) -> str:
    """The card of one variant. templates: the user's folder. Raises InputError, also for any fault of a template; CardFault
    for notes in the present card that cannot be kept."""
    card = view(facts, id)
    env = Sandbox(
        jinja2.FunctionLoader(lambda name: _load(name, templates)),
        {**FILTERS, "row_label": row_label, "quality_name": quality_name},
    )
    try:
        text = env.text(ENTRY, card=card, facts=facts)
    except (*TEMPLATE_ERRORS, yaml.YAMLError) as e:
        raise InputError(_explain(e)) from None
    notes = facts.variant(id).notes
    if notes and notes.fault:
        raise CardFault(notes.fault)  # it names the file
    try:
        return with_notes(_tidy(text), notes)
    except InputError as e:
        raise CardFault(f"{id}: {e}") from None


def figure(facts: Facts, id: str) -> Figure | None:
    """The figure that a variant's card shows; None where there is too little to draw."""
    found = quality_view(facts, id)
    return found.figure if found else None


def _load(name: str, templates: Path | None) -> tuple[str, str, None] | None:
    """Source and name of a template: the user's first, `builtin/…` always ours. None if there is none."""
    own = name.removeprefix(BUILTIN)
    if ".." in own.split("/") or own.startswith("/") or "\\" in own:
        return None
    if templates is not None and not name.startswith(BUILTIN):
        path = templates / own
        if path.exists():
            if not path.resolve().is_relative_to(templates.resolve()):
                raise InputError(f"{templates.name}/{own}: links out of the folder; copy the file itself")
            data = read_file(path, TEMPLATE_BYTES)
            try:
                return data.decode(), own, None
            except UnicodeDecodeError as e:
                raise InputError(f"{templates.name}/{own}: not UTF-8 at byte {e.start}") from None
        if name == ENTRY:
            raise InputError(
                f"{templates.name}: no {ENTRY} in this folder; start it with {{% extends 'builtin/{ENTRY}' %}}"
            )
    source = _builtin().joinpath(own)
    return (source.read_text(encoding="utf-8"), BUILTIN + own, None) if source.is_file() else None


def _builtin() -> Traversable:
    """The built-in templates: of the installed package, or of the checkout."""
    try:
        return files("publisher.templates")
    except ModuleNotFoundError:
        return Path(__file__).parent.parent / "templates"


def _explain(error: Exception) -> str:
    """One line: template, line, what."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{error.name or error.filename or ENTRY}:{error.lineno}: {_message(error)}"
    at = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(".j2")]
    where = f"{at[-1].filename}:{at[-1].lineno}" if at else ENTRY
    if isinstance(error, jinja2.TemplateNotFound):
        return f"{where}: template {error.name!r} is neither in the templates folder nor built in"
    return f"{where}: {_message(error)}"


def _message(error: Exception) -> str:
    text = " ".join(str(getattr(error, "message", None) or error).split())[:300] or "failed"
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"


def _tidy(text: str) -> str:
    """One blank line at most between blocks, no trailing spaces; fenced code stays as it is."""
    out: list[str] = []
    fence = ""
    for line in text.splitlines():
        mark = re.match(r"`{3,}", line)
        if mark:
            fence = "" if fence and line.strip() == fence else fence or mark[0]
        if not fence:
            line = line.rstrip()
            if not line and (not out or not out[-1]):
                continue
        out.append(line)
    return "\n".join(out).strip("\n") + "\n"


def snippets(card: str) -> dict[str, str]:
    """The runnable code of a card by name: fenced blocks that follow `<!-- snippet: NAME -->`."""
    return {m[1]: m[4] for m in SNIPPET.finditer(card)}


# ---------------------------------------------------------------------------------------------- checking

FORBIDDEN: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("placeholder", re.compile(r"\b(?:TBD|TODO|FIXME)\b|(?<![\w/])N/A(?![\w/])|\bundefined\b")),
    ("placeholder", re.compile(r"\[More Information Needed\]|\blorem ipsum\b|(?<![\w?])\?{3,}", re.I)),
    # where a figure would stand; "None of these" and "holds a NaN" are English
    ("placeholder", re.compile(r"(?<![\w.\-])(?:None(?! of\b)|(?<!\ba )(?:NaN|nan|NAN))(?![\w\-])")),
    ("access token", re.compile(r"\bhf_[A-Za-z0-9]{16,}")),
)  # fmt: skip
TEMPLATE = re.compile(r"\{\{|\{%")  # left over from a template; in notes it is text
ADDRESS = re.compile(r"\b(?!file:)[A-Za-z][\w+.\-]*://[^\s<>\"'`|]+")
# folders that hold what belongs to one machine; what every machine has (/usr/bin, /etc) tells nothing
ROOTS = "Users|Volumes|content|data|home|media|mnt|nfs|opt|private|root|run/user|scratch|srv|tmp|var|workspaces?"
MACHINE_PATH = re.compile(
    rf"""\bfile:/+[^\s"'`<>|]+
    | (?<![\w./~\-]) / (?:{ROOTS}) / [^\s"'`<>|,;()\[\]{{}}]+  # at least two parts
    | (?<![\w/]) [A-Za-z]:(?:\\{{1,2}}|/(?!/)) [^\s"'`<>|,;()]+  # Windows""",
    re.X,
)


def machine_paths(text: str) -> list[str]:
    """Absolute paths of some machine in a text (Markdown, JSON), in order; addresses such as https://… hold none."""
    return [m[0].rstrip(".:") for m in MACHINE_PATH.finditer(ADDRESS.sub("", text))]


def check_card(text: str) -> list[str]:
    """What a card must not hold, as `line N: …`: placeholders, paths, tokens, a header that does not parse."""
    return [*metadata_faults(text), *_check_lines(text)]


def _check_lines(text: str) -> Iterable[str]:
    fence, opened, notes = "", 0, _notes_lines(text)
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"`{3,}", line)
        if mark:
            fence, opened = ("", 0) if fence and line.strip() == fence else (fence or mark[0], opened or number)
        for what, pattern in FORBIDDEN:
            for m in pattern.finditer(line):
                shown = m[0][:6] + "…" if what == "access token" else m[0]
                yield f"line {number}: {what} {shown!r}"
        yield from (f"line {number}: path of a machine {path!r}" for path in machine_paths(line))
        if number not in notes:
            yield from (f"line {number}: placeholder {m[0]!r}" for m in TEMPLATE.finditer(line))
            if not fence and "}}" in line:  # closing braces of nested JSON are fine in code
                yield f"line {number}: placeholder '}}}}'"
    if fence:
        yield f"line {opened}: code block is not closed"


def _notes_lines(text: str) -> range:
    """Numbers of the lines between the marks of the notes; none where the marks make no block."""
    try:
        block = split(text)
    except InputError:
        return range(0)
    if block is None:
        return range(0)
    first = len(block.before.splitlines()) + 1
    return range(first, first + len(block.notes.splitlines()))
