"""The smoke test separates broken variants from sound ones, and a failure keeps a variant from leaving the machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from inference.checkpoint import read_header
from publisher.localhub import LocalHub
from publisher.smoke import repetition, repetition_bound

TOKEN = "hf_smoke"
NAN, TEN_BITS = 0x7FC0, 10 << 7  # bfloat16: a quiet NaN; ten added to the exponent is a factor of 1024


def scales(folder: Path, module: str) -> np.memmap:
    """The stored scales of a module as bfloat16 bits, writable in place."""
    path = folder / "model.safetensors"
    info = next(t for t in read_header(path)[0] if t.name == f"language_model.model.layers.{module}.scales")
    assert info.dtype == "BF16"
    return np.memmap(path, "<u2", "r+", offset=info.start, shape=(info.nbytes // 2,))


def make_nan(folder: Path, layer: int) -> None:
    scales(folder, f"{layer}.mlp.down_proj")[7] = NAN


def make_loud(folder: Path, layer: int) -> None:
    bits = scales(folder, f"{layer}.mlp.down_proj")
    bits[bits != 0] += TEN_BITS


@pytest.fixture
def full(ladder: Path) -> Path:
    """The ladder with as much text as the smoke test takes by default."""
    path = ladder / "variants.yaml"
    path.write_text(path.read_text().replace(", text_tokens: 64}", "}"))
    return ladder


def verdicts(publish, folder: Path, *ids: str) -> tuple[dict, object]:
    ran = publish("smoke", *ids, "--json", cwd=folder)
    return {id: r["smoke"] for id, r in json.loads(ran.out).items()}, ran


def test_sound_variants_pass_by_a_wide_margin(full, publish):
    found, ran = verdicts(publish, full, "Q2_K_XL", "Q8_K_XL")
    assert ran.code == 0
    for smoke in found.values():
        assert smoke["passed"] is True
        assert smoke["kld"] < smoke["ceiling"] / 5
        assert smoke["kld_tokens"] == 512
        assert all(c["passed"] for c in smoke["checks"]), smoke["checks"]
    assert found["Q2_K_XL"]["kld"] > found["Q8_K_XL"]["kld"]


def test_a_single_nan_fails_it(ladder, publish):
    for id in ("Q2_K_XL", "Q8_K_XL"):
        make_nan(ladder / "build" / id, 1)
    found, ran = verdicts(publish, ladder, "Q2_K_XL", "Q8_K_XL")
    assert "finite logits" in ran.refused(1)
    for smoke in found.values():
        assert smoke["passed"] is False
        assert smoke["kld"] is None
        assert next(c for c in smoke["checks"] if c["name"] == "finite logits")["passed"] is False


def test_scales_times_1024_fail_it(ladder, publish):
    for id, layer in (("Q2_K_XL", 0), ("Q8_K_XL", 3)):
        make_loud(ladder / "build" / id, layer)
    found, ran = verdicts(publish, ladder, "Q2_K_XL", "Q8_K_XL")
    assert "divergence from BF16" in ran.refused(1)
    for smoke in found.values():
        assert smoke["passed"] is False
        assert smoke["kld"] > 1.5 * smoke["ceiling"]


def test_a_variant_that_cannot_be_loaded_fails_it(ladder, publish):
    path = ladder / "build/Q4_K_XL/model.safetensors"
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size - 100)
    told = publish("smoke", "Q4_K_XL", cwd=ladder).refused(1)
    assert told.startswith("Q4_K_XL: smoke test failed: loads: model.safetensors")


def test_a_failed_variant_is_marked_not_benchmarked_and_not_pushed(ladder, publish, tmp_path):
    folder = ladder / "build/Q4_K_XL"
    sound = (folder / "model.safetensors").read_bytes()
    make_nan(folder, 2)
    told = publish("smoke", "Q4_K_XL", cwd=ladder).refused(1)
    assert told.startswith("Q4_K_XL: smoke test failed: finite logits: 64 of 64 positions")
    (folder / "model.safetensors").write_bytes(sound)  # so that nothing but the verdict on record speaks against it

    (row,) = json.loads(publish("status", "Q4_K_XL", "--json", cwd=ladder).ok().out)["variants"]
    assert row["smoke_failed"].startswith("finite logits")
    assert "failed" in publish("status", "Q4_K_XL", cwd=ladder).ok().out
    assert "**failed**" in (folder / "README.md").read_text()
    assert publish("build", "Q4_K_XL", cwd=ladder).refused(1)  # a build does not forget it

    with LocalHub(tmp_path / "hub", {TOKEN: "write:demo"}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        told = publish("push", "Q4_K_XL", "--yes", cwd=ladder, env=env).refused(3)
        assert "the smoke test failed: finite logits" in told
        assert not hub.stats.received["commit"]
        publish("smoke", "Q4_K_XL", cwd=ladder).ok()
        publish("push", "Q4_K_XL", "--yes", cwd=ladder, env=env).ok()


def test_a_damaged_file_is_refused_by_the_gate_whatever_the_smoke_test_said(ladder, publish, tmp_path):
    bits = scales(ladder / "build/Q8_K_XL", "1.mlp.up_proj")
    bits[3] ^= 1  # no divergence shows this
    publish("smoke", "Q8_K_XL", cwd=ladder).ok()
    with LocalHub(tmp_path / "hub", {TOKEN: "write:demo"}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        ran = publish("push", "Q8_K_XL", "--yes", cwd=ladder, env=env)
        assert ran.code == 3
        assert "model.safetensors" in ran.err
        assert not hub.stats.received["commit"]
    assert "model.safetensors" in publish("verify", "Q8_K_XL", cwd=ladder).refused(1)


@pytest.mark.parametrize(
    ("ids", "share"), [([], 0), ([1, 2, 3], 0), ([1] * 10, 6 / 7), (list(range(20)), 0), ([1, 2, 3, 4] * 2, 0.2)]
)
def test_repetition_is_the_share_of_4_grams_seen_before(ids, share):
    assert repetition(ids) == pytest.approx(share)


def test_the_bound_on_repetition_follows_the_bases_own_spread():
    steady, wild = repetition_bound([0.02, 0.03, 0.02, 0.03, 0.02]), repetition_bound([0.0, 0.6, 0.1, 0.5, 0.0])
    assert 0.02 < steady < 0.15
    assert steady < wild <= 0.9
    assert repetition_bound([0.95, 0.95, 0.95]) == pytest.approx(0.95)  # a base that loops sets no better example
