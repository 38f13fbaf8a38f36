"""Llama for the quantizer: tensor classes, imatrix names, AWQ groups.

Patterns are globs over MLX module paths (see `quant.recipe.matches`).
"""

from __future__ import annotations

from .recipe import TensorClass
from .tables import Entry, Group, Readers

# the rows of the card's table, in its order; the first match decides
CLASSES: tuple[TensorClass, ...] = (
    TensorClass("embed_tokens", "model.embed_tokens"),
    TensorClass("lm_head", "lm_head"),
    TensorClass("self_attn.q/k/v_proj", "*.self_attn.{q,k,v}_proj"),
    TensorClass("self_attn.o_proj", "*.self_attn.o_proj"),
    TensorClass("down_proj", "*.mlp.down_proj"),
    TensorClass("gate_proj, up_proj", "*.mlp.{gate,up}_proj"),
    TensorClass("norms", "*norm", dense=True),
    TensorClass("biases", "*.bias", dense=True),
)

AWQ_GROUPS: tuple[Group, ...] = (
    Group("A", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", every=False),
    Group("B", ("mlp.down_proj",), "mlp.up_proj", rows=True),
    Group("C", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
)

READERS: tuple[Readers, ...] = (
    Readers("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Readers("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Readers("model.norm", ("lm_head",)),
)
PAIRED_NORMS: tuple[tuple[str, str], ...] = ()

# llama.cpp's names (gguf-py constants for llama). Its converter permutes the ROWS of q and k within each head, for its
# own order of rotations; input channels, which statistics are of, stay as they are. The output may be missing
# (llama-imatrix --process-output).
IMATRIX_NAMES: tuple[Entry, ...] = (
    Entry("attn_q", ("self_attn.q_proj",), required=True),
    Entry("attn_k", ("self_attn.k_proj",), required=True),
    Entry("attn_v", ("self_attn.v_proj",), required=True),
    Entry("attn_output", ("self_attn.o_proj",), required=True),
    Entry("ffn_gate", ("mlp.gate_proj",), required=True),
    Entry("ffn_up", ("mlp.up_proj",), required=True),
    Entry("ffn_down", ("mlp.down_proj",), required=True),
    Entry("output", ("lm_head",), layered=False),
    Entry("token_embd", ("model.embed_tokens",), layered=False),
)
# what a card says of the family: tags, whom to thank (name, link, for what), and the question of its usage snippets
CARD_TAGS: tuple[str, ...] = ()
CARD_CREDIT = ("Meta", "https://huggingface.co/meta-llama", "the Llama architecture")
CARD_QUESTION = "Why is the sky blue?"

LAYERS = "model.layers"  # prefix of the layers' module paths
PARTS = ("text",)  # of a checkpoint
