"""Prices of formats: what is expected of a plan is what it costs, and prices are measured once for what they depend on."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from calibrations import EMBED, HEAD, LAYER, text_windows, tied, windows
from engine_checkpoints import write_moe

import inference.load
import quant.sensitivity
from inference.backend import mx
from inference.checkpoint import AFFINE_BITS, AFFINE_GROUPS, QuantSpec, read_checkpoint
from inference.divergence import compare
from inference.families import names_of
from inference.load import Weights, hidden_states_of, hidden_states_of_versions
from publisher import costing
from publisher.calibrate import collect
from publisher.report import Report
from quant import qwen3_5
from quant.moments import FromStatistics
from quant.sample import restored, sample
from quant.sensitivity import Kept, Rounded, Sensitivity, measure
from quant.solve import QUICK, solve


def measured(base, out, texts):
    checkpoint = read_checkpoint(base)
    targets = names_of(checkpoint.config).targets(checkpoint)
    known = FromStatistics(collect(base, out, texts, fisher_tokens=10**6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant.sensitivity, "ROWS", 32)
        patch.setattr(quant.sensitivity, "PROBE_TOKENS", 96)
        return targets, known, measure(base, targets, qwen3_5.CLASSES, known, texts, "ls")


@pytest.fixture(scope="module")
def dense(tiny, tmp_path_factory):
    return measured(tiny, tmp_path_factory.mktemp("dense"), text_windows(tiny))


def test_every_matrix_has_a_price_in_every_format(dense):
    targets, _, found = dense
    dense_classes = {c.label for c in qwen3_5.CLASSES if c.dense}
    wanted = {
        t.module
        for t in targets
        if t.part == "text"
        and t.name.endswith(".weight")
        and len(t.shape) == 2
        and quant.sensitivity.class_of(t, qwen3_5.CLASSES).label not in dense_classes
    }
    assert found.modules.keys() == wanted
    assert {HEAD, EMBED} <= wanted
    for t in targets:
        for bits, group in itertools.product(AFFINE_BITS, AFFINE_GROUPS) if t.module in wanted else ():
            assert (f"{bits}/{group}" in found.modules[t.module]) == (t.shape[-1] % group == 0)


def test_more_bits_never_cost_more(dense):
    for costs in dense[2].modules.values():
        assert all(c >= 0 and np.isfinite(c) for c in costs.values())
        for group in AFFINE_GROUPS:
            falling = [costs[f"{b}/{group}"] for b in AFFINE_BITS if f"{b}/{group}" in costs]
            assert falling == sorted(falling, reverse=True)


def test_the_prices_of_a_plan_add_up_to_its_divergence(tiny, dense):
    targets, known, found = dense
    shapes = {t.module: t.shape for t in targets if t.module in found.modules}
    plans = [
        {m: QuantSpec(3, 64) for m in shapes},
        {m: QuantSpec(2 if ".mlp." in m else 6, 64) for m in shapes},
        {m: QuantSpec(8 if "linear_attn" in m else 5, 32) for m in shapes},
    ]
    weights = Weights(tiny, mx.float32)
    tokens = [mx.array([w]) for w in text_windows(tiny)[:4]]
    want = [t for w in text_windows(tiny)[:4] for t in (*w[1:], 0)]
    states, head = quant.sensitivity._states, weights.head()
    teacher = states(hidden_states_of(weights, tokens))
    expected, true = [], []
    for plan in plans:
        expected.append(sum(found.modules[m][quant.sensitivity.label(s)] for m, s in plan.items()))
        rounded = Rounded(weights, plan, known, "ls")
        student = states(hidden_states_of(rounded, tokens))
        true.append(float(np.mean(compare(teacher, head, student, rounded.head(), want).kld)))
    ratios = np.array(expected) / true
    assert ((ratios > 0.5) & (ratios < 1.5)).all(), ratios
    assert np.argsort(expected).tolist() == np.argsort(true).tolist()


def prices_of(base, known, module, solver):
    """Formats of one module by the solver, without probes."""
    checkpoint = read_checkpoint(base)
    target = next(t for t in names_of(checkpoint.config).targets(checkpoint) if t.module == module)
    return prices_together([target], known, solver)[module]


def prices_together(targets, known, solver):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant.sensitivity, "ROWS", 32)
        return quant.sensitivity._costs(targets, known, solver)


def test_matrices_of_one_input_are_priced_together_as_each_alone(tiny, dense):
    targets, known, _ = dense
    chosen = [t for t in targets if t.name.endswith(".weight") and known.knows(t.module)]
    together = quant.sensitivity.sharing(chosen, known)
    assert sorted(t.name for group in together for t in group) == sorted(t.name for t in chosen)
    names = {tuple(sorted(t.module.rpartition(".")[2] for t in group)) for group in together}
    assert ("k_proj", "q_proj", "v_proj") in names
    assert ("gate_proj", "up_proj") in names
    gate_up = next(g for g in together if f"{LAYER}0.mlp.gate_proj" in {t.module for t in g})
    found = prices_together(gate_up, known, "gptq")
    for target in gate_up:
        assert found[target.module] == pytest.approx(prices_of(tiny, known, target.module, "gptq"), rel=1e-4)


def test_experts_of_one_input_are_priced_together_as_each_alone(tmp_path):
    base = write_moe(tmp_path / "moe")
    known = FromStatistics(collect(base, tmp_path, windows(4), fisher_tokens=10**6))
    checkpoint = read_checkpoint(base)
    modules = [f"{LAYER}0.mlp.switch_mlp.{p}_proj" for p in ("gate", "up")]
    stacks = [t for t in names_of(checkpoint.config).targets(checkpoint) if t.module in modules]
    assert [len(g) for g in quant.sensitivity.sharing(stacks, known)] == [2]
    found = prices_together(stacks, known, "gptq")
    for module in modules:
        assert found[module] == pytest.approx(prices_of(base, known, module, "gptq"), rel=1e-4)


def test_experts_are_priced_together_and_the_hessian_solver_costs_less(tmp_path):
    base = write_moe(tmp_path / "moe")
    known = FromStatistics(collect(base, tmp_path, windows(4), fisher_tokens=10**6))
    for name in ("switch_mlp.down_proj", "shared_expert.up_proj"):
        plain, solved = (prices_of(base, known, f"{LAYER}0.mlp.{name}", s) for s in ("ls", "gptq"))
        assert plain["2/64"] > plain["4/64"] > plain["8/64"] > 0
        assert all(0.2 * plain[f] < cost < plain[f] for f, cost in solved.items())


def test_a_tied_embedding_is_priced_for_both_its_uses(tmp_path):
    base = tied(tmp_path / "tied")
    known = FromStatistics(collect(base, tmp_path, windows(2), fisher_tokens=10**6))
    s = known.statistics
    assert not known.knows(HEAD)
    plain = prices_of(base, known, EMBED, "ls")
    looked_up = s.objective_second(EMBED) - s.second(EMBED)
    assert (looked_up >= 0).all()
    assert looked_up.any()
    assert plain["2/64"] > plain["8/64"] > 0


def test_versions_side_by_side_are_what_each_is_alone_and_read_every_tensor_once(tiny, dense, monkeypatch):
    targets, known, found = dense
    plan = {t.module: QuantSpec(3, 64) for t in targets if t.module in found.modules and ".1.mlp." in t.module}
    tokens = [mx.array([w]) for w in text_windows(tiny)[:2]]
    weights = Weights(tiny, mx.float32)
    alone = [hidden_states_of(w, tokens) for w in (weights, Rounded(weights, plan, known, "ls"))]
    read, reads = inference.load.read_band, Counter()

    def counted(target, start, stop):
        reads[target.name] += 1
        return read(target, start, stop)

    monkeypatch.setattr(inference.load, "read_band", counted)
    base = Kept(weights)
    passed = []

    def done(layer):
        passed.append(layer)
        base.forget()

    together = hidden_states_of_versions([base, Rounded(base, plan, known, "ls")], tokens, done)
    assert all(
        mx.array_equal(a, b).item() for x, y in zip(alone, together, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert set(reads.values()) == {1}
    assert passed == list(range(-1, weights.config.num_hidden_layers))


def test_the_hessian_solver_is_priced_at_every_group_size(tiny, dense):
    """Where a few channels outweigh the rest, what it gains on least squares depends on the group."""
    _, known, _ = dense
    module = f"{LAYER}0.mlp.up_proj"
    costs = prices_of(tiny, known, module, "gptq")
    checkpoint = read_checkpoint(tiny)
    target = next(t for t in names_of(checkpoint.config).targets(checkpoint) if t.module == module)
    ((rows, w, _),) = sample(target, 32)
    price = quant.sensitivity._Price(known, [target], [rows], None, 1)
    moments = known.moments(module, None, None, True)
    for group in (32, 64, 128):
        spec = QuantSpec(4, group)
        assert costs[f"4/{group}"] == pytest.approx(price(w, restored(solve(w, moments, spec, "gptq", QUICK), spec)))


# ------------------------------------------------------------------------------------------------ kept


@pytest.fixture
def prices(monkeypatch, tmp_path, tiny):
    """measure_costs over statistics of one window, with a stand-in for the measuring; how often that ran."""
    statistics = collect(tiny, tmp_path, text_windows(tiny)[:1], fisher_tokens=0)
    runs = []

    def stand_in(*args):
        runs.append(args[5])
        return Sensitivity({"m": {"4/64": 1.0}}, (), 5)

    monkeypatch.setattr(quant.sensitivity, "measure", stand_in)
    checkpoint = read_checkpoint(tiny)
    base = SimpleNamespace(folder=tiny, targets=[], checkpoint=checkpoint)
    state = SimpleNamespace(statistics=statistics, runs=runs, solver="gptq", patch=monkeypatch)
    monkeypatch.setattr(costing, "solver_of", lambda project: state.solver)
    state.measure = lambda force=False: costing.measure_costs(None, base, statistics, [[1]], Report(), force)  # type: ignore[arg-type]
    return state


def test_prices_are_measured_once_for_statistics_solver_and_version(prices):
    first = prices.measure()
    assert prices.measure() == first
    assert prices.runs == ["gptq"]
    prices.solver = "ls"
    assert prices.measure().solver == "ls"
    assert prices.measure().solver == "ls"
    prices.patch.setattr(costing, "SENSITIVITY_VERSION", 99)
    assert prices.measure().version == 99
    assert prices.runs == ["gptq", "ls", "ls"]
    prices.measure(force=True)
    assert len(prices.runs) == 4


def test_probes_are_taken_from_all_of_the_text(monkeypatch):
    monkeypatch.setattr(quant.sensitivity, "PROBE_TOKENS", 12)
    texts = [[i] * 4 for i in range(30)]
    assert [w[0] for w in quant.sensitivity.probe_windows(texts)] == [0, 10, 20]
    assert [w[0] for w in quant.sensitivity.probe_windows(texts[:2])] == [0, 1]
    # windows of another length, as of a short conversation, do not stand beside the others
    assert [w[0] for w in quant.sensitivity.probe_windows([*texts[:3], [9]])] == [0, 1, 2]


def test_a_measurement_that_was_stopped_leaves_no_prices(prices):
    def stop(*args):
        raise KeyboardInterrupt

    prices.patch.setattr(quant.sensitivity, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        prices.measure()
    assert costing.current(prices.statistics, "gptq") is None
    assert list(prices.statistics.folder.glob("*costs*")) == []


def test_prices_of_other_statistics_do_not_count(prices):
    found = prices.measure()
    path = prices.statistics.folder / costing.COSTS
    path.write_text(found.model_copy(update={"statistics": "0" * 64}).model_dump_json())
    assert costing.current(prices.statistics, "gptq") is None
    prices.measure()
    assert len(prices.runs) == 2
