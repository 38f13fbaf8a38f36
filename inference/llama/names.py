"""Llama, dense: hyperparameters and the tensors of its checkpoints, without MLX.

Source of the layout: `transformers` model llama and mlx-lm's of the same name. Both call the tensors alike and store them
alike, so that every tensor is copied as it is; what a checkpoint may hold beside them (`rotary_emb.inv_freq` of old
exports, an `lm_head` that is tied to the embedding) is left out, as both leave it unread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..checkpoint import CONFIG_DTYPES, FLOATS, ITEMSIZE, MAX_LAYERS, Checkpoint, TensorInfo
from ..errors import CheckpointError
from ..layout import Target

SKIPPED: tuple[str, ...] = ()  # tensors of a checkpoint in MLX layout that the text model does not read
ROTARY = "rotary_emb.inv_freq"  # computed from the config instead
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. kind: one of ROPE_TYPES; the rest as in the config, unused (0) where the kind has no use for it."""

    theta: float
    kind: str = "default"
    factor: float = 0
    low_freq_factor: float = 0
    high_freq_factor: float = 0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class Config:
    """Hyperparameters, named as in config.json."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope
    intermediate_size: int
    attention_bias: bool
    mlp_bias: bool
    dtype: str  # safetensors name of the model's own type


def read_config(config: dict[str, Any]) -> Config:
    """Hyperparameters from a config.json. Raises CheckpointError naming the key that is missing or wrong.

    A key that is absent has the default of `transformers`; sizes have none here.
    """

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise CheckpointError(f"config.json: {key}: found {value!r}, expected an integer ≥ 1")
        return value

    def flag(key: str) -> bool:
        value = config.get(key, False)
        if type(value) is not bool:
            raise CheckpointError(f"config.json: {key}: found {value!r}, expected true or false")
        return value

    layers = number("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise CheckpointError(f"config.json: num_hidden_layers: found {layers}, expected at most {MAX_LAYERS}")
    # rope_traditional is mlx-lm's own key; `transformers` would not follow it
    for key, only in (("hidden_act", "silu"), ("rope_traditional", False), ("partial_rotary_factor", 1)):
        if config.get(key, only) != only:
            raise CheckpointError(f"config.json: {key}: found {config[key]!r}, only {only!r} is supported")
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * layers:
        raise CheckpointError("config.json: layer_types: only full_attention, named once a layer, is supported")
    eps = config.get("rms_norm_eps", 1e-6)
    if not _is_number(eps) or not 0 < eps <= 1:
        raise CheckpointError(f"config.json: rms_norm_eps: found {eps!r}, expected a positive number up to 1")
    hidden, heads = number("hidden_size"), number("num_attention_heads")
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = number("head_dim", max(1, hidden // heads))
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim: found {head_dim}, expected an even number")
    kv_heads = number("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if not isinstance(dtype, str) or dtype not in CONFIG_DTYPES:
        raise CheckpointError(f"config.json: dtype {dtype!r}: expected one of {', '.join(CONFIG_DTYPES)}")
    return Config(
        model_type=config["model_type"],
        hidden_size=hidden,
        num_hidden_layers=layers,
        vocab_size=number("vocab_size"),
        rms_norm_eps=float(eps),
        tie_word_embeddings=flag("tie_word_embeddings"),
        max_position_embeddings=number("max_position_embeddings", 2048),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope=_rope(config),
        intermediate_size=number("intermediate_size"),
        attention_bias=flag("attention_bias"),
        mlp_bias=flag("mlp_bias"),
        dtype=CONFIG_DTYPES[dtype],
    )


def _rope(config: dict[str, Any]) -> Rope:
    """From `rope_theta` and `rope_scaling`, or from `rope_parameters`, which holds both (transformers 5)."""
    blocks = {k: config[k] for k in ("rope_scaling", "rope_parameters") if config.get(k) is not None}
    for key, block in blocks.items():
        if not isinstance(block, dict):
            raise CheckpointError(f"config.json: {key}: found {block!r}, expected an object")
    where = "rope_scaling" if blocks.get("rope_scaling") else "rope_parameters"
    block = blocks.get(where, {})
    same = {k: {n: v for n, v in b.items() if n != "rope_theta"} for k, b in blocks.items() if b}
    if any(b != same[where] for b in same.values()):
        raise CheckpointError("config.json: rope_scaling and rope_parameters differ")

    def read(key: str, whole: bool = False) -> Any:
        value = block.get(key)
        if not _is_number(value) or not 0 < value < math.inf or (whole and type(value) is not int):
            expected = "a positive integer" if whole else "a positive number"
            raise CheckpointError(f"config.json: {where}.{key}: found {value!r}, expected {expected}")
        return value if whole else float(value)

    inner = [b["rope_theta"] for b in blocks.values() if "rope_theta" in b]
    thetas = [*([config["rope_theta"]] if config.get("rope_theta") is not None else []), *inner]
    theta = thetas[0] if thetas else 10_000
    if not _is_number(theta) or not 1 < theta < math.inf:
        raise CheckpointError(f"config.json: rope_theta: found {theta!r}, expected a number above 1")
    if any(t != theta for t in thetas):
        raise CheckpointError(f"config.json: rope_theta is given twice, as {theta!r} and {thetas[-1]!r}")
    if block.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError(f"config.json: {where}.partial_rotary_factor: only 1 is supported")
    kind = block.get("rope_type", block.get("type", "default"))
    if kind != block.get("type", kind):
        raise CheckpointError(f"config.json: {where}: type {block['type']!r} and rope_type {kind!r} differ")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise CheckpointError(f"config.json: {where}.rope_type: found {kind!r}, supported are {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return Rope(float(theta))
    if kind == "linear":
        return Rope(float(theta), kind, read("factor"))
    low, high = read("low_freq_factor"), read("high_freq_factor")
    if low >= high:
        raise CheckpointError(f"config.json: {where}: low_freq_factor {low:g} must be below high_freq_factor {high:g}")
    return Rope(float(theta), kind, read("factor"), low, high, read("original_max_position_embeddings", whole=True))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rope_wavelengths(cfg: Config) -> list[float]:
    """1 / frequency of each of the head_dim / 2 rotations, in tokens a radian.

    Source: `transformers.modeling_rope_utils`, `_compute_llama3_parameters` and `_compute_linear_scaling_rope_parameters`.
    """
    rope = cfg.rope
    plain = [rope.theta ** (i / cfg.head_dim) for i in range(0, cfg.head_dim, 2)]
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return [w * rope.factor for w in plain]
    out = []
    for w in plain:
        turns = rope.original_max_position_embeddings / (2 * math.pi * w)  # full turns within the original context
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = min(1.0, max(0.0, smooth))  # 1: a short wave, left alone; 0: a long one, stretched by the factor
        out.append(w / ((1 - smooth) / rope.factor + smooth))
    return out


def mlx_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same model for mlx-lm, which knows no `rope_parameters`, has other defaults and ties what is not said to be
    untied. Nothing that is there is changed."""
    cfg = read_config(config)
    wanted: dict[str, Any] = {
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope.theta,
        "tie_word_embeddings": cfg.tie_word_embeddings,
    }
    if cfg.rope.kind != "default" and not config.get("rope_scaling"):
        wanted["rope_scaling"] = {k: v for k, v in config["rope_parameters"].items() if k != "rope_theta"}
    return dict(config) | {k: v for k, v in wanted.items() if config.get(k) is None}


def text_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor the model must have, by MLX name, with its unpacked shape."""
    h, inter = cfg.hidden_size, cfg.intermediate_size
    q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (cfg.vocab_size, h)}
    for i in range(cfg.num_hidden_layers):
        p = f"model.layers.{i}."
        out[p + "input_layernorm.weight"] = out[p + "post_attention_layernorm.weight"] = (h,)
        a, m = p + "self_attn.", p + "mlp."
        out[a + "q_proj.weight"] = (q, h)
        out[a + "k_proj.weight"] = out[a + "v_proj.weight"] = (kv, h)
        out[a + "o_proj.weight"] = (h, q)
        if cfg.attention_bias:
            out[a + "q_proj.bias"] = (q,)
            out[a + "k_proj.bias"] = out[a + "v_proj.bias"] = (kv,)
            out[a + "o_proj.bias"] = (h,)
        out[m + "gate_proj.weight"] = out[m + "up_proj.weight"] = (inter, h)
        out[m + "down_proj.weight"] = (h, inter)
        if cfg.mlp_bias:
            out[m + "gate_proj.bias"] = out[m + "up_proj.bias"] = (inter,)
            out[m + "down_proj.bias"] = (h,)
    out["model.norm.weight"] = (h,)
    if not cfg.tie_word_embeddings:
        out["lm_head.weight"] = (cfg.vocab_size, h)
    return out


def cache_nbytes(cfg: Config, tokens: int) -> int:
    """Bytes of keys and values after `tokens` tokens of one sequence, in the model's own type."""
    return cfg.num_hidden_layers * 2 * cfg.num_key_value_heads * cfg.head_dim * tokens * ITEMSIZE[cfg.dtype]


def targets(checkpoint: Checkpoint) -> list[Target]:
    """MLX-layout tensors of an original checkpoint, in the order in which they lie on disk.

    Raises CheckpointError if the checkpoint is in MLX layout already, is quantized, holds a tensor that the layout
    does not know, or lacks one that the config calls for.
    """
    where = checkpoint.folder.name
    if checkpoint.mlx:
        raise CheckpointError(f"{where}: is in MLX layout already; expected an original checkpoint")
    for key in ("quantization", "quantization_config"):
        if key in checkpoint.config:
            raise CheckpointError(f"{where}/config.json: {key}: the source is quantized already")
    cfg = read_config(checkpoint.config)
    shapes = text_shapes(cfg)
    out = [
        _target(where, info, shapes, cfg)
        for info in sorted(checkpoint.tensors.values(), key=lambda t: (t.file.name, t.start))
        if not (info.name.endswith(ROTARY) or (info.name == "lm_head.weight" and cfg.tie_word_embeddings))
    ]
    missing = sorted(shapes.keys() - {t.name for t in out})
    if missing:
        raise CheckpointError(f"{where}: tensor {missing[0]} is missing")
    return out


def _target(where: str, info: TensorInfo, shapes: dict[str, tuple[int, ...]], cfg: Config) -> Target:
    if info.name not in shapes:
        raise CheckpointError(f"{where}: tensor {info.name} is not part of a Llama checkpoint")
    if info.dtype not in FLOATS:
        raise CheckpointError(f"{info.file.name}: {info.name}: dtype {info.dtype}, expected one of {', '.join(FLOATS)}")
    if info.shape != shapes[info.name]:
        raise CheckpointError(
            f"{where}: {info.name}: shape {list(info.shape)}, config.json calls for {list(shapes[info.name])}"
        )
    return Target(info.name, info.shape, cfg.dtype, info)
