"""The Hopper kernel's arithmetic on the CPU: layouts, schedule, barriers, sums. Needs no CUDA.

csrc/cuda/hopper keeps it in headers that any C++ compiler takes; the programs in tests/cuda run it
against models of TMA, wgmma and mbarriers that are written from the documents alone.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "cuda"
DEVICE = HERE / "device"
CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
CXX = shlex.split(os.environ.get("CXX", "c++"))
compiled = pytest.mark.skipif(shutil.which(CXX[0]) is None, reason="no C++ compiler was found")


def device_tree(where: Path) -> Path:
    """The kernel's sources with the headers that hold PTX replaced by the emulation's."""
    shutil.copytree(CUDA, where)
    shutil.copytree(DEVICE, where, dirs_exist_ok=True)
    return where


def run(
    source: Path, tmp_path: Path, include: Path = CUDA, flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    program = tmp_path / source.stem
    build = [*CXX, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
             f"-I{include}", f"-I{HERE}", *flags]  # fmt: skip
    made = subprocess.run(
        [*build, str(source), "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    return subprocess.run([str(program)], capture_output=True, text=True, check=False)


@compiled
@pytest.mark.parametrize("source", sorted(HERE.glob("*.cpp")), ids=lambda s: s.stem)
def test_emulation(source, tmp_path):
    result = run(source, tmp_path)
    assert result.returncode == 0, result.stdout
    assert result.stdout == f"{source.stem} ok\n"


# What would go wrong on a card without a word: each must be noticed.
MISTAKES = [
    ("layout", "layout.cuh", "field(kPatternBytes) << 32", "field(kBoxBytes) << 32"),
    ("layout", "layout.cuh", "constexpr uint64_t kDescriptor = field(kBoxBytes) << 16",
     "constexpr uint64_t kDescriptor = field(kPatternBytes) << 16"),
    ("layout", "layout.cuh", "kStepBytes = kWgmmaK * kRowBytes", "kStepBytes = 8 * kRowBytes"),
    ("ring", "ring.cuh", "return parity ^ 1u;", "return parity;"),
    ("ring", "ring.cuh", "stage = 0;\n      parity ^= 1u;", "stage = 0;"),
    ("schedule", "scheduler.cuh", "in_band / rows", "in_band / kGroupO"),
    ("moments", "moments.cuh", "m2 += m2_b + d * (d * weight)", "m2 += m2_b - d * (d * weight)"),
    ("schedule", "fused.cuh", "(tile * groups + group)", "(tile * (groups - 1) + group)"),
]  # fmt: skip


fibers = pytest.mark.skipif(sys.platform != "linux", reason="threads are fibers, by ucontext")


@compiled
@fibers
def test_the_kernel_itself(tmp_path):
    """csrc/cuda/hopper/pipeline.cuh and finish.cuh, every thread of every block."""
    tree = device_tree(tmp_path / "tree")
    result = run(tree / "kernel.cpp", tmp_path, include=tree)
    assert result.stdout == "kernel ok\n", result.stdout


KERNEL_MISTAKES = [
    ("if (lane < Traits::kCluster) arrive_at", "if (lane < 1) arrive_at"),
    ("wait_for(shared.empty + ring.stage, ring.writer_parity());", ""),
    ("wait_for(shared.full + read.stage, read.reader_parity());", ""),
    ("wgmma_wait_all(acc);\n        release();", "release();\n        wgmma_wait_all(acc);"),
    ("if (me == 0) named_wait(turn(0), kTurnThreads);", ""),
    ("    barrier_init_fence();\n", ""),
]


@compiled
@fibers
@pytest.mark.parametrize(("right", "wrong"), KERNEL_MISTAKES, ids=range(len(KERNEL_MISTAKES)))
def test_mistakes_in_the_kernel_are_noticed(right, wrong, tmp_path):
    tree = device_tree(tmp_path / "tree")
    path = tree / "hopper" / "pipeline.cuh"
    text = path.read_text()
    assert text.count(right) == 1, "the line has changed; change the mistake with it"
    path.write_text(text.replace(right, wrong))
    result = run(tree / "kernel.cpp", tmp_path, include=tree, flags=("-DONE_TILE",))
    assert result.returncode != 0, "the mistake went unnoticed"


@compiled
@pytest.mark.parametrize(
    ("program", "header", "right", "wrong"), MISTAKES, ids=range(len(MISTAKES))
)
def test_mistakes_are_noticed(program, header, right, wrong, tmp_path):
    shutil.copytree(CUDA / "hopper", tmp_path / "hopper")
    path = tmp_path / "hopper" / header
    text = path.read_text()
    assert text.count(right) == 1, "the line has changed; change the mistake with it"
    path.write_text(text.replace(right, wrong))
    source = HERE / f"{program}.cpp"
    result = run(source, tmp_path, include=tmp_path)
    assert result.returncode != 0, "the mistake went unnoticed"


def test_the_descriptor_is_tritons(tmp_path):
    """Triton compiles the same product, TMA boxes on both sides: its descriptor must be ours."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, str(HERE / "triton_descriptor.py")],
        capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    if result.returncode == 77:
        pytest.skip(result.stdout)
    assert result.returncode == 0, result.stderr
    theirs = {int(word) for word in result.stdout.split()}
    source = tmp_path / "ours.cpp"
    source.write_text(
        '#include <cstdio>\n#include "hopper/layout.cuh"\n'
        "using namespace gradstats::cuda::hopper;\n"
        "int main() { for (int step = 0; step < 4; ++step) {\n"
        '  std::printf("%llu\\n", static_cast<unsigned long long>(descriptor(0, step))); } }\n'
    )
    if shutil.which(CXX[0]) is None:
        pytest.skip("no C++ compiler was found")
    ours = {int(word) for word in run(source, tmp_path).stdout.split()}
    assert len(ours) == 4
    assert ours <= theirs, (sorted(map(hex, ours)), sorted(map(hex, theirs)))


def test_headers_need_no_cuda():
    """What the programs above include must stay free of CUDA headers."""
    pure = ("portable", "traits", "layout", "ring", "moments", "scheduler", "fused")
    for name in pure:
        text = (CUDA / "hopper" / f"{name}.cuh").read_text()
        headers = re.findall(r"#include [<\"]([^>\"]+)", text)
        assert set(headers) <= {"cstdint", *(f"{p}.cuh" for p in pure)}, (name, headers)
