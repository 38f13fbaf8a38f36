"""MLX, prepared for this machine: import `mx` from here and nowhere else, so that the BLAS is in place first.

The CPU wheel of MLX carries a reference BLAS (2.4 GFLOP/s measured). A system BLAS that is loaded with RTLD_GLOBAL
before the first `import mlx.core` takes its place (193 GFLOP/s on the same two cores); afterwards it is too late. On
the CPU everything is computed in float32, where bfloat16 kernels are several times slower; on Metal and CUDA in the
model's own type.
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeVar

from .errors import InputError

Backend = Literal["metal", "cuda", "cpu"]
F = TypeVar("F", bound=Callable)

# Fastest first; OpenBLAS leads because MKL is slow on AMD.
BLAS_LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.2", "libmkl_rt.so")

# What OpenBLAS calls kernels from before AVX2, and newer ones with what they need; best first.
OLD_KERNELS = ("Prescott", "Core2", "Penryn", "Nehalem", "Generic", "Sandybridge", "Barcelona")
KERNELS = {
    "SkylakeX": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"},
    "Haswell": {"avx2", "fma"},
}


def load_blas() -> str | None:
    """Load the fastest BLAS of a Linux system for MLX's CPU backend; its name, or None if there is none to load.

    PUBLISH_BLAS names a library or path to use instead, or `none`. Raises InputError if that one does not load.
    """
    if not sys.platform.startswith("linux"):
        return None
    wanted = os.environ.get("PUBLISH_BLAS")
    if wanted == "none":
        return None
    for name in (wanted,) if wanted else BLAS_LIBRARIES:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError as e:
            if wanted:
                raise InputError(f"PUBLISH_BLAS={wanted}: cannot be loaded ({str(e).splitlines()[0]})") from None
        else:
            kernels = _openblas_kernels(library, name)
            return os.path.basename(name) + (f", {kernels} kernels" if kernels else "")
    return None


def _openblas_kernels(library: ctypes.CDLL, name: str) -> str | None:
    """Name of the processor that OpenBLAS has kernels chosen for, after helping it; None for another BLAS.

    A release older than the processor does not know its model number and takes the kernels of 2004: 16 GFLOP/s a core
    where those for AVX-512 do 110 (Debian's 0.3.21 on a Sapphire Rapids). Then it is loaded once more and told what the
    processor can do. OPENBLAS_CORETYPE, if set, is left alone.
    """
    if not (chosen := _core_name(library)) or chosen not in OLD_KERNELS or "OPENBLAS_CORETYPE" in os.environ:
        return chosen
    better = next((core for core, needs in KERNELS.items() if needs <= _cpu_flags()), None)
    if better is None:
        return chosen
    _ctypes.dlclose(library._handle)
    os.environ["OPENBLAS_CORETYPE"] = better  # read while it loads; no other library shall see it
    try:
        return _core_name(ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL))
    finally:
        del os.environ["OPENBLAS_CORETYPE"]


def _core_name(library: ctypes.CDLL) -> str | None:
    try:
        ask = library.openblas_get_corename
    except AttributeError:
        return None
    ask.restype = ctypes.c_char_p
    return (ask() or b"").decode("ascii", "replace") or None


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


_BLAS = load_blas()
# The delta rule's float32 products must be float32: TF32 keeps ten bits of the mantissa. Read once, on import.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
try:
    import mlx.core as mx
except ImportError as e:
    if sys.platform.startswith("linux"):
        raise InputError("MLX has no backend: install mlx-publish[cpu] or mlx-publish[cuda13]") from e
    raise InputError(f"MLX cannot be loaded: {str(e).splitlines()[0]}") from e


def _backend() -> Backend:
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


BACKEND: Backend = _backend()


@dataclass(frozen=True)
class DeviceInfo:
    """What a measurement ran on; goes into result files and cards."""

    device: str  # Apple M3 Max, NVIDIA H100 80GB HBM3, AMD EPYC
    backend: Backend
    os: str  # macOS 15.5, Linux 6.18.44
    mlx: str  # version
    blas: str | None  # only where the CPU backend uses one that was loaded: libopenblas.so.0, SkylakeX kernels
    memory_bytes: int  # of the machine, or of the GPU for cuda


def device_info() -> DeviceInfo:
    system = (
        f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else f"{platform.system()} {platform.release()}"
    )
    memory = _machine_memory()
    if BACKEND == "cuda":
        memory = _device_number("total_memory", "memory_size") or memory
    blas = _BLAS if BACKEND == "cpu" else None
    return DeviceInfo(_device_name(), BACKEND, system, metadata.version("mlx"), blas, memory)


def memory_limit() -> int:
    """Bytes that this process may use for a model, now: GPU memory on CUDA, the working set that Metal recommends,
    free memory on the CPU, where what else the cgroup holds counts against its limit."""
    if BACKEND == "metal":
        return _device_number("max_recommended_working_set_size") or _machine_memory() * 3 // 4
    if BACKEND == "cuda":
        return _device_number("free_memory") or _device_number("total_memory", "memory_size") or _machine_memory()
    available = _machine_memory()
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        return min(available, cgroup_free())
    except (OSError, ValueError):  # not Linux, no cgroup v2, or its limit is `max`
        return available


def cgroup_free(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process's cgroup (v2) may still take. Pages of files that the kernel can drop count as free, as they
    do in MemAvailable: of a shard just read they are the whole. Raises OSError or ValueError where there is no limit."""
    limit, used = (int((folder / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    held = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    files = sum(int(held.get(key, 0)) for key in ("active_file", "inactive_file"))
    return max(0, limit - max(0, used - files))


def peak_memory() -> int:
    """Most bytes that MLX held at once since `reset_peak_memory`; every backend counts them."""
    return mx.get_peak_memory()


def reset_peak_memory() -> None:
    mx.clear_cache()
    mx.reset_peak_memory()


def compute_dtype(own: mx.Dtype) -> mx.Dtype:
    """The type to compute in for a model whose own type this is."""
    return mx.float32 if BACKEND == "cpu" else own


def fused(function: F) -> F:
    """`mx.compile` for elementwise functions on a GPU; on the CPU that would need a C++ compiler at run time."""
    return function if BACKEND == "cpu" else mx.compile(function, shapeless=True)  # type: ignore[return-value]


def compiled(function: F) -> F:
    """`mx.compile` for a function of arrays of fixed shapes on a GPU; as it is on the CPU, for the same reason."""
    return function if BACKEND == "cpu" else mx.compile(function)  # type: ignore[return-value]


@functools.cache
def _device_name() -> str:
    name = mx.device_info().get("device_name")
    if BACKEND != "cpu" and name:
        return str(name)
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or "Apple"
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return str(name or platform.processor() or platform.machine())


def _device_number(*keys: str) -> int | None:
    info = mx.device_info()
    for key in keys:
        value = info.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return None


@functools.cache
def _machine_memory() -> int:
    if sys.platform == "darwin":
        return int(_sysctl("hw.memsize") or 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _sysctl(key: str) -> str:
    try:
        return subprocess.run(
            ["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
