"""The model families this engine knows, by the `model_type` of their config. No MLX here.

A family is a package in `inference/` with `names.py` (original → MLX tensors, sizes; no MLX) and `model.py` (forward
pass), and a table of the same name in `quant/` (tensor classes, AWQ groups, imatrix names).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from .errors import CheckpointError

MODEL_TYPES = {
    "llama": "llama",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
}


def family_of(config: dict[str, Any]) -> str:
    """Family name of a config.json. Raises CheckpointError, naming what is supported, for anything else."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(sorted(MODEL_TYPES))}"
        )
    return MODEL_TYPES[model_type]


def names_of(config: dict[str, Any]) -> ModuleType:
    """The family's `names` module (no MLX)."""
    return importlib.import_module(f"inference.{family_of(config)}.names")
