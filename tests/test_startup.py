"""What each command imports, in a process of its own: MLX and other slow libraries only where they are worked with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

from publisher.cli import main

# libraries that take 20 ms or more to import, or that have no business in most commands
SLOW = (
    "mlx", "numpy", "matplotlib", "huggingface_hub", "httpx2", "tokenizers", "starlette", "uvicorn", "pydantic", "yaml",
    "jinja2", "gguf", "safetensors", "rich", "markdown_it", "nh3", "lz4", "cryptography", "model_signing",
)  # fmt: skip
FILES = {"pydantic", "yaml"}  # read variants.yaml and the results
CARDS = FILES | {"jinja2"}
SERVER = {"starlette", "uvicorn", "yaml", "jinja2", "markdown_it", "nh3", "lz4"}
HUB = {"huggingface_hub", "httpx2"}

# what a command may import of SLOW, in a built ladder; `{other}` is another folder. "refused": before it gets to its work
COMMANDS: dict[str, tuple[str, set[str]]] = {
    "no command": ("", set()),
    "--help": ("--help", set()),
    "--version": ("--version", set()),
    "usage error": ("plan --nonsense", set()),
    "unknown command": ("nonsense", set()),
    "plan": ("plan --json", FILES),
    "plan, table": ("plan", FILES | {"rich"}),
    "allocate": ("allocate --all", FILES),
    "status": ("status --json", CARDS),
    "status, table": ("status", CARDS | {"rich"}),
    "card": ("card --all", CARDS),
    "card --check": ("card --all --check", CARDS),
    "build, all current": ("build --all -q --json", CARDS),
    "verify": ("verify Q4_K_XL --json", FILES | {"safetensors", "numpy"}),
    "push without a token": ("push --all --dry-run", CARDS | HUB | {"markdown_it"}),
    "schema": ("schema", FILES),
    "init": ("init model --file {other}/new.yaml", FILES),
    "hub, refused": ("hub --dir {other} --fault nonsense", SERVER),
    "merge, refused": ("merge {other} --file {other}/none.yaml", CARDS | {"numpy", "tokenizers"}),
    "calibrate, refused": ("calibrate --file {other}/none.yaml", FILES),
    "smoke, refused": ("smoke Q4_K_XL --file {other}/none.yaml", CARDS),
    "bench, refused": ("bench Q4_K_XL --file {other}/none.yaml", CARDS),
    "eval, refused": ("eval Q4_K_XL --file {other}/none.yaml", FILES),
    "chat": (
        "chat Q4_K_XL --prompt hi --max-tokens 1 --json",
        CARDS | {"mlx", "numpy", "tokenizers"},
    ),
}
RECORD = f"""
import json, sys
from pathlib import Path
from publisher.cli import main
try:
    main(prog_name="publish")
finally:
    Path(sys.argv[0]).write_text(json.dumps([m for m in {SLOW} if m in sys.modules]))
"""


def imported(arguments: list[str], cwd: Path, record: Path) -> set[str]:
    code = f"import sys; sys.argv = [{str(record)!r}, *{arguments!r}]\n{RECORD}"
    python(code, cwd)
    return set(json.loads(record.read_text()))


def python(code: str, cwd: Path) -> str:
    """Run it in a process of its own; what it wrote to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment(cwd),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_only_what_it_works_with(command, ladder, tmp_path):
    arguments, allowed = COMMANDS[command]
    found = imported(arguments.format(other=tmp_path).split(), ladder, tmp_path / "record.json")
    assert found <= allowed, f"`publish {arguments}` imports {', '.join(sorted(found - allowed))}"
    assert ("mlx" in found) == ("mlx" in allowed)  # the record sees what it is for


def test_every_command_is_in_the_table():
    assert {arguments.split()[0] for arguments, _ in COMMANDS.values() if arguments} >= set(main.commands)


def test_the_help_of_no_command_imports_anything_slow(tmp_path):
    """All in one process: what one of them imports stays."""
    code = f"""
import json, sys
from publisher.cli import main
found = {{}}
for command in {sorted(main.commands)}:
    try:
        main([command, "--help"], prog_name="publish")
    except SystemExit as e:
        assert not e.code
    found[command] = [m for m in {SLOW} if m in sys.modules]
print(json.dumps(found), file=sys.stderr)
"""
    assert json.loads(python(code, tmp_path)) == {command: [] for command in main.commands}
