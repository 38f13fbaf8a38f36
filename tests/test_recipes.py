"""Recipes: what each gives every tensor, against the published table and against mlx-lm's own converter."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import EXAMPLE
from engine_checkpoints import MOE_CONFIG

from inference.checkpoint import TensorInfo
from inference.errors import InputError
from inference.layout import Target
from inference.qwen3_5.names import read_config, text_shapes
from publisher.plan import assignment
from publisher.variants import load_project
from quant import qwen3_5
from quant.builtin import BUILTIN
from quant.recipe import LAYER_SETS, Recipe, Rule, TensorPlan, matches, resolve, rule_bits, snap
from quant.tables import scalable

DENSE_CONFIG = json.loads((EXAMPLE / "model/config.json").read_text())
NOWHERE = TensorInfo("", "BF16", (), Path(), 0, 0)
P = "language_model.model."
L = P + "layers."

# N → bits of each class; 16 is bf16. Snapped: MLX stores no 7-bit weights
UNSLOTH = {
    #    embed lm_head q/k/v qkv/z a/b  o  out down gate/up
    2: (4, 5, 4, 4, 16, 16, 16, 3, 2),
    3: (5, 6, 5, 5, 16, 16, 16, 4, 3),
    4: (6, 8, 6, 6, 16, 16, 16, 5, 4),
    5: (8, 8, 8, 8, 16, 16, 16, 6, 5),
    6: (8, 8, 8, 8, 16, 16, 16, 8, 6),
    8: (8, 8, 8, 8, 16, 16, 16, 8, 8),
}
ROLES = (
    P + "embed_tokens", "language_model.lm_head", L + "3.self_attn.v_proj", L + "0.linear_attn.in_proj_qkv",
    L + "0.linear_attn.in_proj_a", L + "3.self_attn.o_proj", L + "0.linear_attn.out_proj", L + "0.mlp.down_proj",
    L + "0.mlp.up_proj",
)  # fmt: skip


def config(base: dict, layers: int, **text) -> dict:
    out = copy.deepcopy(base)
    kinds = ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(layers)]
    out["text_config"] |= {"num_hidden_layers": layers, "layer_types": kinds, **text}
    return out


def targets(config: dict) -> list[Target]:
    return [
        Target(name, shape, "F32" if name.endswith("A_log") else "BF16", NOWHERE)
        for name, shape in text_shapes(read_config(config)).items()
    ]


def plans(recipe: Recipe | str, bits: int, config: dict = DENSE_CONFIG, group_size: int = 64, awq: bool = False):
    recipe = BUILTIN[recipe] if isinstance(recipe, str) else recipe
    found = resolve(recipe, bits, group_size, targets(config), qwen3_5.CLASSES, scalable(qwen3_5.AWQ_GROUPS), awq)
    return {p.target.module: p for p in found}


def bits_of(plan: TensorPlan) -> int:
    return plan.spec.bits if plan.spec else 16


# ------------------------------------------------------------------------------------------------ built in


@pytest.mark.parametrize("config", [DENSE_CONFIG, MOE_CONFIG], ids=["dense", "moe"])
@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_every_built_in_recipe_names_every_matrix_and_gives_a_reason(name, config):
    for module, plan in plans(name, 4, config).items():
        if plan.spec or plan.rule:
            assert plan.why, module
    assert BUILTIN[name].name == name
    assert BUILTIN[name].origin


@pytest.mark.parametrize("bits", UNSLOTH)
def test_unsloth_gives_the_published_bits(bits):
    got = plans("unsloth", bits)
    assert tuple(bits_of(got[role]) for role in ROLES) == UNSLOTH[bits]
    assert all(p.spec.group_size == 64 and p.spec.mode == "affine" for p in got.values() if p.spec)


@pytest.mark.parametrize("bits", UNSLOTH)
def test_unsloth_8bit_out_differs_in_o_out_a_and_b_alone(bits):
    want, got = plans("unsloth", bits), plans("unsloth_8bit_out", bits)
    differ = {m.rpartition(".")[2] for m in want if want[m].spec != got[m].spec}
    assert differ == {"o_proj", "out_proj", "in_proj_a", "in_proj_b"}
    assert {bits_of(p) for m, p in got.items() if m.rpartition(".")[2] in differ} == {8}


@pytest.mark.parametrize("bits", UNSLOTH)
def test_unsloth_keeps_routers_at_eight_bits_and_gives_experts_what_the_dense_layers_get(bits):
    got = plans("unsloth", bits, MOE_CONFIG)
    _, _, _, _, _, _, _, down, up = UNSLOTH[bits]
    want = {
        "mlp.gate": 8, "mlp.shared_expert_gate": 8, "mlp.switch_mlp.down_proj": down, "mlp.switch_mlp.gate_proj": up,
        "mlp.shared_expert.down_proj": down, "mlp.shared_expert.up_proj": up,
    }  # fmt: skip
    assert {m: bits_of(got[f"{L}0.{m}"]) for m in want} == want


def test_awq_scales_what_a_norm_or_up_proj_can_take_and_nothing_else():
    scaled = {m.removeprefix(L)[2:] for m, p in plans("unsloth", 4, awq=True).items() if p.awq}
    assert scaled == {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "linear_attn.in_proj_qkv", "linear_attn.in_proj_z",
        "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
    }  # fmt: skip
    assert not any(p.awq for p in plans("unsloth", 4, awq=False).values())
    assert not any(".mlp." in m for m, p in plans("unsloth", 4, MOE_CONFIG, awq=True).items() if p.awq)


@pytest.mark.parametrize(("asked", "stored"), [(2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 8), (8, 8), (9, 8), (11, 8)])
def test_bits_that_mlx_does_not_store_go_up_to_those_it_does(asked, stored):
    assert snap(asked) == stored
    assert rule_bits(Rule("*", f"N+{asked - 2}"), 2) == stored


def test_norms_and_the_recurrence_are_never_quantized_even_by_a_rule_for_everything():
    for module, plan in plans("uniform", 2).items():
        if module.endswith(("norm", "conv1d", "A_log", "dt_bias")):
            assert plan.spec is None, module


# ------------------------------------------------------------------------------------------------ against mlx-lm


def mlx_lm_formats(config: dict, bits: int, group_size: int, mode: str = "affine", recipe: str | None = None) -> dict:
    """module → (bits, group size, mode) as `mlx_lm.convert` leaves them, by quantizing a model of that config."""
    import mlx.nn as nn
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import _get_classes, quantize_model

    config = copy.deepcopy(config)
    cls, args = _get_classes(config)
    model = cls(args.from_dict(config))
    predicate = mixed_quant_predicate_builder(recipe, model, group_size) if recipe else None
    model, _ = quantize_model(model, config, group_size, bits, mode, quant_predicate=predicate)
    return {
        path: (m.bits, m.group_size, m.mode) if hasattr(m, "bits") else None
        for path, m in model.named_modules()
        if hasattr(m, "weight") and not isinstance(m, nn.RMSNorm) and not path.endswith(("norm", "conv1d"))
    }


def our_formats(*args, **kwargs) -> dict:
    return {
        m: (p.spec.bits, p.spec.group_size, p.spec.mode) if p.spec else None
        for m, p in plans(*args, **kwargs).items()
        if len(p.target.shape) > 1 and not m.endswith("conv1d")
    }


@pytest.mark.parametrize("layers", [4, 8, 12])
@pytest.mark.parametrize("base", [DENSE_CONFIG, MOE_CONFIG], ids=["dense", "moe"])
@pytest.mark.parametrize("name", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
def test_mixed_recipes_give_every_module_what_mlx_lm_gives_it(name, base, layers):
    small = config(base, layers, vocab_size=64)
    want = mlx_lm_formats(small, 4, 64, recipe=name)
    assert our_formats(name, 4, small) == want
    down = {want[m][0] for m in want if m.endswith("down_proj")}
    assert len(down) == 2, "layers must differ for this to say anything"


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("base", [DENSE_CONFIG, MOE_CONFIG], ids=["dense", "moe"])
@pytest.mark.parametrize("bits", [2, 8])
def test_uniform_gives_every_module_what_mlx_lm_gives_it_routers_included(bits, base, group_size):
    small = config(base, 4, vocab_size=64)
    want = mlx_lm_formats(small, bits, group_size)
    assert our_formats("uniform", bits, small, group_size) == want
    if base is MOE_CONFIG:
        assert want[f"{L}0.mlp.gate"] == want[f"{L}0.mlp.shared_expert_gate"] == (8, 64, "affine")


@pytest.mark.parametrize("base", [DENSE_CONFIG, MOE_CONFIG], ids=["dense", "moe"])
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_recipes_give_every_module_what_mlx_lm_gives_it(mode, base):
    small = config(base, 4, vocab_size=64)
    assert our_formats(mode, 4, small) == mlx_lm_formats(small, None, None, mode)


def test_mixed_recipes_take_the_group_size_of_the_variant_as_mlx_lm_does():
    small = config(DENSE_CONFIG, 8, vocab_size=64)
    assert our_formats("mixed_3_6", 3, small, 32) == mlx_lm_formats(small, 3, 32, recipe="mixed_3_6")


# ------------------------------------------------------------------------------------------------ of one's own


def project(folder: Path, text: str):
    if not (folder / "model").exists():
        (folder / "model").symlink_to(EXAMPLE / "model")
    (folder / "variants.yaml").write_text("base: ./model\n" + text)
    return load_project(folder / "variants.yaml")


def test_own_rules_come_before_those_of_the_recipe_they_extend(tmp_path):
    mine = project(
        tmp_path,
        """\
recipes:
  mine:
    extends: unsloth
    awq_exponent: 0.5
    rules:
      - {match: "*.mlp.down_proj", bits: N+4, why: it was worst}
  nearer:
    extends: mine
    rules:
      - {match: "*.layers.0.mlp.down_proj", bits: bf16}
variants:
  Q2: {bits: 2, recipe: nearer}
  Q3: {bits: 3, recipe: mine, awq_exponent: 0, rules: [{match: "*.lm_head", bits: 3}]}
""",
    )
    q2, q3 = plans(mine.recipe("Q2"), 2), plans(mine.recipe("Q3"), 3)
    assert bits_of(q2[L + "0.mlp.down_proj"]) == 16
    assert bits_of(q2[L + "1.mlp.down_proj"]) == 6
    assert q2[L + "1.mlp.down_proj"].why == "it was worst"
    assert bits_of(q2[L + "1.mlp.up_proj"]) == 2
    assert (bits_of(q3["language_model.lm_head"]), bits_of(q3[L + "0.mlp.down_proj"])) == (3, 8)
    assert (mine.recipe("Q2").awq_exponent, mine.recipe("Q3").awq_exponent) == (0.5, 0)


def test_a_recipe_of_a_built_in_name_replaces_it(tmp_path):
    mine = project(tmp_path, "recipes: {unsloth: {rules: [{match: '*', bits: 8}]}}\nvariants: {Q2: {bits: 2}}\n")
    assert {bits_of(p) for p in plans(mine.recipe("Q2"), 2).values() if p.rule} == {8}


def test_a_recipe_of_ones_own_that_extends_nothing_stands_alone(tmp_path):
    mine = project(
        tmp_path,
        "recipe: mine\nrecipes: {mine: {rules: [{match: '*.lm_head', bits: 8}, {match: '*', bits: N}]}}\n"
        "variants: {Q3: {bits: 3}}\n",
    )
    got = plans(mine.recipe("Q3"), 3)
    assert bits_of(got["language_model.lm_head"]) == 8
    assert {bits_of(p) for m, p in got.items() if p.rule and not m.endswith("lm_head")} == {3}


def test_the_first_rule_that_matches_decides():
    wide, narrow = Rule("*", 4), Rule("*.lm_head", 8, optional=True)
    assert bits_of(plans(Recipe("r", (narrow, wide)), 2)["language_model.lm_head"]) == 8
    assert bits_of(plans(Recipe("r", (wide, narrow)), 2)["language_model.lm_head"]) == 4


def test_a_rule_whose_tensors_all_go_to_earlier_rules_is_overridden_and_no_error():
    got = plans(replace(BUILTIN["unsloth"], rules=(Rule("*.embed_tokens", 8), *BUILTIN["unsloth"].rules)), 2)
    assert bits_of(got["language_model.model.embed_tokens"]) == 8
    assert bits_of(got["language_model.lm_head"]) == 5
    with pytest.raises(InputError, match=r"no_such.*matches no tensor"):
        plans(Recipe("r", (Rule("*", 4), Rule("*.no_such", 8))), 2)


def test_a_rule_for_some_layers_leaves_the_others_to_the_next_rule():
    rules = (Rule("*.up_proj", 8, layers=(1, 3)), Rule("*", 2))
    got = plans(Recipe("r", rules), 2)
    assert [bits_of(got[f"{L}{i}.mlp.up_proj"]) for i in range(4)] == [2, 8, 2, 8]


def test_use_more_bits_is_llama_cpps_formula():
    more = LAYER_SETS["use_more_bits"]
    assert [i for i in range(32) if more(i, 32)] == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*.self_attn.{q,k}_proj", "a.3.self_attn.k_proj", "a.3.self_attn.v_proj"),
        ("*.{mlp,x}.{up,gate}_proj", "a.mlp.gate_proj", "a.mlp.down_proj"),
        ("*.mlp.gate", "l.0.mlp.gate", "l.0.mlp.gate_proj"),
        ("*", "anything.at.all", None),
        ("*.layers.[12].*", "m.layers.2.mlp", "m.layers.3.mlp"),
    ],
)
def test_patterns_are_globs_with_alternatives_over_whole_module_paths(pattern, yes, no):
    assert matches(pattern, yes)
    assert no is None or not matches(pattern, no)


def test_vision_and_mtp_are_quantized_only_by_a_rule_that_names_them():
    others = [
        Target("vision_tower.blocks.0.attn.qkv.weight", (64, 64), "BF16", NOWHERE, part="vision"),
        Target("mtp.fc.weight", (64, 64), "BF16", NOWHERE, part="mtp"),
    ]
    wide = Recipe("r", (Rule("*", 4, optional=True),))
    own = Recipe("r", (Rule("vision_tower.*.qkv", 8), Rule("mtp.fc", 6), Rule("*", 4, optional=True)))
    assert [p.spec for p in resolve(wide, 4, 64, others, qwen3_5.CLASSES)] == [None, None]
    assert [bits_of(p) for p in resolve(own, 4, 64, others, qwen3_5.CLASSES)] == [8, 6]


def test_the_assignment_is_of_the_outcome_and_not_of_the_wording():
    one = Recipe("a", (Rule("*.lm_head", 8), Rule("*", 4)))
    other = Recipe("b", (Rule("language_model.lm_head", 8, why="x"), Rule("*_proj", "N"), Rule("*", "N", 64)))
    different = Recipe("a", (Rule("*.lm_head", 6), Rule("*", 4)))
    got = [assignment(list(plans(r, 4).values())) for r in (one, other, different)]
    assert got[0] == got[1] != got[2]
