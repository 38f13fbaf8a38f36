"""Qwen3.5, dense and MoE: hyperparameters and the tensors of its checkpoints, without MLX.

Source of the layout: `transformers` models qwen3_5 and qwen3_5_moe (original names) and mlx-lm / mlx-vlm (what a
stranger's loader expects). Norms that the original stores as w and uses as 1 + w are stored as 1 + w.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ..checkpoint import CONFIG_DTYPES, FLOATS, ITEMSIZE, MAX_LAYERS, Checkpoint, TensorInfo
from ..errors import CheckpointError
from ..layout import Op, Part, Target

# 1 + w in the arithmetic; `linear_attn.norm` is a plain multiplier and not among them
PLUS_ONE = re.compile(
    r"(\.input_layernorm|\.post_attention_layernorm|\.q_norm|\.k_norm|^language_model\.model\.norm"
    r"|^mtp\.norm|^mtp\.pre_fc_norm_embedding|^mtp\.pre_fc_norm_hidden)\.weight$"
)
SKIPPED = ("vision_tower.", "mtp.")  # tensors of a checkpoint in MLX layout that the text model does not read


@dataclass(frozen=True)
class Config:
    """Hyperparameters of the text model, named as in `text_config`."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]  # linear_attention | full_attention
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rotary_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    intermediate_size: int  # 0 for MoE
    num_experts: int  # 0 for dense
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    dtype: str  # safetensors name of the model's own type


def read_config(config: dict[str, Any]) -> Config:
    """Hyperparameters from a whole config.json. Raises CheckpointError naming the key that is missing or wrong."""
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise CheckpointError("config.json: text_config must be an object")

    def number(key: str, default: int | None = None, least: int = 1) -> int:
        value = text.get(key, default)
        if type(value) is not int or value < least:
            raise CheckpointError(f"config.json: text_config.{key}: found {value!r}, expected an integer ≥ {least}")
        return value

    layers = number("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise CheckpointError(
            f"config.json: text_config.num_hidden_layers: found {layers}, expected at most {MAX_LAYERS}"
        )
    interval = number("full_attention_interval", 4)
    kinds = text.get("layer_types") or [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)
    ]
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in ("linear_attention", "full_attention") for kind in kinds)
    ):
        raise CheckpointError(
            "config.json: text_config.layer_types must name linear_attention or full_attention a layer"
        )
    # mlx-lm derives the kind of a layer from the interval alone: a ladder that it would misread is refused here
    if any((kind == "full_attention") != ((i + 1) % interval == 0) for i, kind in enumerate(kinds)):
        raise CheckpointError(f"config.json: layer_types do not follow full_attention_interval {interval}")
    rope = text.get("rope_parameters", {})
    if not isinstance(rope, dict):
        raise CheckpointError("config.json: text_config.rope_parameters must be an object")
    for key, only in (("hidden_act", "silu"), ("attn_output_gate", True)):
        if text.get(key, only) != only:
            raise CheckpointError(f"config.json: text_config.{key}: found {text[key]!r}, only {only!r} is supported")
    theta, partial = rope.get("rope_theta", 10_000_000), rope.get("partial_rotary_factor", 0.25)
    eps = text.get("rms_norm_eps", 1e-6)
    if (
        not all(isinstance(v, int | float) and 0 < v < math.inf for v in (theta, partial, eps))
        or partial > 1
        or eps > 1
    ):
        raise CheckpointError(
            "config.json: rope_theta, partial_rotary_factor and rms_norm_eps must be positive numbers"
        )
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(f"config.json: rope_type {rope.get('rope_type')!r} is not supported; expected 'default'")
    if text.get("attention_bias"):
        raise CheckpointError("config.json: attention_bias true is not supported for Qwen3.5")
    experts = number("num_experts", 0, 0)
    head_dim = number("head_dim")
    dtype = text.get("dtype") or config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    if not isinstance(dtype, str) or dtype not in CONFIG_DTYPES:
        raise CheckpointError(f"config.json: dtype {dtype!r}: expected one of {', '.join(CONFIG_DTYPES)}")
    cfg = Config(
        model_type=config["model_type"],
        hidden_size=number("hidden_size"),
        num_hidden_layers=layers,
        layer_types=tuple(kinds),
        vocab_size=number("vocab_size"),
        rms_norm_eps=float(eps),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        max_position_embeddings=number("max_position_embeddings", 262144),
        num_attention_heads=number("num_attention_heads"),
        num_key_value_heads=number("num_key_value_heads"),
        head_dim=head_dim,
        rope_theta=float(theta),
        rotary_dim=int(head_dim * partial),
        linear_num_key_heads=number("linear_num_key_heads"),
        linear_num_value_heads=number("linear_num_value_heads"),
        linear_key_head_dim=number("linear_key_head_dim"),
        linear_value_head_dim=number("linear_value_head_dim"),
        linear_conv_kernel_dim=number("linear_conv_kernel_dim", least=2),
        intermediate_size=0 if experts else number("intermediate_size"),
        num_experts=experts,
        num_experts_per_tok=number("num_experts_per_tok") if experts else 0,
        moe_intermediate_size=number("moe_intermediate_size") if experts else 0,
        shared_expert_intermediate_size=number("shared_expert_intermediate_size") if experts else 0,
        dtype=CONFIG_DTYPES[dtype],
    )
    for whole, part in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if getattr(cfg, whole) % getattr(cfg, part):
            raise CheckpointError(
                f"config.json: {whole} {getattr(cfg, whole)} is no multiple of {part} {getattr(cfg, part)}"
            )
    return cfg


def mlx_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json that mlx-lm needs for the same model: as it is."""
    return dict(config)


def text_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor the text model must have, by MLX name, with its unpacked shape."""
    h, d = cfg.hidden_size, cfg.head_dim
    key, value = (
        cfg.linear_num_key_heads * cfg.linear_key_head_dim,
        cfg.linear_num_value_heads * cfg.linear_value_head_dim,
    )
    out: dict[str, tuple[int, ...]] = {"language_model.model.embed_tokens.weight": (cfg.vocab_size, h)}
    for i, kind in enumerate(cfg.layer_types):
        p = f"language_model.model.layers.{i}."
        out[p + "input_layernorm.weight"] = out[p + "post_attention_layernorm.weight"] = (h,)
        if kind == "full_attention":
            a = p + "self_attn."
            out[a + "q_proj.weight"] = (2 * cfg.num_attention_heads * d, h)  # query and output gate, per head
            out[a + "k_proj.weight"] = out[a + "v_proj.weight"] = (cfg.num_key_value_heads * d, h)
            out[a + "o_proj.weight"] = (h, cfg.num_attention_heads * d)
            out[a + "q_norm.weight"] = out[a + "k_norm.weight"] = (d,)
        else:
            a = p + "linear_attn."
            out[a + "A_log"] = out[a + "dt_bias"] = (cfg.linear_num_value_heads,)
            out[a + "conv1d.weight"] = (2 * key + value, cfg.linear_conv_kernel_dim, 1)
            out[a + "in_proj_qkv.weight"] = (2 * key + value, h)
            out[a + "in_proj_z.weight"] = (value, h)
            out[a + "in_proj_a.weight"] = out[a + "in_proj_b.weight"] = (cfg.linear_num_value_heads, h)
            out[a + "norm.weight"] = (cfg.linear_value_head_dim,)
            out[a + "out_proj.weight"] = (h, value)
        m = p + "mlp."
        if cfg.num_experts:
            e, inter, s = cfg.num_experts, cfg.moe_intermediate_size, cfg.shared_expert_intermediate_size
            out[m + "gate.weight"] = (e, h)
            out[m + "switch_mlp.gate_proj.weight"] = out[m + "switch_mlp.up_proj.weight"] = (e, inter, h)
            out[m + "switch_mlp.down_proj.weight"] = (e, h, inter)
            out[m + "shared_expert_gate.weight"] = (1, h)
            m, inter = m + "shared_expert.", s
        else:
            inter = cfg.intermediate_size
        out[m + "gate_proj.weight"] = out[m + "up_proj.weight"] = (inter, h)
        out[m + "down_proj.weight"] = (h, inter)
    out["language_model.model.norm.weight"] = (h,)
    if not cfg.tie_word_embeddings:
        out["language_model.lm_head.weight"] = (cfg.vocab_size, h)
    return out


def cache_nbytes(cfg: Config, tokens: int) -> int:
    """Bytes of keys, values and recurrent state after `tokens` tokens of one sequence, in the model's own type."""
    size = ITEMSIZE[cfg.dtype]
    full = cfg.layer_types.count("full_attention")
    linear = len(cfg.layer_types) - full
    key = cfg.linear_num_key_heads * cfg.linear_key_head_dim
    value = cfg.linear_num_value_heads * cfg.linear_value_head_dim
    state = cfg.linear_num_value_heads * cfg.linear_key_head_dim * cfg.linear_value_head_dim * 4  # float32
    conv = (2 * key + value) * (cfg.linear_conv_kernel_dim - 1) * size
    return full * 2 * cfg.num_key_value_heads * cfg.head_dim * tokens * size + linear * (state + conv)


def targets(checkpoint: Checkpoint) -> list[Target]:
    """MLX-layout tensors of an original checkpoint, in the order in which their sources lie on disk.

    Raises CheckpointError if the checkpoint is in MLX layout already, is quantized, holds a tensor that the layout
    does not know, or lacks one that the config calls for.
    """
    if checkpoint.mlx:
        raise CheckpointError(f"{checkpoint.folder.name}: is in MLX layout already; expected an original checkpoint")
    for key in ("quantization", "quantization_config"):
        if key in checkpoint.config:
            raise CheckpointError(f"{checkpoint.folder.name}/config.json: {key}: the source is quantized already")
    cfg = read_config(checkpoint.config)
    out: list[Target] = []
    for info in sorted(checkpoint.tensors.values(), key=lambda t: (t.file.name, t.start)):
        out += _targets_of(info, cfg)
    shapes = text_shapes(cfg)
    found = {t.name: t for t in out if t.part == "text"}
    for name in sorted(shapes.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{checkpoint.folder.name}: tensor for {name} is missing")
        if name not in shapes:
            raise CheckpointError(f"{checkpoint.folder.name}: tensor {found[name].source.name} is not part of Qwen3.5")
        if found[name].shape != shapes[name]:
            raise CheckpointError(
                f"{checkpoint.folder.name}: {found[name].source.name}: shape {list(found[name].shape)}, "
                f"config.json calls for {list(shapes[name])}"
            )
    return out


def _targets_of(info: TensorInfo, cfg: Config) -> list[Target]:
    name, part = _mlx_name(info.name)
    if name is None or (name == "language_model.lm_head.weight" and cfg.tie_word_embeddings):
        return []
    if info.dtype not in FLOATS:
        raise CheckpointError(f"{info.file.name}: {info.name}: dtype {info.dtype}, expected one of {', '.join(FLOATS)}")
    dtype = "F32" if name.endswith(".A_log") else cfg.dtype
    shape = info.shape
    if name.endswith(".mlp.experts.gate_up_proj"):
        if len(shape) != 3 or shape[1] % 2:
            raise CheckpointError(
                f"{info.file.name}: {info.name}: shape {list(shape)}, expected [experts, 2 × inner, hidden]"
            )
        stem, half = name.removesuffix("experts.gate_up_proj") + "switch_mlp.", (shape[0], shape[1] // 2, shape[2])
        return [
            Target(stem + "gate_proj.weight", half, dtype, info, "first_half", part),
            Target(stem + "up_proj.weight", half, dtype, info, "second_half", part),
        ]
    name = name.replace(".mlp.experts.down_proj", ".mlp.switch_mlp.down_proj.weight")
    op: Op = "copy"
    if name.endswith(".conv1d.weight"):
        if len(shape) != 3 or shape[1] != 1:
            raise CheckpointError(f"{info.file.name}: {info.name}: shape {list(shape)}, expected [channels, 1, width]")
        shape = (shape[0], shape[2], 1)  # the same bytes
    elif name == "vision_tower.patch_embed.proj.weight":
        if len(shape) != 5:
            raise CheckpointError(f"{info.file.name}: {info.name}: shape {list(shape)}, expected five axes")
        op, shape = "patch_embed", (shape[0], *shape[2:], shape[1])
    elif PLUS_ONE.search(name):
        op = "plus_one"
    return [Target(name, shape, dtype, info, op, part)]


def _mlx_name(name: str) -> tuple[str | None, Part]:
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model."), "text"
    if name.startswith("lm_head."):
        return "language_model." + name, "text"
    if name.startswith("model.visual."):
        return "vision_tower." + name.removeprefix("model.visual."), "vision"
    if name.startswith("mtp."):
        return name, "mtp"
    raise CheckpointError(f"tensor {name} is not part of a Qwen3.5 checkpoint")
