"""`publish eval` from end to end on the tiny ladder: figures, what is kept and found again, staleness, the gate."""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from conftest import Ran, run_here
from variant_folder import DEVICE, LADDER, SHA, make_project, make_variant

from inference.backend import mx
from inference.generate import Sampling, generate
from inference.load import load
from publisher import evaluate_teacher
from publisher.evaluate import measure_folder
from publisher.evaluate_figures import divergence
from publisher.evaluate_teacher import Reference, agreement
from publisher.gate import gate
from publisher.schema import Continuations, Manifest, Quality
from publisher.staleness import quality_reasons
from publisher.store import write_model
from publisher.variants import load_project

SMALL = "evaluation: {windows: 3, context: 64, chat: few.json, chat_context: 160, greedy_tokens: 6}\n"
PLAIN = SMALL.replace("chat: few.json, ", "")
CONVERSATIONS = 4  # of the package's, so that a run takes seconds


def write_small(built: Path, folder: Path) -> Path:
    """Three variants of the built ladder, with an evaluation of a few windows."""
    shutil.copytree(built, folder, symlinks=True)
    chat = json.loads(files("publisher").joinpath("data/evaluation_chat.json").read_text(encoding="utf-8"))
    (folder / "few.json").write_text(json.dumps(chat[:CONVERSATIONS]))
    path = folder / "variants.yaml"
    rows = [line for line in path.read_text().splitlines(True) if not re.match(r"  Q[356]_K_XL:", line)]
    path.write_text("".join(rows) + SMALL)
    return folder


@pytest.fixture
def small(built: Path, tmp_path: Path) -> Path:
    """Nothing of it measured yet."""
    return write_small(built, tmp_path / "ladder")


@pytest.fixture(scope="module")
def first(built: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """The same after Q2_K_XL and Q8_K_XL were measured, and what the command said. Not to be changed."""
    folder = write_small(built, tmp_path_factory.mktemp("measured") / "ladder")
    return folder, run_here("eval", "Q2_K_XL", "--compare", "Q2_K_XL", "Q8_K_XL", "--json", cwd=folder).ok()


@pytest.fixture
def measured(first: tuple[Path, Ran], tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(first[0], tmp_path / "ladder", symlinks=True)


def weights_hash(ladder: Path, id: str) -> str:
    return json.loads((ladder / "build" / id / "manifest.json").read_text())["weights_hash"]


def quality_path(ladder: Path, id: str) -> Path:
    return ladder / "build/results" / weights_hash(ladder, id) / "quality.json"


def status(publish, ladder: Path, id: str) -> list[str]:
    rows = json.loads(publish("status", id, "--json", cwd=ladder).ok().out)["variants"]
    return rows[0]["quality"]


def test_what_was_not_measured_says_so(small, publish):
    assert status(publish, small, "Q2_K_XL") == ["not measured"]
    assert "quality: not measured" in publish("status", "Q2_K_XL", cwd=small).ok().out


def test_two_variants_are_measured_and_compared(first):
    found = json.loads(first[1].out)
    q2, q8 = (found["variants"][id] for id in ("Q2_K_XL", "Q8_K_XL"))
    assert [d["corpus"] for d in q2["corpora"]] == ["text", "chat"]
    text = q2["corpora"][0]
    assert (text["windows"], text["context"], text["positions"], text["nonfinite"]) == (3, 64, 3 * 31, 0)
    for low, high in zip(q8["corpora"], q2["corpora"], strict=True):
        assert 0 < low["kld"]["low"] <= low["kld"]["value"] < 0.01 < high["kld"]["value"] <= high["kld"]["high"]
        assert low["top1"]["value"] > high["top1"]["value"]
        assert high["kld_median"] < high["kld_p99"] <= high["kld_p999"]["value"] <= high["kld_max"]
    for control in q2["control"]:
        assert 0 <= control["kld"]["value"] < 1e-9
        assert control["top1"]["value"] == 1
    assert q2["greedy"]["mean"] < q8["greedy"]["mean"] <= q8["greedy_control"]["mean"]
    assert q2["bpw"] < q8["bpw"]
    assert q2["overlap"] == {"ngram": 32, "shared": 0}
    assert q2["compute"] == "float32"
    (pair, _) = found["compared"]["pairs"]
    assert pair["excludes_zero"]
    assert pair["above_control"]
    assert pair["difference"]["value"] == pytest.approx(
        text["kld"]["value"] - q8["corpora"][0]["kld"]["value"], rel=1e-4
    )


def test_what_was_measured_is_kept_and_not_measured_again(measured, publish):
    assert status(publish, measured, "Q2_K_XL") == []
    before = {p: p.stat().st_mtime_ns for p in (measured / "build").rglob("*") if p.is_file() and p.name != ".lock"}
    again = publish("eval", "Q2_K_XL", "Q8_K_XL", cwd=measured).ok()
    assert "nothing to measure" in again.err
    assert "BF16, computed another way" in again.out
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_killed_run_goes_on_with_what_is_missing_and_the_teacher_is_reused(measured, publish, monkeypatch):
    kept = quality_path(measured, "Q2_K_XL").stat().st_mtime_ns
    first = json.loads(quality_path(measured, "Q8_K_XL").read_text())
    quality_path(measured, "Q8_K_XL").unlink()
    folders = []
    real = evaluate_teacher.final_states

    def counted(folder, *args, **kwargs):
        folders.append(Path(folder).name)
        return real(folder, *args, **kwargs)

    monkeypatch.setattr(evaluate_teacher, "final_states", counted)
    monkeypatch.setattr("publisher.evaluate.final_states", counted)
    publish("eval", "Q2_K_XL", "Q8_K_XL", "-q", cwd=measured).ok()
    assert set(folders) == {"Q8_K_XL"}  # the base does not run again
    assert quality_path(measured, "Q2_K_XL").stat().st_mtime_ns == kept
    second = json.loads(quality_path(measured, "Q8_K_XL").read_text())
    for volatile in ("measured_at", "wall_s"):
        first.pop(volatile)
        second.pop(volatile)
    assert first == second


def test_what_is_asked_of_the_measurement_makes_it_stale(measured, publish):
    path = measured / "variants.yaml"
    path.write_text(path.read_text().replace("windows: 3", "windows: 2"))
    assert status(publish, measured, "Q8_K_XL") == ["evaluation: texts, windows or prompts changed"]
    (measured / "own.txt").write_text("A wholly different text to calibrate with. " * 400)
    path.write_text(path.read_text() + "calibration: {text: ./own.txt}\n")
    assert "calibration text: changed" in status(publish, measured, "Q8_K_XL")
    publish("eval", "Q8_K_XL", "-q", cwd=measured).ok()
    assert status(publish, measured, "Q8_K_XL") == []
    assert json.loads(quality_path(measured, "Q8_K_XL").read_text())["corpora"][0]["windows"] == 2


def test_a_text_that_the_weights_may_have_been_fitted_to_is_refused(small, publish):
    shutil.copy(Path(evaluate_teacher.__file__).parent / "data/evaluation.txt", small / "same.txt")
    with open(small / "variants.yaml", "a") as f:
        f.write("calibration: {text: ./same.txt}\n")
    told = publish("eval", "Q8_K_XL", cwd=small).refused(2)
    assert told.startswith("evaluation.text: shares ")
    assert "runs of 32 tokens with the calibration's texts" in told


@pytest.mark.parametrize(
    ("data", "key", "told"),
    [
        (b"\xff\xfe", "text", "evaluation.text: x:1: found byte 0xff, expected UTF-8"),
        (b"short", "text", "expected at least 2 windows of 64"),
        (b"[{]", "chat", "evaluation.chat: not JSON"),
        (b'[[{"role": "user", "content": "x"}], []]', "chat", "evaluation.chat[0]: the assistant says nothing in it"),
    ],
)
def test_a_damaged_file_is_one_clear_line(small, publish, data, key, told):
    (small / "x").write_bytes(data)
    path = small / "variants.yaml"
    path.write_text(
        path.read_text().replace("chat: few.json, ", "").replace("evaluation: {", f"evaluation: {{{key}: ./x, ")
    )
    assert told in publish("eval", "Q8_K_XL", cwd=small).refused(2)


def test_what_is_not_there_is_refused(small, publish):
    shutil.rmtree(small / "build/Q8_K_XL")
    assert "Q8_K_XL: not built; run: publish build Q8_K_XL" in publish("eval", "Q8_K_XL", cwd=small).refused(3)
    assert "name at least one variant" in publish("eval", cwd=small).refused(2)
    path = small / "variants.yaml"
    path.write_text(path.read_text().replace("context: 64", "context: 8192"))
    assert "found 8192, the model's context is 4096" in publish("eval", "Q4_K_XL", cwd=small).refused(2)


def test_without_a_chat_template_the_text_alone_is_measured(tmp_path, quick_yaml, publish):
    from conftest import own_base, write_ladder

    write_ladder(tmp_path, quick_yaml.split("variants:")[0] + PLAIN + "variants:\n  Q4: {bits: 4}\n")
    base = own_base(tmp_path)
    (base / "chat_template.jinja").unlink()
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    publish("build", "Q4", "--skip", "bench", "--eval", "-q", cwd=tmp_path).ok()
    found = json.loads(publish("eval", "Q4", "--json", cwd=tmp_path).ok().out)["variants"]["Q4"]
    assert [d["corpus"] for d in found["corpora"]] == ["text"]
    assert found["missing"] == ["chat: the base has no chat template"]
    assert found["chat_hash"] is None


def test_foreign_baselines_are_measured_and_their_weights_are_not_kept(small, publish):
    path = small / "variants.yaml"
    path.write_text(path.read_text().split("variants:")[0] + SMALL + "variants:\n  Q4_K_XL: {bits: 4}\n")
    ran = publish("eval", "Q4_K_XL", "--baselines", "--json", cwd=small).ok()
    found = json.loads(ran.out)["baselines"]
    assert [b["name"] for b in found] == ["mlx-lm uniform 4-bit", "mlx-lm uniform 8-bit", "unsloth 4 as published"]
    four, eight, unsloth = (b["quality"]["corpora"][0]["kld"]["value"] for b in found)
    assert eight < 0.01 < four
    assert found[2]["weights_hash"] == weights_hash(small, "Q4_K_XL")  # this ladder's recipe is that one
    assert unsloth > 0
    assert found[0]["text_nbytes"] * 8 / found[0]["text_params"] == pytest.approx(4.5, abs=0.1)
    staging = small / "build/staging"
    assert not staging.exists() or not list(staging.iterdir())
    again = publish("eval", "--baselines", cwd=small).ok()
    assert "nothing to measure" in again.err
    assert "mlx-lm uniform 4-bit" in again.out


# ------------------------------------------------------------------------------------------------ the teacher


def test_a_folder_is_measured_without_a_ladder_and_the_base_is_nothing_from_itself(tiny, built, tmp_path, publish: Ran):
    text = Path(evaluate_teacher.__file__).parent / "data/evaluation.txt"
    itself = measure_folder(tiny, tiny, text, windows=2, context=64, cache=tmp_path)
    assert itself.kld
    assert itself.kld.value == itself.kld_max == 0
    other = measure_folder(tiny, built / "build/Q4_K_XL", None, windows=2, context=64, cache=tmp_path)
    assert other.kld
    assert 0.001 < other.kld.value < 1
    assert other.teacher == itself.teacher
    assert len(list(tmp_path.iterdir())) == 1


def test_kept_states_that_were_damaged_are_made_again(tiny, tmp_path):
    def measure():
        return measure_folder(tiny, tiny, None, windows=2, context=64, cache=tmp_path)

    measure()
    (path,) = tmp_path.rglob("hidden.safetensors")
    whole = path.read_bytes()
    for damaged in (whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        found = measure()
        assert found.kld
        assert found.kld.value == 0
        assert path.read_bytes() == whole
    path.with_name("teacher.json").write_text("{")
    assert measure().kld
    assert path.read_bytes() == whole


def test_one_pass_tells_how_long_free_running_text_is_the_same(tiny, built, tmp_path):
    folder = built / "build/Q4_K_XL"
    reference = Reference(tiny, "x", tmp_path)
    tokenizer = load(tiny).tokenizer
    prompts = [tokenizer.encode(p) for p in ("The quick brown fox", "def main():", "In the morning", "First, open")]
    said = reference.continuations(prompts, 24)
    model = load(folder, mx.float32)
    expected = []
    for prompt, theirs in zip(said.prompts, said.tokens, strict=True):
        mine = [t.id for t in generate(model, prompt, max_tokens=24, sampling=Sampling())]
        expected.append(next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), len(theirs)))
    found = agreement(folder, said, 24)
    assert found.agreed == expected
    assert any(a < n for a, n in zip(found.agreed, found.lengths, strict=True))
    own = agreement(tiny, said, 24, step=5)
    assert own.identical == 1
    assert reference.continuations(prompts, 24) == Continuations.model_validate_json(
        (reference.place(said.key) / "greedy.json").read_bytes()
    )


# ------------------------------------------------------------------------------------------------ the gate


def write_quality(project, weights: str, kld: float | None, **change: object) -> None:
    from inference.divergence import Comparison

    n = 8
    values = np.full(n, np.nan if kld is None else kld)
    found = Comparison(np.full(n, kld is not None), values, np.ones(n, bool), np.ones(n), np.ones(n))
    text = divergence(found, [4, 4], "text", "a" * 64, 8)
    quality = Quality(
        version=1, weights_hash=weights, base_hash=SHA, settings="s", nbytes=1, text_nbytes=1, text_params=1, bpw=8.0,
        corpora=[text], control=[], greedy=None, greedy_control=None, missing=[], text_hash=SHA, chat_hash=None,
        calibration_hash=SHA, overlap={"ngram": 32, "shared": 0}, compute="float32", device=DEVICE, wall_s=1.0,
        measured_at="2026-01-01T00:00:00Z",
    ).model_copy(update=change)  # type: ignore[arg-type]  # fmt: skip
    write_model(project.store.results(weights) / "quality.json", quality)


def gated(tmp_path: Path, yaml: str):
    project = make_project(tmp_path, yaml)
    make_variant(project)
    return project, Manifest.model_validate_json(project.store.manifest("Q4").read_bytes()).weights_hash


@pytest.mark.parametrize(
    "yaml",
    [
        LADDER.replace("Q4: {bits: 4,", "Q4: {bits: 4, kld_ceiling: 0.05,"),
        LADDER + "recipe: mine\nrecipes: {mine: {extends: unsloth, kld_ceiling: {4: 0.05}}}\n",
        LADDER + "recipe: b\nrecipes: {a: {extends: unsloth, kld_ceiling: {4: 0.05}}, b: {extends: a}}\n",
    ],
    ids=["variant", "recipe", "parent"],
)
def test_above_its_ceiling_a_variant_may_not_go(tmp_path, yaml):
    project, weights = gated(tmp_path, yaml)
    (told,) = gate(project, "Q4")
    assert told == ("Q4: kld_ceiling is set, but the quality of these weights is not measured; run `publish eval Q4`")
    write_quality(project, weights, 0.04)
    assert gate(project, "Q4") == []
    write_quality(project, weights, 0.06)
    (told,) = gate(project, "Q4")
    assert "mean KL 0.06 nats a token over the evaluation text, kld_ceiling 0.05" in told
    write_quality(project, weights, None)
    (told,) = gate(project, "Q4")
    assert "8 of 8 positions are not finite" in told


def test_a_ceiling_of_other_bits_does_not_count(tmp_path):
    project, _ = gated(tmp_path, LADDER + "recipe: m\nrecipes: {m: {extends: unsloth, kld_ceiling: {8: 0.001}}}\n")
    assert gate(project, "Q4") == []


def test_a_stale_quality_is_refused_where_a_ceiling_is_set(measured):
    path = measured / "variants.yaml"
    path.write_text(path.read_text().replace("Q8_K_XL: {bits: 8,", "Q8_K_XL: {bits: 8, kld_ceiling: 0.1,"))
    project = load_project(path)
    assert gate(project, "Q8_K_XL") == []
    path.write_text(path.read_text().replace("windows: 3", "windows: 2"))
    from publisher.release import _stale
    from publisher.survey import survey

    project = load_project(path)
    rung = survey(project, lambda: None, cards=False, ids=["Q8_K_XL"]).rungs["Q8_K_XL"]
    (told,) = _stale(project, rung)
    assert "kld_ceiling is set, but the quality is stale (evaluation: texts, windows or prompts changed)" in told


def test_reasons_of_a_quality():
    assert quality_reasons(None, 1, "s", "b", "c") == ["not measured"]
