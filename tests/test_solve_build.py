"""`solver:` in variants.yaml: who decides, what it needs, and what makes its weights stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import EXAMPLE, write_ladder
from solved_ladder import HEAD

import publisher.calibrate
from publisher.schema import Costs
from publisher.variants import load_project

SKIP = ("--skip", "smoke", "--skip", "bench", "--skip", "card")


@pytest.fixture
def ladder(tmp_path) -> Path:
    words = (EXAMPLE.parents[1] / "publisher/data/calibration.txt").read_text(encoding="utf-8")
    (tmp_path / "words.txt").write_text(words[:2000], encoding="utf-8")
    return tmp_path


@pytest.fixture(autouse=True)
def _no_prices(monkeypatch):
    """Nothing here is allocated, so nothing need be measured."""
    empty = Costs(statistics="0" * 64, solver="gptq", version=1, modules={})
    monkeypatch.setattr(publisher.calibrate, "measure_costs", lambda *args: empty)


def manifest(ladder: Path, id: str) -> dict:
    return json.loads((ladder / "build" / id / "manifest.json").read_text())


def stale(publish, ladder: Path) -> dict[str, list[str]]:
    rows = json.loads(publish("status", "--json", cwd=ladder).ok().out)["variants"]
    return {r["id"]: r["stale"]["weights"] for r in rows}


def test_the_variants_word_then_the_files_then_the_recipes(ladder):
    variants = (
        "variants:\n  A: {bits: 4}\n  B: {bits: 4, solver: rtn}\n  C: {bits: 4, recipe: uniform}\n  D: {size: 4 bpw}\n"
    )
    mine = "  two: {extends: one}\n  three: {extends: one, solver: ls}\n"
    text = HEAD.replace("recipe: one\n", mine + "recipe: two\n")
    write_ladder(ladder, text + variants + "  E: {bits: 4, recipe: three}\n")
    project = load_project(ladder / "variants.yaml")
    assert [project.solver(id) for id in "ABCDE"] == ["gptq", "rtn", "rtn", "gptq", "ls"]
    (ladder / "variants.yaml").write_text(text + "solver: ls\n" + variants)
    project = load_project(ladder / "variants.yaml")
    assert [project.solver(id) for id in "ABCD"] == ["ls", "rtn", "ls", "ls"]


def test_an_unknown_solver_is_one_line(ladder, publish):
    write_ladder(ladder, HEAD + "variants:\n  A: {bits: 4, solver: magic}\n")
    told = publish("plan", cwd=ladder).refused(2)
    assert told.startswith("variants.yaml:8: variants.A.solver: found 'magic'; expected 'rtn', 'ls' or 'gptq'")


def test_a_solver_without_its_statistics_is_one_line_before_anything_is_built(ladder, publish):
    write_ladder(ladder, HEAD + "variants: {A: {bits: 4}, B: {bits: 4, solver: ls, imatrix: false}}\n")
    assert stale(publish, ladder)["A"] == ["its solver needs statistics: run publish calibrate"]
    for id in "AB":
        assert publish("build", id, *SKIP, "-q", cwd=ladder).refused(2) == (
            f"{id}: its solver needs statistics: run publish calibrate"
        )
    assert not list((ladder / "build").glob("*/*.safetensors"))


def test_least_squares_takes_an_imatrix_and_needs_no_calibration(ladder, publish):
    write_ladder(ladder, HEAD + "variants:\n  A: {bits: 4, solver: ls}\n  R: {bits: 4, solver: rtn}\n")
    publish("build", "--all", *SKIP, "-q", cwd=ladder).ok()
    inputs = manifest(ladder, "A")["inputs"]
    assert (inputs["solver"], inputs["statistics"]) == ("ls", None)
    assert inputs["imatrix"]["name"] == "imatrix-tiny.gguf"
    assert manifest(ladder, "R")["inputs"]["imatrix"] is None
    assert manifest(ladder, "A")["weights_hash"] != manifest(ladder, "R")["weights_hash"]
    assert stale(publish, ladder) == {"A": [], "R": []}
    path = ladder / "imatrix-tiny.gguf"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data + b"\0")
    after = stale(publish, ladder)
    assert after["R"] == []
    assert after["A"][0].startswith("imatrix: ")


def test_weights_follow_the_calibration_text_and_outlive_the_statistics(ladder, publish):
    write_ladder(ladder, HEAD + "variants:\n  A: {bits: 4}\n  R: {bits: 4, solver: rtn}\n")
    publish("calibrate", "-q", cwd=ladder).ok()
    publish("build", "--all", *SKIP, "-q", cwd=ladder).ok()
    first = manifest(ladder, "A")
    (statistics,) = (ladder / "build/statistics").iterdir()
    assert first["inputs"]["statistics"][:16] == statistics.name
    assert first["inputs"]["imatrix"] is None
    shutil.rmtree(statistics)
    assert stale(publish, ladder) == {"A": [], "R": []}

    (ladder / "words.txt").write_text((ladder / "words.txt").read_text(encoding="utf-8")[500:], encoding="utf-8")
    found = stale(publish, ladder)
    assert found["R"] == []
    (reason,) = found["A"]
    assert reason.startswith(f"statistics: {first['inputs']['statistics'][:8]} → ")
    assert "needs statistics" in publish("build", "A", *SKIP, "-q", cwd=ladder).refused(2)
    assert manifest(ladder, "A") == first  # what was built stays until there is something better
    publish("calibrate", "-q", cwd=ladder).ok()
    publish("build", "A", *SKIP, "-q", cwd=ladder).ok()
    assert stale(publish, ladder) == {"A": [], "R": []}
    assert manifest(ladder, "A")["weights_hash"] != first["weights_hash"]


def test_another_solver_is_named_as_the_reason(ladder, publish):
    write_ladder(ladder, HEAD + "variants:\n  A: {bits: 4, solver: ls}\n")
    publish("build", "A", *SKIP, "-q", cwd=ladder).ok()
    text = (ladder / "variants.yaml").read_text()
    (ladder / "variants.yaml").write_text(text.replace("solver: ls}", "solver: rtn}"))
    assert "solver: ls → rtn" in stale(publish, ladder)["A"]
