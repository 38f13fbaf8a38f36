"""A copy of a base whose matrices are rounded to 4 bits, in plain float32 arithmetic: the same weights on every machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from inference.backend import mx

GROUP, STEPS = 64, 15  # weights of a row that share a scale; 2⁴ - 1


def write_coarse(base: Path, out: Path) -> Path:
    """An original-layout checkpoint in float32: every text matrix to nearest on 16 levels between the ends of its groups."""
    out.mkdir(parents=True)
    for file in (*base.glob("*.json"), *base.glob("*.jinja")):
        if file.name != "model.safetensors.index.json":
            shutil.copyfile(file, out / file.name)
    weights = {}
    for file in sorted(base.glob("model*.safetensors")):
        for name, x in mx.load(str(file)).items():  # type: ignore[union-attr]
            if not name.startswith(("model.visual.", "mtp.")):
                weights[name] = coarse(x) if (x := np.array(x.astype(mx.float32))).ndim == 2 else x
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def coarse(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(-1, GROUP)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = np.maximum((high - low) / np.float32(STEPS), np.float32(1e-12))
    return (np.rint((groups - low) / scale) * scale + low).astype(np.float32).reshape(x.shape)
