"""Cards: what they say, and what they must never say. Golden texts: UPDATE_GOLDEN=1 writes them anew."""

from __future__ import annotations

import ast
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from card_ladder import CARD, DENSE, EPYC, MOE, base, bench, build, ladder, record, smoke, speed

from inference.errors import InputError
from publisher.card import Facts, check_card, gather, render, snippets
from publisher.card_bits import layer_text
from publisher.card_facts import HEADER
from publisher.schema import BenchSpec, Ladder, Manifest, Speed
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
    assert row(sibling, "Brooooooklyn/Qwen3.5-9B-UD-Q4_K_XL-mlx")[2] == "its folder cannot be read"


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
    with pytest.raises(InputError, match="no licence found"):
        render(gather(project, None), "Q4_K_XL", None)
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
        "bits", "strategy", "quality", "usage", "how", "limitations", "acknowledgments", "license",
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
        "{{ card.size }}", "{% if %}", "left }} over", "undefined", "see /home/me/x", "`/work/main`", "(/tmp/a)", 
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
