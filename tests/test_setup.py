"""Installing: a named build that cannot be made says why and what to do; none needs no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def _setup(mode: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, capture_output=True, text=True,
        check=False, env={**os.environ, "GRADSTATS_BUILD": mode, **env},
    )  # fmt: skip


def test_unknown_build() -> None:
    result = _setup("fast")
    assert result.returncode != 0
    assert (
        "GRADSTATS_BUILD='fast' does not exist; it takes one of auto, cpu, cuda, none"
        in result.stderr
    )


def test_cpu_build_without_a_compiler() -> None:
    result = _setup("cpu", CXX="/nowhere/c++")
    assert result.returncode != 0
    assert "GRADSTATS_BUILD=cpu: no C++ compiler was found" in result.stderr
    assert "install g++ or clang++" in result.stderr


def test_automatic_build_without_a_compiler_warns_and_goes_on() -> None:
    result = _setup("auto", CXX="/nowhere/c++")
    assert result.returncode == 0
    assert "installed without compiled code" in result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")
def test_cuda_build_without_cuda() -> None:
    result = _setup("cuda")
    assert result.returncode != 0
    assert "GRADSTATS_BUILD=cuda: torch" in result.stderr
    assert "install a CUDA torch and toolkit" in result.stderr


@pytest.mark.parametrize(("mode", "goes_on"), [("auto", True), ("cuda", False)])
def test_a_toolkit_of_another_version_than_torch(tmp_path: Path, mode: str, goes_on: bool) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    code = (
        "import runpy, sys, torch; torch.version.cuda = '12.8'; sys.argv = ['setup.py', '--name']\n"
        "runpy.run_path('setup.py')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "GRADSTATS_BUILD": mode, "CUDA_HOME": str(tmp_path)},
    )  # fmt: skip
    assert (result.returncode == 0) == goes_on, result.stderr
    assert f"{nvcc} is of CUDA 13.0 and torch of 12.8" in result.stderr
    assert ("the CUDA part is left out" in result.stderr) == goes_on


def test_unknown_architecture() -> None:
    result = _setup("cpu", GRADSTATS_ARCH="z80")
    assert result.returncode != 0
    assert "GRADSTATS_ARCH=z80" in result.stderr


def test_an_installation_without_compiled_code_works(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "site"
    skip = shutil.ignore_patterns(".venv", ".git", "build", "*.so", "runs", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=skip)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
         "--target", str(target), str(source)],
        check=True, env={**os.environ, "GRADSTATS_BUILD": "none", "CXX": "/nowhere/c++"},
    )  # fmt: skip
    assert not (target / "kernels").exists()
    code = (
        "import sys\n"  # an editable installation would serve what this one lacks
        "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
        "import gradstats, gradstats.kernels, torch, pathlib\n"
        f"assert pathlib.Path(gradstats.__file__).is_relative_to({str(target)!r})\n"
        "assert gradstats.backends.extension()[0] is None\n"
        "m = torch.nn.Linear(3, 2); monitor = gradstats.attach(m)\n"
        "m(torch.randn(4, 3)).square().sum().backward()\n"
        "assert float(monitor.step().tr_sigma) > 0\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
    )  # fmt: skip
