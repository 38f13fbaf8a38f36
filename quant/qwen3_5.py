"""Qwen3.5 for the quantizer: tensor classes, imatrix names, AWQ groups.

Patterns are globs over MLX module paths (see `quant.recipe.matches`).
"""

from __future__ import annotations

from .recipe import TensorClass
from .tables import Entry, Group, Readers

# the rows of the card's table, in its order; the first match decides
CLASSES: tuple[TensorClass, ...] = (
    TensorClass("embed_tokens", "*.embed_tokens"),
    TensorClass("lm_head", "*.lm_head"),
    TensorClass("self_attn.q/k/v_proj", "*.self_attn.{q,k,v}_proj"),
    TensorClass("linear_attn.in_proj_qkv/z", "*.linear_attn.in_proj_{qkv,z}"),
    TensorClass("linear_attn.in_proj_a/b", "*.linear_attn.in_proj_{a,b}"),
    TensorClass("self_attn.o_proj", "*.self_attn.o_proj"),
    TensorClass("linear_attn.out_proj", "*.linear_attn.out_proj"),
    TensorClass("mlp.gate (router)", "*.mlp.gate"),
    TensorClass("mlp.shared_expert_gate", "*.mlp.shared_expert_gate"),
    TensorClass("experts down_proj", "*.mlp.switch_mlp.down_proj"),
    TensorClass("experts gate_proj, up_proj", "*.mlp.switch_mlp.{gate,up}_proj"),
    TensorClass("shared_expert down_proj", "*.mlp.shared_expert.down_proj"),
    TensorClass("shared_expert gate_proj, up_proj", "*.mlp.shared_expert.{gate,up}_proj"),
    TensorClass("down_proj", "*.mlp.down_proj"),
    TensorClass("gate_proj, up_proj", "*.mlp.{gate,up}_proj"),
    TensorClass("norms", "*norm", dense=True),
    TensorClass("conv1d, A_log, dt_bias", "*.linear_attn.{conv1d,A_log,dt_bias}", dense=True),
)

# MoE layers have no `mlp.{gate,up,down}_proj`, so that A and B pass them by: as in the reference, experts stay unscaled
AWQ_GROUPS: tuple[Group, ...] = (
    Group("A", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", every=False),
    Group("B", ("mlp.down_proj",), "mlp.up_proj", rows=True),
    Group("C", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Group(
        "D", ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), "input_layernorm",
        followers=("linear_attn.in_proj_a", "linear_attn.in_proj_b"),
    ),
)  # fmt: skip

READERS: tuple[Readers, ...] = (
    Readers(
        "input_layernorm",
        (
            *("self_attn." + m for m in ("q_proj", "k_proj", "v_proj")),
            *("linear_attn." + m for m in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")),
        ),
    ),
    Readers(
        "post_attention_layernorm",
        (
            "mlp.gate_proj", "mlp.up_proj", "mlp.gate", "mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj",
            "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate",
        ),
    ),
    Readers("linear_attn.norm", ("linear_attn.out_proj",)),  # kept in float32; a gate stands between, channel by channel
    Readers("model.norm", ("lm_head",)),
)  # fmt: skip
PAIRED_NORMS = (("self_attn.q_norm", "self_attn.k_norm"),)  # of which a score sees the product

# llama.cpp's names (gguf-py constants for qwen35 and qwen35moe). `required`: AWQ or a solver needs the class; the
# routers, the tiny a/b and the output (llama-imatrix --process-output) may be missing.
IMATRIX_NAMES: tuple[Entry, ...] = (
    Entry("attn_q", ("self_attn.q_proj",), required=True),
    Entry("attn_k", ("self_attn.k_proj",), required=True),
    Entry("attn_v", ("self_attn.v_proj",), required=True),
    Entry("attn_output", ("self_attn.o_proj",), required=True),
    Entry("attn_qkv", ("linear_attn.in_proj_qkv",), required=True),
    Entry("attn_gate", ("linear_attn.in_proj_z",), required=True),
    Entry("ssm_alpha", ("linear_attn.in_proj_a",)),
    Entry("ssm_beta", ("linear_attn.in_proj_b",)),
    Entry("ssm_out", ("linear_attn.out_proj",), required=True, tiled=True),
    Entry("ffn_gate", ("mlp.gate_proj",), required=True),
    Entry("ffn_up", ("mlp.up_proj",), required=True),
    Entry("ffn_down", ("mlp.down_proj",), required=True),
    Entry("ffn_gate_exps", ("mlp.switch_mlp.gate_proj",), required=True),
    Entry("ffn_up_exps", ("mlp.switch_mlp.up_proj",), required=True),
    Entry("ffn_gate_up_exps", ("mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"), required=True),
    Entry("ffn_down_exps", ("mlp.switch_mlp.down_proj",), required=True),
    Entry("ffn_gate_shexp", ("mlp.shared_expert.gate_proj",), required=True),
    Entry("ffn_up_shexp", ("mlp.shared_expert.up_proj",), required=True),
    Entry("ffn_down_shexp", ("mlp.shared_expert.down_proj",), required=True),
    Entry("ffn_gate_inp", ("mlp.gate",)),
    Entry("ffn_gate_inp_shexp", ("mlp.shared_expert_gate",)),
    Entry("output", ("language_model.lm_head",), layered=False),
    Entry("token_embd", ("language_model.model.embed_tokens",), layered=False),
)
# what a card says of the family: tags, whom to thank (name, link, for what), and the question of its usage snippets
CARD_TAGS = ("hybrid-attention", "gated-delta-net")
CARD_CREDIT = ("Qwen Team", "https://huggingface.co/Qwen", "the Qwen3.5 model family")
CARD_QUESTION = "Explain the hybrid attention mechanism in Qwen3.5."

LAYERS = "language_model.model.layers"  # prefix of the layers' module paths
PARTS = ("text", "vision", "mtp")  # of a checkpoint; the last two may be missing
