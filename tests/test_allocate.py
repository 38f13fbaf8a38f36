"""The knapsack that spends bytes where they pay, against every choice there is, and what it makes of a model."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest

from inference.checkpoint import QuantSpec, TensorInfo
from inference.errors import InputError
from inference.layout import Target
from inference.qwen3_5.names import read_config, text_shapes
from quant.allocate import Costs, Floor, Item, Option, allocate, choose, demand, predict
from quant.qwen3_5 import CLASSES
from quant.recipe import Recipe, Rule, TensorPlan, resolve


def instance(seed: int, items: int, options: int, shapes: tuple[int, ...] = (3, 7, 20)) -> list[Item]:
    """Random items with falling costs, noise and, at times, equal bytes; few sizes, as layers have."""
    rng = random.Random(seed)
    out = []
    for n in range(items):
        unit, weight = rng.choice(shapes), rng.choice((0.01, 0.1, 1.0))
        found = []
        for k in range(options):
            bits = k // 2 + 2
            found.append(Option(unit * (16 * bits + (k % 2) * 5), weight * 4.0**-bits * rng.uniform(0.5, 1.5)))
        out.append(Item(f"t{n}", (*found, Option(unit * 160, 0.0))))
    return out


def brute(items: list[Item], budget: int) -> float:
    return min(
        sum(o.cost for o in chosen)
        for chosen in itertools.product(*(i.options for i in items))
        if sum(o.nbytes for o in chosen) <= budget
    )


def smallest(items: list[Item]) -> int:
    return sum(min(o.nbytes for o in i.options) for i in items)


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_there_is(seed: int):
    items = instance(seed, 5, 6)
    low, high = smallest(items), sum(max(o.nbytes for o in i.options) for i in items)
    for part in (0.0, 0.05, 0.2, 0.45, 0.8):
        budget = int(low + part * (high - low))
        found = choose(items, budget)
        assert found.exact
        assert found.nbytes <= budget
        assert found.cost == pytest.approx(brute(items, budget), rel=1e-9, abs=1e-15)
        assert found.bound <= found.cost * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("seed", range(8))
def test_a_large_choice_is_within_budget_near_the_bound_and_leaves_no_upgrade(seed: int):
    items = instance(seed, 200, 12, shapes=(64, 256, 2048, 40000))
    low, high = smallest(items), sum(max(o.nbytes for o in i.options) for i in items)
    for part in (0.05, 0.3, 0.7):
        budget = int(low + part * (high - low))
        found = choose(items, budget)
        assert found.nbytes <= budget
        assert found.bound <= found.cost <= found.bound * 1.01
        left = budget - found.nbytes
        for item, k in zip(items, found.options, strict=True):
            now = item.options[k]
            assert not any(o.cost < now.cost and o.nbytes - now.nbytes <= left for o in item.options)


def test_more_bytes_never_cost_more():
    items = instance(3, 30, 8)
    low = smallest(items)
    costs = [choose(items, low + k * 97).cost for k in range(60)]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(costs))


def test_the_choice_is_the_same_each_time_and_ties_go_to_fewer_bytes():
    items = instance(7, 60, 10)
    budget = smallest(items) * 2
    assert choose(items, budget) == choose(list(items), budget)
    twins = [Item("a", (Option(1, 1.0), Option(3, 0.0), Option(2, 0.0)))]
    assert choose(twins, 10).options == (2,)


def test_a_budget_below_the_smallest_is_refused():
    items = instance(1, 4, 4)
    with pytest.raises(InputError, match="smallest possible choice"):
        choose(items, smallest(items) - 1)
    assert choose(items, smallest(items)).nbytes == smallest(items)


def test_a_model_of_300_tensors_takes_a_moment_only():
    items = instance(5, 300, 18, shapes=(64, 256, 2048, 40000))
    started = time.perf_counter()
    choose(items, smallest(items) * 2)
    assert time.perf_counter() - started < 2


# ------------------------------------------------------------------------------------------------ of a model


def targets() -> list[Target]:
    config = read_config(MOE)
    source = TensorInfo("x", "BF16", (1,), Path("x"), 0, 2)
    return [
        Target(name, shape, "BF16", source) for name, shape in text_shapes(config).items() if "conv1d" not in name
    ] + [Target("vision_tower.blocks.0.attn.qkv.weight", (96, 32), "BF16", source, part="vision")]


MOE = {
    "model_type": "qwen3_5_moe",
    "text_config": {
        "hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 512, "num_attention_heads": 2, "head_dim": 64,
        "num_key_value_heads": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 96, "shared_expert_intermediate_size": 64,
    },
}  # fmt: skip


def costs(seed: int = 0) -> Costs:
    rng = random.Random(seed)
    out = {}
    for t in targets():
        if t.part == "text" and len(t.shape) > 1 and t.name.endswith(".weight"):
            weight = t.params**0.5 * 10 ** rng.uniform(-5, -4)
            out[t.module] = {
                f"{b}/{g}": weight * 4.0 ** (2 - b) * (g / 64) ** 0.4
                for b in (2, 3, 4, 5, 6, 8)
                for g in (32, 64, 128)
                if t.shape[-1] % g == 0
            }
    return Costs(out)


def plans_of(rules: tuple[Rule, ...]) -> dict[str, TensorPlan]:
    return {p.target.module: p for p in resolve(Recipe("allocated", rules), 8, 64, targets(), CLASSES)}


def test_an_allocation_is_a_recipe_that_gives_the_chosen_bytes_and_cost():
    wanted = demand(targets(), CLASSES, costs())
    found = allocate(wanted, wanted.least * 2, costs())
    plans = plans_of(found.rules)
    text = [p for p in plans.values() if p.target.part == "text"]
    assert sum(p.nbytes for p in text) == found.nbytes <= wanted.least * 2
    assert predict(plans.values(), costs()) == pytest.approx(found.predicted)
    assert len({p.spec for p in text}) > 3
    assert all("measured on this model" in p.why for p in text if p.rule and "routing" not in p.why)
    assert plans["vision_tower.blocks.0.attn.qkv"].spec is None


def test_reasons_are_the_costs_of_the_next_widths():
    module = "language_model.lm_head"
    known = costs()
    table = known.modules[module]
    wanted = demand(targets(), CLASSES, known, [Rule("*.layers.*", 4, 32), Rule("*.embed_tokens", 4, 64)])
    bytes_of = {(o.spec.bits, o.spec.group_size): o.nbytes for o in wanted.items[0].options if o.spec}
    found = allocate(wanted, wanted.fixed + bytes_of[4, 64], known)
    why = plans_of(found.rules)[module].why
    assert f"3 bits would add {table['3/64'] - table['4/64']:.2g}" in why
    assert f"5 bits would take away {table['4/64'] - table['5/64']:.2g}" in why


def test_routers_are_pinned_and_the_gates_of_the_recurrence_have_a_floor():
    wanted = demand(targets(), CLASSES, costs())
    plans = plans_of(allocate(wanted, wanted.least, costs()).rules)
    for module, plan in plans.items():
        if module.endswith((".mlp.gate", ".shared_expert_gate")):
            assert plan.spec == QuantSpec(8, 64)
        elif module.endswith((".in_proj_a", ".in_proj_b")):
            assert plan.spec is None or plan.spec.bits == 8
        elif plan.spec is not None:
            assert plan.spec == QuantSpec(
                2, 32 if plan.target.shape[-1] % 64 else 64 if plan.target.shape[-1] % 128 else 128
            )


def test_pins_and_floors_of_ones_own_come_first():
    pins = [Rule("*.self_attn.o_proj", "bf16"), Rule("*.mlp.gate", 4, 32, layers=(0, 1))]
    floors = [Floor("*.in_proj_{a,b}", 3), Floor("*.lm_head", 5), Floor("*.embed_tokens", "bf16")]
    wanted = demand(targets(), CLASSES, costs(), pins, floors)
    plans = plans_of(allocate(wanted, wanted.least, costs()).rules)
    assert {p.spec for m, p in plans.items() if m.endswith("o_proj")} == {None}
    assert [plans[f"language_model.model.layers.{i}.mlp.gate"].spec for i in range(4)] == [
        *[QuantSpec(4, 32)] * 2, *[QuantSpec(8, 64)] * 2,
    ]  # fmt: skip
    assert plans["language_model.model.layers.0.linear_attn.in_proj_a"].spec == QuantSpec(3, 128)
    assert plans["language_model.lm_head"].spec == QuantSpec(5, 128)
    assert plans["language_model.model.embed_tokens"].spec is None


def test_only_formats_with_a_figure_are_offered():
    known = {m: {k: v for k, v in t.items() if k in ("4/32", "6/32")} for m, t in costs().modules.items()}
    wanted = demand(targets(), CLASSES, Costs(known), floors=[Floor("*.in_proj_{a,b}", 2)])
    offered = {o.spec for i in wanted.items for o in i.options}
    assert offered == {None, QuantSpec(4, 32), QuantSpec(6, 32)}
    del known["language_model.lm_head"]
    with pytest.raises(InputError, match=r"no costs are known for language_model\.lm_head"):
        demand(targets(), CLASSES, Costs(known))


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(InputError, match=r"'\*\.c_attn' matches no tensor"):
        demand(targets(), CLASSES, None, [Rule("*.c_attn", 8)])
    with pytest.raises(InputError, match=r"floor '\*\.c_attn' matches no tensor"):
        demand(targets(), CLASSES, None, [], [Floor("*.c_attn", 8)])


def test_a_plan_of_formats_without_figures_has_no_prediction():
    found = [TensorPlan(t, QuantSpec(4, 32, "mxfp4"), False, "", "", "") for t in targets() if "lm_head" in t.name]
    assert predict(found, costs()) is None
