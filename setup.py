"""Builds the compiled extension `gradstats._C`; pyproject.toml holds everything else.

GRADSTATS_BUILD  auto (default)  the CPU part where there is a C++ compiler, the CUDA part too where
                                 there are nvcc and a CUDA build of torch, both of one major version (a
                                 GPU need not be present); without a compiler: nothing, with a warning
                 cpu, cuda       that much or an error
                 none            pure Python
GRADSTATS_ARCH   native (default)  the instructions of this machine; for a wheel that travels name
                                   one, as for -march: x86-64-v3 (AVX2), x86-64-v4 (AVX-512)
TORCH_CUDA_ARCH_LIST  as in torch; by default 8.0, with PTX for later GPUs, and 9.0a. The kernels for
                      Hopper alone are built where the list names 9.0a and the toolkit is 12.5 or later
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from glob import glob
from typing import Any, NoReturn

from setuptools import setup

MODES = ("auto", "cpu", "cuda", "none")
TO_SKIP = "GRADSTATS_BUILD=none installs gradstats without compiled code (slower on CPU)"


def fail(mode: str, why: str, do: str) -> NoReturn:
    sys.exit(f"GRADSTATS_BUILD={mode}: {why}. To go on, {do}; or {TO_SKIP}.")


def compiler() -> list[str] | None:
    """The C++ compiler torch will call, or None. MSVC is not supported."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    if sys.platform == "win32" or not command or shutil.which(command[0]) is None:
        return None
    return command


def arch_flags(cxx: list[str]) -> list[str]:
    """-march and the macros by which at::vec picks its vectors, from what the compiler says of it."""
    arch = os.environ.get("GRADSTATS_ARCH", "native")
    option = "-mcpu" if platform.machine() in ("arm64", "aarch64") else "-march"
    flags = [f"{option}={arch}"]
    probe = [*cxx, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    result = subprocess.run(probe, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"GRADSTATS_ARCH={arch}: {cxx[0]} does not know it: {result.stderr.strip()}")
    macros = {line.split()[1] for line in result.stdout.splitlines() if line.startswith("#define")}
    level = "DEFAULT"
    if {"__AVX2__", "__FMA__", "__F16C__"} <= macros:
        level = "AVX2"
        if {"__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__"} <= macros:
            level = "AVX512"
    if level == "DEFAULT":
        # GCC 12 miscompiles at::vec's portable vectors (float64 sums came out wrong) without these.
        flags += ["-fno-strict-aliasing", "-fno-tree-slp-vectorize"]
    return [*flags, f"-DCPU_CAPABILITY={level}", f"-DCPU_CAPABILITY_{level}"]


def extensions() -> tuple[list[Any], dict[str, Any]]:
    mode = os.environ.get("GRADSTATS_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"GRADSTATS_BUILD={mode!r} does not exist; it takes one of {', '.join(MODES)}.")
    if mode == "none":
        return [], {}
    cxx = compiler()
    if cxx is None:
        named = os.environ.get("CXX", "c++")
        why = f"no C++ compiler was found (looked for {named!r}; MSVC is not supported)"
        if mode != "auto":
            fail(mode, why, "install g++ or clang++, or point CXX at one")
        warnings.warn(f"{why}; gradstats is installed without compiled code", stacklevel=1)
        return [], {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        fail(
            mode,
            f"torch is needed to compile and cannot be imported ({error})",
            "install torch and pass --no-build-isolation, so that it is the torch you run with",
        )

    cuda_sources = sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/bind.cpp"))
    missing = []
    toolkit = (0, 0)
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is built without CUDA")
    # A CPU build of torch does not look for the toolkit: its CUDA_HOME is None whatever there is.
    home = cpp_extension.CUDA_HOME or os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if nvcc is None:
        missing.append("nvcc was not found (looked in CUDA_HOME and on the path)")
    elif torch.version.cuda is not None:
        # torch compiles with no toolkit but one of its own major version.
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        release = re.search(r"release ((\d+)\.\d+)", said.stdout)
        if release:
            toolkit = tuple(int(n) for n in release[1].split("."))
        if release and release[2] != torch.version.cuda.split(".")[0]:
            missing.append(f"{nvcc} is of CUDA {release[1]} and torch of {torch.version.cuda}")
            if mode == "auto":
                warnings.warn(f"{missing[-1]}; the CUDA part is left out", stacklevel=1)
    if "csrc/cuda/bind.cpp" not in cuda_sources:
        missing.append("this source tree has no csrc/cuda/bind.cpp")
    if mode == "cuda" and missing:
        do = "install a CUDA torch and toolkit of one version and set CUDA_HOME"
        fail(mode, " and ".join(missing), do)
    cuda = mode != "cpu" and not missing

    common = ["-O3", "-std=c++20"]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # else at::parallel_for is serial
    quiet = ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]  # torch's headers are full of both
    args = {"cxx": [*common, "-g0", *openmp, *quiet, "-fvisibility=hidden", *arch_flags(cxx)]}
    kind = cpp_extension.CppExtension
    if cuda:
        kind = cpp_extension.CUDAExtension
        args["cxx"].append("-DGRADSTATS_WITH_CUDA")
        args["nvcc"] = [*common, "--expt-relaxed-constexpr"]
        # 9.0a in place of 9.0, not beside it: one of two would be picked at run time.
        new = toolkit >= (12, 5)  # cudaGetDriverEntryPointByVersion
        archs = os.environ.setdefault(
            "TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a" if new else "8.0;9.0+PTX"
        )
        if new and "9.0a" in archs:
            args["cxx"].append("-DGRADSTATS_WITH_SM90A")
        else:
            cuda_sources = [s for s in cuda_sources if not s.endswith("_sm90.cu")]
    extension = kind(
        "gradstats._C",
        [
            *sorted(glob("csrc/*.cpp")),
            *sorted(glob("csrc/cpu/*.cpp")),
            *(cuda_sources if cuda else []),
        ],
        include_dirs=[os.path.abspath("csrc")],
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
        extra_compile_args=args,
        extra_link_args=openmp,
    )
    return [extension], {"build_ext": cpp_extension.BuildExtension}


modules, commands = extensions()
setup(ext_modules=modules, cmdclass=commands)
