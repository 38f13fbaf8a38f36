"""Who may import whom, read from the source of every file: publisher → quant → inference, and each library in its place."""

from __future__ import annotations

import ast
import functools
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("inference", "quant", "publisher")
OURS = {"inference": set(), "quant": {"inference"}, "publisher": {"inference", "quant"}}

# top module → the files that may import it; a folder stands for all below it
LIBRARIES = {
    "huggingface_hub": (
        "publisher/hub.py",
        "publisher/hub_client.py",
        "publisher/hub_errors.py",
    ),
    "httpx2": (
        "publisher/hub_client.py",
        "publisher/hub_bounds.py",
        "publisher/hub_errors.py",
        "publisher/hub_watch.py",
    ),
    "httpcore2": ("publisher/hub_watch.py",),
    "safetensors": ("publisher/verify.py",),
    "gguf": ("quant/imatrix.py",),
    "mlx": ("inference/backend.py",),
    "numpy": (
        "inference",
        "quant",
        "publisher/smoke.py",
        "publisher/evaluate_corpora.py",
        "publisher/evaluate_figures.py",
        "publisher/evaluate_teacher.py",
    ),
    "matplotlib": ("publisher/card_figure.py",),
    "tokenizers": ("inference/tokenizer.py",),
    "click": ("publisher/cli.py",),
    "rich": ("publisher/show.py", "publisher/report.py"),
    "yaml": ("publisher",),
    "pydantic": ("publisher",),
    "jinja2": ("publisher", "inference/tokenizer.py", "inference/sandbox.py"),
    "starlette": ("publisher/localhub",),
    "uvicorn": ("publisher/localhub",),
    "lz4": ("publisher/localhub/xet_format.py",),
    "blake3": ("quant", "publisher/verify.py", "publisher/localhub/xet_format.py"),
    "markdown_it": ("publisher/localhub/pages_card.py", "publisher/card_links.py"),
    "mdit_py_plugins": ("publisher/localhub/pages_card.py", "publisher/card_links.py"),
    "nh3": ("publisher/localhub/pages_card.py",),
    "markupsafe": ("publisher/localhub/pages.py",),
    "model_signing": ("publisher/signing.py",),
    "cryptography": ("publisher/signing.py",),
    "OpenSSL": ("publisher/signing.py",),
}
# where the name on PyPI is another
DISTRIBUTION = {
    "yaml": "pyyaml", "markdown_it": "markdown-it-py", "mdit_py_plugins": "mdit-py-plugins",
    "model_signing": "model-signing", "OpenSSL": "pyopenssl",
}  # fmt: skip
# what `plan` and `status` import: none of it may import MLX, not even inside a function that they call
LIGHT = {
    "publisher": (
        "schema",
        "variants",
        "store",
        "plan",
        "base",
        "survey",
        "staleness",
        "protocol",
        "source",
        "starter",
        "show",
    ),
    "quant": ("recipe", "builtin", "llama", "qwen3_5", "source", "version", "folder", "shards"),
    "inference": ("errors", "checkpoint", "layout", "families", "memory", "llama.names", "qwen3_5.names"),
}

FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


@functools.cache
def imports(path: Path, top_level: bool = False) -> frozenset[str]:
    """Absolute names of the modules that a file imports, TYPE_CHECKING blocks aside."""
    package = path.relative_to(ROOT).parts[:-1]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.Import):
                found.update(a.name for a in child.names)
            elif isinstance(child, ast.ImportFrom):
                start = package[: len(package) - child.level + 1] if child.level else ()
                module = ".".join((*start, *([child.module] if child.module else [])))
                found.update({module, *(f"{module}.{a.name}" for a in child.names)})
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(found)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_files_are_found():
    assert {p.parts[len(ROOT.parts)] for p in FILES} == set(PACKAGES)
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    tops = {m.partition(".")[0] for m in imports(path)} & set(PACKAGES)
    assert tops <= OURS[package] | {package}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_each_library_stays_in_its_place(path):
    for module in {m.partition(".")[0] for m in imports(path)} - set(PACKAGES) - set(sys.stdlib_module_names):
        assert module in LIBRARIES, f"{module} is imported here and has no place yet"
        assert any(name(path) == p or name(path).startswith(f"{p}/") for p in LIBRARIES[module]), module


def test_every_library_is_used_and_declared():
    used = {m.partition(".")[0] for p in FILES for m in imports(p)}
    assert set(LIBRARIES) <= used
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["signing"]]
    for module in LIBRARIES:
        assert any(d.startswith(DISTRIBUTION.get(module, module)) for d in declared), module


def test_the_built_in_hub_knows_nothing_of_the_rest():
    for path in (ROOT / "publisher/localhub").rglob("*.py"):
        ours = {m for m in imports(path) if m.partition(".")[0] in PACKAGES}
        assert all(m == "publisher.localhub" or m.startswith("publisher.localhub.") for m in ours - {"publisher"}), path


def _modules() -> dict[str, Path]:
    out = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


@pytest.mark.parametrize("module", [f"{p}.{m}" for p, names in LIGHT.items() for m in names])
def test_what_plan_and_status_need_reaches_neither_mlx_nor_the_hub_client(module):
    modules, seen, todo = _modules(), set(), [module]
    while todo:
        current = todo.pop()
        if current in seen or current not in modules:
            continue
        seen.add(current)
        todo += imports(modules[current], top_level=True)
    reached = {m.partition(".")[0] for s in seen for m in imports(modules[s], top_level=True)}
    assert "inference.backend" not in seen
    assert not reached & {"mlx", "huggingface_hub", "gguf", "starlette", "uvicorn"}


def test_there_are_no_import_cycles():
    modules = _modules()
    graph = {
        m: {
            i for i in imports(p, top_level=True) if i in modules and not f"{m}.".startswith(f"{i}.")
        }  # not its own package
        for m, p in modules.items()
    }
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module]):
                walk(other, (*trail, module))
            done.add(module)

    for module in sorted(modules):
        walk(module, ())
