"""Random Llama checkpoints in the original layout, the same bytes on every machine. Needs numpy alone, so that
`transformers` can be run on them where there is no MLX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from inference.llama.names import read_config, text_shapes

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": True, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# what distinguishes each from CONFIG; None takes a key away
KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": None, "head_dim": 32, "num_key_value_heads": None},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "parameters": {
        "rope_theta": None,
        "rope_parameters": {**LLAMA3, "rope_theta": 500000.0},
    },  # as transformers 5 has it
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def config(kind: str = "tied", **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in (CONFIG | KINDS[kind] | changes).items() if v is not None}


def write_llama(folder: Path, kind: str = "tied", seed: int = 0, **changes: Any) -> Path:
    """changes: of the config. A tied checkpoint also holds what old exports do: a second lm_head and rotary frequencies."""
    folder.mkdir(parents=True, exist_ok=True)
    found = config(kind, **changes)
    cfg = read_config(found)
    rng = np.random.RandomState(seed)  # a stream that numpy keeps for ever
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for name, shape in text_shapes(cfg).items():
        x = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            x = 1 + 0.2 * x
        elif name.endswith("_proj.weight"):
            x *= 1.5 * shape[-1] ** -0.5
        elif name.endswith(".bias"):
            x *= 0.5
        else:
            x *= 0.3
        tensors[name] = "BF16", bf16(x)
    if cfg.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = "F32", np.ones(cfg.head_dim // 2, np.float32)
    save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return folder


def bf16(x: np.ndarray) -> np.ndarray:
    """Bit patterns, rounded to nearest even."""
    u = x.astype(np.float32).view(np.uint32)
    return ((u + ((u >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype("<u2")


def save(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, x) in tensors.items():
        head[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    blob = json.dumps(head).encode()
    path.write_bytes(len(blob).to_bytes(8, "little") + blob + b"".join(x.tobytes() for _, x in tensors.values()))
