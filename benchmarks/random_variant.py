"""A random checkpoint in MLX layout, of the shapes of a real Qwen3.5, written by the device: for speed, not for sense.

    folder = write(config_of("9b", layers=32), Path("/dev/shm/9b-4bit"), bits=4)

`make_checkpoint.py` writes original layouts on the CPU, a minute for 19 GB; this draws and packs on the GPU, a layer at a
time, one shard a layer. Peak: one layer, or the embedding. The same call gives the same bytes on one machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import make_checkpoint
from inference.backend import mx
from inference.families import names_of

GROUP = 64


def config_of(preset: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of a preset of make_checkpoint.py; layers None: as many as the real model has."""
    argv = ["unused", "--preset", preset, "--no-vision", "--no-mtp", *(["--layers", str(layers)] if layers else [])]
    ids = dict.fromkeys(make_checkpoint.SPECIALS + make_checkpoint.ADDED, 0)
    return make_checkpoint.configs(make_checkpoint.arguments(argv), ids)[0]


def write(config: dict[str, Any], folder: Path, bits: int) -> Path:
    """bits 16: bfloat16, else affine with GROUP weights a scale for every matrix that divides into groups."""
    names = names_of(config)
    folder.mkdir(parents=True)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in names.text_shapes(names.read_config(config)).items():
        layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else name.split(".")[-2]
        shards.setdefault(layer, {})[name] = shape
    key = mx.random.key(0)
    for shard, shapes in shards.items():
        arrays: dict[str, mx.array] = {}
        for name, shape in shapes.items():
            key, own = mx.random.split(key)
            weight = _draw(name, shape, own)
            if bits < 16 and name.endswith(".weight") and len(shape) > 1 and shape[-1] % GROUP == 0:
                module = name.removesuffix(".weight")
                arrays[name], arrays[f"{module}.scales"], arrays[f"{module}.biases"] = mx.quantize(weight, GROUP, bits)
            else:
                arrays[name] = weight
            mx.eval(arrays)
        mx.save_safetensors(str(folder / f"model-{shard}.safetensors"), arrays, metadata={"format": "mlx"})
        del arrays, weight
        mx.clear_cache()
    packed = {} if bits == 16 else {"quantization": {"group_size": GROUP, "bits": bits, "mode": "affine"}}
    (folder / "config.json").write_text(json.dumps({**config, **packed}))
    return folder


def _draw(name: str, shape: tuple[int, ...], key: mx.array) -> mx.array:
    """Values of the size of a trained model's, so that activations stay finite and experts are all chosen at times."""
    if name.endswith(".A_log"):
        return mx.log(mx.random.uniform(0.01, 16, shape, key=key))
    if name.endswith(".dt_bias"):
        return mx.random.uniform(-4, 1, shape, key=key).astype(mx.bfloat16)
    if len(shape) == 1:
        return (1 + 0.1 * mx.random.normal(shape, key=key)).astype(mx.bfloat16)
    spread = 0.4 if "conv1d" in name else 0.02 if "embed" in name else shape[-1] ** -0.5
    return mx.random.normal(shape, mx.bfloat16, scale=spread, key=key)
