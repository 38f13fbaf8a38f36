"""`size:` as a user meets it: what it says, what plan shows before and after calibrate, freezing, staleness, nonsense."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from conftest import EXAMPLE
from variant_folder import DEVICE, SHA

from inference import memory
from inference.checkpoint import read_checkpoint
from inference.families import names_of
from publisher import calibrate
from publisher.allocation import Sources, workspace
from publisher.base import resolve_base
from publisher.calibrate import base_hash
from publisher.hub import Hub
from publisher.schema import CalibrationRecord, Costs, FileEntry, StatisticsInput
from publisher.sizes import CONTEXT, Facts, nominal_bits, parse_size, text_budget, workspace_bound
from publisher.store import write_model
from publisher.variants import load_project
from quant.statistics import STATISTICS_VERSION, Statistics
from quant.version import SENSITIVITY_VERSION

LADDER = """\
base: {path: ./model, name: Qwen3.5-tiny}
solver: rtn
variants:
  as2: {size: as unsloth 2}
  as4: {size: as unsloth 4}
  file: {size: 3.5 MB}
  bpw: {size: 5.25 bpw}
  fits: {size: fits 756 MB}
  fixed: {bits: 4}
calibration: {text: ./calibration.txt, chat: false}
bench: {turns: 1, turn_tokens: 6, prefill: [32], runs: 1}
smoke: {prompts: [The quick brown fox], max_tokens: 32, text_tokens: 64}
"""


@pytest.fixture
def sized(tmp_path: Path) -> Path:
    return write(tmp_path, LADDER)


@pytest.fixture
def calibrated(sized: Path) -> Path:
    write_costs(sized)
    return sized


def write(folder: Path, text: str) -> Path:
    if not (folder / "model").exists():
        (folder / "model").symlink_to(EXAMPLE / "model")
    (folder / "calibration.txt").write_text("Words.")
    (folder / "variants.yaml").write_text(text)
    return folder


def write_costs(folder: Path, scale: float = 1.0, heavy: str = "lm_head") -> None:
    """Costs by hand: they fall by four a bit; `heavy` modules cost thirty times what others do."""
    checkpoint = read_checkpoint(EXAMPLE / "model")
    modules = {}
    for t in names_of(checkpoint.config).targets(checkpoint):
        if t.part == "text" and len(t.shape) == 2 and t.name.endswith(".weight"):
            weight = scale * 1e-4 * t.params**0.5 * (30 if heavy in t.module else 1)
            modules[t.module] = {
                f"{b}/{g}": weight * 4.0 ** (2 - b) * (g / 64) ** 0.4
                for b in (2, 3, 4, 5, 6, 8)
                for g in (32, 64, 128)
                if t.shape[-1] % g == 0
            }
    known = Statistics(statistics(folder))
    costs = Costs(statistics=known.digest, solver="rtn", version=SENSITIVITY_VERSION, modules=modules)
    write_model(known.folder / "costs.json", costs)


def statistics(folder: Path) -> Path:
    """The folder of today's statistics, made with nothing much in it if there is none."""
    project = load_project(folder / "variants.yaml")
    base = resolve_base(project, Hub, weights=True)
    source = base_hash(project, base)
    key = calibrate._key(project, base, source, *calibrate.sources(project))
    out = project.store.statistics / key[:16]
    one = StatisticsInput(name="x", file="x.safetensors", modules=["x"], columns=32, experts=None, hessian="one")
    file = FileEntry(path=one.file, size=0, sha256=SHA)
    out.mkdir(parents=True, exist_ok=True)
    (out / one.file).touch()
    record = CalibrationRecord(
        version=STATISTICS_VERSION, key=key, base="", base_hash=source, texts=[], tokens=0, windows=0, context=0,
        fisher_windows=0, fisher_tokens=0, gradient_hessian=False, seed=0, inputs=[one], files=[file], wall_s=0,
        resumed_steps=0, peak_gb=0, device=DEVICE, made_at="",
    )  # fmt: skip
    write_model(out / "statistics.json", record)
    return out


def plan(publish, folder: Path, *args: str) -> dict[str, dict]:
    found = json.loads(publish("plan", *args, "--json", cwd=folder).ok().out)
    return {v["id"]: v for v in found["variants"]}


# ------------------------------------------------------------------------------------------------ what a size says


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("5 GB", "file", 5_000_000_000),
        ("4.7 GiB", "file", Fraction(47, 10) * (1 << 30)),
        ("650 MB", "file", 650_000_000),
        ("650MB", "file", 650_000_000),
        ("fits 16 GB", "memory", 16_000_000_000),
        ("4.5 bpw", "bpw", Fraction(9, 2)),
    ],
)
def test_sizes_in_bytes_memory_and_bits(text: str, kind: str, value: Fraction):
    size = parse_size(text)
    assert (size.kind, size.value) == (kind, value)


def test_a_size_as_a_recipe():
    size = parse_size(" as  unsloth_8bit_out 5\n")
    assert (size.kind, size.recipe, size.bits, size.text) == ("as", "unsloth_8bit_out", 5, "as unsloth_8bit_out 5")


@pytest.mark.parametrize(
    "text",
    ["", "5", "5 gigabytes", "-5 GB", "0 GB", "1e9 GB", "5 GB 5 GB", "fits", "fits 16", "as unsloth", "as unsloth 7",
     "as 4", "0.5 bpw", "17 bpw", "nan GB", "5 Gb", "as unsloth 4 extra", "٥ GB", "9" * 400 + " GB"],
)  # fmt: skip
def test_nonsense_is_refused(text: str):
    with pytest.raises(ValueError, match="expected "):
        parse_size(text)


def test_what_a_size_leaves_for_the_language_model():
    facts = Facts(text_params=1000, other=300, caches=40, workspace=60, like=777)
    assert text_budget(parse_size("0.001 MB"), facts) == 1000 - 300
    assert text_budget(parse_size("fits 0.001 MB"), facts) == 700 - 40 - 60
    assert text_budget(parse_size("4.5 bpw"), facts) == 562
    assert text_budget(parse_size("as unsloth 4"), facts) == 777


def test_n_of_a_size_is_the_nearest_uniform_width():
    size = parse_size("5 GB")
    found = [nominal_bits(size, round(bpw * 1000), 8000) for bpw in (2.0, 2.5, 3.6, 4.5, 4.9, 5.5, 6.9, 8.5, 16)]
    assert found == [2, 2, 3, 4, 4, 5, 6, 8, 8]
    assert nominal_bits(parse_size("as unsloth 3"), 5000, 8000) == 3


# ------------------------------------------------------------------------------------------------ plan


def test_before_calibrate_a_plan_shows_the_budget_and_what_to_run(sized, publish):
    before = sorted(sized.rglob("*"))
    found = plan(publish, sized)
    fixed = found.pop("fixed")
    assert found["as4"]["size"]["budget_nbytes"] == fixed["text_nbytes"]
    assert found["file"]["nbytes"] == 3_500_000
    assert found["bpw"]["text_bpw"] == pytest.approx(5.25, abs=1e-3)
    assert all(v["size"]["allocation"] is None for v in found.values())
    assert {v["stale"]["weights"][0] for v in found.values()} == {"not allocated: run publish calibrate"}
    text = publish("plan", cwd=sized).ok().out
    assert f"as4: as unsloth 4: {fixed['text_nbytes'] / 1e9:.6f} GB for the language model; not allocated" in text
    assert sorted(sized.rglob("*")) == before
    assert publish("build", "--all", cwd=sized).refused(2).endswith("fits: not allocated: run publish calibrate")
    publish("status", cwd=sized).ok()


def test_after_calibrate_a_plan_shows_the_choice(calibrated, publish):
    found = plan(publish, calibrated)
    fixed = found.pop("fixed")
    assert fixed["size"] is None
    for v in found.values():
        size = v["size"]
        left = size["budget_nbytes"] - v["text_nbytes"]
        assert v["text_nbytes"] == size["allocation"]["nbytes"]
        assert left >= 0
        assert left < 2000  # of a matrix with 16,384 weights: less than its cheapest step
        assert v["nbytes"] == sum(c["nbytes"] for c in v["classes"])
        assert v["recipe"] == "allocated"
    assert found["file"]["nbytes"] <= 3_500_000
    assert found["as2"]["size"]["allocation"]["predicted_kld"] > found["as4"]["size"]["allocation"]["predicted_kld"]
    heads = [r for r in found["as2"]["size"]["allocation"]["rules"] if r["match"].endswith("lm_head")]
    others = [r for r in found["as2"]["size"]["allocation"]["rules"] if r["match"].endswith("embed_tokens")]
    assert heads[0]["bits"] > others[0]["bits"]
    assert found == {k: v for k, v in plan(publish, calibrated).items() if k != "fixed"}
    text = publish("plan", cwd=calibrated).ok().out
    assert "predicted KL divergence" in text
    assert "not allocated" not in text


def test_what_fits_a_memory_leaves_room_for_caches_and_workspace(calibrated, publish):
    checkpoint = read_checkpoint(EXAMPLE / "model")
    names = names_of(checkpoint.config)
    config = names.read_config(checkpoint.config)
    taken = workspace_bound(checkpoint.config) + names.cache_nbytes(config, 8192)
    found = plan(publish, calibrated, "fits")["fits"]
    assert found["size"]["budget_nbytes"] == 529_200_000 - taken


@pytest.mark.parametrize("measured", [None, 1], ids=["by shapes", "a small measurement"])
@pytest.mark.parametrize("hidden", [4096, 8192])
def test_what_fits_a_memory_is_not_refused_by_the_engine_on_metal(measured, hidden):
    config = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": 32, "vocab_size": 128256, "rms_norm_eps": 1e-5,
              "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
              "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "hidden_act": "silu"}  # fmt: skip
    size, names = parse_size("fits 24 GB"), names_of(config)
    caches = names.cache_nbytes(names.read_config(config), CONTEXT)
    left = workspace(size, config, Sources(workspace=measured))
    weights = text_budget(size, Facts(text_params=1, other=0, caches=caches, workspace=left))
    need = memory.need(config, CONTEXT, "metal", weights=weights, step=memory.SMALLEST_STEP)
    assert need.total <= 16_800_000_000  # 70 %; Metal recommends two thirds of 24 GiB, which is more
    assert need.total > 14_000_000_000


def test_allocate_shows_classes_layers_and_reasons(calibrated, publish):
    text = publish("allocate", "as4", cwd=calibrated).ok().out
    row = next(line for line in text.splitlines() if line.startswith("lm_head"))
    assert "measured on this model" in row
    assert "would add" in row
    assert publish("allocate", "fixed", cwd=calibrated).refused(2).endswith("names bits, not a size")
    assert set(json.loads(publish("allocate", "--all", "--json", cwd=calibrated).ok().out)["variants"][0]) >= {
        "id", "text", "budget_nbytes", "allocation", "frozen",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ built


def build(publish, folder: Path, *ids: str) -> None:
    publish("build", *ids, "--skip", "smoke", "--skip", "bench", cwd=folder).ok()


def reasons(publish, folder: Path, id: str) -> list[str]:
    rows = json.loads(publish("status", id, "--json", cwd=folder).ok().out)["variants"]
    return rows[0]["stale"]["weights"]


def test_a_built_allocation_is_stale_with_the_reason_when_it_changes(calibrated, publish):
    build(publish, calibrated, "as4")
    manifest = json.loads((calibrated / "build/as4/manifest.json").read_text())
    assert manifest["inputs"]["allocation"]["size"] == "as unsloth 4"
    assert manifest["inputs"]["bits"] == 4
    assert manifest["text_nbytes"] == manifest["allocation"]["nbytes"]
    assert reasons(publish, calibrated, "as4") == []
    write_costs(calibrated, scale=2.0)  # the same choice from other figures
    assert reasons(publish, calibrated, "as4") == []
    write_costs(calibrated, heavy="down_proj")
    found = reasons(publish, calibrated, "as4")
    assert found[0].startswith("measured costs: ")
    assert found[1].startswith("allocation: other formats in ")
    write_costs(calibrated)
    write(calibrated, LADDER.replace("as4: {size: as unsloth 4}", "as4: {size: as unsloth 3}"))
    assert reasons(publish, calibrated, "as4")[:2] == ["bits: 4 → 3", "size: as unsloth 4 → as unsloth 3"]


def test_what_was_built_stays_current_while_the_costs_are_away(calibrated, publish):
    build(publish, calibrated, "as4")
    shutil.rmtree(calibrated / "build/statistics")
    found = plan(publish, calibrated, "as4", "as2")
    assert found["as4"]["stale"]["weights"] == []
    assert found["as4"]["size"]["allocation"]["from"] == "built"
    assert found["as2"]["size"]["allocation"] is None


def test_its_card_tells_size_and_reasons(calibrated, publish):
    build(publish, calibrated, "as4")
    card = (calibrated / "build/as4/README.md").read_text()
    assert "Formats were chosen for the size `as unsloth 4`" in card
    assert "measured on this model: " in card
    assert "N=4" not in card
    publish("card", "--check", cwd=calibrated).ok()


def test_its_own_benchmark_does_not_make_a_variant_stale(calibrated, publish):
    planned = plan(publish, calibrated, "fits")["fits"]
    publish("build", "fits", cwd=calibrated).ok()
    assert reasons(publish, calibrated, "fits") == []
    assert "nothing to do" in publish("build", "fits", cwd=calibrated).ok().err
    # one that is not built goes by what was measured, which is less than the bound
    shutil.move(calibrated / "build/fits", calibrated / "build/bpw")
    manifest = calibrated / "build/bpw/manifest.json"
    manifest.write_text(manifest.read_text().replace('"id": "fits"', '"id": "bpw"'))
    assert plan(publish, calibrated, "fits")["fits"]["size"]["budget_nbytes"] > planned["size"]["budget_nbytes"]


# ------------------------------------------------------------------------------------------------ frozen


def test_a_frozen_allocation_is_used_without_statistics_and_gives_the_same_bytes(calibrated, publish):
    build(publish, calibrated, "as4")
    searched = json.loads((calibrated / "build/as4/manifest.json").read_text())
    publish("allocate", "as4", "--freeze", cwd=calibrated).ok()
    shutil.rmtree(calibrated / "build")  # statistics and all
    assert plan(publish, calibrated, "as4")["as4"]["size"]["allocation"]["from"] == "frozen"
    build(publish, calibrated, "as4")
    assert json.loads((calibrated / "build/as4/manifest.json").read_text()) == searched


def test_other_costs_do_not_touch_what_is_frozen_until_it_is_frozen_again(calibrated, publish):
    publish("allocate", "as4", "--freeze", cwd=calibrated).ok()
    path = calibrated / "variants.allocations/as4.yaml"
    before, shown = path.read_bytes(), plan(publish, calibrated, "as4")["as4"]["classes"]
    publish("allocate", "as4", "--freeze", cwd=calibrated).ok()
    assert path.read_bytes() == before
    write_costs(calibrated, heavy="down_proj")
    assert plan(publish, calibrated, "as4")["as4"]["classes"] == shown
    publish("allocate", "as4", "--freeze", cwd=calibrated).ok()
    assert path.read_bytes() != before
    assert plan(publish, calibrated, "as4")["as4"]["classes"] != shown


def test_a_frozen_allocation_of_another_size_or_other_pins_is_refused(calibrated, publish):
    publish("allocate", "as4", "--freeze", cwd=calibrated).ok()
    write(calibrated, LADDER.replace("as4: {size: as unsloth 4}", "as4: {size: 4.5 bpw}"))
    told = publish("plan", cwd=calibrated).refused(2)
    assert told.startswith(
        "variants.allocations/as4.yaml: frozen for size 'as unsloth 4', variants.yaml says '4.5 bpw'"
    )
    write(calibrated, LADDER + 'allocation: {floors: [{match: "*.lm_head", bits: 5}]}\n')
    assert "frozen under other pins and floors" in publish("plan", cwd=calibrated).refused(2)
    publish("allocate", "as4", "--freeze", cwd=calibrated).ok()
    publish("plan", cwd=calibrated).ok()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("predicted_kld: ", "predicted_kld: -", "predicted_kld: found -"),
        ("schema_version: 1", "schema_version: 1\nmore: 2", "more: unknown key"),
        ("rules:\n", "rules:\n- {match: '*.c_attn', bits: 4}\n", "does not fit this model"),
        ("bits: 6", "bits: 2", "the allocation takes"),
        ("size: as", "size: [", "not YAML"),
    ],
)
def test_a_damaged_frozen_allocation_is_one_line(old, new, told, calibrated, publish):
    publish("allocate", "as4", "--freeze", cwd=calibrated).ok()
    path = calibrated / "variants.allocations/as4.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert told in publish("plan", cwd=calibrated).refused(2)


# ------------------------------------------------------------------------------------------------ nonsense


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ("{size: 5 gigabytes}", "variants.v.size: found '5 gigabytes'; expected a size such as \"5 GB\""),
        ("{size: 5}", "variants.v.size: found 5; expected text"),
        ("{bits: 4, size: 5 GB}", "expected either bits or size, not both"),
        ("{note: x}", "expected either bits or size"),
        ("{size: as unslot 4}", "recipe 'unslot' is unknown"),
        ("{size: 5 GB, awq_exponent: 1}", "no awq_exponent with size"),
        ('{size: 5 GB, rules: [{match: "*.lm_head", bits: N}]}', "bits of a pin as a number or bf16, found N"),
        ("{size: 1 MB}", "leaves 0.000388 GB for the language model; the smallest possible takes"),
        ("{size: fits 100 MB}", "leaves nothing for the language model"),
        ('{size: 3 MB, rules: [{match: "*.c_attn", bits: 4}]}', "variants.v.rules.0: "),
        ('{size: 3 MB, rules: [{match: "*.lm_head", bits: bf16}]}', "the smallest possible takes"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(variant, told, tmp_path, publish):
    folder = write(tmp_path, f"base: ./model\nvariants:\n  v: {variant}\n")
    line = publish("plan", cwd=folder).refused(2)
    assert line.startswith("variants.yaml:3: ")
    assert told in line


def test_the_smallest_possible_plan_that_an_error_names_is_possible(calibrated, publish):
    alone = LADDER.split("variants:")[0] + "vision: drop\ncalibration:" + LADDER.split("calibration:")[1] + "variants: "
    told = publish("plan", cwd=write(calibrated, alone + "{v: {size: 1 MB}}\n")).refused(2)
    least = told.split("takes ")[1].split(" GB")[0]
    found = plan(publish, write(calibrated, f"{alone}{{v: {{size: {least} GB}}}}\n"))
    assert found["v"]["size"]["allocation"]
    assert found["v"]["nbytes"] <= float(least) * 1e9


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v["modules"].popitem(), "no costs are known for"),
        (lambda v: v["modules"]["language_model.lm_head"].update({"4/64": -1.0}), "greater than or equal to 0"),
        (lambda v: v["modules"]["language_model.lm_head"].update({"7/64": 1.0}), "7/64"),
        (lambda v: v.update(statistics="x"), "statistics"),
    ],
)
def test_damaged_costs_are_one_line(change, told, calibrated, publish):
    path = statistics(calibrated) / "costs.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    assert told in publish("plan", cwd=calibrated).refused(2)


def test_the_ladder_that_init_writes_is_planned_and_asks_for_calibrate(tmp_path, publish):
    (tmp_path / "model").symlink_to(EXAMPLE / "model")
    publish("init", "./model", cwd=tmp_path).ok()
    sizes = [v["size"] for v in yaml.safe_load((tmp_path / "variants.yaml").read_text())["variants"].values()]
    assert sizes == [f"as unsloth {n}" for n in (2, 3, 4, 5, 6, 8)]
    assert "run publish calibrate" in publish("plan", cwd=tmp_path).ok().out
