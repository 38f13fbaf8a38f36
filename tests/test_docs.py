"""What is written about the project is true of it: commands, keys, links, tables, examples."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from pydantic import BaseModel

from publisher import schema as files
from publisher.cli import EXIT_CODES, INTERRUPTED, main
from publisher.plan import rule_inputs
from publisher.schema import Ladder
from publisher.starter import json_schema
from publisher.variants import Project, load_project
from quant.builtin import BUILTIN

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
VARIANTS = ROOT / "docs/variants.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = {p: p.read_text(encoding="utf-8") for p in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def tracked() -> list[Path]:
    """Files that git has or would take; without git, all but what is made here."""
    found = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode == 0:
        return [p for name in found.stdout.split("\0") if name and (p := ROOT / name).is_file()]
    made = re.compile(
        r"(^|/)(\.venv|\.git/|\.whl|\.?build/|demo-out|dist/|__pycache__|\.\w+_cache|\.hypothesis|[^/]+\.egg-info)"
    )
    return [p for p in ROOT.rglob("*") if p.is_file() and not made.search(p.relative_to(ROOT).as_posix())]


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize("name", sorted(main.commands))
def test_readme_names_every_command_and_option(name: str):
    rows = [line for line in WRITTEN[README].splitlines() if line.startswith(f"| `publish {name}")]
    assert len(rows) == 1, f"README's table has {len(rows)} rows for publish {name}"
    common = {"--file", "--json", "--quiet", "-q", "--help", "-h"}
    options = {
        o for p in main.commands[name].params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)
    }
    said = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rows[0]))
    assert said == options - common
    if "--json" not in options:
        assert "All but `schema` and `hub`" in WRITTEN[README]
        assert name in ("schema", "hub")


def test_readme_names_the_common_options():
    for option in ("--file", "--json", "-q", "--quiet", "-h", "--help", "--version"):
        assert f"`{option}`" in WRITTEN[README] or f"`publish {option}`" in WRITTEN[README], option


def test_readme_lists_every_exit_code():
    section = WRITTEN[README].split("### Exit codes")[1].split("###")[0]
    listed = {int(n) for n in re.findall(r"^\| (\d+) \|", section, re.M)}
    assert listed == {0, INTERRUPTED, *EXIT_CODES.values()}


def test_every_publish_command_in_the_docs_exists():
    for page, text in WRITTEN.items():
        code = [m[2] for m in FENCE.finditer(text) if m[1] in ("bash", "sh", "")] + re.findall(
            r"`(publish [^`]+)`", text
        )
        for line in "\n".join(code).splitlines():
            for name, rest in re.findall(r"(?<![\w/.-])publish ([a-z]+)([^|&;\n]*)", line):
                assert name in main.commands, f"{page.name}: publish {name}"
                known = {o for p in main.commands[name].params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
                used = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest))
                assert used <= known, f"{page.name}: publish {name}{rest}"


def test_readme_begins_with_scripts_that_exist():
    first = [m[2].strip() for m in FENCE.finditer(WRITTEN[README])][:2]
    assert first == ["sh scripts/demo.sh", "sh scripts/test.sh"]


def test_scripts_named_anywhere_exist():
    for page, text in WRITTEN.items():
        for name in re.findall(r"(?:scripts|examples|docs|tests)/[\w/.-]+\.(?:sh|py)|\.ci/run", text):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


@pytest.mark.parametrize("name", ["setup", "demo", "test", "parity", "browser", "clients"])
def test_scripts_are_posix_shell(name: str):
    path = ROOT / f"scripts/{name}.sh"
    assert path.read_text(encoding="utf-8").startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", str(path)], check=True)


def test_the_workflow_only_calls_the_checks_script():
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"].values()
    commands = [step["run"] for job in steps for step in job["steps"] if "run" in step]
    assert commands
    assert all(re.fullmatch(r"bash \.ci/run( (lint|test|browser|demo|parity|clients))+", c) for c in commands), commands
    assert (ROOT / ".ci/run").stat().st_mode & 0o100


# ------------------------------------------------------------------------------------------------ variants.yaml


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and all that its fields hold."""
    yield model
    for field in model.model_fields.values():
        yield from (m for inner in _inner(field.annotation) for m in models(inner))


def _inner(kind: object) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in getattr(kind, "__args__", ()):
        yield from _inner(part)


SECTIONS = {
    "Ladder": "Top level",
    "Base": "base",
    "VariantSpec": "variants",
    "AllocationSpec": "allocation",
    "FloorSpec": "Floors",
    "RecipeSpec": "Recipes",
    "RuleSpec": "Rules",
    "ImatrixSource": "imatrix",
    "SmokeSpec": "smoke",
    "BenchSpec": "bench",
    "CalibrationSpec": "calibration",
    "EvaluationSpec": "evaluation",
    "CardSpec": "card",
    "CollectionSpec": "collection",
    "SignSpec": "sign",
    "Lock": "variants.lock",
}


def section(title: str) -> str:
    """Text below a heading of docs/variants.md, up to the next heading, without its code blocks."""
    text = FENCE.sub("", WRITTEN[VARIANTS])
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.M | re.S)
    assert found, f"docs/variants.md has no section {title}"
    return found[1]


@pytest.mark.parametrize(
    "model", {m.__name__: m for m in (*models(Ladder), files.Lock) if m.__name__ in SECTIONS}.values()
)
def test_every_key_of_variants_yaml_is_documented_in_its_section(model: type[BaseModel]):
    rows = {
        k
        for line in re.findall(r"^\| (`[^|]+`) \|", section(SECTIONS[model.__name__]), re.M)
        for k in re.findall(r"`([^`]+)`", line)
    }
    assert rows == set(model.model_fields) - {"schema_version"}


def test_every_model_of_variants_yaml_has_a_section():
    assert {m.__name__ for m in models(Ladder)} | {"Lock"} == set(SECTIONS)


@pytest.mark.parametrize("model", {m.__name__: m for m in models(Ladder)}.values())
def test_documented_defaults_are_those_of_the_schema(model: type[BaseModel]):
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section(SECTIONS[model.__name__]), re.M))
    for key, field in model.model_fields.items():
        said = rows[key].strip()
        if field.is_required():
            assert said == "required", key
        elif isinstance(field.default, (bool, int, str, list)) and field.default != "" and key != "prompts":
            assert yaml.safe_load(said.strip("`")) == field.default, key
        else:
            assert said != "required", key


@pytest.mark.parametrize(
    "name",
    [
        "Manifest",
        "BuildInputs",
        "Allocation",
        "Costs",
        "BuildRecord",
        "Smoke",
        "Bench",
        "Speed",
        "Quality",
        "Divergence",
        "Greedy",
        "Teacher",
        "Continuations",
        "Baseline",
        "Provenance",
        "ProvenanceBase",
        "ProvenanceImatrix",
        "Receipt",
        "History",
        "Release",
        "ReleaseQuality",
    ],
)
def test_every_key_of_the_other_files_is_documented(name: str):
    text = WRITTEN[ROOT / "docs/files.md"]
    missing = [k for k in getattr(files, name).model_fields if f"`{k}`" not in text]
    assert not missing


def test_the_schema_file_is_what_the_command_prints():
    text = (ROOT / "docs/variants.schema.json").read_text(encoding="utf-8")
    assert text == json_schema(), "run: publish schema > docs/variants.schema.json"


def test_the_table_of_the_default_recipe_is_that_of_the_code():
    cells = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in section("Built-in recipes").splitlines()
        if line.startswith("| `*.")
    ]
    recipe = BUILTIN["unsloth"]
    columns = [[str(r.bits) for r in rule_inputs(recipe, n)] for n in (2, 3, 4, 5, 6, 8)]
    want = [
        [f"`{rule.match}`", str(rule.bits), *(c[i] for c in columns), "yes" if rule.awq else ""]
        for i, rule in enumerate(recipe.rules)
    ]
    assert cells == want


def test_every_built_in_recipe_is_documented():
    text = section("Built-in recipes")
    assert [n for n in BUILTIN if f"`{n}`" not in text] == []


@pytest.mark.parametrize("text", [m[2] for m in FENCE.finditer(WRITTEN[VARIANTS]) if m[1] == "yaml"])
def test_examples_of_variants_yaml_are_valid(text: str, tiny: Path, tmp_path: Path):
    value = {"base": "Qwen/Qwen3.5-9B", "variants": {"Q4_K_XL": {"bits": 4}}} | (yaml.safe_load(text) or {})
    ladder = Ladder.model_validate(value)
    for id in ladder.variants:
        Project(ladder, tmp_path / "variants.yaml").recipe(id)


def test_the_blocks_of_a_card_are_documented():
    """tests/test_demo.py renders a card with the example itself."""
    ours = re.findall(r"{% block (\w+) %}", (ROOT / "templates/card.md.j2").read_text(encoding="utf-8"))
    listed = section("Templates of your own").split("Blocks, in order:")[1].split(".")[0]
    assert re.findall(r"`(\w+)`", listed) == ours


@pytest.mark.parametrize("path", ["variants.yaml", "examples/unsloth.yaml", "examples/tiny/variants.yaml"])
def test_ladders_of_this_repo_load(path: str):
    project = load_project(ROOT / path)
    widths = [v.bits or f"{v.size}".removeprefix("as unsloth ") for v in project.ladder.variants.values()]
    assert [int(w) for w in widths] == [2, 3, 4, 5, 6, 8]
    assert list(project.ladder.variants) == [f"Q{b}_K_XL" for b in (2, 3, 4, 5, 6, 8)]


def test_the_ladder_of_this_repo_names_no_owner_and_its_schema():
    text = (ROOT / "variants.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=docs/variants.schema.json\n")
    assert load_project(ROOT / "variants.yaml").ladder.owner is None


# ------------------------------------------------------------------------------------------------ text


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", WRITTEN[page])):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


# built in pieces, so that this file does not find itself
WORDS = ("T" + "BD", "FIX" + "ME", "X" + "XX")
PATHS = tuple("/" + p for p in ("work/", "home/", "root/", "Users/"))
TESTS_NAME_PATHS = re.compile(r"tests/|publisher/(card|localhub)")  # what refuses such words has to name them


def test_no_tracked_text_holds_a_placeholder_or_a_path_of_a_machine():
    found = []
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        if TESTS_NAME_PATHS.match(name) or name.startswith("examples/tiny/model/"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {w}" for w in WORDS if re.search(rf"\b{w}\b", text)]
        found += [f"{name}: {p}" for p in PATHS if p in text]
    assert not found


def test_no_tracked_file_holds_a_token():
    for path in tracked():
        if not path.relative_to(ROOT).as_posix().startswith("tests/"):
            assert not re.search(rb"\bhf_[A-Za-z0-9]{30,}", path.read_bytes()), path
