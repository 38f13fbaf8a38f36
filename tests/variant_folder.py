"""A ladder with a small built variant, made without MLX: real safetensors packed as MLX packs them, and all the JSON.

The card is a plain text: what a rendered one looks like is tested elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from publisher.protocol import SMOKE_VERSION
from publisher.schema import (
    BuildInputs,
    Check,
    Device,
    FileEntry,
    Manifest,
    Smoke,
    TensorEntry,
)
from publisher.store import sha256_file, write_model
from publisher.variants import Project, load_project
from quant.folder import weights_hash

LADDER = """\
base: {path: base, name: Tiny-1B}
owner: acme
collection: {title: Tiny ladder, description: All rungs}
variants:
  Q4: {bits: 4, note: the middle}
  Q8: {bits: 8}
"""
CARD = """\
---
license: apache-2.0
library_name: mlx
pipeline_tag: text-generation
base_model: acme/Tiny-1B
base_model_relation: quantized
tags:
- mlx
---

# Tiny-1B {id}

Four bits of a small model.
"""
SHA = hashlib.sha256(b"").hexdigest()
DEVICE = Device(name="test", backend="cpu", os="Linux", memory_gb=1.0, mlx="0", tool="mlx-publish 0")
MODULES = {"model.layers.0.mlp.up_proj": (4, 64), "model.layers.0.mlp.down_proj": (8, 32), "lm_head": (6, 64)}


def make_project(folder: Path, yaml: str = LADDER) -> Project:
    (folder / "base").mkdir(parents=True, exist_ok=True)
    (folder / "variants.yaml").write_text(yaml)
    return load_project(folder / "variants.yaml")


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """[rows, columns] codes → [rows, columns × bits / 32] words, the first code in the lowest bits, as MLX does."""
    rows, columns = codes.shape
    planes = (codes[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(planes.reshape(rows, -1).astype(np.uint8), axis=-1, bitorder="little")
    return packed.view("<u4").reshape(rows, columns * bits // 32)


def tensors(seed: int = 0, rows: int = 16, columns: int = 128) -> dict[str, tuple[str, np.ndarray]]:
    """name → (safetensors dtype, array) of three packed modules and a dense norm."""
    rng = np.random.default_rng(seed)
    out: dict[str, tuple[str, np.ndarray]] = {}
    for module, (bits, group) in MODULES.items():
        out[f"{module}.weight"] = ("U32", pack(rng.integers(0, 1 << bits, (rows, columns)), bits))
        for part in ("scales", "biases"):
            out[f"{module}.{part}"] = ("F16", rng.standard_normal((rows, columns // group)).astype(np.float16))
    out["model.norm.weight"] = ("BF16", rng.integers(0, 1 << 16, (columns,)).astype("<u2"))
    return out


def write_safetensors(path: Path, values: dict[str, tuple[str, np.ndarray]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    data = b""
    for name, (dtype, array) in values.items():
        raw = array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def quantization() -> dict[str, Any]:
    entries = {m: {"group_size": g, "bits": b, "mode": "affine"} for m, (b, g) in MODULES.items()}
    return {"group_size": 64, "bits": 4, "mode": "affine", **entries}


def make_variant(project: Project, id: str = "Q4", seed: int = 0, shards: int = 2, smoke: bool = True) -> Path:
    """Write (or rewrite) a built variant: folder, manifest, card, smoke result."""
    folder = project.store.variant(id)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    values = tensors(seed)
    names = list(values)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    where = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        write_safetensors(folder / file, {n: values[n] for n in names if where[n] == file})
    write_config(
        folder, {"model_type": "qwen3_5", "quantization": quantization(), "quantization_config": quantization()}
    )
    total = sum(a.nbytes for _, a in values.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (folder / "LICENSE").write_text("Apache License\n")
    (folder / "README.md").write_text(CARD.format(id=id))
    rows = [(n, d, list(a.shape), blake3(a.tobytes()).hexdigest()) for n, (d, a) in values.items()]
    manifest = seal(project, id, rows)
    if smoke:
        write_smoke(project, id, manifest.weights_hash)
    return folder


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def seal(project: Project, id: str, rows: list[tuple[str, str, list[int], str]] | None = None) -> Manifest:
    """Write the manifest for the folder as it is. rows: its tensors, else those of the old manifest."""
    folder = project.store.variant(id)
    if rows is None:
        old = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
        rows = [(t.name, t.dtype, t.shape, t.blake3) for t in old.tensors]
    config = json.loads((folder / "config.json").read_text())
    files = [
        FileEntry(path=p.name, size=p.stat().st_size, sha256=sha256_file(p))
        for p in sorted(folder.iterdir())
        if p.is_file() and p.name not in ("README.md", "manifest.json", "model.sig")
    ]
    inputs = {
        "base": {"name": "Tiny-1B", "commit": None, "source_hash": SHA, "files_hash": ""}, "recipe": "unsloth", "bits": 4,
        "group_size": 64, "rules": [], "assignment": SHA, "awq_exponent": None, "imatrix": None, "mtp": "drop",
        "vision": "drop", "solver": "mlx", "quant_version": 1,
    }  # fmt: skip
    manifest = Manifest(
        tool="mlx-publish 0", id=id, inputs=BuildInputs.model_validate(inputs),
        weights_hash=weights_hash(rows, config.get("quantization")), params=1, text_params=1, nbytes=1, text_nbytes=1,
        files=files, tensors=[TensorEntry(name=n, dtype=d, shape=s, blake3=h) for n, d, s, h in rows],
    )  # fmt: skip
    write_model(folder / "manifest.json", manifest)
    return manifest


def write_smoke(project: Project, id: str, weights: str, passed: bool = True) -> None:
    checks = [Check(name="divergence", passed=passed, detail="0.02 nats, ceiling 0.1")]
    smoke = Smoke(
        version=SMOKE_VERSION, weights_hash=weights, base_hash=SHA, settings="x", ceiling=0.1, passed=passed, kld=0.02,
        kld_tokens=512, checks=checks, samples=[], device=DEVICE, measured_at="2026-01-01T00:00:00Z",
    )  # fmt: skip
    write_model(project.store.results(weights) / "smoke.json", smoke)
