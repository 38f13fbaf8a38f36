"""Statistics of a base: what is counted, what it predicts, and that a killed collection goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from calibrations import EMBED, HEAD, LAYER, text_windows, tied, windows
from engine_checkpoints import write_moe
from gguf import GGUFReader

import quant.collect
import quant.sensitivity
from inference.backend import mx, peak_memory, reset_peak_memory
from inference.divergence import kld
from inference.errors import InputError
from inference.load import Weights, load
from inference.tokenizer import Tokenizer
from publisher.calibrate import collect, windows_of
from publisher.schema import CalibrationSpec
from publisher.source import Source
from quant.imatrix import read_imatrix
from quant.sensitivity import Sensitivity
from quant.statistics import KAPPA, Statistics, blocks, packed_size, unpack

ROOT = Path(__file__).parents[1]
EXPERTS = LAYER + "0.mlp.switch_mlp."


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_moe(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def collected(base, tmp_path_factory) -> Statistics:
    return collect(base, tmp_path_factory.mktemp("out"), windows(), fisher_tokens=10**6, gradient_hessian=True)


@pytest.fixture(scope="module")
def dense(tiny, tmp_path_factory) -> Statistics:
    return collect(tiny, tmp_path_factory.mktemp("dense"), text_windows(tiny), fisher_tokens=10**6)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "statistics.json"}


# ------------------------------------------------------------------------------------------------ what is counted


def test_modules_that_read_the_same_input_share_what_is_stored(collected):
    attention = {m for m in collected.modules if m.startswith(LAYER + "3.self_attn.")}
    assert {collected.input(m).name.rpartition(".")[2] for m in attention} == {"q_proj", "o_proj"}
    assert set(collected.input(LAYER + "3.self_attn.v_proj").modules) == {
        f"{LAYER}3.self_attn.{p}_proj" for p in ("q", "k", "v")
    }
    for layer in (0, 3):
        mlp = f"{LAYER}{layer}.mlp."
        shared = ("gate", "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert_gate")
        assert set(collected.input(mlp + "gate").modules) == {mlp + m for m in shared}
        assert set(collected.input(mlp + "switch_mlp.up_proj").modules) == {
            mlp + "switch_mlp.gate_proj",
            mlp + "switch_mlp.up_proj",
        }
    gdn = collected.input(LAYER + "1.linear_attn.in_proj_a")
    assert len(gdn.modules) == 4
    assert HEAD in collected
    assert EMBED not in collected


def test_moments_are_those_of_the_inputs(base, collected):
    tokens = mx.array(windows())
    weights = Weights(base)
    x = weights.linear(EMBED).rows(tokens).reshape(-1, 64)
    x = mx.fast.rms_norm(x, weights.array(LAYER + "0.input_layernorm.weight"), 1e-6)
    x = np.array(x.astype(mx.float32), np.float64)
    module = LAYER + "0.linear_attn.in_proj_b"
    own = weights.dtype == mx.float32  # else a GPU's bfloat16, rounded once more here
    rtol, atol = (1e-4, 1e-5) if own else (0.01, 0.005)
    np.testing.assert_allclose(collected.hessian(module), x.T @ x / len(x), rtol=rtol, atol=atol)
    np.testing.assert_allclose(collected.second(module), (x**2).mean(0), rtol=rtol)
    assert collected.tokens(module) == len(x) == 6 * 48
    model = load(base)
    final = mx.concatenate([model.hidden(mx.array([w])) for w in windows()]).reshape(-1, 64).astype(mx.float32)
    np.testing.assert_allclose(collected.second(HEAD), (np.array(final) ** 2).mean(0), rtol=1e-3 if own else 0.05)


def test_the_diagonal_of_a_hessian_is_the_second_moment(collected):
    for module in collected.modules:
        hessian, second = collected.hessian(module, 2 if collected.input(module).experts else None), None
        second = collected.second(module)[2] if collected.input(module).experts else collected.second(module)
        np.testing.assert_allclose(np.diagonal(hessian), second, rtol=1e-5, atol=1e-9)
        np.testing.assert_array_equal(hessian, hessian.T)
        assert np.linalg.eigvalsh(hessian.astype(np.float64)).min() > -1e-4 * hessian.max()
        if not collected.input(module).experts:
            np.testing.assert_allclose(
                np.diagonal(collected.hessian_g(module)), collected.second_g(module), rtol=1e-3, atol=1e-7
            )


@pytest.mark.parametrize("k", [1, 511, 512, 513, 1300])
def test_a_stored_triangle_is_the_whole_matrix_again(k):
    x = np.random.default_rng(k).random((k, k), np.float32)
    x = x + x.T
    flat = np.concatenate([x[r:s, r:].ravel() for r, s in blocks(k)])
    assert flat.size == packed_size(k)
    np.testing.assert_array_equal(unpack(flat, k), x)


def test_experts_are_counted_by_the_tokens_routed_to_them(collected):
    tokens = collected.tokens(EXPERTS + "gate_proj")
    assert tokens.shape == (8,)
    assert tokens.sum() == 6 * 48 * 3
    down = collected.input(EXPERTS + "down_proj")
    assert (collected.tokens(down.name) == tokens).all()
    assert down.hessian == "experts"


@pytest.mark.parametrize("bound", [1 << 30, 0], ids=["own", "shared"])
def test_experts_that_saw_few_tokens_lean_on_their_layer(base, tmp_path, monkeypatch, bound):
    monkeypatch.setattr(quant.collect, "EXPERT_HESSIAN_BYTES", bound)
    s = collect(base, tmp_path, [[7] * 40], fisher_tokens=0)  # one token: after the first layers few experts are chosen
    module = LAYER + "0.mlp.switch_mlp.down_proj"
    assert s.input(module).hessian == ("experts" if bound else "shared")
    tokens, raw, second = s.tokens(module), s.second(module, blended=False), s.second(module)
    assert tokens.sum() == 120
    unseen = np.flatnonzero(tokens == 0)
    assert len(unseen)
    assert not raw[unseen].any()
    mean = (tokens[:, None] * raw.astype(np.float64)).sum(0) / tokens.sum()
    np.testing.assert_allclose(second[unseen[0]], mean, rtol=1e-5)
    busy = int(tokens.argmax())
    blended = (tokens[busy] * raw[busy] + KAPPA * mean) / (tokens[busy] + KAPPA)
    np.testing.assert_allclose(second[busy], blended, rtol=1e-5)
    for e in (unseen[0], busy):
        np.testing.assert_allclose(np.diagonal(s.hessian(module, e)), second[e], rtol=1e-4, atol=1e-9)


def test_a_tied_embedding_has_the_statistics_of_the_output(tmp_path):
    s = collect(tied(tmp_path / "base"), tmp_path, windows(2), fisher_tokens=64)
    assert HEAD not in s
    assert s.hessian(EMBED).shape == (64, 64)
    assert s.fisher(EMBED).shape == (256,)
    columns, seen = s.embedding()
    assert columns.shape == (64, 64)
    assert seen.sum() == 96


def test_a_bfloat16_pass_gives_nearly_the_same(tiny, tmp_path):
    """As on a GPU, where states and gradients between the layers are kept in the model's own type."""
    from inference.qwen3_5 import model

    found = []
    for dtype in (mx.bfloat16, mx.float32):
        folder = tmp_path / str(dtype)
        quant.collect.collect(Weights(tiny, dtype), model, quant.collect.Plan(windows(2), 2), folder, "")
        found.append({k: v for p in folder.glob("*.safetensors") for k, v in mx.load(str(p)).items()})  # type: ignore[union-attr]
    theirs, ours = found
    assert all(x.dtype in (mx.float32, mx.int64) for x in theirs.values())
    for name in (
        "0.linear_attn.out_proj.second",
        "3.mlp.gate_proj.second",
        "0.mlp.up_proj.fisher",
        "3.self_attn.q_proj.fisher",
    ):
        a, b = np.array(theirs[LAYER + name]), np.array(ours[LAYER + name])
        assert abs(np.log(a.mean() / b.mean())) < 0.2


# ------------------------------------------------------------------------------------------------ what it predicts


def true_kld(base: Path, tokens: list[list[int]], module: str, delta: np.ndarray) -> float:
    class Changed(Weights):
        def array(self, name: str) -> mx.array:
            x = super().array(name)
            return x + mx.array(delta) if name == f"{module}.weight" else x

    from inference.qwen3_5.model import TextModel, make_cache

    def logits(weights: Weights) -> mx.array:
        text = TextModel(weights.config, weights)
        return text.logits(text.hidden(mx.array(tokens), make_cache(weights.config))).flatten(0, 1)

    return float(kld(logits(Weights(base, mx.float32)), logits(Changed(base, mx.float32))).mean())


@pytest.mark.parametrize(
    "module", ["0.mlp.up_proj", "1.linear_attn.out_proj", "2.mlp.down_proj", "3.self_attn.v_proj", "3.self_attn.o_proj"]
)
def test_the_predicted_divergence_of_a_small_change_is_the_true_one(tiny, dense, module):
    """Of a dense model: where a small change sends tokens to other experts, no quadratic form holds."""
    module = LAYER + module
    weight = np.array(Weights(tiny, mx.float32).array(f"{module}.weight"))
    delta = np.random.default_rng(1).normal(0, 0.01 * weight.std(), weight.shape).astype(np.float32)
    true = true_kld(tiny, text_windows(tiny), module, delta)
    assert dense.predicted_kld(module, delta) == pytest.approx(true, rel=0.3)
    plain = 0.5 * float(dense.fisher(module) @ ((delta @ dense.hessian(module)) * delta).sum(1))
    assert plain == pytest.approx(true, rel=0.6)


def test_the_output_matrix_has_the_exact_fisher(base, collected):
    weight = np.array(Weights(base, mx.float32).array(f"{HEAD}.weight"))
    delta = np.random.default_rng(2).normal(0, 0.01 * weight.std(), weight.shape).astype(np.float32)
    assert collected.predicted_kld(HEAD, delta) == pytest.approx(true_kld(base, windows(), HEAD, delta), rel=0.1)


def test_the_experts_of_a_layer_are_predicted_together(base, collected):
    module = LAYER + "3.mlp.switch_mlp.down_proj"
    weight = np.array(Weights(base, mx.float32).array(f"{module}.weight"))
    delta = np.random.default_rng(3).normal(0, 0.01 * weight.std(), weight.shape).astype(np.float32)
    assert collected.fisher(module).shape == (8, 64)
    assert collected.predicted_kld(module, delta) == pytest.approx(true_kld(base, windows(), module, delta), rel=0.4)


# ------------------------------------------------------------------------------------------------ kept and resumed


def test_killed_again_and_again_it_ends_with_the_same_bytes(base, tmp_path):
    undisturbed = collect(base, tmp_path / "whole", windows(), fisher_tokens=96)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    for steps in (2, 5):
        command = [sys.executable, "-m", "calibrations", str(base), str(tmp_path / "killed"), str(steps)]
        assert subprocess.run(command, env=env, check=False).returncode == -signal.SIGKILL
    (part,) = (tmp_path / "killed/statistics").iterdir()
    (part / ".layer-0003.safetensors.part").write_bytes(b"torn")
    done: list[int] = []
    s = collect(base, tmp_path / "killed", windows(), fisher_tokens=96, progress=lambda n, total: done.append(n))
    assert s.record["resumed_steps"] >= 5
    assert files(s.folder) == files(undisturbed.folder)
    assert not list(s.folder.glob("*.state"))


def test_what_was_damaged_while_it_was_interrupted_is_collected_again(base, tmp_path):
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        collect(base, tmp_path, windows(), fisher_tokens=96, progress=stop)
    (part,) = (tmp_path / "statistics").iterdir()
    path = part / "layer-0001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)
    s = collect(base, tmp_path, windows(), fisher_tokens=96)
    assert s.record["resumed_steps"] == 0
    s.verify()


def test_found_by_what_they_depend_on_and_by_nothing_else(base, tmp_path):
    first = collect(base, tmp_path, windows(2), fisher_tokens=0)
    before = (first.folder / "statistics.json").stat().st_mtime_ns
    assert collect(base, tmp_path, windows(2), fisher_tokens=0).folder == first.folder
    assert (first.folder / "statistics.json").stat().st_mtime_ns == before
    other = collect(base, tmp_path, windows(2, seed=1), fisher_tokens=0)
    assert other.folder != first.folder
    assert other.digest != first.digest


def test_without_gradients_there_is_no_fisher(base, tmp_path):
    s = collect(base, tmp_path, windows(2), fisher_tokens=0)
    with pytest.raises(InputError, match="without gradients"):
        s.fisher(HEAD)


def test_memory_does_not_grow_with_the_text(base, tmp_path, monkeypatch):
    """States of all windows lie in files: what is held is one layer, one batch and the sums of one layer."""
    monkeypatch.setattr(quant.collect, "BATCH_TOKENS", 96)
    peaks = []
    for count in (2, 20):
        reset_peak_memory()
        collect(base, tmp_path, windows(count), fisher_tokens=96)
        peaks.append(peak_memory())
    assert peaks[1] < 1.3 * peaks[0]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("cut", "bytes, expected"),
        ("gone", "no such file"),
        ("version", "version 0, expected"),
        ("json", "not JSON"),
        ("inputs", "inputs: found"),
        ("shape", "expected F32"),
        ("nan", "not finite"),
    ],
)
def test_damaged_statistics_are_one_line(collected, tmp_path, harm, says):
    folder = tmp_path / "s"
    shutil.copytree(collected.folder, folder)
    record = json.loads((folder / "statistics.json").read_text())
    layer = folder / "layer-0000.safetensors"
    if harm == "cut":
        layer.write_bytes(layer.read_bytes()[:-8])
    elif harm == "gone":
        layer.unlink()
    elif harm == "version":
        record["version"] = 0
    elif harm == "inputs":
        record["inputs"][0]["columns"] = "many"
    elif harm == "shape":
        record["inputs"][0]["columns"] += 1
    elif harm == "nan":
        data = bytearray(layer.read_bytes())
        data[-len(data) // 2 :] = b"\xff" * len(data[-len(data) // 2 :])
        layer.write_bytes(data)
    (folder / "statistics.json").write_text("{" if harm == "json" else json.dumps(record))
    with pytest.raises(InputError, match=says) as e:
        read_all(folder)
    assert "\n" not in str(e.value)


def read_all(folder: Path) -> None:
    s = Statistics(folder)
    for i in s.inputs.values():
        s.second(i.name)
        s.hessian(i.name)


# ------------------------------------------------------------------------------------------------ imatrix


def test_the_imatrix_says_the_same_and_the_gguf_package_reads_it(base, collected):
    path = collected.folder / "imatrix.gguf"
    m = read_imatrix(path, json.loads((base / "config.json").read_text()))
    assert m.missing == ()
    assert set(m.importance) == set(collected.modules)
    for module, importance in m.importance.items():
        np.testing.assert_allclose(importance, collected.second(module, blended=False), rtol=1e-6)
        np.testing.assert_array_equal(m.counts[module], np.atleast_1d(collected.tokens(module)))
    reader = GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 6
    assert reader.fields["imatrix.chunk_size"].contents() == 48
    shapes = {t.name: tuple(map(int, t.shape)) for t in reader.tensors}
    assert shapes["blk.0.ffn_down_exps.weight.in_sum2"] == (64, 8)
    assert shapes["blk.0.ffn_down_exps.weight.counts"] == (1, 8)
    assert shapes["blk.3.attn_k.weight.in_sum2"] == (64, 1)


# ------------------------------------------------------------------------------------------------ texts and command


def source(text: str, where: str = "calibration.text") -> Source:
    return Source(where, text, "0" * 64)


def test_windows_begin_with_a_bos_only_if_the_tokenizer_adds_one(tiny, monkeypatch):
    tokenizer = Tokenizer.load(tiny)
    spec = CalibrationSpec(tokens=256, context=64)
    text = source("The quick brown fox jumps over the lazy dog. " * 60)
    plain, _ = windows_of(spec, tokenizer, text, None)
    ids = tokenizer.encode(text.text)
    assert all(len(w) == 64 for w in plain)
    assert len(plain) == 4
    assert plain[0] == ids[:64]
    monkeypatch.setattr(Tokenizer, "bos", lambda self: 3)
    begun, parts = windows_of(spec, tokenizer, text, None)
    assert begun[0] == [3, *ids[:63]]
    assert parts[0].tokens == 256


def test_conversations_take_at_most_half(tiny):
    tokenizer = Tokenizer.load(tiny)
    say = [{"role": "user", "content": "Which way? " * 40}, {"role": "assistant", "content": "That way. " * 40}]
    chat = source(json.dumps([say] * 9), "calibration.chat")
    spec = CalibrationSpec(tokens=512, context=64)
    found, parts = windows_of(spec, tokenizer, source("A long walk home. " * 400), chat)
    assert [(p.name, p.tokens) for p in parts] == [("text", 256), ("chat", 256)]
    assert len(found) == 8


def test_calibrate_collects_once_and_again_when_the_text_changes(tiny, tmp_path, publish, monkeypatch):
    monkeypatch.setattr(quant.sensitivity, "ROWS", 2)
    monkeypatch.setattr(quant.sensitivity, "PROBE_BITS", (4,))
    (tmp_path / "model").symlink_to(tiny)
    (tmp_path / "text.txt").write_text("In a hole in the wall there lived a clock. " * 30)
    (tmp_path / "variants.yaml").write_text(
        "base: {path: model}\nrecipe: uniform\nvariants: {Q4: {size: 4.5 bpw, solver: ls}}\n"
        "calibration: {text: text.txt, chat: false, tokens: 128, context: 64, fisher_tokens: 64}\n"
    )
    first = json.loads(publish("calibrate", "--json", "-q", cwd=tmp_path).ok().out)
    assert first["fresh"]
    assert first["tokens"] == 128
    assert first["modules"] == 32
    again = json.loads(publish("calibrate", "--json", "-q", cwd=tmp_path).ok().out)
    assert not again["fresh"]
    assert again["folder"] == first["folder"]
    # prices were measured once; below it is the statistics that count, and prices take ten times as long
    monkeypatch.setattr(quant.sensitivity, "measure", lambda *args: Sensitivity({"m": {"4/64": 1.0}}, (), 5))
    (tmp_path / "text.txt").write_text("In a hole in the roof there lived a clock. " * 30)
    other = json.loads(publish("calibrate", "--json", "-q", cwd=tmp_path).ok().out)
    assert other["fresh"]
    assert other["key"] != first["key"]
    assert "collected" in publish("calibrate", "--force", "-q", cwd=tmp_path).ok().out
    (tmp_path / "text.txt").write_text("")
    assert "calibration.text: found no text" in publish("calibrate", cwd=tmp_path).refused(2)
