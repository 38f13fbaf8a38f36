"""A ladder whose one quantized matrix is solved with statistics of few tokens; its variants are to follow."""

HEAD = """\
base: {path: model, name: tiny}
imatrix: ./imatrix-tiny.gguf
calibration: {text: ./words.txt, chat: false, tokens: 96, context: 48, fisher_tokens: 48}
recipes:
  one: {solver: gptq, rules: [{match: "*.layers.3.self_attn.q_proj", bits: N}, {match: "*", bits: bf16}]}
recipe: one
"""
