"""What is installed from a wheel: all that a command needs, and nothing of the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_template_and_text(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for package in ("publisher", "quant", "inference"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".txt"):
                assert path.relative_to(ROOT).as_posix() in held
    for path in (ROOT / "templates").rglob("*.j2"):
        assert f"publisher/templates/{path.relative_to(ROOT / 'templates').as_posix()}" in held
    for path in (ROOT / "publisher/localhub/html").iterdir():
        assert f"publisher/localhub/html/{path.name}" in held
    assert not [n for n in held if n.startswith(("tests/", "examples/", "benchmarks/"))]


def test_an_installed_wheel_plans_and_renders_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import sys; sys.path = [p for p in sys.path if p not in ('', sys.argv[1])]; sys.path.insert(0, sys.argv[2])\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import publisher.card, publisher.protocol\n"
        "assert publisher.card.__file__.startswith(sys.argv[2]), publisher.card.__file__\n"
        "assert publisher.card._builtin().joinpath('card.md.j2').is_file()\n"
        "from importlib.resources import files; assert files('publisher').joinpath('smoke_text.txt').is_file()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT), str(site)], check=True, cwd=tmp_path)
