"""What the engine's modules pull in, in a fresh interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inference.backend import OLD_KERNELS, cgroup_free

ROOT = Path(__file__).parents[1]
WITHOUT_MLX = ("errors", "checkpoint", "layout", "families", "memory", "llama.names", "qwen3_5.names")
FOREIGN = ("torch", "transformers", "mlx_lm", "huggingface_hub", "publisher", "quant")


def run(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | env, check=False
    )
    return result.stdout.strip() or result.stderr.strip().splitlines()[-1]


def test_headers_can_be_read_without_mlx():
    imports = "; ".join(f"import inference.{m}" for m in WITHOUT_MLX)
    assert run(f"{imports}; import sys; print([m for m in sys.modules if m.split('.')[0] == 'mlx'])") == "[]"


def test_the_engine_imports_nothing_of_the_project_or_of_torch():
    code = "import inference.generate, inference.divergence, inference.load, inference.llama.model, inference.qwen3_5.model, sys"
    assert run(f"{code}; print([m for m in {FOREIGN} if m in sys.modules])") == "[]"


def test_only_backend_imports_mlx():
    """Anywhere else it could come before the BLAS."""
    for path in (ROOT / "inference").rglob("*.py"):
        if path.name != "backend.py":
            assert "import mlx" not in path.read_text(encoding="utf-8"), path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux loads a BLAS")
def test_a_blas_that_does_not_load_is_one_line():
    line = run("import inference.backend", PUBLISH_BLAS="/nowhere/libblas.so")
    assert line.startswith("inference.errors.InputError: PUBLISH_BLAS=/nowhere/libblas.so: cannot be loaded")


AVX2 = sys.platform.startswith("linux") and " avx2 " in Path("/proc/cpuinfo").read_text(encoding="utf-8")


@pytest.mark.skipif(not AVX2, reason="a processor that has no newer kernels")
def test_openblas_uses_the_vector_units_of_a_processor_that_it_does_not_know():
    """Told of the oldest kernels, OpenBLAS obeys; left to itself it never ends up with them."""
    product = "mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))"
    code = f"from inference.backend import device_info, mx; {product}; print(device_info().blas)"
    told = run(code, OPENBLAS_CORETYPE="Prescott")
    if "kernels" not in told:
        pytest.skip("no OpenBLAS here")
    assert told.endswith("Prescott kernels")
    assert not run(code).endswith(tuple(f" {old} kernels" for old in OLD_KERNELS))


def test_missing_mlx_is_one_line(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx/__init__.py").touch()
    (tmp_path / "mlx/core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    line = run("import inference.backend", PYTHONPATH=str(tmp_path))
    if sys.platform.startswith("linux"):
        assert (
            line == "inference.errors.InputError: MLX has no backend: install mlx-publish[cpu] or mlx-publish[cuda13]"
        )
    else:
        assert line.startswith("inference.errors.InputError: MLX cannot be loaded")


def test_device_info_says_what_ran():
    code = """
from inference.backend import device_info, memory_limit, peak_memory, reset_peak_memory, mx
i = device_info()
assert i.device and i.os and i.mlx and i.memory_bytes >= 1 << 30, i
assert 0 < memory_limit() <= i.memory_bytes
reset_peak_memory()
mx.eval(mx.zeros((1000, 1000)))
assert peak_memory() >= 4_000_000
print(i.backend)
"""
    assert run(code) in ("cpu", "metal", "cuda")


def test_what_a_container_holds_already_is_not_free_but_pages_of_files_are(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nfile 300\ninactive_file 150\nactive_file 50\n")
    assert cgroup_free(tmp_path) == 1000 - (700 - 200)
    (tmp_path / "memory.max").write_text("max\n")
    with pytest.raises(ValueError, match="max"):
        cgroup_free(tmp_path)
