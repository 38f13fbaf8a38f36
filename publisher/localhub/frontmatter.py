"""The YAML at the top of a README: read it, and say what the Hub would refuse.

The Hub's own schema is not public; these are the checks its card documentation states and that a wrong card fails.
Licence identifiers are not checked against the Hub's list. The publisher's own check before a push (`card_metadata`) is
another on purpose: see there.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

FRONT_BYTES = 64 << 10
INT_BITS = 1024
DEPTH = 50  # PyYAML needs quadratic time and then the whole stack for nested brackets
BLOCK = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)(?:\r?\n)?^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
STRINGS = (
    "license",
    "license_name",
    "license_link",
    "library_name",
    "pipeline_tag",
    "quantized_by",
    "thumbnail",
)
STRING_LISTS = ("language", "tags", "base_model", "datasets", "metrics", "new_version")
# what PyYAML raises for a tag that its text does not fit, such as `!!bool perhaps`
UNFIT = (ArithmeticError, AttributeError, LookupError, TypeError)
RELATIONS = ("adapter", "merge", "quantized", "finetune")
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class _Core(yaml.SafeLoader):
    """YAML 1.2, as the Hub reads it: `no` is Norwegian, and booleans are `true` and `false` alone."""


_Core.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:bool"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Core.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))


def read(readme: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """(metadata, errors, warnings) of a README. The metadata is plain JSON, empty if there are errors."""
    block = BLOCK.match(readme)
    if block is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    if len(block[1].encode()) > FRONT_BYTES:
        return {}, [f"metadata larger than {FRONT_BYTES} bytes"], []
    try:
        hostile = _hostile(block[1])
        if hostile:
            return {}, [hostile], []
        data = _plain(yaml.load(block[1], Loader=_Core))
    except (yaml.YAMLError, ValueError, RecursionError, *UNFIT) as e:
        problem = getattr(e, "problem", None) or "cannot be read"
        mark = getattr(e, "problem_mark", None)
        where = f" (line {mark.line + 2})" if mark else ""
        return {}, [f"YAML: {problem}{where}"], []
    if data is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return {}, ["metadata must be a YAML mapping"], []
    errors = _errors(data)
    return ({}, errors, []) if errors else (data, [], [])


def _hostile(text: str) -> str | None:
    """What makes this YAML dangerous to load, seen from its events alone."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            # A few aliases of aliases expand to gigabytes when the metadata is sent as JSON.
            return "YAML aliases (*name) are not supported"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            return f"YAML nested more than {DEPTH} deep"
    return None


def _errors(data: dict[str, Any]) -> list[str]:
    errors = [f'"{key}" must be a string' for key in STRINGS if key in data and not _is_text(data[key])]
    for key in STRING_LISTS:
        values = data[key] if isinstance(data.get(key), list) else [data[key]] if key in data else []
        if not all(_is_text(value) for value in values):
            errors.append(f'"{key}" must be a string or a list of strings')
        elif key == "language":
            errors += [f'"language": {v!r} must be lowercase' for v in values if v != v.lower()]
        elif key == "base_model":
            errors += [f'"base_model": {v!r} is no model id' for v in values if not REPO_ID.fullmatch(v)]
    if "base_model_relation" in data and data["base_model_relation"] not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    if "model-index" in data and not isinstance(data["model-index"], list):
        errors.append('"model-index" must be a list')
    return errors


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _plain(value: Any) -> Any:
    """The value as JSON can carry it: dates and odd floats as text, keys as text. Raises ValueError."""
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # YAML can spell half a character
    if isinstance(value, int) and value.bit_length() > INT_BITS:
        raise ValueError("a number too large")  # and Python refuses to print it
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
