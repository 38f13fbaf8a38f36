"""A folder → a model that runs, by config.json alone, as a stranger's loader must.

Reads variants in MLX layout (affine, mxfp4, mxfp8, nvfp4, with a format of its own for any module) and the original
Hugging Face layout of the base; which of the two is taken from what the shards declare. Vision tower and MTP head are
skipped. Names, shapes and types are checked against the config before anything is read, and whether it all fits into
memory. On the CPU all floating-point tensors become float32, on Metal and CUDA they stay as stored; norms that the
original stores as w and uses as 1 + w are computed in float32 and stay so. Where memory is short, a model takes prompts in
smaller pieces, and is refused only if the smallest do not fit.

Peak: the model and three times its largest tensor.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from . import memory
from .backend import BACKEND, compute_dtype, memory_limit, mx
from .cache import Cache
from .checkpoint import FLOATS, ITEMSIZE, Checkpoint, QuantSpec, read_checkpoint, read_quantization
from .errors import CheckpointError, ResourceError
from .families import family_of, names_of
from .layout import Target, read_band
from .linear import Dense, Linear, Packed
from .memory import CUDA_PREFILL_STEP, SMALLEST_STEP, Need
from .tokenizer import Tokenizer

PREFILL_STEP = CUDA_PREFILL_STEP if BACKEND == "cuda" else memory.PREFILL_STEP
DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


@dataclass
class Model:
    """A loaded model. tokens are [B, T]; a cache holds what came before them and is brought up to date in place."""

    folder: Path
    config: Any  # the family's Config: vocab_size, num_hidden_layers, …
    raw_config: dict[str, Any]  # config.json
    text: Any  # the family's TextModel
    nbytes: int  # of the weights in memory
    prefill_step: int  # tokens of a prompt that run at once: PREFILL_STEP, or what memory has room for
    _family: ModuleType

    def forward(self, tokens: mx.array, cache: Cache | None = None, *, last_only: bool = False) -> mx.array:
        """Logits [B, T, V] (last_only: [B, 1, V]) in the compute type. Evaluated as it is built, but for few tokens."""
        hidden = self.hidden(tokens, cache, last_only=last_only)
        return self.text.logits(hidden)

    def hidden(self, tokens: mx.array, cache: Cache | None = None, *, last_only: bool = False) -> mx.array:
        """States after the last norm, [B, T, H] (last_only: [B, 1, H]); `logits` makes logits of them."""
        cache = cache or self.make_cache()
        out = []
        for start in range(0, tokens.shape[1], self.prefill_step):
            if start:
                mx.eval(out[-1], cache.arrays())
            piece = self.text.hidden(tokens[:, start : start + self.prefill_step], cache)
            out = [piece[:, -1:]] if last_only else [*out, piece]
        return out[0] if len(out) == 1 else mx.concatenate(out, axis=1)

    def step(self, tokens: mx.array, cache: Cache) -> mx.array:
        """Logits [B, 1, V] of one more token of each sequence, [B, 1], behind a cache that is not empty. Lazy."""
        return self.text.step(tokens, cache)

    def logits(self, hidden: mx.array) -> mx.array:
        """[B, T, H] → [B, T, V]"""
        return self.text.logits(hidden)

    def make_cache(self) -> Cache:
        return self._family.make_cache(self.config)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder)


def load(folder: Path | str, compute: mx.Dtype | None = None, *, context: int = PREFILL_STEP) -> Model:
    """Check and load a checkpoint folder.

    context: tokens, prompt and answer together, that are to fit into memory beside the weights.

    compute: the type to compute in, by default that of `backend.compute_dtype`; mx.float32 widens every floating-point
    tensor, scales and biases of packed weights too.

    Raises CheckpointError if anything in it is missing, superfluous, mis-shaped or unknown, ResourceError if weights,
    caches and the workspace of prefill, in the smallest steps, would not fit into memory; nothing is read then.
    """
    weights = Weights(Path(folder), compute)
    limit, step = memory_limit(), PREFILL_STEP
    while (needed := weights.need(context, step)).total > limit and step > SMALLEST_STEP:
        step //= 2
    if needed.total > limit:
        raise ResourceError(f"{weights.folder.name}: {needed}; usable are {limit / 1e9:.3g} GB")
    if BACKEND == "metal":
        mx.set_wired_limit(limit)  # weights stay resident between tokens
    family = _family(weights.raw_config)
    text = family.TextModel(weights.config, weights)
    return Model(weights.folder, weights.config, weights.raw_config, text, weights.nbytes, step, family)


def hidden_states_streamed(
    folder: Path | str,
    token_batches: Sequence[mx.array],
    *,
    compute: mx.Dtype | None = None,
    step: int | None = None,
    after_layer: Callable[[int], None] | None = None,
) -> list[mx.array]:
    """Final states [B, T, H] of each batch of tokens [B, T], loading one layer at a time; no KV cache survives.

    For bases that do not fit into memory. `load_head` turns the states into logits. compute: as for `load`. step: tokens
    that pass a layer at a time, behind each other with its cache; None: the whole batch. after_layer(i) is called once
    all batches have passed layer i.
    """
    return hidden_states_of(Weights(Path(folder), compute), token_batches, step=step, after_layer=after_layer)


def hidden_states_of(
    weights: Weights,
    token_batches: Sequence[mx.array],
    *,
    step: int | None = None,
    after_layer: Callable[[int], None] | None = None,
) -> list[mx.array]:
    """As `hidden_states_streamed`, of weights that are open already."""
    family, cfg = _family(weights.raw_config), weights.config
    entries = family.make_cache(cfg).layers
    return family.TextModel.hidden_streamed(cfg, weights, entries, token_batches, after_layer, step)


def hidden_states_of_versions(
    versions: Sequence[Weights], token_batches: Sequence[mx.array], done: Callable[[int], None]
) -> list[list[mx.array]]:
    """As `hidden_states_of`, under several versions of one model's weights side by side, layer by layer. done(i): all have
    passed layer i, or the embedding (-1)."""
    family, cfg = _family(versions[0].raw_config), versions[0].config
    entries = family.make_cache(cfg).layers
    return family.TextModel.hidden_of_versions(cfg, versions, entries, token_batches, done)


def load_head(folder: Path | str, compute: mx.Dtype | None = None) -> Linear:
    """The output matrix alone: `load_head(folder)(hidden)` are logits."""
    return Weights(Path(folder), compute).head()


def decoded(raw: np.ndarray, target: Target) -> mx.array:
    """A band as `read_band` returns it, in the source's type: bfloat16 is no type of numpy."""
    x = mx.array(raw)
    return x.view(mx.bfloat16) if target.source.dtype == "BF16" else x


class Weights:
    """Tensors of a checked folder by MLX name. Nothing is read before it is asked for, nothing is kept."""

    def __init__(self, folder: Path, compute: mx.Dtype | None = None) -> None:
        checkpoint = read_checkpoint(folder)
        names = names_of(checkpoint.config)
        self.folder = folder
        self.raw_config = checkpoint.config
        self.config = names.read_config(checkpoint.config)
        self._targets: dict[str, Target]
        self._specs: dict[str, QuantSpec] = {}  # by module, quantized ones only
        if checkpoint.mlx:
            self._targets, self._specs = _check_mlx(checkpoint, names.text_shapes(self.config), names.SKIPPED)
        else:
            self._targets = {t.name: t for t in names.targets(checkpoint) if t.part == "text"}
        self._dtype = compute or compute_dtype(DTYPES[self.config.dtype])
        self._wide = self._dtype == mx.float32  # every floating-point tensor becomes float32

    @property
    def dtype(self) -> mx.Dtype:
        """The type to compute in."""
        return self._dtype

    def need(self, context: int, step: int = PREFILL_STEP) -> Need:
        """Memory for the whole model and one sequence of `context` tokens, `step` of them at once."""
        name = next(name for name, dtype in DTYPES.items() if dtype == self._dtype)
        return memory.need(self.raw_config, context, BACKEND, name, self.nbytes, step)

    def head(self) -> Linear:
        """The output matrix."""
        return _family(self.raw_config).TextModel.head(self.config, self)

    @property
    def nbytes(self) -> int:
        """Bytes of the text model once loaded."""
        return sum(t.params * (4 if self._widens(t) else ITEMSIZE[t.source.dtype]) for t in self._targets.values())

    def array(self, name: str) -> mx.array:
        """One tensor; floating-point ones in the type to compute in."""
        target = self._targets[name]
        x = decoded(read_band(target, 0, target.shape[0] if target.shape else 1), target)
        if target.op == "plus_one":
            x = 1 + x.astype(mx.float32)
        elif self._widens(target):
            x = x.astype(mx.float32)
        mx.eval(x)
        return x

    def linear(self, module: str) -> Linear:
        weight = self.array(f"{module}.weight")
        bias = self.array(f"{module}.bias") if f"{module}.bias" in self._targets else None
        spec = self._specs.get(module)
        if spec is None:
            return Dense(weight, bias)
        biases = self.array(f"{module}.biases") if spec.mode == "affine" else None
        return Packed(weight, self.array(f"{module}.scales"), biases, spec, self._dtype, bias)

    def _widens(self, target: Target) -> bool:
        if target.source.dtype not in FLOATS:
            return False
        return self._wide or target.op == "plus_one" or target.name.endswith(".A_log")


def _check_mlx(
    checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], skipped: tuple[str, ...]
) -> tuple[dict[str, Target], dict[str, QuantSpec]]:
    """The stored tensors by name and the formats of quantized modules, all agreeing with shapes and config."""
    where = checkpoint.folder.name
    default, modules = read_quantization(checkpoint.config)
    known = {name.removesuffix(".weight") for name in shapes}
    for module in modules:
        if module not in known and not module.startswith(skipped):
            raise CheckpointError(f"{where}/config.json: quantization names {module}, which the model does not have")
    left = {name: info for name, info in checkpoint.tensors.items() if not name.startswith(skipped)}
    targets: dict[str, Target] = {}
    specs: dict[str, QuantSpec] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        spec = modules.get(module, default)
        if f"{module}.scales" in left and name.endswith(".weight"):
            if spec is None:
                raise CheckpointError(f"{where}: {module}.scales exists, but config.json gives no quantization for it")
            specs[module] = spec
            parts = spec.parts(name, shape)
        elif modules.get(module) is not None:
            raise CheckpointError(f"{where}: config.json quantizes {module}, but {module}.scales is missing")
        else:
            parts = [(name, "BF16", shape)]
        for part, dtype, part_shape in parts:
            info = left.pop(part, None)
            if info is None:
                raise CheckpointError(f"{where}: tensor {part} is missing")
            if info.shape != part_shape:
                raise CheckpointError(
                    f"{info.file.name}: {part}: shape {list(info.shape)}, config.json calls for {list(part_shape)}"
                )
            if info.dtype not in (FLOATS if dtype in FLOATS else (dtype,)):
                expected = "a float type" if dtype in FLOATS else dtype
                raise CheckpointError(f"{info.file.name}: {part}: dtype {info.dtype}, expected {expected}")
            targets[part] = Target(part, info.shape, info.dtype, info)
    if left:
        info = left[min(left)]
        raise CheckpointError(f"{info.file.name}: tensor {info.name} is not part of this model")
    return targets, specs


def _family(config: dict[str, Any]) -> ModuleType:
    return importlib.import_module(f"inference.{family_of(config)}.model")
