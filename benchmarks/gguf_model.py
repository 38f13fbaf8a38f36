"""An original checkpoint as a GGUF that llama.cpp runs, and a GGUF's codes back in the original layout as float32.

    python benchmarks/gguf_model.py BASE OUT.gguf [--type F32]
    python benchmarks/gguf_model.py BASE OUT_FOLDER --dequantize QUANTIZED.gguf

Needs neither torch nor llama.cpp. Llama and dense Qwen3.5, text only. What llama.cpp wants otherwise than the original
layout: Llama's q and k rows with the rotary halves interleaved; Qwen3.5's value heads tiled ([r, nk, d] for r value
heads a key head, the original has [nk, r, d]), `1 + w` for the norms that use it, `-exp(A_log)`. Only matrices are read
back from a quantized file: vectors and the convolution must be float32 there, and come from the base unchanged.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inference.checkpoint import TensorInfo, read_checkpoint, read_json
from inference.families import family_of, names_of

Reshape = Callable[[np.ndarray], np.ndarray]
PRE = {
    "llama": "smollm",
    "qwen3_5": "qwen35",
}  # llama.cpp's name of the pre-tokenizer; `same_tokens` in gguf_rows checks it
SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
LLAMA = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
QWEN = LLAMA | {
    "post_attention_layernorm": "post_attention_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha", "linear_attn.in_proj_b": "ssm_beta", "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor of the text model: its name in GGUF, its source, and the way there and back."""

    gguf: str
    source: TensorInfo
    to_gguf: Reshape
    from_gguf: Reshape | None  # None: not a matrix, never quantized


def tensors(base: Path) -> list[Tensor]:
    """Text tensors of an original checkpoint folder."""
    checkpoint = read_checkpoint(base)
    family = family_of(checkpoint.config)
    if family not in PRE:
        raise SystemExit(f"{base.name}: model_type {checkpoint.config.get('model_type')!r} has no GGUF mapping here")
    cfg = names_of(checkpoint.config).read_config(checkpoint.config)
    out = []
    for name, info in sorted(checkpoint.tensors.items()):
        short = re.sub(r"^model\.(language_model\.)?", "", name)
        if short.startswith(("visual.", "mtp.")) or (short == "lm_head.weight" and cfg.tie_word_embeddings):
            continue
        out.append(_tensor(family, cfg, short, info))
    return out


def write_gguf(base: Path, out: Path, type_name: str = "F32") -> None:
    """The base as a GGUF; type_name F32, F16 or BF16 is that of the matrices, all else is float32."""
    import gguf

    matrix_type = gguf.GGMLQuantizationType[type_name]
    raw = read_json(base / "config.json")
    writer = gguf.GGUFWriter(out, {"llama": "llama", "qwen3_5": "qwen35"}[family_of(raw)])
    _write_hyperparameters(writer, raw)
    _write_tokenizer(writer, base, PRE[family_of(raw)])
    for t in tensors(base):
        x = np.ascontiguousarray(t.to_gguf(read_float32(t.source)))
        kind = matrix_type if t.from_gguf else gguf.GGMLQuantizationType.F32
        writer.add_tensor(t.gguf, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantized(base: Path, quantized: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every text tensor of the base by its original name, as the GGUF holds it; float32."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = {t.name: t for t in GGUFReader(quantized).tensors}
    wanted = tensors(base)
    if set(stored) != {t.gguf for t in wanted}:
        odd = min(set(stored) ^ {t.gguf for t in wanted})
        raise SystemExit(f"{quantized.name}: {odd} is in only one of the GGUF and {base.name}")
    for t in wanted:
        if t.from_gguf is None:
            if stored[t.gguf].tensor_type.name != "F32":
                raise SystemExit(f"{quantized.name}: {t.gguf} is {stored[t.gguf].tensor_type.name}, expected F32")
            yield t.source.name, read_float32(t.source)
            continue
        x = dequantize(stored[t.gguf].data, stored[t.gguf].tensor_type).astype(np.float32)
        yield t.source.name, np.ascontiguousarray(t.from_gguf(x)).reshape(t.source.shape)


def write_dequantized(base: Path, quantized: Path, out: Path) -> None:
    """A float32 checkpoint folder in the original layout that computes what the GGUF's codes say."""
    write_float32(base, dict(dequantized(base, quantized)), out)


def write_float32(base: Path, weights: dict[str, np.ndarray], out: Path) -> None:
    """A checkpoint folder in the original layout with these float32 tensors and the base's config and tokenizer."""
    from safetensors.numpy import save_file

    out.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def text_bytes(gguf_file: Path) -> tuple[int, int, dict[str, int]]:
    """(bytes of all tensors, their elements, number of tensors by type)"""
    from gguf import GGUFReader

    nbytes, params, kinds = 0, 0, {}
    for t in GGUFReader(gguf_file).tensors:
        nbytes, params = nbytes + int(t.n_bytes), params + int(t.n_elements)
        kinds[t.tensor_type.name] = kinds.get(t.tensor_type.name, 0) + 1
    return nbytes, params, dict(sorted(kinds.items()))


def read_float32(info: TensorInfo) -> np.ndarray:
    data = bytes(info.read())
    if info.dtype == "BF16":
        x = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        x = np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[info.dtype]).astype(np.float32)
    return x.reshape(info.shape)


def _tensor(family: str, cfg: Any, short: str, info: TensorInfo) -> Tensor:
    """short: the original name without `model.` or `model.language_model.`"""
    if short == "lm_head.weight":
        return Tensor("output.weight", info, _same, _same)
    if short == "embed_tokens.weight":
        return Tensor("token_embd.weight", info, _same, _same)
    plus_one = (lambda x: x + np.float32(1)) if family == "qwen3_5" else _same
    if short == "norm.weight":
        return Tensor("output_norm.weight", info, plus_one, None)
    layer, module = re.fullmatch(r"layers\.(\d+)\.(.+)", short).groups()  # type: ignore[union-attr]
    block = f"blk.{layer}."
    if module == "linear_attn.A_log":
        return Tensor(block + "ssm_a", info, lambda x: _tile_rows(cfg, -np.exp(x), 0, 1), None)
    if module == "linear_attn.dt_bias":
        return Tensor(block + "ssm_dt.bias", info, lambda x: _tile_rows(cfg, x, 0, 1), None)
    module = module.removesuffix(".weight")
    name = block + (QWEN if family == "qwen3_5" else LLAMA)[module] + ".weight"
    if module.endswith("norm"):
        return Tensor(name, info, _same if module == "linear_attn.norm" else plus_one, None)
    if family == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = cfg.num_attention_heads if module.endswith("q_proj") else cfg.num_key_value_heads
        return Tensor(name, info, lambda x: _interleave(x, heads), lambda x: _interleave(x, heads, back=True))
    if module.startswith("linear_attn."):
        return _linear_attention(cfg, name, module.removeprefix("linear_attn."), info)
    return Tensor(name, info, _same, _same)


def _linear_attention(cfg: Any, name: str, module: str, info: TensorInfo) -> Tensor:
    d, before = cfg.linear_value_head_dim, 2 * cfg.linear_num_key_heads * cfg.linear_key_head_dim
    if module == "conv1d":
        return Tensor(name, info, lambda x: _tile_rows(cfg, x.reshape(x.shape[0], -1), before, d), None)
    if module == "out_proj":
        return Tensor(
            name, info, lambda x: _tile_rows(cfg, x.T, 0, d).T, lambda x: _tile_rows(cfg, x.T, 0, d, back=True).T
        )
    start, size = {"in_proj_qkv": (before, d), "in_proj_z": (0, d), "in_proj_a": (0, 1), "in_proj_b": (0, 1)}[module]
    return Tensor(
        name, info, lambda x: _tile_rows(cfg, x, start, size), lambda x: _tile_rows(cfg, x, start, size, back=True)
    )


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _interleave(x: np.ndarray, heads: int, back: bool = False) -> np.ndarray:
    """Rows of each head from [first halves, second halves] to pairs, as llama.cpp rotates them; back: the inverse."""
    half = x.shape[0] // heads // 2
    parts = (heads, half, 2, -1) if back else (heads, 2, half, -1)
    return x.reshape(parts).swapaxes(1, 2).reshape(x.shape)


def _tile_rows(cfg: Any, x: np.ndarray, start: int, size: int, back: bool = False) -> np.ndarray:
    """Value heads of `size` rows each, from row `start` on, from [nk, r] to [r, nk]; back: the inverse."""
    nk, r = cfg.linear_num_key_heads, cfg.linear_num_value_heads // cfg.linear_num_key_heads
    v = x[start:]
    v = v.reshape((r, nk, size, -1) if back else (nk, r, size, -1)).swapaxes(0, 1).reshape(v.shape)
    return np.concatenate([x[:start], v])


def _write_hyperparameters(writer: Any, raw: dict[str, Any]) -> None:
    cfg, text = names_of(raw).read_config(raw), raw.get("text_config", raw)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_context_length(int(text.get("max_position_embeddings", 8192)))
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_vocab_size(cfg.vocab_size)
    if family_of(raw) == "llama":
        if cfg.rope.kind != "default":
            raise SystemExit(f"config.json: rope_type {cfg.rope.kind!r} has no GGUF mapping here")
        writer.add_rope_freq_base(cfg.rope.theta)
        writer.add_rope_dimension_count(cfg.head_dim)
        return
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_rope_dimension_count(cfg.rotary_dim)
    sections = text["rope_parameters"].get("mrope_section", [11, 11, 10])
    writer.add_rope_dimension_sections([*sections, 0])
    writer.add_ssm_conv_kernel(cfg.linear_conv_kernel_dim)
    writer.add_ssm_state_size(cfg.linear_key_head_dim)
    writer.add_ssm_group_count(cfg.linear_num_key_heads)
    writer.add_ssm_time_step_rank(cfg.linear_num_value_heads)
    writer.add_ssm_inner_size(cfg.linear_num_value_heads * cfg.linear_value_head_dim)
    writer.add_full_attention_interval(int(text.get("full_attention_interval", 4)))


def _write_tokenizer(writer: Any, base: Path, pre: str) -> None:
    from gguf import TokenType

    file, raw = json.loads((base / "tokenizer.json").read_text(encoding="utf-8")), read_json(base / "config.json")
    vocab = {i: t for t, i in file["model"]["vocab"].items()}
    added = {t["id"]: t for t in file["added_tokens"]}
    vocab |= {i: t["content"] for i, t in added.items()}
    size = raw.get("text_config", raw)["vocab_size"]
    kinds = []
    for i in range(size):
        if i not in vocab:
            kinds.append(TokenType.UNUSED)
        elif i in added:
            kinds.append(TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([vocab.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in file["model"]["merges"]])
    writer.add_add_bos_token(False)
    text = raw.get("text_config", raw)
    if isinstance(text.get("eos_token_id"), int):
        writer.add_eos_token_id(text["eos_token_id"])
    if isinstance(text.get("bos_token_id"), int):
        writer.add_bos_token_id(text["bos_token_id"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="F32", choices=("F32", "F16", "BF16"))
    parser.add_argument("--dequantize", type=Path, metavar="GGUF")
    args = parser.parse_args()
    if args.dequantize:
        write_dequantized(args.base, args.dequantize, args.out)
    else:
        write_gguf(args.base, args.out, args.type)


if __name__ == "__main__":
    main()
