"""Cards: what they say, and what they must never say. Golden texts: UPDATE_GOLDEN=1 writes them anew."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
import yaml
from card_ladder import CARD, DENSE, EPYC, MOE, base, bench, build, ladder, record, smoke, speed

from inference.errors import InputError
from publisher import card_format, card_sandbox
from publisher.card import Facts, check_card, gather, machine_paths, render, snippets
from publisher.card_bits import layer_text
from publisher.card_facts import HEADER
from publisher.card_view import view
from publisher.schema import BenchSpec, File, Ladder, Manifest, Speed
from publisher.store import write_model, write_text
from publisher.variants import Project

GOLDEN = Path(__file__).parent / "fixtures" / "cards"
HEAD = """base: {repo: Qwen/Qwen3.5-9B, path: ./base}
owner: Brooooooklyn
imatrix: {repo: unsloth/Qwen3.5-9B-GGUF, file: imatrix_unsloth.gguf_file}
"""
THREE = (
    HEAD
    + """variants:
  Q2_K_XL: {bits: 2}
  Q4_K_XL: {bits: 4}
  Q8_K_XL: {bits: 8}
"""
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("dense") / "base")


@pytest.fixture
def project(tmp_path: Path, dense: Path) -> Project:
    (tmp_path / "base").symlink_to(dense)
    return ladder(tmp_path, THREE)


@pytest.fixture
def measured(project: Project, dense: Path) -> dict[str, Manifest]:
    """Q2 and Q4 built and fully measured, Q8 not built."""
    out = {id: build(project, id, dense) for id in ("Q2_K_XL", "Q4_K_XL")}
    record(project, smoke(out["Q2_K_XL"], 0.41), smoke(out["Q4_K_XL"], 0.0312))
    record(project, bench(out["Q2_K_XL"], 60.1), bench(out["Q4_K_XL"], 46))
    return out


def golden(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.md"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path.name}: UPDATE_GOLDEN=1 writes it anew"
    assert check_card(text) == []


def header(text: str) -> dict:
    found = HEADER.match(text)
    assert found
    return yaml.safe_load(found[2])


def row(text: str, start: str) -> list[str]:
    """Cells of the table line that starts with this text."""
    (line,) = [x for x in text.splitlines() if x.startswith(f"| {start}")]
    return [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_golden_fully_measured(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    golden("measured", render(gather(project, dense), "Q4_K_XL", None))


def test_golden_bench_skipped_and_other_devices(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    m = build(project, "Q8_K_XL", dense)
    record(project, smoke(m, 0.0009))
    why = Speed(reason="the weights need 19.3 GB, usable are 16 GB")
    record(project, bench(measured["Q2_K_XL"], 3.02, why, EPYC))
    text = render(gather(project, dense), "Q8_K_XL", None)
    golden("bench_skipped", text)
    cells = row(text, "[Brooooooklyn/Qwen3.5-9B-UD-Q2_K_XL-mlx]")
    assert cells[4] == "3.0 [3.0–3.1]<sup>a</sup>"
    assert cells[5] == "not measured: BF16: the weights need 19.3 GB, usable are 16 GB"
    assert "Not Apple silicon" in text
    assert row(text, "**[Brooooooklyn/Qwen3.5-9B-UD-Q8_K_XL-mlx]")[4] == "not measured: bench was not run"


def test_golden_mixed_layers_on_a_local_base(tmp_path: Path, dense: Path) -> None:
    (tmp_path / "base").symlink_to(dense)
    text = """base: {path: ./base, name: house-9B}
recipe: mine
card: {intro: "Ours | yours.", tags: [house]}
recipes:
  mine:
    extends: uniform
    origin: our own
    rules:
      - {match: "*.v_proj", bits: 8, why: "values | matter", layers: [3, 7, 11, 31]}
      - {match: "*.mlp.down_proj", bits: bf16, why: first and last, layers: [0, 1, 2, 31]}
variants:
  small: {bits: 4}
"""
    project = ladder(tmp_path, text)
    m = build(project, "small", dense, None)
    record(project, smoke(m, None), bench(m, 46, device=EPYC, protocol=BenchSpec(runs=1)))
    card = render(gather(project, dense), "small", None)
    golden("mixed_layers", card)
    assert row(card, "`self_attn.v_proj`, layers 3, 7, 11, 31")[1:4] == ["8-bit", "affine, 64", "4"]
    assert row(card, "`self_attn.v_proj`, layers 15, 19, 23, 27")[1:4] == ["4-bit", "affine, 64", "4"]
    assert row(card, "`down_proj`, layers 0–2, 31")[1:4] == ["**bf16**", "–", "4"]
    assert row(card, "`down_proj`, layers 3–30")[3] == "28"
    assert "values \\| matter" in card
    front = header(card)
    assert not {"base_model", "base_model_relation", "quantized_by"} & front.keys()
    assert not {"awq", "imatrix", "unsloth-dynamic"} & set(front["tags"])
    assert 'load("./house-9B-UD-small-mlx")' in card


def test_golden_moe(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", MOE)
    project = ladder(tmp_path, THREE.replace("9B", "35B-A3B"))
    m = build(project, "Q4_K_XL", folder)
    record(project, smoke(m, 0.02), bench(m, 80.4, 31.2))
    text = render(gather(project, folder), "Q4_K_XL", None)
    golden("moe", text)
    assert row(text, "`mlp.gate (router)`" if "`mlp.gate (router)`" in text else "mlp.gate (router)")[1] == "8-bit"
    assert row(text, "experts gate_proj, up_proj")[1] == "4-bit"
    assert row(text, "`self_attn.q/k/v_proj`")[1] == "6-bit + AWQ"
    assert header(text)["model_type"] == "qwen3_5_moe"


def test_same_facts_same_bytes(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    first = render(gather(project, dense), "Q4_K_XL", None)
    assert render(gather(project, dense), "Q4_K_XL", None) == first


def test_front_matter_inherits_licence_and_language_only(
    project: Project, measured: dict[str, Manifest], dense: Path
) -> None:
    front = header(render(gather(project, dense), "Q4_K_XL", None))
    assert front == {
        "license": "apache-2.0",
        "license_link": "https://huggingface.co/Qwen/Qwen3.5-9B/blob/main/LICENSE",
        "language": ["en", "zh"],
        "base_model": "Qwen/Qwen3.5-9B",
        "base_model_relation": "quantized",
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "model_type": "qwen3_5",
        "quantized_by": "Brooooooklyn",
        "tags": [
            "mlx", "mlx-publish", "quantized", "mixed-precision", "4-bit", "awq", "imatrix", "qwen3_5",
            "hybrid-attention", "gated-delta-net", "apple-silicon", "unsloth-dynamic",
        ],
    }  # fmt: skip


def test_bits_per_weight_by_hand(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    text = render(gather(project, dense), "Q2_K_XL", None)
    # 64 matrices of 12288 × 4096 in 2 bits with a bf16 scale and bias a group of 64: 2.5 bits a weight
    assert row(text, "`gate_proj`, `up_proj`")[1:6] == [
        "2-bit + AWQ", "affine, 64", "64", "3.22 B (34.5 %)", f"{64 * 12288 * 4096 * 2.5 / 8e9:.2f} GB (17.7 %)",
    ]  # fmt: skip
    # the text model, in weights × bits: embedding and head, attention, delta net, feed-forward; then bf16 and f32
    h, kv, inter, vocab = 4096, 1024, 12288, 248320
    quantized = (
        vocab * h * (4.5 + 5.5) + 8 * (8192 + 2 * kv) * h * 4.5 + 24 * (8192 + 4096) * h * 4.5
        + 32 * inter * h * 3.5 + 64 * inter * h * 2.5
    )  # fmt: skip
    dense_params = 32 * h * h + 48 * 32 * h + 24 * (8192 * 4 + 32 + 128) + 65 * h + 16 * 256
    a_log = 24 * 32
    params = 2 * vocab * h + 8 * (8192 + 2 * kv) * h + 24 * 12288 * h + 96 * inter * h + dense_params + a_log
    bpw = (quantized + 16 * dense_params + 32 * a_log) / params
    assert f"| **Bits per weight** | 16.00 | **{bpw:.2f}** language model," in text
    assert f"{bpw:.2f}" == "4.41"


def test_speed_up_is_against_bf16_of_the_same_run(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    record(project, bench(measured["Q2_K_XL"], 60, 15.0))
    text = render(gather(project, dense), "Q4_K_XL", None)
    assert row(text, "[Brooooooklyn/Qwen3.5-9B-UD-Q2_K_XL-mlx]")[5] == "4.00×"
    assert row(text, "**[Brooooooklyn/Qwen3.5-9B-UD-Q4_K_XL-mlx]")[5] == f"{46 / 20.8:.2f}×"


def test_a_result_of_other_bytes_is_no_result(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    m = measured["Q4_K_XL"]
    folder = project.store.results(m.weights_hash)
    write_model(folder / "bench.json", bench(measured["Q2_K_XL"], 77.7))
    write_text(folder / "smoke.json", "{}")
    text = render(gather(project, dense), "Q4_K_XL", None)
    assert "77.7" not in text
    assert row(text, "**[Brooooooklyn/Qwen3.5-9B-UD-Q4_K_XL-mlx]")[4:] == [
        "not measured: measured on other bytes", "not measured: measured on other bytes",
        "not measured: smoke.json cannot be read",
    ]  # fmt: skip
    assert check_card(text) == []


def test_an_infinite_figure_is_not_printed(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    broken = speed(46).model_copy(update={"peak_gb": float("inf"), "ttft_s": None, "reason": "ran out of memory"})
    record(project, bench(measured["Q4_K_XL"], 46, variant=broken))
    text = render(gather(project, dense), "Q4_K_XL", None)
    assert row(text, "Time to first token, turn 4")[2] == "not measured: ran out of memory"
    assert row(text, "Peak memory")[2] == "not measured: the result is not a finite number"
    assert check_card(text) == []


@pytest.mark.parametrize("prefill", [2048, 4096])
def test_a_prompt_beyond_the_context_says_so(
    project: Project, measured: dict[str, Manifest], dense: Path, prefill: int
) -> None:
    m = measured["Q4_K_XL"]
    path = project.store.variant("Q4_K_XL") / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["max_position_embeddings"] = 2048
    path.write_text(json.dumps(config))
    short = speed(46).model_copy(update={"prefill_tps": {128: speed(46).prefill_tps[128]}})
    record(project, bench(m, 46, short, variant=short, protocol=BenchSpec(prefill=[128, prefill])))
    text = render(gather(project, dense), "Q4_K_XL", None)
    why = (
        "not measured: " + ("as long as" if prefill == 2048 else "longer than") + " the model's context of 2048 tokens"
    )
    assert row(text, f"Prefill, {prefill} tokens")[1:] == [why, why]


def test_turns_of_one_token_time_no_decoding(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    none = speed(46).model_copy(update={"decode_tps": None})
    record(project, bench(measured["Q4_K_XL"], 46, none, variant=none, protocol=BenchSpec(turn_tokens=1)))
    text = render(gather(project, dense), "Q4_K_XL", None)
    assert row(text, "Decode, turn 4")[2] == "not measured: a turn of one token leaves nothing to time"


def test_float32_on_the_cpu_is_said(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    on_mac = render(gather(project, dense), "Q4_K_XL", None)
    assert "engine, computed in bfloat16. " in on_mac
    assert "float32" not in on_mac
    for id, m in measured.items():
        record(project, bench(m, 46 if id == "Q4_K_XL" else 60, device=EPYC))
    text = render(gather(project, dense), "Q4_K_XL", None)
    assert "| Speed-up vs BF16 as float32 |" in text
    assert "| | Original (BF16 as float32) | This Model |" in text
    assert "engine, computed in float32. " in text
    assert "BF16 means its weights expanded to float32, too: speed-up and memory compare with that." in text


def test_rows_computed_in_another_type_have_another_mark(
    project: Project, measured: dict[str, Manifest], dense: Path
) -> None:
    record(project, bench(measured["Q2_K_XL"], 60, compute="float32"))
    text = render(gather(project, dense), "Q4_K_XL", None)
    assert "| Speed-up vs BF16 |" in text
    assert row(text, "[Brooooooklyn/Qwen3.5-9B-UD-Q2_K_XL-mlx]")[4].endswith("<sup>a</sup>")
    assert row(text, "**[Brooooooklyn/Qwen3.5-9B-UD-Q4_K_XL-mlx]")[4].endswith("<sup>b</sup>")


def test_the_tool_is_linked_where_an_address_is_given(
    tmp_path: Path, project: Project, measured: dict[str, Manifest], dense: Path
) -> None:
    plain = render(gather(project, dense), "Q4_K_XL", None)
    assert "Made with mlx-publish 0.1.0 for" in plain
    assert "With mlx-publish, the tool that made it (it must be installed first):" in plain
    given = ladder(tmp_path, THREE + "card: {tool_url: 'https://example.org/a(b)|c'}\n")
    text = render(gather(given, dense), "Q4_K_XL", None)
    link = "[mlx-publish](https://example.org/a%28b%29%7Cc)"
    assert f"Made with {link} 0.1.0 for" in text
    assert f"With {link}, the tool that made it (install it from there, see its README):" in text
    assert row(text, "Made with")[1].startswith(f"{link} 0.1.0, mlx")
    assert check_card(text) == []


def test_peak_memory_is_explained(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    text = render(gather(project, dense), "Q4_K_XL", None)
    assert "Peak memory is the most that MLX held at once during this benchmark: weights, caches and workspace." in text


def truncate(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    os.truncate(path, 100)


def without_shard(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def odd_quantization(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization": ["x"]}))


def no_family(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": None}))


def binary_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\xfe")


def manifest_of_another(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"id": "Q4_K_XL"', '"id": "Q8_K_XL"'))


def manifest_is_a_folder(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()


@pytest.mark.parametrize(
    "damage",
    [truncate, without_shard, broken_config, list_config, odd_quantization, no_family, binary_manifest,
     manifest_of_another, manifest_is_a_folder],
)  # fmt: skip
def test_a_damaged_variant_does_not_stop_its_siblings(
    project: Project, measured: dict[str, Manifest], dense: Path, damage: Any
) -> None:
    damage(project.store.variant("Q4_K_XL"))
    facts = gather(project, dense)
    assert list(facts.errors) == ["Q4_K_XL"]
    assert facts.variant("Q4_K_XL").error == facts.errors["Q4_K_XL"]
    assert "\n" not in facts.errors["Q4_K_XL"]
    with pytest.raises(InputError):
        render(facts, "Q4_K_XL", None)
    text = render(facts, "Q2_K_XL", None)
    damaged = "this variant's folder is damaged"
    assert row(text, "Brooooooklyn/Qwen3.5-9B-UD-Q4_K_XL-mlx")[2:] == [damaged, damaged] + 3 * [
        f"not measured: {damaged}"
    ]
    assert check_card(text) == []


def test_a_folder_that_is_not_its_manifest_gets_no_card(
    project: Project, measured: dict[str, Manifest], dense: Path
) -> None:
    shard = next(project.store.variant("Q4_K_XL").glob("*.safetensors"))
    with open(shard, "ab") as f:
        f.write(b"x")
    facts = gather(project, dense)
    with pytest.raises(InputError, match="belong to no tensor"):
        render(facts, "Q4_K_XL", None)
    sibling = render(facts, "Q2_K_XL", None)
    assert row(sibling, "Brooooooklyn/Qwen3.5-9B-UD-Q4_K_XL-mlx")[2] == "this variant's folder is damaged"


def test_bits_come_from_the_files_not_from_the_recipe(
    project: Project, measured: dict[str, Manifest], dense: Path
) -> None:
    path = project.store.manifest("Q4_K_XL")
    path.write_text(path.read_text().replace('"bits": 5', '"bits": 3'))
    with pytest.raises(InputError, match=r"is stored in 5-bit, but the rules in manifest\.json give 3-bit"):
        render(gather(project, dense), "Q4_K_XL", None)


def test_reasons_of_a_changed_recipe_are_not_borrowed(
    tmp_path: Path, project: Project, measured: dict[str, Manifest], dense: Path
) -> None:
    changed = ladder(tmp_path, THREE.replace("{bits: 4}", "{bits: 4, recipe: mixed_4_6}"))
    text = render(gather(changed, dense), "Q4_K_XL", None)
    assert row(text, "`down_proj`")[1] == "5-bit + AWQ"
    assert row(text, "`down_proj`")[6] == "the recipe in variants.yaml has changed since this build"
    assert "use_more_bits" not in text


def test_folders_of_the_machine_are_cut_from_reasons(
    project: Project, measured: dict[str, Manifest], dense: Path
) -> None:
    m = measured["Q4_K_XL"]
    record(project, bench(m, 46, variant=Speed(reason="/home/me/build/Q4_K_XL: no such folder")))
    text = render(gather(project, dense), "Q4_K_XL", None)
    assert row(text, "Peak memory")[2] == "not measured: Q4_K_XL: no such folder"
    assert check_card(text) == []


def test_an_unbuilt_variant_has_no_card(project: Project, dense: Path) -> None:
    with pytest.raises(InputError, match="Q8_K_XL: not built"):
        render(gather(project, dense), "Q8_K_XL", None)


def test_licence_must_come_from_somewhere(tmp_path: Path, project: Project, measured: dict[str, Manifest]) -> None:
    bare = render(gather(project, None), "Q4_K_XL", None)
    assert "license" not in header(bare)
    assert "names no licence" in bare
    assert any("set card.license" in fault for fault in check_card(bare))  # so the gate lets it go nowhere
    given = ladder(tmp_path, THREE + "card: {license: mit}\n")
    text = render(gather(given, None), "Q4_K_XL", None)
    assert header(text)["license"] == "mit"
    assert "as given by the publisher" in text
    assert row(text, "**Size**")[1] == "not read: the original's files were not at hand"


def test_a_licence_that_contradicts_the_base_is_refused(tmp_path: Path, project: Project, dense: Path) -> None:
    with pytest.raises(InputError, match=r"'mit', but the base's own card says 'apache-2\.0'"):
        gather(ladder(tmp_path, THREE + "card: {license: mit}\n"), dense)


def test_a_licence_of_its_own_name_and_norwegian_survive(tmp_path: Path) -> None:
    card = CARD.replace("apache-2.0", "other\nlicense_name: tiny licence").replace("- zh", "- no")
    card = re.sub("license_link: .*", "license_link: LICENSE", card)
    folder = base(tmp_path / "base", DENSE, card)
    project = ladder(tmp_path, THREE)
    build(project, "Q4_K_XL", folder)
    front = header(render(gather(project, folder), "Q4_K_XL", None))
    assert front["license_name"] == "tiny licence"
    assert front["license_link"] == "https://huggingface.co/Qwen/Qwen3.5-9B/blob/main/LICENSE"
    assert front["language"] == ["en", "no"]


def test_fragment_is_a_ladder_that_gives_the_same_rules(
    tmp_path: Path, project: Project, measured: dict[str, Manifest], dense: Path
) -> None:
    text = render(gather(project, dense), "Q4_K_XL", None)
    found = re.search(r"```yaml\n(.*?)```", text, re.S)
    assert found
    Ladder.model_validate(yaml.safe_load(found[1]))
    (tmp_path / "again").mkdir()
    again = ladder(tmp_path / "again", found[1])
    m = build(again, "Q4_K_XL", dense)
    assert m.weights_hash == measured["Q4_K_XL"].weights_hash
    assert m.inputs.assignment == measured["Q4_K_XL"].inputs.assignment


def test_snippets_are_code(project: Project, measured: dict[str, Manifest], dense: Path) -> None:
    found = snippets(render(gather(project, dense), "Q4_K_XL", None))
    assert list(found) == ["mlx-lm", "publish", "server", "request"]
    ast.parse(found["mlx-lm"])
    assert "make_sampler(temp=0.6, top_p=0.95, top_k=20)" in found["mlx-lm"]
    words = [shlex.split(x) for x in found["publish"].splitlines()]
    assert words[0] == [
        "hf", "download", "Brooooooklyn/Qwen3.5-9B-UD-Q4_K_XL-mlx", "--local-dir", "Qwen3.5-9B-UD-Q4_K_XL-mlx",
    ]  # fmt: skip
    assert words[1][:4] == ["publish", "chat", "./Qwen3.5-9B-UD-Q4_K_XL-mlx", "--prompt"]
    body = shlex.split(found["request"])[-1]
    assert yaml.safe_load(body)["temperature"] == 0.6


# ---------------------------------------------------------------------------------------------- templates


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Facts:
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "base").symlink_to(dense)
    project = ladder(folder, THREE)
    m = build(project, "Q4_K_XL", dense)
    record(project, smoke(m, 0.0312), bench(m, 46))
    return gather(project, dense)


def own(tmp_path: Path, text: str, name: str = "card.md.j2") -> Path:
    folder = tmp_path / "mine"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder


def test_override_block_by_block(tmp_path: Path, facts: Facts) -> None:
    mine = own(
        tmp_path,
        "{% extends 'builtin/card.md.j2' %}{% block usage %}## Use\n\nAsk us.\n{% endblock %}"
        "{% block limitations %}{{ super() }}- {{ v.id }} of {{ facts.variants | length }}{% endblock %}",
    )
    built, text = render(facts, "Q4_K_XL", None), render(facts, "Q4_K_XL", mine)
    assert "## Use\n\nAsk us.\n\n## How It Was Made" in text
    assert "- Q4_K_XL of 3" in text
    assert snippets(text) == {}
    cut = text.index("## Use")
    assert text[:cut] == built[:cut]


@pytest.mark.parametrize(
    "block",
    [
        "front_matter", "title", "lead", "compatibility", "intro", "glance", "own", "variants", "protocol", "speed",
        "bits", "strategy", "quality", "choose", "smoke", "usage", "how", "limitations", "acknowledgments", "license",
    ],
)  # fmt: skip
def test_every_section_is_a_block(tmp_path: Path, facts: Facts, block: str) -> None:
    mine = own(tmp_path, f"{{% extends 'builtin/card.md.j2' %}}{{% block {block} %}}MINE{{% endblock %}}")
    assert render(facts, "Q4_K_XL", mine).count("MINE") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{{ card.speling }}", "card.md.j2:3: 'publisher.card_view.View object' has no attribute 'speling'"),
        ("{{ nothing }}", "card.md.j2:3: 'nothing' is undefined"),
        ("{% if %}", "card.md.j2:3: Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "card.md.j2:3: access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ card.variant.error }}", "card.md.j2:3: the value printed here is missing (None)"),
        ("{{ 1 / 0 }}", "card.md.j2:3: ZeroDivisionError: division by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "card.md.j2:3: OverflowError"),
        ("{{ facts.variants.append(1) }}", "card.md.j2:3: 'tuple object' has no attribute 'append'"),
        ("{% include '../../etc/passwd' %}", "card.md.j2:3: template '../../etc/passwd' is neither"),
    ],
)
def test_a_template_fault_is_one_line(tmp_path: Path, facts: Facts, line: str, message: str) -> None:
    with pytest.raises(InputError) as e:
        render(facts, "Q4_K_XL", own(tmp_path, f"---\nlicense: mit\n{line}\n"))
    assert message in str(e.value)
    assert "\n" not in str(e.value)


# what a template of a stranger might try; none may come through, and none may run on
REACHES = (
    "facts.card.parse_raw('x', proto='pickle', allow_pickle=True)",
    "facts.card.parse_file('/etc/passwd')",
    "facts.card.model_dump()",
    "facts.card.model_copy(update={'intro': 'x'})",
    "facts.card.model_fields",
    "facts.card.__class__",
    "facts.card['model_dump']()",
    "facts.card | attr('model_dump')",
    "([facts.card] | map(attribute='model_dump') | first)()",
    "(([facts] | map(attribute='card.model_construct')) | first)()",
    "'{0.model_dump}'.format(facts.card)",
    "'{0.__class__}'.format(facts)",
    "'{x.model_dump}'.format_map({'x': facts.card})",
    "'{0[card].model_dump}'.format(facts)",
    "card.contents.manifest.model_dump_json()",
    "facts.variant('Q4_K_XL')",
    "card.variant.__dataclass_fields__",
    "card.contents.family",
    "dict.fromkeys('ab')",
    "range.__init__",
    "cycler.__init__.__globals__",
    "card.front_matter.update({})",
    "card.front_matter.pop('license')",
    "'a'.encode()",
    "'a'.translate({})",
    "self._TemplateReference__context",
    "self.__init__",
    "loop",
    "lipsum",
    "'x' | pprint",
    "[1, 2] | random",
    "card",
    "facts.variants",
    "facts.variants | map(attribute='id')",
    "'' ~ facts.card",
    "'{}'.format(facts.card)",
)


@pytest.mark.parametrize("expression", REACHES)
def test_a_template_reaches_data_only(tmp_path: Path, facts: Facts, expression: str) -> None:
    with pytest.raises(InputError) as e:
        render(facts, "Q4_K_XL", own(tmp_path, f"---\nlicense: mit\n{{{{ {expression} }}}}\n"))
    assert "card.md.j2:3: " in str(e.value)
    assert "\n" not in str(e.value)


def test_facts_hold_data_only(facts: Facts) -> None:
    """What the sandbox is handed: models, dataclasses of ours and plain values; no module, path or function."""
    seen, todo = set(), [facts, view(facts, "Q4_K_XL")]
    while todo:
        x = todo.pop()
        seen.add(type(x).__name__)
        if isinstance(x, File):
            todo += [getattr(x, name) for name in type(x).model_fields]
        elif is_dataclass(x):
            assert type(x).__module__.startswith("publisher.")
            todo += [getattr(x, f.name) for f in fields(x)]
        elif isinstance(x, list | tuple):
            todo += x
        elif isinstance(x, dict):
            todo += [*x, *x.values()]
        else:
            assert type(x) in (NoneType, bool, int, float, str), x
    assert {"Manifest", "BitRow", "Contents", "Bench"} <= seen


def test_what_templates_may_do_works(tmp_path: Path, facts: Facts) -> None:
    text = """---
license: mit
{% set ns = namespace(n=0) %}{% macro m(x) %}<{{ x }}{{ caller() if caller is defined }}>{% endmacro %}
{% for v in facts.variants %}{% set ns.n = ns.n + v.bits %}
{{ loop.index }}/{{ loop.length }}{{ ", " if not loop.last }}
{%- endfor %}; {{ ns.n }}
{{ m("a") }}{% call m("b") %}c{% endcall %} {{ "%.2f" | format(1.5) }} {{ "{:>5}|{a}".format(7, a="b") }} {{ "%s-%d" % ("x", 3) }}
{{ facts.variants | map(attribute="id") | join(" ") }} {{ card.front_matter["tags"][:2] | join("+") }}
{% for k, rows in card.bits | groupby("format") %}{{ k }}:{{ rows | length }} {% endfor %}.
{{ card.contents.manifest.inputs.bits * 2 }} {{ "ab".upper() ~ 1 }} {{ "a,b".split(",") | last }}
{{ card.front_matter.items() | first | first }}
{% filter upper %}{% set z %}x{{ 2 ** 3 }}{% endset %}{{ z }}{% endfilter %} {{ (1, 2) == (1, 2) }} {{ "<" | e }}
"""
    out = render(facts, "Q4_K_XL", own(tmp_path, text)).splitlines()
    assert out[2:9] == [
        "1/3, 2/3, 3/3; 14",
        "<a><bc> 1.50     7|b x-3",
        "Q2_K_XL Q4_K_XL Q8_K_XL mlx+mlx-publish",
        out[5],
        "8 AB1 b",
        "license",
        "X8 True &lt;",
    ]
    assert "4-bit:1 " in out[5]


ENDLESS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% for a in [1] * 1000 %}{% for b in 'x' * 9999 %}{% for c in 'x' * 9999 %}x{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [[]] recursive %}{% if loop.depth < 90 %}{{ loop([1]) }}{{ loop([1]) }}{% endif %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | string }}",
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x, 'x' * 9999] %}{% endfor %}",
    "{% set x = 'x' * 999999 %}{% for i in range(99999) %}{{ x[1:] }}{% endfor %}",
    "{% set x = range(99999) | list %}{% for i in range(9999) %}{% if -1 in x %}{% endif %}{% endfor %}",
    "{% set x = range(99999) | list %}{{ x | select('in', x) | list | length }}{{ x | map('in', x) | list }}",
    "{% for i in range(99999) %}" + "0123456789" * 99 + "{% endfor %}",
    "{% for i in range(99999) %}{{ [-10 ** 9] | map('§cost') | list | length }}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}", "{{ [0] * 10 ** 10 }}", "{{ 10 ** (10 ** 10) }}", "{{ 10 ** 10 * 'x' }}",
    "{{ 'x'.center(10 ** 10) }}", "{{ 'x' | center(10 ** 10) }}", "{{ 'x'.zfill(10 ** 10) }}",
    "{{ 1 | round(10 ** 9, 'floor') }}",
    "{{ '%9999999999d' % 1 }}", "{{ '%9999999999d' | format(1) }}", "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '{:9999999999}'.format(1) }}", "{{ '{:{w}}'.format(1, w=10 ** 9) }}", "{{ ('{0}' * 99999).format('x' * 9999) }}",
    "{{ ('x' * 9999).replace('', 'x' * 9999) }}", "{{ ('x' * 9999) | replace('x', 'x' * 9999) }}",
    "{{ ('x' * 9999).join('x' * 9999) }}", "{{ ('x' * 9999) | join('x' * 9999) }}",
    "{{ ('x\n' * 9999) | indent(10 ** 6) }}", "{{ ('x ' * 9999) | wordwrap(1, wrapstring='x' * 9999) }}",
    "{{ [1] | batch(10 ** 9, 1) | list | length }}", "{{ [1] | slice(10 ** 9) | list | length }}",
    "{{ [[1]] | sum(start=[]) }}",
    "{% include 'card.md.j2' %}{% include 'card.md.j2' %}",
)  # fmt: skip


@pytest.mark.parametrize("text", ENDLESS)
def test_a_template_that_runs_on_is_cut(
    tmp_path: Path, facts: Facts, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text != ENDLESS[0]:
        monkeypatch.setattr(card_sandbox, "WORK", 2_000_000)  # a tenth, for a tenth of the time
    mine = own(tmp_path, f"---\nlicense: mit\n{text}\n")
    found = set()
    for _ in range(2):
        with pytest.raises(InputError) as e:
            render(facts, "Q4_K_XL", mine)
        found.add(str(e.value))
    (message,) = found  # the same each time: counted, not timed
    assert "\n" not in message
    assert len(message) < 400


def test_a_huge_card_and_a_huge_template_are_refused(
    tmp_path: Path, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="card would be larger than 2 MiB"):
        render(facts, "Q4_K_XL", own(tmp_path, "{% for i in range(3000) %}" + "x" * 1000 + "{% endfor %}"))
    monkeypatch.setattr(card_sandbox, "TEMPLATE_BYTES", 100)
    with pytest.raises(InputError, match="is larger than"):
        render(facts, "Q4_K_XL", own(tmp_path, "x" * 101))


def test_blocks_nested_too_deep_are_one_line(tmp_path: Path, facts: Facts) -> None:
    with pytest.raises(InputError):
        render(facts, "Q4_K_XL", own(tmp_path, "{% for i in [1] %}" * 30 + "{% endfor %}" * 30))
    with pytest.raises(InputError):
        render(facts, "Q4_K_XL", own(tmp_path, "{{ " + "(" * 9999 + ")" * 9999 + " }}"))
    with pytest.raises(InputError):
        render(facts, "Q4_K_XL", own(tmp_path, "{{ facts | yaml }}"))


def test_sizes_have_one_spelling() -> None:
    sizes = [12, 547_000, 13_600_000, 7_170_000_000]
    assert [card_format.size(n) for n in sizes] == ["12 bytes", "547 kB", "13.6 MB", "7.17 GB"]


def test_a_cell_of_backslashes_takes_no_time() -> None:
    assert card_format.cell("\\" * 200_000 + "x") == "\\" * 200_000 + "x"
    assert card_format.cell(r"a\|b") == r"a\\\|b"


def test_a_templates_folder_without_an_entry_is_refused(tmp_path: Path, facts: Facts) -> None:
    with pytest.raises(InputError, match=r"mine: no card\.md\.j2"):
        render(facts, "Q4_K_XL", own(tmp_path, "x", "other.j2"))


def test_values_cannot_break_tables_or_the_header(tmp_path: Path, dense: Path) -> None:
    (tmp_path / "base").symlink_to(dense)
    nasty = r'a\|b|c <script>\n---\n# not a "heading"'
    text = (
        HEAD
        + f"""recipe: mine
quantized_by: "x: [y]\\n---\\nz"
recipes:
  mine: {{extends: uniform, rules: [{{match: "*.mlp.down_proj", bits: 6, why: {nasty!r}}}]}}
card: {{tags: ["a: b", "c\\n---\\nd"]}}
variants: {{Q4: {{bits: 4}}}}
"""
    )
    project = ladder(tmp_path, text)
    record(project, smoke(build(project, "Q4", dense, None), 0.1))
    card = render(gather(project, dense), "Q4", None)
    front = header(card)
    assert front["quantized_by"] == "x: [y] --- z"
    assert front["tags"][-2:] == ["a: b", "c --- d"]
    cells = row(card, "`down_proj`")
    assert len(cells) == 7
    assert "<script>" not in card
    assert check_card(card) == []


# ---------------------------------------------------------------------------------------------- check_card


@pytest.mark.parametrize(
    "line",
    [
        "| Decode | TBD |", "| Size | N/A |", "| KLD | nan |", "NaN tok/s", "| x | None |", "value: None",
        "{{ card.size }}", "{% if %}", "left }} over", "undefined", "see /home/me/x", "`/srv/models`", "(/tmp/a)",
        "/Users/me", "C:\\models\\x", "file:///x", "hf_AbCdEfGhIjKlMnOpQrStUv", "```",
    ],
)  # fmt: skip
def test_check_finds(line: str) -> None:
    found = check_card(f"---\nlicense: mit\n---\n# T\n{line}\n")
    assert found, line
    assert found[0].startswith("line 5: ")
    assert "GhIjKl" not in found[0]


@pytest.mark.parametrize(
    "line",
    [
        "None of these was measured.", "Nonetheless", "banana", "https://example.org/home/x", "a NaN or an infinity",
        "```json\n{\"a\": {\"b\": 1}}\n```", "./work/x", "hf_transfer", "and/or", "finance",
        "not measured: bench was not run",
    ],
)  # fmt: skip
def test_check_lets_pass(line: str) -> None:
    assert check_card(f"---\nlicense: mit\n---\n# T\n{line}\n") == []


@pytest.mark.parametrize("text", ["# T\n", "---\nlicense: [\n---\n", "---\ntags: [a]\n---\n", "---\n- a\n---\n"])
def test_check_wants_front_matter(text: str) -> None:
    assert len(check_card(text)) == 1


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("in /home/me/models/x.", ["/home/me/models/x"]),
        ('{"path": "/workspace/m", "b": ["/data/q/w.gguf"]}', ["/workspace/m", "/data/q/w.gguf"]),
        ("load(/Volumes/T7/m), then /var/folders/zz", ["/Volumes/T7/m", "/var/folders/zz"]),
        ("box:/mnt/m and --out=/private/tmp/x", ["/mnt/m", "/private/tmp/x"]),
        ("file:///opt/m C:/models/x d:\\m\\x", ["file:///opt/m", "C:/models/x", "d:\\m\\x"]),
        (json.dumps({"p": "C:\\Users\\me"}), ["C:\\\\Users\\\\me"]),
        ("https://a.org/home/x, s3://b/tmp/y, q/k/v, ./tmp/x, ~/data/x, /tmp, /home, #!/usr/bin/env, /v1/chat", []),
        ("http://127.0.0.1:8080/data/x and 4/root/x", []),
    ],
)
def test_paths_of_a_machine(text: str, paths: list[str]) -> None:
    assert machine_paths(text) == paths


def test_layers_as_text() -> None:
    assert layer_text([3]) == "layer 3"
    assert layer_text([6, 0, 3]) == "layers 0, 3, 6"
    assert layer_text([0, 1, 2, 5, 6, 31]) == "layers 0–2, 5, 6, 31"


def test_unmeasured_variant_still_has_a_card(project: Project, dense: Path) -> None:
    build(project, "Q8_K_XL", dense)
    facts = gather(project, dense)
    text = render(facts, "Q8_K_XL", None)
    assert "Not measured: bench was not run." in text
    assert "Not measured: smoke was not run." in text
    assert check_card(text) == []
    variant = replace(facts.variant("Q8_K_XL"), build=None)
    bare = render(replace(facts, variants=(*facts.variants[:2], variant)), "Q8_K_XL", None)
    assert row(bare, "Built")[1].startswith("not recorded: build.json is missing")
