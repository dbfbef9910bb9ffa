"""The CUDA sources compile wherever nvcc is, without torch and without a GPU, and spill nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
# torch builds its extensions with these, which forbid implicit conversions of 16-bit types.
TORCH_FLAGS = [
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
]


def test_sources_are_found():
    assert {s.stem for s in SOURCES} >= {"multi_sq_norm", "linear_stats"}


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_compiles_without_spills(source, tmp_path):
    command = [NVCC, "-std=c++20", "-O3", "-arch=sm_90", "-Xptxas=-v", *TORCH_FLAGS]
    result = subprocess.run(
        [*command, "-c", str(source), "-o", str(tmp_path / "out.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", result.stderr)
    assert spilled, "ptxas reported nothing"
    assert all(row == ("0", "0", "0") for row in spilled), result.stderr


@pytest.mark.parametrize("source", [*SOURCES, *CUDA.glob("*.cuh")], ids=lambda s: s.name)
def test_torch_stays_in_the_binding(source):
    headers = re.findall(r"#include [<\"]([^>\"]+)", source.read_text())
    assert not [h for h in headers if h.startswith(("torch", "ATen", "c10", "cublas"))]
