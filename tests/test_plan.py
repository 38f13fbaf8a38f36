"""`publish plan`: the figures of a ladder from headers alone, quickly, and equal to what is built."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from card_ladder import sparse
from conftest import EXAMPLE, PUBLISH, environment

from inference.checkpoint import read_header
from inference.qwen3_5.names import read_config, text_shapes

GIB = 1 << 30
CONFIG_9B = {
    "model_type": "qwen3_5", "dtype": "bfloat16",
    "text_config": {
        "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 12288, "vocab_size": 248320,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip


def vision(depth: int = 27, v: int = 1152, inter: int = 4304, out: int = 4096) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        for name, rows, columns in (
            ("attn.proj", v, v), ("attn.qkv", 3 * v, v), ("mlp.linear_fc1", inter, v), ("mlp.linear_fc2", v, inter),
        ):  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
        shapes |= {f"blocks.{i}.{n}.{p}": (v,) for n in ("norm1", "norm2") for p in ("weight", "bias")}
    for name, rows in (("merger.linear_fc1", 4 * v), ("merger.linear_fc2", out)):
        shapes |= {f"{name}.weight": (rows, 4 * v), f"{name}.bias": (rows,)}
    shapes |= {"merger.norm.weight": (v,), "merger.norm.bias": (v,), "patch_embed.proj.bias": (v,)}
    shapes |= {"patch_embed.proj.weight": (v, 3, 2, 16, 16), "pos_embed.weight": (2304, v)}
    return {f"model.visual.{name}": shape for name, shape in shapes.items()}


def mtp(h: int = 4096, inter: int = 12288, q: int = 8192, kv: int = 1024) -> dict[str, tuple[int, ...]]:
    layer = {
        "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, h),
        "self_attn.q_norm": (256,), "self_attn.k_norm": (256,), "input_layernorm": (h,), "post_attention_layernorm": (h,),
        "mlp.gate_proj": (inter, h), "mlp.up_proj": (inter, h), "mlp.down_proj": (h, inter),
    }  # fmt: skip
    top = {"fc": (h, 2 * h), "norm": (h,), "pre_fc_norm_embedding": (h,), "pre_fc_norm_hidden": (h,)}
    return {f"mtp.layers.0.{n}.weight": s for n, s in layer.items()} | {f"mtp.{n}.weight": s for n, s in top.items()}


@pytest.fixture(scope="module")
def nine_billion(tmp_path_factory) -> Path:
    """A checkpoint in the shape of Qwen3.5-9B: true headers over sparse files, and the starter's ladder for it."""
    folder = tmp_path_factory.mktemp("nine")
    model = folder / "Qwen3.5-9B"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG_9B))
    shapes = {}
    for name, shape in text_shapes(read_config(CONFIG_9B)).items():
        name = name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        )
        shapes[name] = (shape[0], 1, shape[1]) if name.endswith("conv1d.weight") else shape
    shapes |= vision() | mtp()
    rows = [(n, "F32" if n.endswith(("A_log", "linear_attn.norm.weight")) else "BF16", s) for n, s in shapes.items()]
    weight_map = {}
    for i in range(4):
        file = f"model.safetensors-{i + 1:05d}-of-00004.safetensors"  # as the Qwen3.5 repos name them
        mine = rows[i * len(rows) // 4 : (i + 1) * len(rows) // 4]
        sparse(model / file, mine, {"format": "pt"})
        weight_map |= dict.fromkeys((n for n, _, _ in mine), file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    ladder = "".join(f"  Q{n}_K_XL: {{bits: {n}}}\n" for n in (2, 3, 4, 5, 6, 8))
    (folder / "variants.yaml").write_text(f"base: ./Qwen3.5-9B\nvariants:\n{ladder}")
    return folder


def planned(publish, folder: Path, ladder: str) -> list[dict]:
    """Plan of a ladder of this repo, on the base in `folder`."""
    text = (EXAMPLE.parents[1] / ladder).read_text()
    value = yaml.safe_load(text) | {"base": "./Qwen3.5-9B"}
    (folder / "other.yaml").write_text(json.dumps(value))
    try:
        return json.loads(publish("plan", "--file", "other.yaml", "--json", cwd=folder).ok().out)["variants"]
    finally:
        (folder / "other.yaml").unlink()


def test_the_reference_ladder_has_the_published_sizes(nine_billion, publish):
    plans = planned(publish, nine_billion, "examples/unsloth.yaml")
    assert [round(v["nbytes"] / GIB, 2) for v in plans] == [5.45, 6.43, 7.53, 8.68, 9.43, 10.18]
    assert plans[0]["text_params"] == 8_953_803_264
    assert any(c["awq"] for c in plans[0]["classes"])


def test_the_ladder_of_this_repo_has_the_bytes_of_the_reference(nine_billion, publish):
    reference = planned(publish, nine_billion, "examples/unsloth.yaml")
    own = planned(publish, nine_billion, "variants.yaml")
    assert [v["nbytes"] for v in own] == [v["nbytes"] for v in reference]
    assert [v["bits"] for v in own] == [v["bits"] for v in reference]


def test_vision_stays_in_bf16_and_mtp_is_dropped(nine_billion, publish):
    plan = json.loads(publish("plan", "--json", cwd=nine_billion).ok().out)
    for variant in plan["variants"]:
        rows = {c["class"]: c for c in variant["classes"]}
        assert rows["vision tower"]["format"] == "bf16"
        assert rows["vision tower"]["nbytes"] == 2 * rows["vision tower"]["params"]
        assert "MTP head" not in rows
        assert variant["nbytes"] - variant["text_nbytes"] == rows["vision tower"]["nbytes"]


def test_the_table_names_its_units(nine_billion, publish):
    lines = publish("plan", cwd=nine_billion).ok().out.splitlines()
    head = next(line for line in lines if line.startswith("variant"))
    for unit in ("GB", "GiB", "bits/weight", "GB to run, 8k context"):
        assert unit in head
    row = next(line for line in lines if line.startswith("Q4_K_XL")).split()
    gb, gib = float(row[row.index("N=4") + 1]), float(row[row.index("N=4") + 2])
    assert gb == pytest.approx(gib * GIB / 1e9, abs=0.01)
    assert "GB is 1e9 bytes, GiB is 2^30" in "\n".join(lines)


def test_memory_to_run_is_text_weights_and_caches(nine_billion, publish):
    plan = json.loads(publish("plan", "--json", cwd=nine_billion).ok().out)
    # 8 attention layers: keys and values of 4 heads of 256; 24 recurrent ones: 32 × 128 × 128 in float32, and the convolution
    caches = 8 * 2 * 4 * 256 * 8192 * 2 + 24 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)
    assert {v["run_nbytes"] - v["text_nbytes"] for v in plan["variants"]} == {caches}


def test_disk_is_that_of_the_stale_variants_only(ladder, nine_billion, publish):
    plan = json.loads(publish("plan", "--json", cwd=nine_billion).ok().out)
    assert plan["build"]["disk_nbytes"] >= plan["total_nbytes"]
    assert json.loads(publish("plan", "--json", cwd=ladder).ok().out)["build"]["disk_nbytes"] == 0
    assert "Weights of all variants are current." in publish("plan", cwd=ladder).ok().out


def test_json_of_some_variants_has_the_documented_shape(nine_billion, publish):
    ran = publish("plan", "Q2_K_XL", "Q8_K_XL", "--json", cwd=nine_billion).ok()
    plan = json.loads(ran.out)
    assert plan.keys() == {"base", "variants", "total_nbytes", "build", "context_tokens"}
    assert plan["base"] == {"name": "Qwen3.5-9B", "commit": None, "downloaded": True}
    assert [v["id"] for v in plan["variants"]] == ["Q2_K_XL", "Q8_K_XL"]
    assert plan["total_nbytes"] == sum(v["nbytes"] for v in plan["variants"])
    for variant in plan["variants"]:
        rows = variant["classes"]
        assert variant["nbytes"] == sum(c["nbytes"] for c in rows)
        assert variant["params"] == sum(c["params"] for c in rows)
        assert variant["text_bpw"] == pytest.approx(8 * variant["text_nbytes"] / variant["text_params"], abs=1e-4)
        assert variant["stale"]["weights"] == ["not built"]
        assert rows[0].keys() == {"class", "format", "awq", "group_size", "tensors", "params", "nbytes"}


def test_planned_bytes_are_the_built_bytes(built, publish):
    plan = json.loads(publish("plan", "--json", cwd=built).ok().out)
    for variant in plan["variants"]:
        tensors, _ = read_header(built / "build" / variant["id"] / "model.safetensors")
        assert variant["nbytes"] == sum(t.nbytes for t in tensors), variant["id"]


def test_plan_writes_nothing(nine_billion, publish):
    before = sorted(nine_billion.rglob("*"))
    publish("plan", cwd=nine_billion).ok()
    assert sorted(nine_billion.rglob("*")) == before


def test_plan_reads_no_weight(nine_billion, publish):
    """The sparse files hold 19 GB of zeros: reading them would take longer than this test may."""
    started = time.perf_counter()
    publish("plan", cwd=nine_billion).ok()
    assert time.perf_counter() - started < 2


# ------------------------------------------------------------------------------------------------ start-up


def cpu_s(cwd: Path, *args: str) -> float:
    """Of a process, start and all. On an idle machine it is what a person waits; a busy one takes longer, for no more of it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", PUBLISH, *args], cwd=cwd, env=environment(cwd), check=True, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_plan_answers_within_a_second(nine_billion):
    cpu_s(nine_billion, "--help")  # the first in a checkout compiles
    assert cpu_s(nine_billion, "plan") < 2 * 1.0  # twice the promise: a machine may be slow


def test_help_answers_within_a_third_of_a_second(tmp_path):
    assert cpu_s(tmp_path, "--help") < 2 * 0.3


def test_the_example_is_what_this_suite_builds(built):
    """Guards the fixture: the six variants of the example, no fewer."""
    ids = yaml.safe_load((EXAMPLE / "variants.yaml").read_text())["variants"]
    assert {p.name for p in (built / "build").iterdir()} >= set(ids)
