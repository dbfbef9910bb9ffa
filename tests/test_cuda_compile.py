"""The CUDA sources compile wherever nvcc is, without torch and without a GPU, and spill nothing.

What the machine code of the Hopper kernel must hold is read from its disassembly.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
HEADERS = sorted(CUDA.rglob("*.cuh"))
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
# torch builds its extensions with these, which forbid implicit conversions of 16-bit types.
TORCH_FLAGS = [
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
]
PORTABLE = ("80", "90")
HOPPER_ONLY = "linear_fused_sm90"
REGISTERS_AT_ENTRY = 168  # 65536 over the 384 threads of a block
CONSUMER_REGISTERS = 232  # what setmaxnreg gives the warpgroups that multiply
# Kernels of traits <moments, cluster, columns of a tile>.
TILES = [(m, c, n) for c in (1, 2) for m, n in ((False, 192), (False, 128), (True, 128))]
ARITHMETIC = {False: 2, True: 5}  # instructions for each accumulator of a sample


def compile_for(source: Path, archs: tuple[str, ...], out: Path) -> str:
    """What ptxas says of every kernel."""
    command = [NVCC, "-std=c++20", "-O3", "-Xptxas=-v", *TORCH_FLAGS]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    result = subprocess.run(
        [*command, "-c", str(source), "-o", str(out)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", result.stderr)
    assert spilled, "ptxas reported nothing"
    assert all(row == ("0", "0", "0") for row in spilled), result.stderr
    return result.stderr


def disassembler() -> str | None:
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    """(what ptxas said, object file) of the kernels of sm_90a."""
    if NVCC is None:
        pytest.skip("nvcc was not found")
    out = tmp_path_factory.mktemp("hopper") / "out.o"
    return compile_for(CUDA / f"{HOPPER_ONLY}.cu", ("90a",), out), out


@pytest.fixture(scope="module")
def opcodes(hopper):
    """(moments, cluster, columns, dtype) -> how often the machine code holds each instruction."""
    tool = disassembler()
    if tool is None:
        pytest.skip("cuobjdump was not found")
    text = subprocess.run([tool, "-sass", hopper[1]], capture_output=True, text=True, check=True)
    found = {}
    for kernel in text.stdout.split("Function : ")[1:]:
        name = re.match(r"\S*fused_kernel\S*TraitsILb(\d)ELi(\d)ELi(\d+)EEE\d+(\w+?)E", kernel)
        if name:
            ops = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", kernel)
            count = Counter(
                op + ("" if "tnsp" not in args else args[args.index(".tnsp") :].split(",")[0])
                for op, args in ops
            )
            count["registers"] = 1 + max(
                int(r) for _, args in ops for r in re.findall(r"\bR(\d+)", args)
            )
            found[name[1] == "1", int(name[2]), int(name[3]), name[4]] = count
    return found


def test_sources_are_found():
    assert {s.stem for s in SOURCES} >= {"multi_sq_norm", "multi_dot", "linear_stats", HOPPER_ONLY}


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_compiles_without_spills(source, tmp_path):
    # Of the Hopper kernel nothing but a trap is left elsewhere; that must compile too.
    archs = PORTABLE[:1] if source.stem == HOPPER_ONLY else PORTABLE
    compile_for(source, archs, tmp_path / "out.o")


def test_hopper_registers(hopper):
    report = hopper[0]
    assert "C7510" not in report, "wgmmas wait for each other"
    assert "C7508" not in report, "setmaxnreg is ignored"
    used = re.findall(r"Compiling entry function '(\S+)'.*?Used (\d+) registers", report, re.S)
    fused = {int(n) for name, n in used if "fused_kernel" in name}
    assert fused == {REGISTERS_AT_ENTRY}, "setmaxnreg shares out what the block has at entry"
    assert all(int(n) <= 64 for name, n in used if "finish_kernel" in name)


def test_hopper_instructions(opcodes):
    assert {key[:3] for key in opcodes} == set(TILES)
    assert len(opcodes) == 2 * len(TILES), "bfloat16 and float16"
    for (moments, cluster, columns, dtype), found in opcodes.items():
        names = " ".join(found)
        assert not re.search(r"\b(LDL|STL)", names), "local memory"
        assert found["registers"] <= CONSUMER_REGISTERS
        wgmma = sum(n for op, n in found.items() if op.startswith("HGMMA") and "tnspA.tnspB" in op)
        assert wgmma >= 4, (dtype, names)
        loads = found["UTMALDG.3D"], found["UTMALDG.3D.MULTICAST"]
        assert loads[0] >= 2
        assert (loads[1] >= columns // 64) == (cluster == 2), loads
        assert any(op.startswith("USETMAXREG.TRY_ALLOC") for op in found)
        assert any(op.startswith("USETMAXREG.DEALLOC") for op in found)
        arithmetic = sum(
            n for op, n in found.items() if op.split(".")[0] in {"FADD", "FMUL", "FFMA"}
        )
        least = ARITHMETIC[moments] * columns * 64 // 128
        assert least <= arithmetic <= least + 64, arithmetic


@pytest.mark.parametrize("source", [*SOURCES, *HEADERS], ids=lambda s: s.name)
def test_torch_stays_in_the_binding(source):
    headers = re.findall(r"#include [<\"]([^>\"]+)", source.read_text())
    assert not [h for h in headers if h.startswith(("torch", "ATen", "c10", "cublas", "cute"))]
