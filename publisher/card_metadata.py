"""The YAML at the top of a card: what the Hub would refuse of it, told before anything is sent.

The Hub checks a card's metadata when a commit arrives (`/api/validate-yaml` asks it before). Its schema is not public.
What it is known to refuse is refused here: values of the wrong type, languages that are no codes, a base model that is no
id, keys that stand there twice. What it takes is the Hub's to say, so a licence that is not on its documented list is
told (`unlisted_license`), not refused. Scalars are read as the Hub's YAML 1.2 reads them: `no` is Norwegian.

`localhub.frontmatter` stands for the Hub's own check, and is another on purpose: a server that shares no code with its
client cannot repeat the client's mistake. Here a licence has to be named, codes and ids have a form, and a key may stand
there once; there a licence is one text, which is all that our cards write. YAML is read alike.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import yaml

HEADER = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$))")  # the Hub's own pattern
FRONT_BYTES = 64 << 10
DEPTH = 50  # of nesting; PyYAML takes quadratic time for it
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+\-]{0,63}")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
REPO_ID = re.compile(r"[A-Za-z0-9_][\w.\-]*(/[A-Za-z0-9_][\w.\-]*)?", re.ASCII)
LICENSE_FILE = re.compile(r"licen[cs]e(\.\w+)?", re.I)
TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# what PyYAML raises for a tag that its text does not fit, such as `!!bool perhaps`
UNFIT = (ArithmeticError, AttributeError, LookupError, TypeError)
RELATIONS = ("adapter", "merge", "quantized", "finetune")
TEXTS = ("license_name", "license_link", "library_name", "pipeline_tag", "quantized_by", "thumbnail", "model_type")
LISTS = ("tags", "datasets", "metrics")
LIST_OR_TEXT = ("language", "base_model", "new_version", "license")
# https://huggingface.co/docs/hub/repositories-licenses, 2026
LISTED = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 "
    "cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 "
    "lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl "
    "openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license "
    "fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown "
    "other"
)
LICENSES = frozenset(LISTED.split())


class _Core(yaml.SafeLoader):
    """Booleans are `true` and `false` alone."""


_Core.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:bool"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Core.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))


@dataclass(frozen=True)
class Metadata:
    """What a header says. lines: of its keys; fault: why it says nothing, `line N: …`."""

    values: dict[str, Any]
    lines: dict[str, int]
    fault: str = ""


def read_metadata(text: str) -> Metadata:
    """Of a whole card. Within bounds, and without raising: what is wrong stands in `fault`."""
    found = HEADER.match(text)
    if not found:
        return Metadata({}, {}, "line 1: no front matter between --- lines")
    first = len(found[1].splitlines()) + 1
    if len(found[2].encode()) > FRONT_BYTES:
        return Metadata({}, {}, f"line 1: front matter is larger than {FRONT_BYTES} bytes")
    try:
        loader = _Core(found[2])
        if _deep(found[2]):
            return Metadata({}, {}, f"line 1: front matter is nested more than {DEPTH} deep, or has aliases (*name)")
        node = loader.get_single_node()
        value = loader.construct_document(node) if node else {}
    except (yaml.YAMLError, ValueError, RecursionError, *UNFIT) as e:
        mark = getattr(e, "problem_mark", None)
        return Metadata({}, {}, f"line {mark.line + first if mark else 1}: front matter is not YAML")
    if not isinstance(node, yaml.MappingNode) or not isinstance(value, dict):
        return Metadata({}, {}, "line 1: front matter names no license; expected keys and values")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value), key.start_mark.line + first
        if name in lines:
            return Metadata({}, {}, f"line {line}: {name} stands in the front matter twice")
        lines[name] = line
    return Metadata({str(k): v for k, v in value.items()}, lines)


def _deep(text: str) -> bool:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH or isinstance(event, yaml.AliasEvent):  # a few aliases of aliases are gigabytes when shown
            return True
    return False


def metadata_faults(text: str, repo: str = "", files: Set[str] | None = None) -> list[str]:
    """What the Hub would refuse, as `line N: key: found, expected`.

    repo: that the card belongs to. files: of the repo; None: what the card says of them is not looked at.
    """
    data = read_metadata(text)
    if data.fault:
        return [data.fault]
    if not data.values.get("license"):
        what = "front matter names no license; the base's card has none, so set card.license in variants.yaml"
        return [f"line 1: {what}"]
    faults = list(_faults(data.values, repo))
    if files is not None:
        faults += _license_files(data.values, files)
    return [f"line {data.lines.get(key, 1)}: {key}: {what}" for key, what in faults]


def _faults(data: dict[str, Any], repo: str) -> Iterator[tuple[str, str]]:
    for key in TEXTS:
        if key in data and not _is_text(data[key]):
            yield key, _expected(data[key], "text")
    for key in LISTS:
        if key in data and not (isinstance(data[key], list) and all(map(_is_text, data[key]))):
            yield key, _expected(data[key], "a list of texts")
    for key in LIST_OR_TEXT:
        if key in data and not all(map(_is_text, _listed(data[key]) or [None])):
            yield key, _expected(data[key], "text, or a list of texts")
    yield from _each(data, "license", LICENSE_ID.fullmatch, "an id such as apache-2.0")
    yield from _each(data, "language", LANGUAGE.fullmatch, "a code of two or three small letters such as en")
    yield from _each(data, "base_model", REPO_ID.fullmatch, "a model id such as owner/name")
    yield from _each(data, "new_version", REPO_ID.fullmatch, "a model id such as owner/name")
    if repo and repo in _listed(data.get("base_model")):
        yield "base_model", f"found {repo}, which is this repo itself; expected the original model"
    if _is_text(data.get("pipeline_tag")) and not TASK.fullmatch(data["pipeline_tag"]):
        yield "pipeline_tag", _expected(data["pipeline_tag"], "a task such as text-generation")
    if "base_model_relation" in data and data["base_model_relation"] not in RELATIONS:
        yield "base_model_relation", _expected(data["base_model_relation"], f"one of {', '.join(RELATIONS)}")
    for key in ("model-index", "widget"):
        if key in data and not isinstance(data[key], list):
            yield key, _expected(data[key], "a list")


def _license_files(data: dict[str, Any], files: Set[str]) -> Iterator[tuple[str, str]]:
    """The text of the licence has to be there where the card points at it."""
    link = data.get("license_link")
    if isinstance(link, str) and link.strip() and not re.match(r"https?://", link):
        name = link.removeprefix("./")
        if name not in files:
            yield "license_link", f"found {link}, which is no file of the repo; expected one, or a whole https address"
    elif "other" in _listed(data["license"]) and not link and not any(map(LICENSE_FILE.fullmatch, files)):
        yield "license", "other needs its text: expected a file LICENSE, or license_link with a whole https address"


def _each(data: dict[str, Any], key: str, good: Callable[[str], object], expected: str) -> Iterator[tuple[str, str]]:
    for value in _listed(data.get(key)):
        if _is_text(value) and not good(value):
            yield key, _expected(value, expected)


def unlisted_license(text: str) -> str | None:
    """A sentence on the first licence that the Hub's documentation does not list; None if all are listed."""
    for value in _listed(read_metadata(text).values.get("license")):
        if _is_text(value) and value not in LICENSES:
            near = difflib.get_close_matches(value, LICENSES, 1)
            meant = near[0] if near else "other, with license_name and license_link"
            return f"licence {value} is not on the Hub's documented list, so the Hub may refuse it; perhaps {meant}"
    return None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _expected(value: Any, what: str) -> str:
    shown = "nothing" if value is None or value == "" or value == [] else repr(value)
    return f"found {shown if len(shown) < 60 else shown[:57] + '…'}, expected {what}"
