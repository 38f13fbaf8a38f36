"""Searched AWQ exponents: the best of the grid on the group's own rounding error, in the build, the manifest and the card."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_ladder
from quant_jobs import TINY_IMATRIX, load_tensors, plans
from test_solve_build import SKIP, manifest, stale

from inference.backend import mx
from quant import awq_search, qwen3_5
from quant.awq import folds, groups, scale
from quant.awq_search import GRID, search
from quant.imatrix import Imatrix, read_imatrix
from quant.sample import restored
from quant.solve import Moments, solve

LAYER = "language_model.model.layers."
HEAD = """\
base: {path: model, name: tiny}
imatrix: ./imatrix-tiny.gguf
recipes:
  few: {rules: [{match: "*.{gate,up}_proj", bits: N, awq: true}, {match: "*", bits: bf16}]}
recipe: few
variants:
"""


@pytest.fixture(scope="module")
def imatrix(tiny) -> Imatrix:
    return read_imatrix(TINY_IMATRIX, json.loads((tiny / "config.json").read_text()))


def with_outliers(imatrix: Imatrix) -> Imatrix:
    """The same, with a few channels of every input that see a hundred times more."""
    out = {m: v.copy() for m, v in imatrix.importance.items()}
    for v in out.values():
        v[..., ::40] *= 1e4
    return replace(imatrix, importance=out)


@pytest.mark.parametrize("solver", ["rtn", "ls"])
def test_the_exponent_with_the_least_error_of_the_outputs_is_taken(tiny, imatrix, monkeypatch, solver):
    monkeypatch.setattr(awq_search, "ROWS", 10**6)  # all rows, so that whole matrices tell the same
    grid = GRID[::3]
    monkeypatch.setattr(awq_search, "GRID", grid)
    planned = [p for p in plans(tiny, 3, awq=True) if ".layers.3." in p.target.name]
    found = search(planned, imatrix, qwen3_5.AWQ_GROUPS, solver)
    assert found == search(planned, imatrix, qwen3_5.AWQ_GROUPS, solver)
    assert set(found) == {(LAYER + "3", "A"), (LAYER + "3", "B"), (LAYER + "3", "C")}
    stored = load_tensors(tiny)
    (group,) = (g for g in groups(planned, imatrix, qwen3_5.AWQ_GROUPS) if g.group.label == "A")
    totals = []
    for exponent in grid:
        s, total = scale(group.importance, exponent), 0.0
        for plan in group.members:
            assert plan.spec is not None
            w = stored[plan.target.source.name].astype(mx.float32)
            second = imatrix.importance[plan.target.module]
            moments = Moments((second / s**2).astype(np.float32))
            packed = solve((w * mx.array(s)).astype(mx.bfloat16), moments, plan.spec, solver, awq_search.QUICK)
            e = np.array(restored(packed, plan.spec), np.float64) / s - np.array(w, np.float64)
            total += float((e**2 * second).sum())
        totals.append(total)
    assert found[LAYER + "3", "A"] == grid[int(np.argmin(totals))]


def test_outliers_are_scaled_and_least_squares_needs_less_of_it(tiny, imatrix):
    planned = [p for p in plans(tiny, 3, awq=True) if ".layers.0." in p.target.name]
    hard = with_outliers(imatrix)
    nearest, fitted = (search(planned, hard, qwen3_5.AWQ_GROUPS, s) for s in ("rtn", "gptq"))
    assert all(0 < e < 1 for e in nearest.values())
    assert sum(fitted.values()) <= sum(nearest.values())


def test_an_exponent_of_zero_changes_no_value(tiny, imatrix):
    planned = [p for p in plans(tiny, 3, awq=True) if ".layers.0." in p.target.name]
    none = {(g.layer, g.group.label): 0.0 for g in groups(planned, imatrix, qwen3_5.AWQ_GROUPS)}
    for fold in folds(planned, imatrix, none, qwen3_5.AWQ_GROUPS).values():
        for vector in (fold.columns, fold.rows):
            assert vector is None or (vector == 1).all()


def test_a_searched_variant_is_built_recorded_and_told(tmp_path, publish):
    write_ladder(
        tmp_path, HEAD + "  S: {bits: 3, awq_exponent: search}\n  F: {bits: 3}\n  N: {bits: 3, awq_exponent: 0}\n"
    )
    publish("build", "--all", "--skip", "smoke", "--skip", "bench", "-q", cwd=tmp_path).ok()
    s = manifest(tmp_path, "S")
    assert s["inputs"]["awq_exponent"] == "search"
    assert s["awq_exponents"].keys() == {"A"}
    assert set(s["awq_exponents"]["A"]) == {f"{LAYER}{i}" for i in range(4)}
    assert set(s["awq_exponents"]["A"].values()) <= set(GRID)
    assert manifest(tmp_path, "F")["awq_exponents"] == {}
    assert len({manifest(tmp_path, id)["weights_hash"] for id in "SFN"}) == 3
    assert stale(publish, tmp_path) == {"S": [], "F": [], "N": []}
    card = (tmp_path / "build/S/README.md").read_text()
    assert "exponent searched for each group of matrices" in card
    assert "awq_exponent: search" in card
    assert "exponent 1.0, no search" in (tmp_path / "build/F/README.md").read_text()

    text = (tmp_path / "variants.yaml").read_text()
    (tmp_path / "variants.yaml").write_text(text.replace("S: {bits: 3, awq_exponent: search}", "S: {bits: 3}"))
    assert stale(publish, tmp_path)["S"] == ["awq_exponent: search → 1.0"]
    (tmp_path / "variants.yaml").write_text(text)
    publish("build", "S", "--force", *SKIP, "-q", cwd=tmp_path).ok()
    assert manifest(tmp_path, "S")["weights_hash"] == s["weights_hash"]


def test_a_recipe_can_search_and_a_variant_can_say_otherwise(tmp_path, publish):
    text = HEAD.replace("few: {", "few: {awq_exponent: search, ")
    write_ladder(
        tmp_path,
        text
        + "  S: {bits: 3}\n  F: {bits: 3, awq_exponent: 0.5}\n  U: {bits: 3, recipe: unsloth, awq_exponent: search}\n",
    )
    from publisher.variants import load_project

    project = load_project(tmp_path / "variants.yaml")
    assert [project.recipe(id).awq_exponent for id in "SFU"] == ["search", 0.5, "search"]
    (tmp_path / "variants.yaml").write_text(text + "  S: {bits: 3, awq_exponent: best}\n")
    told = publish("plan", cwd=tmp_path).refused(2)
    assert told.startswith("variants.yaml:7: variants.S.awq_exponent: found 'best'; expected ")
    assert "'search'" in told
