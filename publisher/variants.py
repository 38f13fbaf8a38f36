"""Reading variants.yaml: YAML with line numbers → `Ladder`, and what follows from it alone (recipes, repo names, paths).

Every mistake is one line that names the file, the line, what was found and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from inference.checkpoint import AFFINE_BITS
from inference.errors import InputError
from inference.strict import read_file
from quant.allocate import Floor
from quant.builtin import BUILTIN
from quant.recipe import Recipe, Rule
from quant.version import ALLOCATED_SOLVER

from .schema import ImatrixSource, Ladder, Lock, RecipeSpec, RuleSpec, VariantSpec
from .sizes import Size, parse_size
from .store import RESERVED, Store, read_model

MAX_YAML_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 50_000  # keys, values and entries; PyYAML takes about 30 µs and 500 bytes for each. A large ladder has 1000
MAX_NUMBER = 100  # characters of a number or date: `1:1:1:…` is one in base 60, and quadratic to read
BY_BITS = ("smoke_kld", "kld_ceiling")  # keys whose own keys are numbers


@dataclass(frozen=True)
class Project:
    """A ladder as loaded from a file, with everything that depends on where the file lies."""

    ladder: Ladder
    path: Path
    lines: Mapping[tuple[Any, ...], int] = field(default_factory=dict, repr=False, compare=False)  # of every key path

    def at(self, *keys: Any) -> str:
        """`FILE:LINE: KEY`, for a message about a key; the nearest key that the file has, if it lacks this one."""
        line, _ = _line_of(keys, dict(self.lines))
        return f"{self.path.name}:{line}: {'.'.join(map(str, keys))}"

    @property
    def folder(self) -> Path:
        return self.path.parent

    @cached_property
    def store(self) -> Store:
        return Store(self.folder / Path(self.ladder.output).expanduser())

    @property
    def lock_path(self) -> Path:
        return self.path.with_suffix(".lock")

    def lock(self) -> Lock:
        """The lock file, or an empty one. Raises InputError if it does not parse."""
        return read_model(self.lock_path, Lock) or Lock()

    @property
    def base_name(self) -> str:
        """Hub id of the base, or the name given to its folder."""
        base = self.ladder.base
        return base.repo or base.name or self.local(base.path or "").name

    def local(self, path: str) -> Path:
        """A path of variants.yaml, relative to that file."""
        return (self.folder / Path(path).expanduser()).resolve()

    def variant(self, id: str) -> VariantSpec:
        return self.ladder.variants[id]

    def repo(self, id: str) -> str:
        """Repo of a variant: owner/name, or the bare name while no owner is set."""
        own = self.variant(id).repo
        if own:
            return own
        name = self.ladder.repo.format(base=self.base_name.split("/")[-1], id=id)
        return f"{self.ladder.owner}/{name}" if self.ladder.owner else name

    @property
    def private_storage(self) -> int | None:
        """Bytes that the owner's private repos may hold together, where the file says."""
        given = self.ladder.private_storage
        return int(parse_size(given).value) if given else None

    def solver(self, id: str) -> str:
        """How a variant's codes are chosen: its own, the file's, or the recipe's word."""
        own = self.variant(id).solver or self.ladder.solver
        return own or (ALLOCATED_SOLVER if self.variant(id).size else self.recipe(id).solver)

    def solves_by_imatrix(self, id: str) -> bool:
        """Whether the solver takes E[x²] from the variant's imatrix: `ls` does where one is named, else from `calibrate`."""
        return self.solver(id) == "ls" and self.imatrix(id) is not None

    def solves_by_statistics(self, id: str) -> bool:
        """Whether the solver needs what `publish calibrate` collects."""
        return self.solver(id) != "rtn" and not self.solves_by_imatrix(id)

    def group_size(self, id: str) -> int:
        return self.variant(id).group_size or self.ladder.group_size

    def mtp(self, id: str) -> str:
        return self.variant(id).mtp or self.ladder.mtp

    def vision(self, id: str) -> str:
        return self.variant(id).vision or self.ladder.vision

    def imatrix(self, id: str) -> ImatrixSource | None:
        own = self.variant(id).imatrix
        return self.ladder.imatrix if own is None else (own or None)

    def recipe(self, id: str) -> Recipe:
        """The recipe of a variant, its own rules first. Raises InputError for an unknown or circular recipe.

        Of a variant made by size only what is beside the rules counts: its formats are the allocator's.
        """
        spec = self.variant(id)
        recipe = self._named(
            spec.recipe or self.ladder.recipe, ("variants", id, "recipe") if spec.recipe else ("recipe",)
        )
        if spec.rules and spec.size is None:
            recipe = replace(recipe, rules=(*map(to_rule, spec.rules), *recipe.rules))
        if spec.awq_exponent is not None:
            recipe = replace(recipe, awq_exponent=spec.awq_exponent)
        named = (spec.bits,) if spec.bits else AFFINE_BITS  # whatever N a size comes to
        if spec.smoke_kld is not None:
            recipe = replace(recipe, smoke_kld=tuple((bits, spec.smoke_kld) for bits in named))
        if spec.kld_ceiling is not None:
            recipe = replace(recipe, kld_ceiling=tuple((bits, spec.kld_ceiling) for bits in named))
        return recipe

    def size(self, id: str) -> Size | None:
        """The size that a variant is made by; None where a recipe and N decide."""
        text = self.variant(id).size
        return parse_size(text) if text else None

    def like(self, id: str) -> Recipe:
        """The recipe whose bytes an `as` size takes. Raises InputError for an unknown one."""
        size = self.size(id)
        assert size is not None
        return self._named(size.recipe, ("variants", id, "size"))

    def pins(self, id: str) -> tuple[Rule, ...]:
        """Rules that come before the allocator: the variant's own, then those of `allocation`."""
        return tuple(map(to_rule, (*self.variant(id).rules, *self.ladder.allocation.pins)))

    def floors(self) -> tuple[Floor, ...]:
        return tuple(Floor(f.match, f.bits, f.optional) for f in self.ladder.allocation.floors)

    def frozen_path(self, id: str) -> Path:
        """Where a frozen allocation lies: beside the file, in a folder of its name."""
        return self.path.with_suffix(".allocations") / f"{id}.yaml"

    def _named(self, name: str, keys: tuple[str, ...], trail: tuple[str, ...] = ()) -> Recipe:
        """keys: where the file names it. trail: the recipes that extend it."""
        if name in trail:
            raise InputError(f"{self.at(*keys)}: recipe {trail[0]!r} extends itself: {' → '.join((*trail, name))}")
        own = self.ladder.recipes.get(name)
        if own is None:
            if name not in BUILTIN:
                known = sorted({*BUILTIN, *self.ladder.recipes})
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InputError(f"{self.at(*keys)}: recipe {name!r} is unknown; known: {', '.join(known)}{hint}")
            return BUILTIN[name]
        parent = (
            self._named(own.extends, ("recipes", name, "extends"), (*trail, name)) if own.extends else Recipe(name, ())
        )
        return _extend(parent, name, own)

    def rule_keys(self, id: str, index: int | None) -> tuple[Any, ...]:
        """Where the file writes rule `index` of a variant's recipe; the variant itself for a rule that is built in."""
        spec = self.variant(id)
        places: list[tuple[Any, ...]] = [("variants", id, "rules", i) for i in range(len(spec.rules))]
        if spec.size is not None:
            places += [("allocation", "pins", i) for i in range(len(self.ladder.allocation.pins))]
            return places[index] if index is not None and index < len(places) else ("variants", id, "size")
        name: str | None = spec.recipe or self.ladder.recipe
        while name in self.ladder.recipes:
            own = self.ladder.recipes[name]
            places += [("recipes", name, "rules", i) for i in range(len(own.rules))]
            name = own.extends
        return places[index] if index is not None and index < len(places) else ("variants", id)

    def select(self, ids: Iterable[str], all_variants: bool = True) -> list[str]:
        """The named variants in the ladder's order, or all. Raises InputError for an unknown id."""
        ids = list(ids)
        known = list(self.ladder.variants)
        for id in ids:
            if id not in known:
                near = difflib.get_close_matches(id, known, 1, 0.3)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InputError(f"{self.path.name}: no variant {id!r}; known: {', '.join(known)}{hint}")
        if not ids and not all_variants:
            raise InputError("name at least one variant, or give --all")
        return [i for i in known if i in ids] if ids else known


def to_rule(spec: RuleSpec) -> Rule:
    layers = tuple(spec.layers) if isinstance(spec.layers, list) else spec.layers
    return Rule(
        spec.match, spec.bits, spec.group_size, spec.mode, spec.awq, spec.why, layers, spec.optional
    )  # fmt: skip


def to_spec(rule: Rule) -> RuleSpec:
    """The inverse of `to_rule`."""
    value = {k: getattr(rule, k) for k in RuleSpec.model_fields}
    layers = rule.layers
    return RuleSpec.model_validate(value | {"layers": list(layers) if isinstance(layers, tuple) else layers})


def _extend(parent: Recipe, name: str, own: RecipeSpec) -> Recipe:
    return Recipe(
        name,
        (*map(to_rule, own.rules), *parent.rules),
        parent.awq_exponent if own.awq_exponent is None else own.awq_exponent,
        tuple(sorted(own.smoke_kld.items())) if own.smoke_kld else parent.smoke_kld,
        own.origin or (f"extends {parent.name}: {parent.origin}" if parent.rules else ""),
        tuple(sorted(own.kld_ceiling.items())) if own.kld_ceiling else parent.kld_ceiling,
        own.solver or parent.solver,
    )


def load_project(path: Path) -> Project:
    """Read and check variants.yaml, its recipes and the files it names. Raises InputError."""
    if not path.exists():
        raise InputError(f"{path}: no such file; `publish init BASE` writes one")
    data = read_file(path, MAX_YAML_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise InputError(f"{path.name}:{line}: found byte {e.object[e.start]:#x}; expected UTF-8") from None
    value, lines = parse_yaml(text, path.name)
    try:
        ladder = Ladder.model_validate(value)
    except ValidationError as e:
        raise InputError(explain(e, lines, path.name)) from None
    project = Project(ladder, path.absolute(), lines)
    for id in ladder.variants:
        project.recipe(id)
        if (size := project.size(id)) and size.kind == "as":
            project.like(id)
    _check_files(project, lines)
    _check_output(project)
    _check_names(project)
    return project


def parse_yaml(text: str, name: str) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """(value, line of every key path). Safe tags only; a key that appears twice, an alias or deep nesting is an error."""
    lines: dict[tuple[Any, ...], int] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = None if node is None else _build(node, (), lines, name)
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        raise InputError(f"{name}:{line}: not YAML: {e.problem}") from None
    except RecursionError:
        raise InputError(f"{name}: nested too deep") from None
    except yaml.reader.ReaderError as e:
        line = text[: e.position].count("\n") + 1
        raise InputError(f"{name}:{line}: not YAML: found the control character {e.character:#x}") from None
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise InputError(f"{name}:1: found {found}, expected keys such as base and variants")
    return value, lines


class _Loader(yaml.SafeLoader):
    """Refuses, before anything is expanded, what makes a small file large: aliases and deep nesting."""

    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem=f"found *{event.anchor}; aliases are not taken: write it out", problem_mark=event.start_mark
            )
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=event.start_mark)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES} keys and values", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


NUMBERS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
_constructor = yaml.constructor.SafeConstructor()


def _build(node: yaml.Node, path: tuple[Any, ...], lines: dict[tuple[Any, ...], int], name: str) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.MappingNode):
        out: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = _build(key_node, (*path, "?"), {}, name)
            at = key_node.start_mark.line + 1
            if not isinstance(key, str) and not (type(key) is int and path and path[-1] in BY_BITS):
                raise InputError(f"{name}:{at}: key {_short(key)} is a {type(key).__name__}; put it in quotes")
            if key in out:
                first = lines[(*path, key)]
                raise InputError(f"{name}:{at}: {key!r} appears twice; first on line {first}")
            lines[(*path, key)] = at
            out[key] = _build(value_node, (*path, key), lines, name)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_build(n, (*path, i), lines, name) for i, n in enumerate(node.value)]
    if len(node.value) > MAX_NUMBER and node.tag in NUMBERS:
        raise InputError(f"{name}:{line}: found {_short(node.value)}, a number of {len(node.value)} characters")
    try:
        return _constructor.construct_object(node)
    except ValueError as e:
        raise InputError(f"{name}:{line}: {e}") from None
    except (LookupError, AttributeError, TypeError, ArithmeticError):  # a tag that does not fit, as in `!!bool perhaps`
        raise InputError(f"{name}:{line}: found {_short(str(node.value))}, which is no {node.tag[-40:]}") from None


def explain(error: ValidationError, lines: dict[tuple[Any, ...], int], name: str, model: Any = Ladder) -> str:
    """One line for the first mistake: file, line, key, what was found, what is allowed."""
    first = min(error.errors(), key=lambda e: (_line_of(e["loc"], lines)[0], len(e["loc"])))
    line, keys = _line_of(first["loc"], lines)
    # a key that is missing, or a value that fits nothing, may well be a key beside it that is misspelt
    for e in error.errors():
        at, place = _line_of(e["loc"], lines)
        if e["type"] == "extra_forbidden" and place[:-1] == keys:
            first, line, keys = e, at, place
            break
    same = [e for e in error.errors() if _line_of(e["loc"], lines)[1] == keys]
    where = ".".join(map(str, keys)) or "file"
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        allowed = _allowed_keys(keys[:-1], model)
        near = difflib.get_close_matches(key, allowed, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{name}:{line}: {where}: unknown key; allowed: {', '.join(allowed)}{hint}"
    if first["type"] == "missing":
        return f"{name}:{line}: {where}: {first['loc'][-1]} is missing"
    expected = " or ".join(dict.fromkeys(_expected(e) for e in same))
    found = first["input"]
    if "7" in _short(found) and keys and keys[-1] == "bits":
        expected += " (MLX stores no 7-bit weights)"
    return f"{name}:{line}: {where}: found {_short(found)}; expected {expected}"


def _expected(error: Any) -> str:
    if error["type"] == "too_short":
        return f"at least {error['ctx']['min_length']}"
    if error["type"] in ("dict_type", "model_type"):
        return "keys and values"
    if error["type"] == "string_type":
        return "text"
    message = error["msg"]
    for prefix in ("Value error, expected ", "Value error, ", "Input should be "):
        if message.startswith(prefix):
            return message.removeprefix(prefix)
    if error["type"] == "string_pattern_mismatch":
        pattern = error["ctx"]["pattern"]
        return {
            r"^N(\+[0-9])?$": "N or N+1 …",
            r"^[A-Za-z0-9_.\-]+/[A-Za-z0-9_.\-]+$": "owner/name",
            r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$": "letters, digits, '.', '_' and '-'",
            r"^[A-Za-z0-9_.\-]+$": "letters, digits, '.', '_' and '-'",
        }.get(pattern, f"text like {pattern}")
    return message[:1].lower() + message[1:]


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "…"


def _line_of(loc: tuple[Any, ...], lines: dict[tuple[Any, ...], int]) -> tuple[int, tuple[Any, ...]]:
    """Line and key path of a pydantic location: the longest prefix that is in the file (union tags are left out)."""
    path: tuple[Any, ...] = ()
    for part in loc:
        if (*path, part) in lines:
            path = (*path, part)
    return lines.get(path, 1), path


def _allowed_keys(path: tuple[Any, ...], model: Any) -> list[str]:
    """Keys of the model at a path of the file, whose own model is `model`."""
    kind = model
    for part in path:
        fields = getattr(kind, "model_fields", None)
        kind = _keyed(get_args(kind)[-1] if fields is None else fields[part].annotation)
    return list(kind.model_fields)


def _keyed(kind: Any) -> Any:
    """What of a type has keys or entries: a model, a dict or a list, without what else it may be (None, a bare string)."""
    if hasattr(kind, "model_fields") or get_origin(kind) in (dict, list):
        return kind
    return next((found for found in map(_keyed, get_args(kind)) if found), None)


def _check_names(project: Project) -> None:
    """Folders and repos of two variants must differ, also where upper and lower case are the same."""
    folders: dict[str, str] = {name.lower(): "this tool's own files" for name in RESERVED}
    repos: dict[str, str] = {}
    for id, spec in project.ladder.variants.items():
        taken = folders.setdefault(id.lower(), id)
        if taken != id:
            raise InputError(f"{project.at('variants', id)}: found {id!r}; the folder of that name is for {taken}")
        repo = project.repo(id)
        taken = repos.setdefault(repo.lower(), id)
        if taken != id:
            keys = ("variants", id, "repo") if spec.repo else ("repo",)
            hint = "" if spec.repo else "; expected a pattern with {id} in it"
            raise InputError(f"{project.at(*keys)}: {taken} and {id} would both be {repo}{hint}")


def _check_output(project: Project) -> None:
    """The output folder is one of its own: files of a build are not scattered among those of a person."""
    out = project.local(project.ladder.output)
    around = {
        folder
        for start in (project.folder.resolve(), project.path.resolve().parent)
        for folder in (start, *start.parents)
    }
    if out in around or (out / "variants.yaml").exists():
        what = "is the root" if out == out.parent else "holds a variants.yaml, or a folder with one"
        raise InputError(
            f"{project.at('output')}: found {_short(project.ladder.output)}, which {what}; expected a folder of its own, "
            "such as build"
        )


def _check_files(project: Project, lines: dict[tuple[Any, ...], int]) -> None:
    """Local files and folders that variants.yaml names must be there."""
    ladder = project.ladder
    named: list[tuple[tuple[Any, ...], str | None, str]] = [
        (("base", "path"), ladder.base.path, "folder"),
        (("imatrix", "path"), ladder.imatrix.path if ladder.imatrix else None, "file"),
        (("smoke", "text"), ladder.smoke.text, "file"),
        (("calibration", "text"), ladder.calibration.text, "file"),
        (
            ("calibration", "chat"),
            ladder.calibration.chat if isinstance(ladder.calibration.chat, str) else None,
            "file",
        ),
        (("evaluation", "text"), ladder.evaluation.text, "file"),
        (("evaluation", "chat"), ladder.evaluation.chat, "file"),
        (("card", "templates"), ladder.card.templates, "folder"),
        (("output",), ladder.output, "path"),
    ]
    for id, spec in ladder.variants.items():
        if spec.imatrix:
            named.append((("variants", id, "imatrix", "path"), spec.imatrix.path, "file"))
    for keys, value, kind in named:
        if value is None:
            continue
        try:
            path = project.local(value)
            good = path.is_dir() if kind == "folder" else path.is_file() if kind == "file" else True
        except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, ~ of a user that does not exist
            good = False
        if not good:
            line, found = _line_of(keys, lines)
            want = f"an existing {kind}, relative to this file" if kind != "path" else "a path, relative to this file"
            raise InputError(
                f"{project.path.name}:{line}: {'.'.join(map(str, found))}: found {_short(value)}, expected {want}"
            )
