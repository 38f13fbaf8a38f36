"""How many bytes a model needs, from its config.json alone: weights, caches, and what prefill holds beside them. No MLX.

A prompt runs in pieces of PREFILL_STEP tokens, each evaluated before the next, so that the workspace of prefill does not
grow with the prompt except by the attention scores, which have a bound of their own (SCORE_BYTES), and by keys and values
that move to larger buffers. A smaller step needs less. Decode needs weights and caches, and next to nothing beside them.

The backends differ: the CPU and CUDA unpack matrices before they multiply many rows, and compute the delta rule in chunks;
Metal does neither. Constants that the forward pass shares have their home here, where MLX is not needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from .checkpoint import ITEMSIZE, QuantSpec, read_quantization
from .families import names_of

if TYPE_CHECKING:
    from .backend import Backend

PREFILL_STEP = 512  # tokens per piece of a long forward pass, which bounds its memory
SMALLEST_STEP = (
    128  # to which a model's own step may be halved where memory is short; below, weights are read too often
)
CUDA_PREFILL_STEP = 2048  # at 9B on an H100, twice as fast as 512; such cards have the memory
SCORE_BYTES = 256 << 20  # largest block of attention scores, where the backend has no fused kernel
KV_STEP = 256  # tokens by which the buffers of keys and values grow
CHUNK = 64  # tokens of a chunk of the gated delta rule; a power of two
MOST_PLACES = 4  # where experts are padded to one number of rows: places for a routed row, all experts together

# Arrays alive at once, at most, counted in the code of the forward pass and rounded up:
OUTPUTS = 2  # a linear's result and what is made of it
SCORES, SCORE_BLOCKS = 3, 2  # scores, masked scores, their softmax; of this block and the next
CONV = 4  # of the causal conv's channels in float32: joined input, two partial sums, result
DELTA_KEYS, DELTA_VALUES, DELTA_CHUNKS = 9, 6, 10  # per value head in float32: [T, Dk], [T, Dv], [T, CHUNK]
DELTA_STATES = 4  # and [Dv, Dk] for each chunk: transitions, what is written, the states between
KERNEL_KEYS, KERNEL_VALUES = 4, 4  # by MLX's kernel instead, per key head and per value head: normed, as it reads them
IN_FLIGHT = 2  # layers: the next one is begun before what the last one held is free (LAYERS_AHEAD in blocks.py)


@dataclass(frozen=True)
class Need:
    """Bytes for one sequence of `context` tokens. workspace: of prefill, at most."""

    context: int
    weights: int
    caches: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.workspace

    def __str__(self) -> str:
        weights, caches, workspace = (f"{n / 1e9:.3g} GB" for n in (self.weights, self.caches, self.workspace))
        return f"the weights need {weights}, caches of {self.context} tokens {caches}, prefill at most {workspace} beside them"


def need(
    config: dict[str, Any],
    context: int,
    backend: Backend,
    compute: str | None = None,
    weights: int | None = None,
    step: int = PREFILL_STEP,
) -> Need:
    """config: the whole config.json. compute: safetensors name of the type to compute in, the model's own if None.

    step: tokens of a prompt that run at once. weights: their bytes where they are known (from headers); else what the config
    says. Raises CheckpointError as `read_config` does.
    """
    cfg = names_of(config).read_config(config)
    compute = compute or str(cfg.dtype)
    return Need(
        context,
        weights_nbytes(config, compute) if weights is None else weights,
        cache_nbytes(config, context, compute),
        workspace_nbytes(config, context, compute, backend, step),
    )


def weights_nbytes(config: dict[str, Any], compute: str) -> int:
    """Of the language model, loaded; float32 as the type to compute in widens scales and all that is not packed."""
    total = 0
    for name, shape, spec in _formats(config):
        parts = spec.parts(name, shape, compute) if spec else [(name, compute, shape)]
        total += sum(prod(part) * ITEMSIZE["F32" if name.endswith(".A_log") else dtype] for _, dtype, part in parts)
    return total


def cache_nbytes(config: dict[str, Any], tokens: int, compute: str) -> int:
    """Keys and values in whole steps of KV_STEP tokens; conv inputs; states of the delta rule, which are float32."""
    names = names_of(config)
    cfg = replace(names.read_config(config), dtype=compute)
    return names.cache_nbytes(cfg, -(-tokens // KV_STEP) * KV_STEP)


def workspace_nbytes(
    config: dict[str, Any], context: int, compute: str, backend: Backend, step: int = PREFILL_STEP
) -> int:
    """What a piece of `step` tokens holds beside weights and caches, at most, when `context` tokens are cached after it.

    IN_FLIGHT times what the widest layer holds: the results of its linears and what is made of them; conv and delta rule
    in float32; its matrices unpacked, on a backend that unpacks; the keys and values that its buffers grow out of. Experts
    count once there, since routing waits for the layer before. Beside these, attention scores of SCORE_BLOCKS blocks and
    the logits of one token.
    """
    names = names_of(config)
    cfg = names.read_config(config)
    size, t, unpacks = ITEMSIZE[compute], min(step, max(1, context)), backend != "metal"
    outputs: dict[str, int] = defaultdict(int)  # values a token, by layer
    unpacked: dict[str, int] = defaultdict(int)  # bytes of dense matrices
    experts: dict[str, int] = defaultdict(int)  # bytes, where routing waits
    for name, shape, spec in _formats(config):
        if ".layers." not in name or not _is_matrix(shape):
            continue
        layer = name.split(".layers.")[1].split(".")[0]
        if len(shape) == 2:
            outputs[layer] += shape[0]
        else:  # the rows of the chosen experts are gathered, so what goes in counts as well
            routed = cfg.num_experts_per_tok * sum(shape[1:])
            if unpacks:
                experts[layer] += OUTPUTS * t * MOST_PLACES * routed * size
            else:
                outputs[layer] += routed
        if unpacks and spec:
            value = size if backend == "cuda" else size + _bits_nbytes(spec)
            (unpacked if len(shape) == 2 else experts)[layer] += prod(shape) * value
    widest = OUTPUTS * t * (max(outputs.values()) + cfg.hidden_size) * size + max(unpacked.values(), default=0)
    if getattr(cfg, "linear_num_value_heads", 0):
        widest += _delta_nbytes(cfg, t, backend)
    widest += 2 * cfg.num_key_value_heads * cfg.head_dim * (context + KV_STEP) * size
    block = min(SCORE_BLOCKS * SCORE_BYTES // 4, cfg.num_attention_heads * t * max(t, context))  # scores
    logits = 3 * cfg.vocab_size * 4
    return IN_FLIGHT * widest + max(experts.values(), default=0) + SCORES * block * size + logits


def _bits_nbytes(spec: QuantSpec) -> int:
    """What a value takes on its way out of packed words where no kernel unpacks: a uint32, one for each of its bits where
    these do not divide a word."""
    return 4 if 32 % spec.bits == 0 else 4 * spec.bits


def _delta_nbytes(cfg: Any, tokens: int, backend: Backend) -> int:
    """Of conv and gated delta rule in one layer."""
    keys, values = (
        cfg.linear_num_key_heads * cfg.linear_key_head_dim,
        cfg.linear_num_value_heads * cfg.linear_value_head_dim,
    )
    conv = CONV * (2 * keys + values)
    if backend == "metal":
        return 4 * tokens * (conv + KERNEL_KEYS * keys + KERNEL_VALUES * values)
    dk, dv = cfg.linear_key_head_dim, cfg.linear_value_head_dim
    per_head = DELTA_KEYS * dk + DELTA_VALUES * dv + DELTA_CHUNKS * CHUNK + DELTA_STATES * dk * dv // CHUNK
    return 4 * -(-tokens // CHUNK) * CHUNK * (conv + cfg.linear_num_value_heads * per_head)


def _formats(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], QuantSpec | None]]:
    """Every tensor of the language model: MLX name, unpacked shape, format or None.

    A config that names modules of its default format too, as this tool and mlx-lm write it, names all that is packed; else
    the default holds for every matrix whose rows divide into its groups.
    """
    names = names_of(config)
    default, modules = read_quantization(config)
    other = None if default in modules.values() else default
    for name, shape in names.text_shapes(names.read_config(config)).items():
        spec = modules.get(name.removesuffix(".weight"), other)
        packed = spec is not None and _is_matrix(shape) and shape[-1] % spec.group_size == 0
        yield name, shape, spec if packed else None


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """The weight of a linear, or a stack of them; a conv is [C, K, 1]."""
    return len(shape) > 1 and shape[-1] > 1
