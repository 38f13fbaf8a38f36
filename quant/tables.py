"""What a family's table is made of, beside its tensor classes: AWQ groups, readers of norms, imatrix names.

`quant.awq` and `quant.imatrix` do the arithmetic; this stands apart, without numpy, for `publish plan`, which needs no
arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One class of matrices: llama.cpp's name (`blk.N.<gguf>.weight`) and the modules it stands for in MLX.

    layered: modules are relative to a layer. tiled: input channels lie in llama.cpp's order of value heads. required:
    a file without any such matrix is refused (if the model has them).
    """

    gguf: str
    modules: tuple[str, ...]
    required: bool = False
    tiled: bool = False
    layered: bool = True


@dataclass(frozen=True)
class Group:
    """Matrices of one layer that share an input, and what takes the inverse of their scale.

    Module paths relative to the layer. members: scaled, and their statistics enter the importance. followers: fed by
    the same input, so scaled as well, but with no say in s. inverse: a norm (its weights are divided), or with `rows` a
    matrix whose output rows are divided; a bias beside it is divided, too. every: the statistics of all members are
    needed, else any one suffices.
    """

    label: str
    members: tuple[str, ...]
    inverse: str
    followers: tuple[str, ...] = ()
    rows: bool = False
    every: bool = True


@dataclass(frozen=True)
class Readers:
    """A norm and the matrices that read it, all relative to what holds both: a layer, or the model. Some may be missing."""

    norm: str
    modules: tuple[str, ...]


def scalable(table: Iterable[Group]) -> tuple[str, ...]:
    """Globs of the modules whose input channels a fold can scale (`quant.recipe.resolve`)."""
    return tuple(f"*.{m}" for group in table for m in group.members)
