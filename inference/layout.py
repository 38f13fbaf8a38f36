"""From an original Hugging Face checkpoint to the tensors of the MLX layout, without MLX.

A family's `names.py` lists `Target`s: one a tensor of the MLX layout, each made from one source tensor by one `Op`.
Ops work on bands of the leading axis, so that the largest tensor never has to be in memory whole. The layout of a
checkpoint is taken from what it declares (`format: mlx` in its shards), never guessed from a shape or a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .checkpoint import ITEMSIZE, TensorInfo, count

if TYPE_CHECKING:
    import numpy as np

Part = Literal["text", "vision", "mtp"]
# copy: bytes as they are (a reshape at most); plus_one: w → 1 + w in float32; patch_embed: [O,C,T,H,W] → [O,T,H,W,C];
# first_half / second_half: [E,2I,H] → [E,I,H]
Op = Literal["copy", "plus_one", "patch_embed", "first_half", "second_half"]


@dataclass(frozen=True)
class Target:
    """One tensor of the MLX layout and how it comes from the source.

    name and shape are those of the MLX layout, before any quantizing; dtype is what is stored when the tensor is not
    quantized (safetensors name); op is applied to `source`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: TensorInfo
    op: Op = "copy"
    part: Part = "text"

    @property
    def module(self) -> str:
        """Module path: the name without `.weight`."""
        return self.name.removesuffix(".weight")

    @property
    def params(self) -> int:
        return count(self.shape)

    @property
    def nbytes(self) -> int:
        return self.params * ITEMSIZE[self.dtype]


def read_band(target: Target, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of the target's leading axis, in the source's dtype (bfloat16 as uint16 bit patterns).

    Returns [stop - start, *shape[1:]]. `plus_one` is not applied here: it changes values and belongs to whoever knows
    the arithmetic (`quant.convert`, `inference.load`). Reads only the bytes it returns.
    """
    import numpy as np  # noqa: PLC0415 - plans read no values

    info, size = target.source, ITEMSIZE[target.source.dtype]
    kind = {
        "BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64, "U8": np.uint8, "I8": np.int8,
        "U32": np.uint32, "I32": np.int32, "I64": np.int64, "U16": np.uint16, "I16": np.int16,
    }[info.dtype]  # fmt: skip
    if not target.shape:
        return np.frombuffer(info.read(), kind).reshape(())
    row = count(info.shape[1:]) * size
    tail = target.shape[1:]
    if target.op in ("first_half", "second_half"):
        half = row // 2
        skip = 0 if target.op == "first_half" else half
        out = np.empty((stop - start, *tail), kind)
        for i in range(start, stop):
            out[i - start] = np.frombuffer(info.read(i * row + skip, half), kind).reshape(tail)
        return out
    x = np.frombuffer(info.read(start * row, (stop - start) * row), kind)
    if target.op == "patch_embed":
        x = x.reshape(stop - start, *info.shape[1:])
        return np.ascontiguousarray(np.moveaxis(x, 1, -1))
    return x.reshape(stop - start, *tail)
