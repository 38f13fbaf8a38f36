"""The solver's GPU kernels, run here as C++: their text is compiled by the system's compiler, a thread after the other."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess

import numpy as np
import pytest

from inference.backend import mx
from inference.errors import InputError
from quant import gptq, hessians, kernels

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

# what either language gives a kernel, for one thread at a time
PRELUDE = """
#include <cmath>
using namespace std;
struct Place { int x, y, z; };
[[maybe_unused]] static Place blockIdx, blockDim = {1, 1, 1}, threadIdx = {0, 0, 0}, thread_position_in_grid;
"""


class Emulator:
    """What `mx.fast.cuda_kernel` and `metal_kernel` return, on the CPU. Threads beyond the grid run too, as on CUDA."""

    def __init__(self, folder, name, input_names, output_names, source, header):
        self.folder, self.name, self.inputs, self.outputs = folder, name, input_names, output_names
        self.source, self.header = source, header

    def __call__(self, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        assert output_dtypes == [mx.float32] * len(self.outputs)
        held = [np.ascontiguousarray(np.array(x)) for x in inputs]
        out = [np.full(shape, np.nan, np.float32) for shape in output_shapes]
        padded = -(-grid[0] // threadgroup[0]) * threadgroup[0]
        self._function(template)(*grid[1:], padded, *(x.ctypes.data_as(ctypes.c_void_p) for x in (*held, *out)))
        return [mx.array(x) for x in out]

    def _function(self, template):
        constants = "".join(f"constexpr int {k} = {v};\n" for k, v in template)
        kinds = ["int" if name == "size" else "float" for name in self.inputs]
        arguments = [f"const {kind}* {name}" for kind, name in zip(kinds, self.inputs, strict=True)]
        arguments += [f"float* {name}" for name in self.outputs]
        names = ", ".join((*self.inputs, *self.outputs))
        text = (
            f"{PRELUDE}{self.header}\nstatic void one({', '.join(arguments)}) {{\n{constants}{self.source}\n}}\n"
            f'extern "C" void all(int pairs, int matrices, int rows, {", ".join(arguments)}) {{\n'
            "for (int z = 0; z < matrices; ++z) for (int y = 0; y < pairs; ++y) for (int x = 0; x < rows; ++x) {\n"
            f"blockIdx = thread_position_in_grid = {{x, y, z}}; one({names}); }} }}\n"
        )
        path = self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not path.exists():
            path.with_suffix(".cpp").write_text(text)
            command = [COMPILER, "-O1", "-shared", "-fPIC", "-Werror=all", "-Wno-unknown-pragmas", "-o", str(path)]
            subprocess.run([*command, str(path.with_suffix(".cpp"))], check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(path)).all


@pytest.fixture(params=["cuda", "metal"])
def emulated(request, monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / f"kernels-{request.param}"
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(kernels, "BACKEND", request.param)
    monkeypatch.setattr(gptq, "BACKEND", request.param)
    monkeypatch.setattr(mx.fast, f"{request.param}_kernel", lambda **given: Emulator(folder, **given), raising=False)
    kernels._kernel.cache_clear()
    gptq.by_kernels.cache_clear()
    yield
    kernels._kernel.cache_clear()
    gptq.by_kernels.cache_clear()


def problem(columns=128, rows=48, matrices=2, seed=0):
    rng = np.random.default_rng(seed)
    w = mx.array(rng.standard_normal((matrices, columns, rows)).astype(np.float32))
    parts = []
    for _ in range(matrices):
        x = rng.standard_normal((600, columns)) @ (np.eye(columns) + 0.2 * rng.standard_normal((columns, columns)))
        parts.append(hessians.factorize((x.T @ x / 600).astype(np.float32), 0.02))
    return w, hessians.factor_of(parts)


def start(w, bits, group):
    lanes = w.swapaxes(1, 2)
    _, s, b = mx.quantize(lanes, group_size=group, bits=bits)
    return s.swapaxes(1, 2), b.swapaxes(1, 2)


@needs_compiler
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (3, 32), (8, 128)])
def test_kernels_find_what_plain_operations_find(emulated, monkeypatch, bits, group):
    w, factor = problem()
    s, b = start(w, bits, group)
    assert gptq._kernel_fault() is None
    assert gptq.by_kernels()
    found = gptq.optimize(w, s, b, factor, bits, mx.bfloat16)
    monkeypatch.setenv("PUBLISH_GPTQ", "plain")
    gptq.by_kernels.cache_clear()
    assert not gptq.by_kernels()
    plain = gptq.optimize(w, s, b, factor, bits, mx.bfloat16)
    same = np.array(found[0] == plain[0])
    assert same.mean() > 0.99  # sums in another order cross a tie now and then
    errors = [np.array(gptq.error(w, *x, factor.hessian)) for x in (found, plain)]
    assert np.allclose(errors[0], errors[1], rtol=0.05)
    assert abs(errors[0].sum() / errors[1].sum() - 1) < 0.005


RIGHT = {"COST": "total += pivots", "CODES": "rint((sum[i] - bias) / divisor)", "DESCENT": "= now;"}
WRONG = {"COST": "total += 2.0f * pivots", "CODES": "floor((sum[i] - bias) / divisor)", "DESCENT": "= now + 1.0f;"}


@needs_compiler
@pytest.mark.parametrize("kernel", RIGHT)
@pytest.mark.parametrize("fault", ["wrong", "not a program"])
def test_kernels_that_are_wrong_or_do_not_compile_are_not_used(emulated, monkeypatch, kernel, fault):
    text = getattr(kernels, kernel)
    broken = text.replace(RIGHT[kernel], WRONG[kernel]) if fault == "wrong" else text + "this is no program"
    assert broken != text
    monkeypatch.setattr(kernels, kernel, broken)
    assert not gptq.by_kernels()
    monkeypatch.setenv("PUBLISH_GPTQ", "kernels")
    gptq.by_kernels.cache_clear()
    with pytest.raises(InputError, match=r"PUBLISH_GPTQ=kernels: the kernels (give wrong codes|do not run)"):
        gptq.by_kernels()


def test_the_setting_is_checked(monkeypatch):
    gptq.by_kernels.cache_clear()
    monkeypatch.setenv("PUBLISH_GPTQ", "fast")
    with pytest.raises(InputError, match="PUBLISH_GPTQ=fast: expected plain or kernels"):
        gptq.by_kernels()
    monkeypatch.setenv("PUBLISH_GPTQ", "kernels")
    if gptq.BACKEND == "cpu":
        with pytest.raises(InputError, match="there are none for the cpu backend"):
            gptq.by_kernels()
    gptq.by_kernels.cache_clear()


def test_compiled_kernels_are_named_after_their_text(emulated, monkeypatch):
    """MLX keeps compiled kernels on disk by name: another version of one must have another."""
    names = []
    for text in (kernels.COST, kernels.COST + " "):
        kernels._kernel.cache_clear()
        names.append(kernels._kernel("costs", ("w",), ("cost",), text).name)
    assert names[0] != names[1]
