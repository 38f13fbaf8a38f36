"""Ladders of any size without weights: sparse files that hold only headers, manifests and results made to order."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from inference.checkpoint import ITEMSIZE, count, read_checkpoint
from inference.divergence import Comparison
from inference.families import names_of
from inference.qwen3_5.names import read_config, text_shapes
from publisher.evaluate_figures import divergence, greedy
from publisher.plan import build_inputs, plan_variant, select_targets
from publisher.protocol import BENCH_VERSION, QUALITY_VERSION, SMOKE_VERSION, calibration_hash, quality_settings
from publisher.schema import (
    BaseInput,
    Baseline,
    Baselines,
    Bench,
    BenchSpec,
    BuildRecord,
    Check,
    Device,
    Divergence,
    FileEntry,
    ImatrixInput,
    Manifest,
    Overlap,
    Quality,
    Smoke,
    Speed,
    Stat,
    TensorEntry,
)
from publisher.store import write_model
from publisher.variants import Project, load_project
from quant.folder import index_json, quantized_config, weights_hash, write_json
from quant.shards import plan_layout

TEXT = {
    "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 248320, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "intermediate_size": 12288,
    "tie_word_embeddings": False,
}  # fmt: skip
DENSE = {"model_type": "qwen3_5", "text_config": TEXT, "dtype": "bfloat16"}
MOE = {
    "model_type": "qwen3_5_moe", "dtype": "bfloat16",
    "text_config": {
        **TEXT, "hidden_size": 2048, "num_hidden_layers": 40, "num_key_value_heads": 2, "num_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    },
}  # fmt: skip
CARD = """---
license: apache-2.0
license_link: https://huggingface.co/Qwen/Qwen3.5-9B/blob/main/LICENSE
language:
- en
- zh
pipeline_tag: image-text-to-text
datasets: [someone/else]
model-index: [{name: x, results: []}]
widget: [{text: hi}]
---
# Qwen3.5-9B
"""
IMATRIX = ImatrixInput(name="imatrix_unsloth.gguf_file", sha256=sha256(b"imatrix").hexdigest())
M3 = Device(
    name="Apple M3 Max", backend="metal", os="macOS 26.1", memory_gb=137.4, mlx="0.32.4", tool="mlx-publish 0.1.0"
)
EPYC = Device(
    name="AMD EPYC", backend="cpu", os="Linux 6.18", memory_gb=25.3, mlx="0.32.4", tool="mlx-publish 0.1.0",
    blas="libopenblas.so.0",
)  # fmt: skip


def sparse(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> None:
    """A safetensors file with these tensors, all zero and taking no room."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + ITEMSIZE[dtype] * count(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    blob = json.dumps(header).encode()
    path.write_bytes(len(blob).to_bytes(8, "little") + blob)
    with open(path, "r+b") as f:
        f.truncate(8 + len(blob) + end)


def base(folder: Path, config: dict[str, Any] = DENSE, card: str = CARD) -> Path:
    """An original checkpoint in the Hugging Face layout, in four files."""
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(card)
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in text_shapes(read_config(config)).items():
        dtype = "F32" if name.endswith(".A_log") else "BF16"
        name = name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        )
        if name.endswith(".conv1d.weight"):
            shape = (shape[0], 1, shape[1])
        if name.endswith(".switch_mlp.up_proj.weight"):
            continue
        if name.endswith(".switch_mlp.gate_proj.weight"):
            shape = (shape[0], 2 * shape[1], shape[2])
        name = name.replace("switch_mlp.gate_proj.weight", "experts.gate_up_proj")
        name = name.replace("switch_mlp.down_proj.weight", "experts.down_proj")
        tensors[name] = dtype, shape
    tensors["model.visual.patch_embed.proj.weight"] = "BF16", (1152, 3, 2, 16, 16)
    for i in range(27):
        tensors[f"model.visual.blocks.{i}.attn.qkv.weight"] = "BF16", (3456, 1152)
        tensors[f"model.visual.blocks.{i}.mlp.linear_fc1.weight"] = "BF16", (4304, 1152)
        tensors[f"model.visual.blocks.{i}.mlp.linear_fc2.weight"] = "BF16", (1152, 4304)
    tensors["mtp.fc.weight"] = "BF16", (4096, 8192)
    names, weight_map = sorted(tensors), {}
    for i in range(4):
        file = f"model-{i + 1:05d}-of-00004.safetensors"
        mine = names[i::4]
        sparse(folder / file, [(n, *tensors[n]) for n in mine], {})
        weight_map |= dict.fromkeys(mine, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def ladder(folder: Path, text: str) -> Project:
    path = folder / "variants.yaml"
    path.write_text(text)
    return load_project(path)


def build(project: Project, id: str, base_folder: Path, imatrix: ImatrixInput | None = IMATRIX) -> Manifest:
    """What `publish build` would leave for a variant, with no weights in it."""
    checkpoint = read_checkpoint(base_folder)
    targets = names_of(checkpoint.config).targets(checkpoint)
    plan = plan_variant(project, id, checkpoint, targets)
    chosen = set(select_targets(project, id, targets))
    plans = tuple(p for p in plan.plans if p.target in chosen)
    layout = plan_layout([p.stored() for p in plans])
    folder = project.store.variant(id)
    folder.mkdir(parents=True)
    for shard in layout.shards:
        (folder / shard.name).write_bytes(shard.header)
        with open(folder / shard.name, "r+b") as f:
            f.truncate(shard.nbytes)
    stored = [(s, layout.shards[s.shard].name) for group in layout.groups for s in group]
    config = quantized_config(checkpoint.config, plans)
    write_json(folder / "config.json", config)
    write_json(folder / "model.safetensors.index.json", index_json(stored, plan.params))
    write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20})
    (folder / "chat_template.jinja").write_text("{% if enable_thinking %}{% endif %}")
    (folder / "LICENSE").write_text("Apache License")
    tensors = [(s.name, s.dtype, s.shape, sha256(f"{s.name} {s.dtype}".encode()).hexdigest()) for s, _ in stored]
    source = BaseInput(
        name=project.base_name,
        commit="0123456789" * 4,
        source_hash=sha256(b"source").hexdigest(),
        files_hash=sha256(b"files").hexdigest(),
    )
    files = [p for p in sorted(folder.iterdir()) if p.suffix != ".json" or p.name != "manifest.json"]
    manifest = Manifest(
        tool="mlx-publish 0.1.0",
        id=id,
        inputs=build_inputs(project, replace(plan, plans=plans), source, imatrix, "rtn", 1),
        weights_hash=weights_hash(tensors, config.get("quantization")),
        params=plan.params,
        text_params=plan.text_params,
        nbytes=plan.nbytes,
        text_nbytes=plan.text_nbytes,
        files=[
            FileEntry(path=p.name, size=p.stat().st_size, sha256=sha256(f"{id} {p.name}".encode()).hexdigest())
            for p in files
        ],
        tensors=[TensorEntry(name=n, dtype=d, shape=list(s), blake3=h) for n, d, s, h in tensors],
    )  # fmt: skip
    write_model(project.store.manifest(id), manifest)
    record = BuildRecord(
        weights_hash=manifest.weights_hash, built_at="2026-11-20T09:00:00+00:00", wall_s=60, variants=[id],
        bytes_read=1, bytes_written=1, peak_gb=1.5, device=M3,
    )  # fmt: skip
    write_model(project.store.results(manifest.weights_hash) / "build.json", record)
    return manifest


def stat(median: float, runs: int = 3) -> Stat:
    return Stat(median=median, low=round(0.99 * median, 4), high=round(1.01 * median, 4), runs=runs)


def speed(decode: float) -> Speed:
    return Speed(
        decode_tps=stat(decode),
        prefill_tps={128: stat(10 * decode), 512: stat(12 * decode), 2048: stat(11 * decode)},
        ttft_s=stat(round(10 / decode, 4)),
        peak_gb=round(400 / decode, 2),
    )


def bench(manifest: Manifest, decode: float, bf16: Speed | float = 20.8, device: Device = M3, **change: Any) -> Bench:
    return Bench(
        version=BENCH_VERSION, weights_hash=manifest.weights_hash, base_hash="b", run="r1", settings="s", protocol=BenchSpec(),
        compute="float32" if device.backend == "cpu" else "bfloat16", variant=speed(decode), 
        bf16=bf16 if isinstance(bf16, Speed) else speed(bf16), device=device, measured_at="2026-11-21T10:00:00+00:00",
    ).model_copy(update=change)  # fmt: skip


def smoke(manifest: Manifest, kld: float | None, device: Device = M3, **change: Any) -> Smoke:
    found = f"mean KL {kld} nats a token | ceiling 0.5" if kld is not None else "logits are all over | the place"
    checks = [
        Check(name="loads", passed=True, detail="7.10 GB in memory"),
        Check(name="finite logits", passed=True, detail="0 of 512 positions are not finite"),
        Check(name="divergence from BF16", passed=kld is not None, detail=found),
        Check(name="repetition", passed=None, detail="base not compared: it needs 19.3 GB"),
    ]
    return Smoke(
        version=SMOKE_VERSION, weights_hash=manifest.weights_hash, base_hash="b", settings="s", ceiling=0.5,
        passed=kld is not None, kld=kld, kld_tokens=512, checks=checks, samples=["a None /home/x"], device=device,
        measured_at="2026-11-20T09:30:00+00:00",
    ).model_copy(update=change)  # fmt: skip


@functools.cache
def over(corpus: str, kld: float, spread: float = 0.1, windows: int = 24, size: int = 40) -> Divergence:
    """A divergence of this mean. spread: of the windows' means, as a share; the same windows are hard for every model."""
    at = np.arange(windows * size)
    level = 1 + spread * np.sin(1.7 * (at // size))
    values = kld * level * (0.5 + (at * 7919 % 101) / 101)
    values *= kld / values.mean()
    found = Comparison(
        finite=np.ones(len(at), bool),
        kld=values,
        same_top=at % 1000 >= 1000 * min(kld, 0.5),
        nll_ref=np.full(len(at), 2.0),
        nll=2.0 + values * np.cos(at),
    )
    teacher = sha256(corpus.encode()).hexdigest()
    return divergence(found, [size] * windows, corpus, teacher, 512 if corpus == "text" else 1807)


def quality(
    project: Project, manifest: Manifest | Baseline, kld: float, spread: float = 0.1, base_hash: str = "", **change: Any
) -> Quality:
    """What `publish eval` would leave. base_hash: of a baseline."""
    said = [min(64, int(2 / kld) % 65 + i) for i in range(10)]
    return Quality(
        version=QUALITY_VERSION, weights_hash=manifest.weights_hash,
        base_hash=base_hash if isinstance(manifest, Baseline) else manifest.inputs.base.source_hash,
        settings=quality_settings(project), nbytes=manifest.nbytes, text_nbytes=manifest.text_nbytes,
        text_params=manifest.text_params, bpw=round(8 * manifest.text_nbytes / manifest.text_params, 4),
        corpora=[over("text", kld, spread), over("chat", 1.2 * kld, spread)],
        control=[over("text", 2.1e-9), over("chat", 2.4e-9)],
        greedy=greedy(said, [64] * 10, 64), greedy_control=greedy([64] * 10, [64] * 10, 64), missing=[],
        text_hash=sha256(b"text").hexdigest(), chat_hash=sha256(b"chat").hexdigest(),
        calibration_hash=calibration_hash(project), overlap=Overlap(ngram=32, shared=0), compute="float32", device=M3,
        wall_s=100, measured_at="2026-11-22T10:00:00+00:00",
    ).model_copy(update=change)  # fmt: skip


def baseline(project: Project, name: str, recipe: str, like: Manifest, share: float, kld: float) -> None:
    """A foreign model on record, of a share of a variant's bytes."""
    known = project.store.baselines
    others = Baselines.model_validate_json(known.read_bytes()).baselines if known.is_file() else []
    text_nbytes = int(share * like.text_nbytes)
    entry = Baseline(
        name=name, recipe=recipe, bits=4, group_size=64, imatrix=None, inputs=sha256(b"i" + name.encode()).hexdigest(),
        weights_hash=sha256(name.encode()).hexdigest(), nbytes=like.nbytes - like.text_nbytes + text_nbytes,
        text_nbytes=text_nbytes, text_params=like.text_params,
    )  # fmt: skip
    write_model(known, Baselines(baselines=[*others, entry]))
    record(project, quality(project, entry, kld, base_hash=like.inputs.base.source_hash))


def record(project: Project, *results: Bench | Smoke | Quality) -> None:
    for r in results:
        write_model(project.store.results(r.weights_hash) / f"{type(r).__name__.lower()}.json", r)
