"""Custom GPU kernels, written once in what CUDA and Metal have in common.

A kernel's text uses WORDS for what the two languages say differently. MLX compiles it when it is first used.
Nothing relies on a kernel: whoever has one checks, once a process, that it compiles and computes what it should
(`trusted`), and has plain MLX operations for where it does not. The tests compile the same text as C++.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from .backend import BACKEND, mx
from .errors import InputError

# Words of a kernel's text, and what the languages say for them. They are replaced, not defined as macros: MLX looks through the
# text for the names of Metal's attributes, to declare those that it finds.
WORDS = {
    "cuda": {
        "ROW": "(blockIdx.x * blockDim.x + threadIdx.x)",
        "SECOND": "blockIdx.y",
        "THIRD": "blockIdx.z",
        "GROUP": "blockIdx.x",
        "LANE": "threadIdx.x",
        "SHARED": "__shared__",
        "SYNC": "__syncthreads()",
        "OFFSET": "long long",
    },
    "metal": {
        "ROW": "thread_position_in_grid.x",
        "SECOND": "thread_position_in_grid.y",
        "THIRD": "thread_position_in_grid.z",
        "GROUP": "threadgroup_position_in_grid.x",
        "LANE": "thread_position_in_threadgroup.x",
        "SHARED": "threadgroup",
        "SYNC": "threadgroup_barrier(mem_flags::mem_threadgroup)",
        "OFFSET": "long",
    },
}

SETTING = "PUBLISH_KERNELS"
ROUNDING = 2.0**-8  # of a value, twice what rounding it to bfloat16 moves it by
Kernel = Callable[..., list[mx.array]]


def kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str) -> Kernel:
    """What `mx.fast.cuda_kernel` or `metal_kernel` makes of a kernel's text, for the backend of this process."""

    def run(**given: Any) -> list[mx.array]:
        types = tuple(str(x.dtype) for x in given["inputs"])
        return _made(name, inputs, outputs, source, types)(**given)

    return run


@functools.cache
def _made(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, types: tuple[str, ...]) -> Kernel:
    """types: of the inputs. MLX keeps what it compiled by name and template, on disk too, and on CUDA looks at nothing else:
    so the name says all else that it was compiled from, which is the text and these."""
    words = WORDS[BACKEND]
    text = re.sub(rf"\b({'|'.join(words)})\b", lambda found: words[found[0]], source)
    named = f"publish_{name}_{hashlib.sha256(repr((text, types)).encode()).hexdigest()[:8]}"
    make: Any = mx.fast.cuda_kernel if BACKEND == "cuda" else mx.fast.metal_kernel
    return make(name=named, input_names=list(inputs), output_names=list(outputs), source=text)


def trusted(check: Callable[[], str | None], by_default: bool = True) -> bool:
    """Whether this process uses some kernels: where there is a GPU for them, they compile, and they are right.

    check: what is wrong with their results, None if nothing; what it raises is of the compiler. by_default: on a GPU,
    without the setting. PUBLISH_KERNELS=plain keeps to MLX's own operations, PUBLISH_KERNELS=custom asks for all kernels;
    raises InputError where they cannot be had, or for another value. Without it a fault is one line on stderr.
    """
    wanted = os.environ.get(SETTING)
    if wanted not in (None, "plain", "custom"):
        raise InputError(f"{SETTING}={wanted}: expected plain or custom")
    if wanted == "plain" or (wanted is None and (BACKEND == "cpu" or not by_default)):
        return False
    fault = f"there are none for the {BACKEND} backend"
    if BACKEND != "cpu":
        try:
            fault = check()
        except Exception as e:  # noqa: BLE001 - in whatever type a backend raises it
            fault = f"they do not run on this device ({str(e).splitlines()[0] if str(e) else type(e).__name__})"
    if fault and wanted:
        raise InputError(f"{SETTING}=custom: {fault}")
    if fault:  # slower, and not the same bytes: nobody should have to guess
        sys.stderr.write(f"GPU kernels of this tool are not used: {fault}\n")
    return not fault
