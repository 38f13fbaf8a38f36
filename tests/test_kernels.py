"""The solver's GPU kernels, run here as C++: their text is compiled by the system's compiler, a thread after the other."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from typing import Any, ClassVar

import numpy as np
import pytest
from engine_checkpoints import write_dense
from llama_checkpoints import write_llama

import inference.kernels
from inference import norm_kernel
from inference.backend import BACKEND, mx
from inference.errors import InputError
from inference.kernels import kernel
from inference.load import load
from inference.qwen3_5 import token_kernel
from quant import gptq, hessians, kernels

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

# what either language gives a kernel; the threads of a group run side by side where they wait for each other
PRELUDE = """
#include <bit>
#include <cmath>
using namespace std;
struct Place { int x, y, z; };
static float rsqrt(float x) { return 1.0f / std::sqrt(x); }
static thread_local Place blockIdx, blockDim, threadIdx;
static thread_local Place thread_position_in_grid, threadgroup_position_in_grid, thread_position_in_threadgroup;
static void at(int x, int y, int z, int size, int i) {
    blockDim = {size, 1, 1};
    threadgroup_position_in_grid = blockIdx = {x, y, z};
    thread_position_in_threadgroup = threadIdx = {i, 0, 0};
    thread_position_in_grid = {x * size + i, y, z};
}
struct bfloat16 {  // to the nearest, ties to even, as both languages convert
    unsigned short bits;
    bfloat16() = default;
    explicit bfloat16(float x) {
        const unsigned whole = bit_cast<unsigned>(x);
        bits = (unsigned short)((whole + 0x7FFF + (whole >> 16 & 1)) >> 16);
    }
    explicit operator float() const { return bit_cast<float>((unsigned)bits << 16); }
};
"""
# of an array, by its type: what C++ calls it, and numpy, which knows no bfloat16
KINDS = {mx.float32: ("float", np.float32), mx.int32: ("int", np.int32), mx.bfloat16: ("bfloat16", np.uint16)}
ONE_BY_ONE = "for (int i_ = 0; i_ < size_; ++i_) { at(x_, y_, z_, size_, i_); one(NAMES); }"
# the threads of a group, where they wait for each other
MEETING = """
#include <barrier>
#include <thread>
#include <vector>
struct mem_flags { static const int mem_threadgroup = 0; };
static barrier<>* together = nullptr;
static void threadgroup_barrier(int) { together->arrive_and_wait(); }
static void __syncthreads() { together->arrive_and_wait(); }
#define __shared__ static
#define threadgroup static
"""
SIDE_BY_SIDE = """
        barrier<> meeting_(size_);
        together = &meeting_;
        vector<thread> threads_;
        for (int i_ = 0; i_ < size_; ++i_) threads_.emplace_back([=] { at(x_, y_, z_, size_, i_); one(NAMES); });
        for (auto& t_ : threads_) t_.join();
        together = nullptr;  // which outlives what it pointed to
"""
DRIVER = """
extern "C" void all(int groups_, int ys_, int zs_, int size_, ARGUMENTS) {
    for (int z_ = 0; z_ < zs_; ++z_) for (int y_ = 0; y_ < ys_; ++y_) for (int x_ = 0; x_ < groups_; ++x_) { RUN }
}
"""
WORDS_OF_METAL = {
    "thread",
    "device",
    "constant",
    "kernel",
    "vertex",
    "fragment",
    "half",
    "sampler",
    "texture",
    "buffer",
}


class Emulator:
    """What `mx.fast.cuda_kernel` and `metal_kernel` return, on the CPU. Threads beyond the grid run too, as on CUDA."""

    compiled: ClassVar[dict[Any, Any]] = {}

    def __init__(self, folder, name, input_names, output_names, source):
        self.folder, self.name, self.inputs, self.outputs = folder, name, input_names, output_names
        self.source = source
        written = set(re.findall(r"\w+", source))
        assert not written & WORDS_OF_METAL, "a name that Metal has another meaning for"
        assert not any(f"{name}_{x}" in source for name in input_names for x in ("shape", "strides", "ndim"))

    def __call__(self, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        assert threadgroup[1:] == (1, 1)
        held = [np.ascontiguousarray(np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)) for x in inputs]
        out = [
            np.full(shape, 0xFFFF if dtype == mx.bfloat16 else np.nan, KINDS[dtype][1])  # no numbers
            for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        ]
        groups = -(-grid[0] // threadgroup[0])
        pointers = [x.ctypes.data_as(ctypes.c_void_p) for x in (*held, *out)]
        key = (self.folder, self.name, repr(template))  # as MLX keeps them on CUDA, whatever the types of inputs are
        run = self.compiled.get(key) or self._function(template, [x.dtype for x in inputs], output_dtypes)
        self.compiled[key] = run
        run(groups, *grid[1:], threadgroup[0], *pointers)
        return [mx.array(x).view(dtype) for x, dtype in zip(out, output_dtypes, strict=True)]

    def _function(self, template, input_dtypes, output_dtypes):
        of_template = [
            f"constexpr int {k} = {v};" if isinstance(v, int) else f"using {k} = {KINDS[v][0]};" for k, v in template
        ]
        arguments = [
            *(f"const {KINDS[t][0]}* {name}" for t, name in zip(input_dtypes, self.inputs, strict=True)),
            *(f"{KINDS[t][0]}* {name}" for t, name in zip(output_dtypes, self.outputs, strict=True)),
        ]
        given = ", ".join(arguments)
        body = "\n".join(["", *of_template, self.source, ""])
        waits = any(word in self.source for word in ("__syncthreads", "threadgroup_barrier"))
        assert waits or not re.search(r"\b(__shared__|threadgroup)\b", self.source), "shared, and nobody waits"
        driver = DRIVER.replace("RUN", SIDE_BY_SIDE if waits else ONE_BY_ONE).replace("ARGUMENTS", given)
        driver = driver.replace("NAMES", ", ".join((*self.inputs, *self.outputs)))
        text = f"static void one({given}) {{{body}}}\n{driver}"
        path = self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not path.exists():
            path.with_suffix(".cpp").write_text(text)
            compile_cpp("-include", prelude(self.folder.parent), "-shared", "-o", path, path.with_suffix(".cpp"))
        return ctypes.CDLL(str(path)).all


def compile_cpp(*arguments):
    flags = ["-std=c++20", "-O1", "-pthread", "-fPIC", "-Werror=all"]
    flags += ["-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable", "-Wno-unused-but-set-variable"]
    done = subprocess.run([str(COMPILER), *flags, *map(str, arguments)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def prelude(folder):
    """Header of all kernels, compiled once: it takes five times as long as a kernel."""
    path = folder / "prelude.hpp"
    if not path.exists():
        path.write_text(PRELUDE + MEETING)
        compile_cpp("-x", "c++-header", "-o", f"{path}.gch", path)
    return path


@pytest.fixture(params=["cuda", "metal"])
def emulated(request, monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / f"kernels-{request.param}"
    folder.mkdir(exist_ok=True)
    for module in (inference.kernels, gptq, norm_kernel, token_kernel):
        monkeypatch.setattr(module, "BACKEND", request.param)
    monkeypatch.setattr(mx.fast, f"{request.param}_kernel", lambda **given: Emulator(folder, **given), raising=False)
    cached = (inference.kernels._made, gptq.by_kernels, norm_kernel.usable, token_kernel.usable)
    for function in cached:
        function.cache_clear()
    yield request.param
    for function in cached:
        function.cache_clear()


def problem(columns=128, rows=20, matrices=2, seed=0):
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
@pytest.mark.parametrize(
    ("emulated", "bits", "group"), [("cuda", 4, 64), ("cuda", 3, 32), ("metal", 8, 128)], indirect=["emulated"]
)
def test_kernels_find_what_plain_operations_find(emulated, monkeypatch, bits, group):
    w, factor = problem()
    s, b = start(w, bits, group)
    assert gptq._kernel_fault() is None
    assert gptq.by_kernels()
    found = gptq.optimize(w, s, b, factor, bits, mx.bfloat16)
    monkeypatch.setenv("PUBLISH_KERNELS", "plain")
    gptq.by_kernels.cache_clear()
    assert not gptq.by_kernels()
    plain = gptq.optimize(w, s, b, factor, bits, mx.bfloat16)
    same = np.array(found[0] == plain[0])
    assert same.mean() > 0.98  # sums in another order cross a tie now and then
    errors = [np.array(gptq.error(w, *x, factor.hessian)) for x in (found, plain)]
    assert np.allclose(errors[0], errors[1], rtol=0.05)
    assert abs(errors[0].sum() / errors[1].sum() - 1) < 0.005


RIGHT = {"COST": "total += pivots", "CODES": "rint((sum[i] - bias) / divisor)", "DESCENT": "= now;"}
WRONG = {"COST": "total += 2.0f * pivots", "CODES": "floor((sum[i] - bias) / divisor)", "DESCENT": "= now + 1.0f;"}


@needs_compiler
@pytest.mark.parametrize("emulated", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    ("kernel", "fault"), [("COST", "wrong"), ("CODES", "wrong"), ("DESCENT", "wrong"), ("CODES", "no program")]
)
def test_kernels_that_are_wrong_or_do_not_compile_are_not_used(emulated, monkeypatch, capsys, kernel, fault):
    text = getattr(kernels, kernel)
    broken = text.replace(RIGHT[kernel], WRONG[kernel]) if fault == "wrong" else text + "this is no program"
    assert broken != text
    monkeypatch.setattr(kernels, kernel, broken)
    assert not gptq.by_kernels()
    assert capsys.readouterr().err.startswith("GPU kernels of this tool are not used: they ")
    monkeypatch.setenv("PUBLISH_KERNELS", "custom")
    gptq.by_kernels.cache_clear()
    with pytest.raises(InputError, match=r"PUBLISH_KERNELS=custom: they (give wrong codes|do not run)"):
        gptq.by_kernels()


def test_the_setting_is_checked(monkeypatch):
    gptq.by_kernels.cache_clear()
    monkeypatch.setenv("PUBLISH_KERNELS", "fast")
    with pytest.raises(InputError, match="PUBLISH_KERNELS=fast: expected plain or custom"):
        gptq.by_kernels()
    monkeypatch.setenv("PUBLISH_KERNELS", "custom")
    if gptq.BACKEND == "cpu":
        with pytest.raises(InputError, match="there are none for the cpu backend"):
            gptq.by_kernels()
    gptq.by_kernels.cache_clear()


def test_compiled_kernels_are_named_after_all_that_they_are_compiled_from(emulated):
    """MLX keeps them by name, on disk too: another version of one must have another, and one for other types of inputs."""
    names = [
        inference.kernels._made("costs", ("w",), ("cost",), text, (dtype,)).name
        for text in ("one;", "two;")
        for dtype in ("float32", "bfloat16")
    ]
    assert len(set(names)) == 4


@needs_compiler
def test_one_norm_serves_weights_of_two_types(emulated):
    """An original's norms are 1 + w in float32 and a variant's are bfloat16, in one process: `publish bench`."""
    x, y, weight = (mx.array(v, mx.bfloat16) for v in np.random.default_rng(0).standard_normal((3, 64)))
    found = [norm_kernel.add_norm(x[None], y[None], w, 1e-6)[1] for w in (weight.astype(mx.float32), weight)]
    assert mx.array_equal(found[0], found[1]).item()


# ------------------------------------------------------------------------------------------------ decode


@pytest.mark.skipif(BACKEND != "cpu", reason="a step that MLX compiles cannot run what stands in for a kernel here")
@needs_compiler
@pytest.mark.parametrize(
    ("emulated", "family", "compute"),
    [
        ("cuda", "qwen3_5", mx.float32),
        ("cuda", "qwen3_5", mx.bfloat16),
        ("cuda", "llama", mx.float32),
        ("metal", "qwen3_5", mx.bfloat16),
    ],
    indirect=["emulated"],
    ids=str,
)
def test_a_token_by_the_kernels_is_a_token_without(emulated, monkeypatch, tmp_path, family, compute):
    """A model decodes the same logits, on one sequence and on two at once."""
    folder = write_dense(tmp_path / "base") if family == "qwen3_5" else write_llama(tmp_path / "base")
    called = []
    monkeypatch.setattr(norm_kernel, "kernel", lambda name, *rest: called.append(name) or kernel(name, *rest))
    monkeypatch.setattr(token_kernel, "kernel", lambda name, *rest: called.append(name) or kernel(name, *rest))
    assert token_kernel._fault() is None
    assert norm_kernel._fault() is None
    ids = mx.array([[11, 7, 5, 3, 2, 200, 40], [9, 8, 7, 6, 5, 4, 3]])
    for rows in (ids[:1], ids):
        found = {}
        for setting in ("custom", "plain"):
            monkeypatch.setenv("PUBLISH_KERNELS", setting)
            token_kernel.usable.cache_clear()
            norm_kernel.usable.cache_clear()
            assert token_kernel.usable() == norm_kernel.usable() == (setting == "custom")
            called.clear()
            model = load(folder, compute)
            cache = model.make_cache()
            model.forward(rows[:, :5], cache)
            steps = [model.step(rows[:, at : at + 1], cache).astype(mx.float32) for at in range(5, 7)]
            found[setting] = np.array(mx.concatenate(steps))
            both = {"add_norm", "delta_token"} if family == "qwen3_5" else {"add_norm"}
            assert set(called) == (both if setting == "custom" else set())
        off = np.abs(found["custom"] - found["plain"])
        assert off.max() < (1e-4 if compute == mx.float32 else 0.01 * np.abs(found["plain"]).max())


@needs_compiler
def test_the_token_kernel_is_for_cuda_unless_asked_for(emulated, monkeypatch):
    assert token_kernel.usable() == (emulated == "cuda")
    monkeypatch.setattr(token_kernel, "SOURCE", token_kernel.SOURCE.replace("beta * (v", "2.0f * beta * (v"))
    token_kernel.usable.cache_clear()
    assert not token_kernel.usable()
    token_kernel.usable.cache_clear()
    monkeypatch.setenv("PUBLISH_KERNELS", "custom")
    with pytest.raises(InputError, match=r"PUBLISH_KERNELS=custom: the kernel's output is off by"):
        token_kernel.usable()


@needs_compiler
@pytest.mark.parametrize("wrong", ["1.01f * scale", "0.0f / 0.0f"])
def test_a_norm_that_is_wrong_is_not_used(emulated, monkeypatch, wrong):
    text = norm_kernel.SOURCE.replace("* scale *", f"* {wrong} *")
    assert text != norm_kernel.SOURCE
    monkeypatch.setenv("PUBLISH_KERNELS", "custom")
    assert norm_kernel.usable()
    norm_kernel.usable.cache_clear()
    monkeypatch.setattr(norm_kernel, "SOURCE", text)
    with pytest.raises(InputError, match=r"PUBLISH_KERNELS=custom: the norm's kernel is off by"):
        norm_kernel.usable()
