"""Cards with measured quality: the table, who is dominated, which to choose, and what is said of what was not measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from card_ladder import DENSE, TEXT, base, baseline, bench, build, ladder, over, quality, record, smoke, speed
from test_card import THREE, golden
from test_card import row as only_row

from publisher import card_figure
from publisher.build import card_figures
from publisher.build import render_cards as build_cards
from publisher.card import check_card, figure, gather, render
from publisher.card_quality import OTHER_TEACHER, UNSOUND
from publisher.gate import gate
from publisher.push_plan import local_files
from publisher.schema import (
    BuildRecord,
    CalibrationInput,
    CalibrationSpec,
    CalibrationText,
    CostProbe,
    Interval,
    Ladder,
    Manifest,
)
from publisher.store import write_model
from publisher.variants import Project

Q2, Q4, Q8 = "Q2_K_XL", "Q4_K_XL", "Q8_K_XL"


def link(id: str) -> str:
    return f"[{id}](https://huggingface.co/Brooooooklyn/Qwen3.5-9B-UD-{id}-mlx)"


def row(text: str, start: str) -> list[str]:
    """Cells of the first line that starts so: the table of the text comes before that of conversations."""
    line = next(x for x in text.splitlines() if x.startswith(f"| {start}"))
    return only_row(line, start)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes of the 9B with four layers: as many tensors as the tests need."""
    config = {**DENSE, "text_config": {**TEXT, "num_hidden_layers": 4}}
    return base(tmp_path_factory.mktemp("dense") / "base", config)


@pytest.fixture
def project(tmp_path: Path, dense: Path) -> Project:
    (tmp_path / "base").symlink_to(dense)
    return ladder(tmp_path, THREE)


@pytest.fixture
def built(project: Project, dense: Path) -> dict[str, Manifest]:
    out = {id: build(project, id, dense) for id in (Q2, Q4, Q8)}
    record(project, *(smoke(m, 0.03) for m in out.values()), *(bench(m, 46) for m in out.values()))
    return out


@pytest.fixture
def measured(project: Project, built: dict[str, Manifest]) -> dict[str, Manifest]:
    for id, kld in ((Q2, 0.31), (Q4, 0.0213), (Q8, 0.00061)):
        record(project, quality(project, built[id], kld))
    baseline(project, "mlx-lm uniform 4-bit", "uniform", built[Q4], 0.85, 0.0542)
    baseline(project, "mlx-lm uniform 8-bit", "uniform", built[Q8], 0.98, 0.0009)
    baseline(project, "unsloth 4 as published", "unsloth", built[Q4], 1.0, 0.0313)
    return built


def test_golden_quality_of_all(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    text = render(gather(project, dense), Q4, None)
    golden("quality", text)
    cells = row(text, f"**{link(Q4)}**")
    assert cells[3].startswith("**0.0213 [")
    assert row(text, "BF16 against BF16 computed another way")[3].startswith("2.1e-9 [")
    assert "KLD, smoke test" not in text
    assert row(text, "**[Brooooooklyn/Qwen3.5-9B-UD-Q4_K_XL-mlx]")[6] == "0.0213"
    assert "By how much was not measured" not in text


def test_golden_quality_of_some(project: Project, built: dict[str, Manifest], dense: Path) -> None:
    record(project, quality(project, built[Q2], 0.31, settings="other"))
    lost = quality(project, built[Q4], 0.0213)
    record(project, lost.model_copy(update={
        "corpora": lost.corpora[:1], "control": lost.control[:1], "greedy": None, "greedy_control": None,
        "chat_hash": None, "missing": ["chat: the base has no chat template", "greedy: BF16 does not fit: /home/me/x"],
    }))  # fmt: skip
    text = render(gather(project, dense), Q8, None)
    golden("quality_partial", text)
    assert row(text, link(Q2))[3] == "not measured: evaluation: texts, windows or prompts changed"
    assert row(text, f"**{link(Q8)}**")[3] == "not measured: eval was not run"
    assert "Not measured: chat: the base has no chat template." in text
    assert "kld-light.png" not in text
    assert "/home/me" not in text
    assert "By how much was not measured." in text
    assert "Not considered, since not measured or broken: Q2_K_XL, Q8_K_XL." in text


def test_without_any_quality_the_smoke_figure_stays_a_smoke_figure(
    project: Project, built: dict[str, Manifest], dense: Path
) -> None:
    text = render(gather(project, dense), Q4, None)
    assert "| KLD, smoke test |" in text
    assert "## Quality\n\nNot measured: eval was not run.\n" in text
    assert "Which Variant to Choose" not in text
    assert figure(gather(project, dense), Q4) is None


def test_a_dominated_variant_says_so(project: Project, built: dict[str, Manifest], dense: Path) -> None:
    record(project, quality(project, built[Q2], 0.01), quality(project, built[Q4], 0.02))
    record(project, quality(project, built[Q8], 0.001))
    text = render(gather(project, dense), Q4, None)
    assert "- Q4_K_XL: Q2_K_XL is no larger and closer to BF16, by 0.0100 [" in text
    assert row(text, f"**{link(Q4)}** <sup>†</sup>")
    assert gather(project, dense).standings.dominator(Q8) is None
    assert gather(project, dense).standings.dominator(Q2) is None


def test_a_foreign_model_dominates_too(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    baseline(project, "somebody's", "uniform", measured[Q2], 0.9, 0.1)
    found = gather(project, dense).standings.dominator(Q2)
    assert found
    assert found[0].name == "somebody's"


def test_what_the_windows_do_not_tell_apart_is_not_ranked(
    project: Project, built: dict[str, Manifest], dense: Path
) -> None:
    # as close on average, but each better on other windows
    record(project, quality(project, built[Q2], 0.0100, 0.9), quality(project, built[Q4], 0.0101, -0.9))
    record(project, quality(project, built[Q8], 0.001))
    facts = gather(project, dense)
    assert facts.standings.dominator(Q4) is None
    best = facts.standings.best([Q2, Q4])
    assert best
    assert best.name == Q2  # the smaller
    assert "not ranked: Q2_K_XL and Q4_K_XL." in render(facts, Q4, None)


def test_under_the_control_row_nothing_is_ranked(project: Project, built: dict[str, Manifest], dense: Path) -> None:
    noisy = [over("text", 0.005), over("chat", 0.005)]
    for id, kld in ((Q2, 0.010), (Q4, 0.012), (Q8, 0.011)):
        record(project, quality(project, built[id], kld, control=noisy))
    facts = gather(project, dense)
    assert all(facts.standings.dominator(id) is None for id in (Q2, Q4, Q8))
    assert facts.standings.best([Q2, Q4, Q8]).name == Q2  # type: ignore[union-attr]
    assert "Q2_K_XL and Q4_K_XL; Q2_K_XL and Q8_K_XL; Q4_K_XL and Q8_K_XL" in render(facts, Q4, None)


@pytest.mark.parametrize("peaks", [None, (4.0, 9.0, 20.0)])
def test_which_to_choose_by_memory(
    project: Project, measured: dict[str, Manifest], dense: Path, peaks: tuple[float, ...] | None
) -> None:
    for m, peak in zip(measured.values(), peaks or (0, 0, 0), strict=True):
        (project.store.results(m.weights_hash) / "bench.json").unlink()
        if peaks:
            record(project, bench(m, 46, variant=speed(46).model_copy(update={"peak_gb": peak})))
    facts = gather(project, dense)
    text = render(facts, Q4, None)
    contents = {id: c for id in measured if (c := facts.variant(id).contents)}
    # what the greediest benchmark took beside weights; without one, the most that prefill can take
    took = max((int(1e9 * p) - m.text_nbytes for p, m in zip(peaks or (), measured.values(), strict=False)), default=0)
    needs = {id: c.text_nbytes + c.caches + (took or c.workspace) for id, c in contents.items()}
    lines = re.search(r"## Which Variant to Choose\n\n(.*?)\n\n", text, re.S)
    assert lines
    table = {c[0].strip(): c[1].strip() for x in lines[1].splitlines()[2:] if (c := x.split("|")[1:-1])}
    for memory in (8, 16, 24, 32, 48, 64):
        best = [id for id in (Q2, Q4, Q8) if needs[id] <= 0.7e9 * memory][-1:]
        (found,) = [v for k, v in table.items() if covers(k, memory)]
        expected = [f"**{link(id)}**" if id == Q4 else link(id) for id in best]
        assert [found] == (expected or ["none of the measured ones fits"])
    assert ("prefill workspace (as measured)" if peaks else "prefill workspace (at most, by shapes)") in text
    assert ("none of the measured ones fits" in text) == bool(peaks)


def covers(cell: str, memory: int) -> bool:
    low, _, high = cell.removesuffix(" GB and more").removesuffix(" GB").partition(" to ")
    return int(low) <= memory <= (10**9 if cell.endswith("more") else int(high or low))


def test_a_variant_that_failed_its_smoke_test_is_not_recommended(
    project: Project, measured: dict[str, Manifest], dense: Path
) -> None:
    record(project, smoke(measured[Q8], None))
    text = render(gather(project, dense), Q4, None)
    assert "Not considered, since not measured or broken: Q8_K_XL." in text


def test_of_two_teachers_only_the_common_one_stands(
    project: Project, measured: dict[str, Manifest], dense: Path
) -> None:
    other = [d.model_copy(update={"teacher": "b" * 64}) for d in (over("text", 0.1), over("chat", 0.1))]
    record(project, quality(project, measured[Q2], 0.1, corpora=other))
    text = render(gather(project, dense), Q4, None)
    assert row(text, link(Q2))[3] == f"not measured: {OTHER_TEACHER}"


@pytest.mark.parametrize("broken", ["infinite", "lists", "one window", "reversed", "no positions"])
def test_a_result_that_does_not_add_up_counts_as_none(
    project: Project, measured: dict[str, Manifest], dense: Path, broken: str
) -> None:
    good = over("text", 0.0213)
    change = {
        "infinite": {"kld": Interval(value=float("inf"), low=0, high=1)},
        "lists": {"window_kld": good.window_kld[:3]},
        "one window": {"windows": 1, "window_kld": [0.1], "window_positions": [40]},
        "reversed": {"kld": Interval(value=0.1, low=0.2, high=0.05)},
        "no positions": {"window_positions": [0] * good.windows},
    }[broken]
    record(project, quality(project, measured[Q4], 0.0213, corpora=[good.model_copy(update=change)]))
    facts = gather(project, dense)
    text = render(facts, Q4, None)
    assert row(text, f"**{link(Q4)}**")[3] == f"not measured: {UNSOUND}"
    assert check_card(text) == []
    drawn = figure(facts, Q4)
    assert drawn
    assert Q4 not in {p.name for p in drawn.points}
    assert Q4 not in drawn.alt


def test_hostile_names_break_neither_table_nor_alternative_text(
    project: Project, measured: dict[str, Manifest], dense: Path
) -> None:
    nasty = "a|b](x) <script> ![y] `$\\frac{1}$` \n# h"
    baseline(project, nasty, "uniform", measured[Q4], 0.7, 0.2)
    baseline(project, Q4, "uniform", measured[Q4], 0.7, 0.3)  # a variant's name: the variant keeps it
    facts = gather(project, dense)
    text = render(facts, Q4, None)
    assert check_card(text) == []
    assert "<script>" not in text
    assert len(row(text, "a\\|b")) == 7
    (alt,) = re.findall(r"^!\[([^\]\n]*)\]\(images/kld-light\.png#hf-light-mode-only\)$", text, re.M)
    assert alt.isprintable()
    drawn = figure(facts, Q4)
    assert drawn
    assert sum(p.name == Q4 for p in drawn.points) == 1
    assert card_figure.draw(drawn, card_figure.THEMES[0]).startswith(card_figure.SIGNATURE)


def test_the_alternative_text_tells_the_finding(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    drawn = figure(gather(project, dense), Q4)
    assert drawn
    assert "This variant: Q4_K_XL with 0.0213 at" in drawn.alt
    assert "Of 3 variants the closest is Q8_K_XL with 0.000610 at" in drawn.alt
    assert "the smallest Q2_K_XL with 0.310" in drawn.alt
    assert "mlx-lm uniform 4-bit with 0.0542" in drawn.alt


def test_positions_that_are_not_finite_are_said_and_never_recommended(
    project: Project, measured: dict[str, Manifest], dense: Path
) -> None:
    bad = over("text", 0.0001).model_copy(update={"nonfinite": 7})
    record(project, quality(project, measured[Q8], 0.0001, corpora=[bad]))
    text = render(gather(project, dense), Q4, None)
    assert "(7 of 960 positions are not finite and left out)" in row(text, link(Q8))[3]
    assert "Not considered, since not measured or broken: Q8_K_XL." in text


# ---------------------------------------------------------------------------------------------- how it was made


def solved(project: Project, m: Manifest) -> Manifest:
    """The manifest as of a build by `gptq` with statistics, and what was measured of the classes then."""
    texts = [CalibrationText(name="text", sha256="c" * 64, tokens=5000)]
    found = CalibrationInput(
        texts=texts, tokens=5000, settings=CalibrationSpec(text="mine.txt", tokens=5000, chat=False)
    )
    inputs = m.inputs.model_copy(update={"solver": "gptq", "statistics": "d" * 64})
    m = m.model_copy(update={"inputs": inputs, "calibration": found})
    write_model(project.store.manifest(m.id), m)
    path = project.store.results(m.weights_hash) / "build.json"
    two = CostProbe(label="down_proj", bits=2, group_size=64, predicted=1, measured=0.31)
    probes = [two, two.model_copy(update={"bits": 4, "measured": 0.0053})]
    built = BuildRecord.model_validate_json(path.read_bytes())
    write_model(path, built.model_copy(update={"probes": probes, "probe_tokens": 4096}))
    return m


def test_the_models_own_sensitivity_stands_beside_the_inherited_reasons(
    project: Project, built: dict[str, Manifest], dense: Path
) -> None:
    solved(project, built[Q4])
    text = render(gather(project, dense), Q4, None)
    assert row(text, "`down_proj`")[6].endswith("; all 4 at 2 bits 0.310, at 4 bits 0.00530")
    assert "gate and up <sup>" in row(text, "`down_proj`")[6]  # what was there stays
    assert "over 4,096 tokens of the calibration text" in text
    assert "It was not measured again on this model" not in text


def test_solver_and_calibration_are_told_and_in_the_fragment(
    project: Project, built: dict[str, Manifest], dense: Path
) -> None:
    solved(project, built[Q4])
    text = render(gather(project, dense), Q4, None)
    assert "By `gptq`: " in text
    assert f"over 5,000 tokens of calibration text: 5,000 of the text (sha256 `{'c' * 12}`)." in text
    assert "`publish calibrate` and `publish build Q4_K_XL`" in text
    found = re.search(r"```yaml\n(.*?)```", text, re.S)
    assert found
    again = Ladder.model_validate(yaml.safe_load(found[1]))
    assert again.solver == "gptq"
    assert again.calibration == CalibrationSpec(text="./mine.txt", tokens=5000, chat=False)


def test_deleting_statistics_leaves_the_card_as_it_is(
    project: Project, built: dict[str, Manifest], dense: Path
) -> None:
    solved(project, built[Q4])
    folder = project.store.statistics / ("d" * 16)
    folder.mkdir(parents=True)
    (folder / "costs.json").write_text(json.dumps({}))
    before = render(gather(project, dense), Q4, None)
    (folder / "costs.json").unlink()
    folder.rmdir()
    assert render(gather(project, dense), Q4, None) == before


# ---------------------------------------------------------------------------------------------- pictures and release


def test_pictures_come_and_go_with_the_results(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    base = SimpleNamespace(folder=dense)
    assert build_cards(project, base).changed == {Q2, Q4, Q8}  # type: ignore[arg-type]
    assert card_figures(project, gather(project, dense)) == {Q2: [], Q4: [], Q8: []}
    assert not build_cards(project, base).changed  # type: ignore[arg-type]
    shown = re.findall(r"\]\((images/[^)#]+)", (project.store.variant(Q4) / "README.md").read_text())
    assert shown == ["images/kld-light.png", "images/kld-dark.png"]
    assert set(shown) <= {f.path for f in local_files(project, Q4, rehash=False)[1]}  # pushed with the card
    record(project, quality(project, measured[Q8], 0.0005))
    # its siblings' pictures hold it, too
    assert all(
        "is not of today's figures" in lines[0] for lines in card_figures(project, gather(project, dense)).values()
    )
    for m in measured.values():
        (project.store.results(m.weights_hash) / "quality.json").unlink()
    assert build_cards(project, base).changed == {Q2, Q4, Q8}  # type: ignore[arg-type]
    assert not (project.store.variant(Q4) / "images").exists()


def test_a_card_whose_picture_is_missing_does_not_leave(
    project: Project, measured: dict[str, Manifest], dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("publisher.gate.verify_folder", lambda *_: [])  # gigabytes of nothing
    build_cards(project, SimpleNamespace(folder=dense))  # type: ignore[arg-type]
    told = "'images/kld-dark.png#hf-dark-mode-only' is no file that is pushed; run `publish card Q4_K_XL`"
    assert not any("images/" in line for line in gate(project, Q4))
    (project.store.variant(Q4) / "images" / "kld-dark.png").unlink()
    assert any(line.endswith(told) for line in gate(project, Q4))
    assert card_figures(project, gather(project, dense))[Q4] == ["images/kld-dark.png is missing"]
