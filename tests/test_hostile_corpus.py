"""Every input that fuzzing kept, through the parser that it was made for (fuzz/targets.py, without atheris)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "fuzz"
sys.path.insert(0, str(FUZZ))

import run  # noqa: E402 - the folder is no package
import targets  # noqa: E402

CORPUS_BYTES = 300_000  # of all inputs in the repository


@pytest.mark.parametrize("name", targets.TARGETS)
def test_what_fuzzing_kept_gives_a_result_or_one_line(name):
    inputs = sorted(p for kind in ("corpus", "findings") for p in (FUZZ / kind / name).glob("*"))
    assert any(p.name.startswith("seed-") for p in inputs), "no seed: run fuzz/seeds.py"
    for path in inputs:
        try:
            targets.TARGETS[name](path.read_bytes())
        except Exception as e:
            raise AssertionError(f"{path.relative_to(FUZZ)}: {type(e).__name__}: {e}") from e


def test_the_corpus_is_small_and_of_known_targets():
    files = [p for kind in ("corpus", "findings") for p in (FUZZ / kind).glob("*/*")]
    assert {p.parent.name for p in files} <= targets.TARGETS.keys()
    assert sum(p.stat().st_size for p in files) < CORPUS_BYTES


def test_the_table_in_the_docs_is_the_record():
    rows = json.loads((FUZZ / "results.json").read_text())["rows"]
    assert [r["target"] for r in rows] == list(targets.TARGETS)
    assert run.table(rows) in (FUZZ.parent / "docs/reliability.md").read_text(encoding="utf-8")
