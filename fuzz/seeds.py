"""Writes the valid inputs that fuzzing starts from: fuzz/corpus/TARGET/seed-*. From the bundled example alone."""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
MODEL = HERE.parent / "examples/tiny/model"

TOKENIZER = {  # a tokenizer with one of every part that can make text grow or fail
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    },
    "added_tokens": [
        {
            "id": 3,
            "content": "<s>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}},
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    },
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {"a": 0, "b": 1, "ab": 2},
        "merges": [["a", "b"]],
    },
}
VARIANTS = """\
base: {path: model, name: Tiny-1B}
owner: acme
repo: "{base}-UD-{id}-mlx"
recipe: mine
recipes:
  mine:
    extends: uniform
    rules:
    - {match: "*.self_attn.{q,k}_proj", bits: N+1, why: "they \\u00e4re few", layers: [0, 3]}
    - {match: "*.mlp.*", bits: 6, optional: true}
    smoke_kld: {4: 0.5}
allocation: {pins: [{match: "*.lm_head", bits: 6}], floors: [{match: "*", bits: 2}]}
imatrix: ./imatrix.gguf
collection: {title: Tiny}
smoke: {prompts: [Hi], max_tokens: 32}
variants:
  Q4:
    bits: 4
    note: |
      two
      lines
  Q5: {size: fits 16 GB, rules: [{match: "a*", bits: bf16, group_size: 32}]}
  Q6: {size: as uniform 6, imatrix: false, kld_ceiling: 0.1}
"""
TEMPLATE = """\
---
license: mit
{% for t in card.tags %}- {{ t | upper }}{% endfor %}
---
{% macro row(v, n=2) %}| {{ v.id }} | {{ "%.1f" % v.kld }} | {{ "{:>{w}}".format(n, w=4) }} |{% endmacro %}
{% set ns = namespace(x=0) %}
{% for v in facts.variants if v.id != 'x' recursive %}{% set ns.x = ns.x + loop.index %}{{ row(v) }}{% else %}none{% endfor %}
{{ ns.x ~ card.rows | join(', ') }}{{ card.tags[0:1] | tojson(indent=2) }}{{ (1, 2) | sum }}{{ 'ab' * 3 }}{{ 2 ** 3 }}
{% block a %}{{ card.id | default('-') | replace('Q', 'q') }}{% endblock %}{% include 'builtin/x' ignore missing %}
"""
CHAT = """\
{%- for m in messages %}{% if loop.index0 > 5 %}{% break %}{% endif %}
<|{{ m.role }}|>{% generation %}{{ m['content'].split('</think>')[-1].lstrip('\\n') | trim }}{% endgeneration %}
{%- endfor %}{{ tools | tojson(indent=1) }}{{ strftime_now('%Y') | length }}{% if add_generation_prompt %}<|a|>{% endif %}
{% if messages[::-1][0].role not in ['user', 'assistant'] %}{{ raise_exception('no ' + eos_token) }}{% endif %}
"""
README = """\
---
license: apache-2.0
language: [en, zh]
tags:
- "a: b"
base_model: acme/x
date: 2026-01-01
n: 0x1F
f: 1.5e3
---
# Title

| a | b |
|--|--|

```python
x = {"a": {}}
```
"""


def seeds() -> dict[str, list[bytes]]:
    from targets import tiny_config

    config = tiny_config()
    packed = {
        **config,
        "quantization": {
            "bits": 4,
            "group_size": 64,
            "mode": "affine",
            "a.b": {"bits": 8, "group_size": 32},
            "c": False,
        },
    }
    llama = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 8192,
        },
    }
    tensors = {
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    }
    head = js({"__metadata__": {"format": "pt"}, **tensors})
    return {
        "header": [bytes([26]) + head, b"\0" + len(head).to_bytes(8, "little") + head + bytes(26)],
        "index": [
            js(
                {
                    "metadata": {"total_size": 3},
                    "weight_map": {"a": "model-0.safetensors", "b": "model-0.safetensors", "c": "model-1.safetensors"},
                }
            )
        ],
        "config": [js(config), js(packed), js(llama)],
        "tokenizer": [
            js(TOKENIZER),
            js({**TOKENIZER, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}),
            js(
                {
                    **TOKENIZER,
                    "model": {
                        "type": "Unigram",
                        "unk_id": 0,
                        "vocab": [["a", -1.0], ["b", -2.5]],
                        "byte_fallback": False,
                    },
                }
            ),
        ],
        "tokenizer_config": [
            js({"bos_token": "a", "eos_token": {"content": "a"}, "chat_template": CHAT, "add_bos_token": True}),
            js({"chat_template": [{"name": "default", "template": "x"}], "eos_token": "a"}),
        ],
        "chat_template": [CHAT.encode()],
        "imatrix": [imatrix()],
        "variants": [VARIANTS.encode()],
        "allocation": [
            b"size: 5 GB\nbudget_nbytes: 5\nnbytes: 4\npredicted_kld: 0.1\nconstraints: "
            + b"c" * 64
            + b"\ncosts: "
            + b"a" * 64
            + b"\nstatistics: "
            + b"b" * 64
            + b"\nsolver: gptq\nversion: 1\nrules:\n- {match: a, bits: 4}\n"
        ],
        "records": [
            b"\1"
            + js(
                {
                    "id": "Q4",
                    "repo": "a/b",
                    "endpoint": "e",
                    "commit": "c",
                    "weights_hash": "0" * 64,
                    "files": [],
                    "pushed_at": "x",
                }
            ),
            b"\3" + js({"base": {"repo": "a/b", "revision": "main", "commit": "c"}, "imatrix": []}),
        ],
        "conversations": [
            js(
                [
                    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh"}],
                    {"messages": [{"role": "assistant", "content": "x"}]},
                ]
            )
        ],
        "card_template": [TEMPLATE.encode()],
        "front_matter": [README.encode()],
        "commit": [b"\n".join(js(x) for x in operations())],
        "xorb": xorbs(),
        "shard": shards(),
        "answers": answers(),
    }


def js(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def imatrix() -> bytes:
    from targets import SMALL

    from quant.imatrix import gguf_shapes, write_imatrix

    sums = {n: (np.ones(shape, np.float32), np.ones(shape[0], np.float32)) for n, shape in gguf_shapes(SMALL).items()}
    with tempfile.TemporaryDirectory() as folder:
        write_imatrix(Path(folder) / "i.gguf", sums, ["a.txt"])
        return (Path(folder) / "i.gguf").read_bytes()


def operations() -> list[dict[str, Any]]:
    sha = "ab" * 32
    return [
        {"key": "header", "value": {"summary": "s", "description": "", "parentCommit": "a" * 40}},
        {
            "key": "file",
            "value": {"path": "README.md", "content": base64.b64encode(README.encode()).decode(), "encoding": "base64"},
        },
        {"key": "file", "value": {"path": "x/ü.txt", "content": "text", "encoding": "utf-8"}},
        {"key": "lfsFile", "value": {"path": "m.safetensors", "algo": "sha256", "oid": sha, "size": 5}},
        {"key": "copyFile", "value": {"path": "c", "srcPath": "README.md", "srcRevision": "a" * 40}},
        {"key": "deletedFile", "value": {"path": "a/b.txt"}},
        {"key": "deletedFolder", "value": {"path": "x/"}},
    ]


def xorbs() -> list[bytes]:
    import lz4.frame

    def chunk(data: bytes, packed: bytes, scheme: int) -> bytes:
        return (
            bytes([0]) + len(packed).to_bytes(3, "little") + bytes([scheme]) + len(data).to_bytes(3, "little") + packed
        )

    plain, text = b"plain", b"abcd" * 20
    return [chunk(plain, plain, 0) + chunk(text, lz4.frame.compress(text), 1)]


def shards() -> list[bytes]:
    from publisher.localhub.xet_format import Chunk, read_shard, write_shard

    whole = write_shard("ab" * 32, [Chunk("cd" * 32, 5, 13)], 0, 0)
    read_shard(whole)
    return [whole, b"\1" + whole[48:]]


def answers() -> list[bytes]:
    sha = "a" * 40
    sibling = {
        "rfilename": "config.json",
        "size": 3,
        "blobId": sha,
        "lfs": {"sha256": sha, "size": 3, "pointerSize": 1},
    }
    bodies = {
        0: {"id": "acme/x", "sha": sha, "private": False, "siblings": [sibling], "cardData": {"license": "mit"}},
        1: [
            {"type": "file", "oid": sha, "size": 3, "path": "a/b.txt"},
            {
                "type": "file",
                "oid": sha,
                "size": 9,
                "path": "m.safetensors",
                "lfs": {"oid": "b" * 64, "size": 9, "pointerSize": 1},
                "xetHash": "c" * 64,
            },
            {"type": "directory", "oid": sha, "path": "a"},
        ],
        2: {
            "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": sha}],
            "converts": [],
            "tags": [{"name": "v1", "ref": "refs/tags/v1", "targetCommit": sha}],
        },
        3: {"name": "acme", "orgs": [{"name": "o"}], "auth": {"accessToken": {"role": "write"}}},
        4: {"errors": [{"message": "no"}], "warnings": []},
        5: {"id": "acme/x", "sha": sha},
        6: {
            "title": "t",
            "num": 3,
            "author": {"name": "a"},
            "createdAt": "2026-01-01T00:00:00.000Z",
            "status": "open",
            "repo": {"name": "acme/x", "type": "model"},
            "isPullRequest": True,
            "events": [],
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
        },
        7: {"url": "http://127.0.0.1:9/acme/x"},
        8: {},
        9: {},
    }
    return [
        *(bytes([n, 0]) + js(body) for n, body in bodies.items()),
        bytes([4, 3]) + js(bodies[4]),
        bytes([7, 7]) + js(bodies[7]),
        bytes([0, 6]) + b'{"error":"gone"}',
    ]


def main() -> None:
    for name, values in seeds().items():
        folder = HERE / "corpus" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(values):
            (folder / f"seed-{i}").write_bytes(data)


if __name__ == "__main__":
    main()
