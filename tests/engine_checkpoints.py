"""Small checkpoints for the engine's tests: random bases, and variants made with nothing but `mx.quantize`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference.backend import mx
from inference.checkpoint import QuantSpec
from inference.families import names_of
from inference.load import Weights
from inference.qwen3_5.names import PLUS_ONE, read_config, text_shapes

MOE_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_5_moe_text", "dtype": "bfloat16", "hidden_size": 64, "num_hidden_layers": 4,
        "full_attention_interval": 4, "vocab_size": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 1024,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64, "hidden_act": "silu", "attn_output_gate": True,
        "rope_parameters": {
            "rope_type": "default", "type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25,
            "mrope_section": [4, 2, 2], "mrope_interleaved": True,
        },
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "model_type": "qwen3_5_moe", "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
        "num_position_embeddings": 16, "out_hidden_size": 64, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "in_channels": 3, "hidden_act": "gelu_pytorch_tanh", "deepstack_visual_indexes": [],
    },
    "image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253,
}  # fmt: skip


DENSE_CONFIG: dict[str, Any] = {
    **MOE_CONFIG,
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": {
        **{k: v for k, v in MOE_CONFIG["text_config"].items() if "expert" not in k and "moe" not in k},
        "model_type": "qwen3_5_text",
        "intermediate_size": 128,
    },
}


def write_moe(folder: Path, seed: int = 0) -> Path:
    """A random MoE checkpoint in the original layout, bfloat16, without vision tower and MTP head."""
    return _write(folder, MOE_CONFIG, seed)


def write_dense(folder: Path, seed: int = 0) -> Path:
    """The same without experts."""
    return _write(folder, DENSE_CONFIG, seed)


def _write(folder: Path, config: dict[str, Any], seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    mx.random.seed(seed)
    cfg = read_config(config)
    tensors: dict[str, mx.array] = {}
    for name, shape in text_shapes(cfg).items():
        if name.endswith("A_log"):
            x = mx.log(mx.random.uniform(1, 8, shape))
        elif PLUS_ONE.search(name):
            x = mx.random.randint(-24, 25, shape) / 64  # 1 + w is exact in bfloat16
        elif name.endswith(("dt_bias", "linear_attn.norm.weight")):
            x = 1 + 0.2 * mx.random.normal(shape)
        elif name.endswith("embed_tokens.weight"):
            x = mx.random.normal(shape)
        else:
            fan_in = shape[1] if name.endswith("conv1d.weight") else shape[-1]
            x = mx.random.normal(shape) * 1.5 * fan_in**-0.5
        tensors[name] = x.astype(mx.float32 if name.endswith("A_log") else mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), _original_layout(tensors), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def _original_layout(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    out: dict[str, mx.array] = {}
    for name, x in tensors.items():
        if name.endswith("switch_mlp.up_proj.weight"):
            continue
        if name.endswith("switch_mlp.gate_proj.weight"):
            up = tensors[name.replace("gate_proj", "up_proj")]
            x, name = (
                mx.concatenate([x, up], axis=1),
                name.replace("switch_mlp.gate_proj.weight", "experts.gate_up_proj"),
            )
        elif name.endswith("conv1d.weight"):
            x = x.swapaxes(1, 2)
        name = name.replace("switch_mlp.down_proj.weight", "experts.down_proj")
        name = name.replace("language_model.lm_head", "lm_head")
        out[name.replace("language_model.model.", "model.language_model.")] = mx.contiguous(x)
    return out


def write_variant(
    base: Path, folder: Path, default: QuantSpec | None, overrides: dict[str, QuantSpec | bool] | None = None
) -> Path:
    """`base`, of any family, in MLX layout: every matrix in the `default` format, modules of `overrides` in their own."""
    folder.mkdir(parents=True, exist_ok=True)
    overrides = overrides or {}
    weights = Weights(base)
    names = names_of(weights.raw_config)
    tensors: dict[str, mx.array] = {}
    for name, shape in names.text_shapes(weights.config).items():
        module = name.removesuffix(".weight")
        x = weights.array(name)
        x = x if name.endswith("A_log") else x.astype(mx.bfloat16)
        spec = overrides.get(module, default)
        is_matrix = len(shape) >= 2 and not name.endswith("conv1d.weight")
        if not (is_matrix and isinstance(spec, QuantSpec)):
            tensors[name] = x
            continue
        weight, scales, *biases = mx.quantize(x, spec.group_size, spec.bits, mode=spec.mode)
        tensors |= {name: weight, f"{module}.scales": scales} | ({f"{module}.biases": biases[0]} if biases else {})
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    config = names.mlx_config(weights.raw_config)
    if default:
        named = {m: False if s is False else _entry(s) for m, s in overrides.items()}  # type: ignore[arg-type]
        config["quantization"] = config["quantization_config"] = _entry(default) | named
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (base / file).is_file():
            shutil.copy(base / file, folder / file)
    return folder


def _entry(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "mode": spec.mode}


def edit_tensors(folder: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    """Rewrite a one-file variant after `change` had its way with the tensors."""
    path = folder / "model.safetensors"
    tensors, metadata = mx.load(str(path), return_metadata=True)  # type: ignore[misc]
    mx.eval(list(tensors.values()))
    change(tensors)
    path.unlink()
    mx.save_safetensors(str(path), tensors, metadata)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")
