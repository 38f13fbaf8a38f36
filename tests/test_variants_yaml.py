"""variants.yaml: every mistake is one line that says where it is, what was found and what is allowed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml
from conftest import EXAMPLE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.errors import InputError
from publisher.schema import Ladder
from publisher.variants import load_project

BROKEN = Path(__file__).parent / "fixtures/broken_yaml"

# file → (line, words that name what was found, words that name what is allowed)
FAULTS = {
    "a_list": (1, "found a list", "expected keys such as base and variants"),
    "alias_bomb": (3, "*a", "aliases are not taken"),
    "alias_to_itself": (3, "*v", "aliases are not taken"),
    "bad_base": (1, "base: found 'Qwen/Qwen3.5/9B'", "owner/name"),
    "bad_timestamp": (3, "month", "1..12"),
    "bits_as_text": (3, "variants.Q4.bits: found 'four'", "2, 3, 4, 5, 6 or 8"),
    "circular_recipe": (7, "recipe 'first' extends itself", "first → second → first"),
    "control_character": (3, "control character", "not YAML"),
    "deep_nesting": (2, "nested more than", "32 deep"),
    "duplicate_id": (5, "'Q4' appears twice", "first on line 3"),
    "empty": (1, "found nothing", "expected keys such as base and variants"),
    "folder_as_imatrix": (2, "imatrix: found './model'", "an existing file"),
    "group_size_does_not_divide": (7, "*.up_proj: group size 16", "32, 64, 128"),
    "id_of_a_folder_of_ours": (3, "found 'results'", "this tool's own files"),
    "id_with_slash": (3, "found '../Q4'", "letters, digits, '.', '_' and '-'"),
    "ids_differing_by_case": (4, "found 'q4'", "the folder of that name is for Q4"),
    "imatrix_without_file": (2, "acme/statistics", "either path, or repo and file"),
    "merge_key": (4, "*q", "aliases are not taken"),
    "missing_base_folder": (2, "found './nowhere'", "an existing folder"),
    "missing_bits": (3, "variants.Q4", "either bits or size"),
    "missing_file": (2, "imatrix: found './nowhere.gguf'", "an existing file"),
    "mode_with_other_bits": (6, "6 in groups of 64", "mxfp4 has 4 bits in groups of 32"),
    "mtp_misspelt": (2, "mtp: found 'dropped'", "'drop', 'keep' or 'split'"),
    "nested_mappings": (34, "nested more than", "32 deep"),
    "no_base": (1, "base", "is missing"),
    "no_variants": (2, "variants: found {}", "at least 1"),
    "not_a_matrix": (7, "vision_tower.blocks.0.attn.proj.bias", "is no matrix and cannot be quantized"),
    "not_utf8": (3, "0xfc", "expected UTF-8"),
    "number_as_id": (3, "key 4 is a int", "quotes"),
    "output_of_no_user": (2, "output: found '~nobody-of-that-name/x'", "a path"),
    "output_as_number": (2, "output: found 7", "text"),
    "pattern_matching_nothing": (7, "recipes.mine.rules.1", "pattern '*.c_attn' matches no tensor"),
    "pattern_of_a_variant_matching_nothing": (6, "variants.Q4.rules.0", "'*.q_projection' matches no tensor"),
    "path_with_nul": (2, "base.path: found './a\\x00b'", "an existing folder"),
    "python_tag": (3, "variants.Q4: found ['true']", "keys and values"),
    "repo_pattern_with_another_field": (2, "found '{base}-{size}'", "{base} and {id}"),
    "repo_pattern_without_id": (2, "Q4 and Q5 would both be model-mlx", "{id}"),
    "rule_bits_as_expression": (6, "found 'N-1'", "N or N+1"),
    "seven_bit": (4, "variants.Q7.bits: found 7", "2, 3, 4, 5, 6 or 8 (MLX stores no 7-bit weights)"),
    "smoke_kld_infinite": (3, "smoke_kld: found inf", "finite number"),
    "tab_indent": (3, "'\\t'", "not YAML"),
    "tensor_no_rule_names": (7, "no rule names language_model.lm_head", "add one, or a final `*`"),
    "two_variants_in_one_repo": (4, "Q4 and Q5 would both be acme/one", "variants.Q5.repo"),
    "unknown_default_recipe": (2, "recipe 'gptq' is unknown", "uniform, unsloth"),
    "unknown_key": (5, "variants.Q4.group_sise: unknown key", "did you mean group_size?"),
    "unknown_parent_recipe": (5, "recipe 'nothing' is unknown", "uniform, unsloth"),
    "unknown_recipe": (6, "recipe 'unslot' is unknown", "did you mean unsloth?"),
    "variants_as_list": (2, "variants: found [{'id': 'Q4', 'bits': 4}]", "keys and values"),
    "yes_for_a_string": (2, "owner: found True", "text"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("yaml")
    (folder / "model").symlink_to(EXAMPLE / "model")
    return folder


def test_every_broken_file_is_tested():
    assert {p.stem for p in BROKEN.glob("*.yaml")} == set(FAULTS)


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_mistake_is_one_line_with_place_finding_and_remedy(fault, folder, publish):
    (folder / "variants.yaml").write_bytes((BROKEN / f"{fault}.yaml").read_bytes())
    ran = publish("plan", cwd=folder)
    line, found, allowed = FAULTS[fault]
    told = ran.refused(2)
    assert told.startswith(f"variants.yaml:{line}: "), told
    assert found in told
    assert allowed in told
    assert len(told) < 400
    assert not ran.out


@pytest.mark.parametrize("output", ["/", ".", "..", "../other", "./build/..", "{folder}", "link"])
def test_output_is_a_folder_of_its_own(output, tmp_path, publish):
    folder = tmp_path / "ladders/one"
    folder.mkdir(parents=True)
    (tmp_path / "ladders/other").mkdir()
    (tmp_path / "ladders/other/variants.yaml").touch()
    (folder / "model").symlink_to(EXAMPLE / "model")
    (folder / "link").symlink_to(tmp_path)
    path = folder / "variants.yaml"
    text = "base: ./model\noutput: '{}'\nvariants:\n  Q4: {{bits: 4}}\n"
    path.write_text(text.format(output.format(folder=folder)))
    before = sorted(tmp_path.rglob("*"))
    for command in ("plan", "build"):
        told = publish(command, "Q4", cwd=folder).refused(2)
        assert told.startswith("variants.yaml:2: output: found '"), told
        assert "expected a folder of its own" in told
    assert sorted(tmp_path.rglob("*")) == before
    path.write_text(text.format("../build"))
    publish("plan", cwd=folder).ok()


def _mappings(model, path=()):
    """(path, model) of every mapping that variants.yaml may have; of a dict the key Q4, of a list the first entry."""
    yield path, model
    for name, field in model.model_fields.items():
        todo = [field.annotation]
        while todo:
            kind = todo.pop()
            if hasattr(kind, "model_fields"):
                yield from _mappings(kind, (*path, name))
            elif get_origin(kind) in (dict, list) and hasattr(get_args(kind)[-1], "model_fields"):
                yield from _mappings(get_args(kind)[-1], (*path, name, "Q4" if get_origin(kind) is dict else 0))
            else:
                todo += get_args(kind)


MISSPELT = [(path, name) for path, model in _mappings(Ladder) for name in model.model_fields]


@pytest.mark.parametrize("flow", [False, True], ids=["block", "flow"])
def test_a_misspelt_key_of_any_mapping_is_told_the_nearest(flow, folder):
    assert ("collection",) in {path for path, _ in MISSPELT}
    assert ("variants", "Q4", "imatrix") in {path for path, _ in MISSPELT}
    for path, name in MISSPELT:
        value = {name[0] + name[2:]: "x"}
        for key in reversed(path):
            value = [value] if key == 0 else {key: value}
        value = {"base": "./model", "variants": {"Q4": {"bits": 4}}} | value
        (folder / "variants.yaml").write_text(yaml.safe_dump(value, default_flow_style=flow, sort_keys=False))
        with pytest.raises(InputError) as told:
            load_project(folder / "variants.yaml")
        assert str(told.value).endswith(f"; did you mean {name}?"), (path, str(told.value))


def test_a_file_that_is_not_there_names_the_command_that_writes_one(tmp_path, publish):
    told = publish("plan", cwd=tmp_path).refused(2)
    assert "variants.yaml: no such file" in told
    assert "publish init" in told


def test_a_folder_in_place_of_the_file_is_one_line(tmp_path, publish):
    (tmp_path / "variants.yaml").mkdir()
    assert publish("plan", cwd=tmp_path).code == 2


def test_a_file_larger_than_the_limit_is_refused_unread(tmp_path, publish):
    (tmp_path / "variants.yaml").write_text("# " + "x" * 1_000_001)
    assert "larger than" in publish("plan", cwd=tmp_path).refused(2)


def test_a_byte_order_mark_is_no_mistake(folder, publish):
    (folder / "variants.yaml").write_bytes(b"\xef\xbb\xbf" + b"base: ./model\nvariants: {Q4: {bits: 4}}\n")
    assert "Q4" in publish("plan", cwd=folder).ok().out


def test_a_bare_base_is_a_path_only_if_it_starts_like_one(folder):
    for text, want in (("./model", ("path", "./model")), ("acme/model", ("repo", "acme/model"))):
        ladder = Ladder.model_validate({"base": text, "variants": {"Q4": {"bits": 4}}})
        assert getattr(ladder.base, want[0]) == want[1]


@pytest.mark.parametrize("alone", [True, False])
def test_what_a_variant_says_wins_over_the_top_of_the_file(folder, alone):
    own = "group_size: 32, recipe: uniform, mtp: keep, vision: drop, repo: acme/own, imatrix: false" if alone else ""
    text = f"""\
base: ./model
owner: top
imatrix: {EXAMPLE / "imatrix-tiny.gguf"}
group_size: 128
mtp: split
variants:
  Q4: {{bits: 4, {own}}}
"""
    (folder / "variants.yaml").write_text(text)
    project = load_project(folder / "variants.yaml")
    got = (
        project.group_size("Q4"), project.recipe("Q4").name, project.mtp("Q4"), project.vision("Q4"),
        project.repo("Q4"), project.imatrix("Q4") is None,
    )  # fmt: skip
    assert got == (
        (32, "uniform", "keep", "drop", "acme/own", True)
        if alone
        else (128, "unsloth", "split", "keep", "top/model-UD-Q4-mlx", False)
    )


# ---------------------------------------------------------------------------------------- nothing gives a traceback

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.binary(max_size=4)
keys = st.sampled_from(
    [*Ladder.model_fields, "bits", "rules", "match", "extends", "path", "repo", "Q4", "*", "N"]
) | st.text(max_size=6)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | st.integers(), inner, max_size=4),
    max_leaves=12,
)
ladders = st.fixed_dictionaries(
    {"base": st.just("./model") | trees, "variants": st.dictionaries(keys, st.just({"bits": 4}) | trees, max_size=3)},
    optional={name: trees for name in Ladder.model_fields if name not in ("base", "variants")},
)
EXAMPLES = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def _load(data: bytes) -> None:
    """Loads, or refuses in one line; anything else is raised."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "variants.yaml"
        path.write_bytes(data)
        (path.parent / "model").mkdir()
        told = "variants.yaml:"
        try:
            load_project(path)
        except InputError as e:
            told = str(e)
        assert told.startswith(("variants.yaml:", f"{path}:"))
        assert "\n" not in told


@EXAMPLES
@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_one_line(data):
    _load(data)


@EXAMPLES
@given(st.text(alphabet="abQ4:{}[]&*!|>-?#'\"%@`, \n\t\\0.<~=", max_size=80))
def test_arbitrary_yaml_syntax_gives_one_line(text):
    _load(text.encode())


@EXAMPLES
@given(trees | ladders)
def test_arbitrary_values_give_one_line(value):
    _load(yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass"))
