"""What the compiler made of every Triton kernel: registers, local memory, shared memory, opcodes.

Needs no GPU: the wrappers plan on meta tensors, their launches are caught and compiled.
Run `python bench/static_table.py` to write bench/results/static.md.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from gradstats.kernels import (
    _common,
    conv_stats,
    embedding_stats,
    group_norm_stats,
    layer_norm_stats,
    linear_config,
    linear_stats,
    tied_cross,
)
from gradstats.kernels.schedule import Schedule

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDTHS = (torch.float32, torch.bfloat16)  # float16 compiles to bfloat16's code but for a letter
INTEGERS = {torch.int32: "i32", torch.int64: "i64"}
WATCHED = (
    "HGMMA",
    "UTCHMMA",
    "HMMA",
    "FFMA",
    "UTMALDG",
    "LDGSTS",
    "LDG",
    "STG",
    "BAR",
    "LDL",
    "STL",
)
SHARED_LIMIT = {90: 227 * 1024, 80: 163 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int
    local: int
    shared: int
    opcodes: Counter[str]

    @property
    def spills(self) -> bool:
        """Local memory in any form."""
        return bool(self.stack or self.local or self.opcodes["LDL"] or self.opcodes["STL"])


@contextmanager
def caught() -> Iterator[list[Launch]]:
    """Catch launches instead of running them."""
    launches: list[Launch] = []

    def catch(kernel, grid, args, num_warps, num_stages=1):
        launches.append(Launch(kernel, grid, args, num_warps, num_stages))

    original, _common.launch = _common.launch, catch
    try:
        yield launches
    finally:
        _common.launch = original


def source(launch: Launch) -> ASTSource:
    """Types and specialisation as the JIT would see them: 1 is a constant, 16 divides."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attrs: dict[tuple[int], list[Any]] = {}
    constexprs = {p.name for p in launch.kernel.params if p.is_constexpr}
    as_they_come = {p.name for p in launch.kernel.params if p.do_not_specialize}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.args[name]
        if name in as_they_come:
            signature[name] = "i32"
        elif name in constexprs or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{(TYPES | INTEGERS)[value.dtype]}"
            attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attrs)


def identity(launch: Launch) -> tuple[str, int, int]:
    """Launches that share it share their code."""
    return source(launch).hash(), launch.num_warps, launch.num_stages


def build(launch: Launch, arch: int) -> Compiled:
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    made = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        dump = _tool("cuobjdump", "-res-usage", "-sass", file.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", dump))
    return Compiled(used["REG"], used["STACK"], used["LOCAL"], made.metadata.shared, opcodes)


def _tool(name: str, *args: str) -> str:
    command = [str(TOOLS / name), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def linear_cases(arch: int = 90) -> Iterator[tuple[str, Callable[[], Any]]]:
    """One call per configuration; the sizes fit the tile, as in an ordinary model."""
    for dtype, moments, c in linear_config.all_configs(arch):
        if dtype not in WIDTHS:
            continue
        # Inputs that no descriptor can describe: the longest block has the most addresses.
        pointers = c.path == "fused" and dtype != torch.float32 and arch // 10 in (9, 10)
        pointers = pointers and not c.described
        sizes = (c.block_o == 64, dtype, moments, arch, False)
        if pointers and c != linear_config.fused_tile(64, *sizes):
            continue
        t = {"rank_one": 1, "gram": c.block_t}.get(c.path, 64)
        x = torch.empty(8, t, 768, dtype=dtype, device="meta")
        tile = f"{c.block_o}×{c.block_i}×{c.block_t} w{c.num_warps} s{c.num_stages}"
        name = f"linear {c.path} {tile} {TYPES[dtype]}{' moments' if moments else ''}"
        name += " pointers" if pointers else ""
        yield name, lambda x=x, m=moments, c=c: linear_stats.weight_stats(x, x, m, c)
        if c.path == "gram":  # enough samples to fill the card
            x = torch.empty(linear_config.DEFAULT_SMS, t, 768, dtype=dtype, device="meta")
            name += " of many samples"
            yield name, lambda x=x, m=moments, c=c: linear_stats.weight_stats(x, x, m, c)
        if c.path == "fused" and not pointers:  # 36 or 144 tiles
            joined = Schedule(100, c.block_t) if moments else Schedule(200, 1, parts=True)
            c = replace(c, schedule=joined)
            name += " shared" if moments else " shared in parts"
            yield name, lambda x=x, m=moments, c=c: linear_stats.weight_stats(x, x, m, c)


def norm_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype in _common.DTYPES:
        for d in (64, 768, 8192):
            x = torch.empty(8, 256, d, dtype=dtype, device="meta")
            stat = torch.empty(8, 256, device="meta")
            scale = torch.empty(d, dtype=dtype, device="meta")
            yield (
                f"layer_norm D={d} {TYPES[dtype]}",
                lambda x=x, s=stat, w=scale: layer_norm_stats.layer_norm_stats(
                    x, x, s, s, w, True, True, True, True
                ),
            )
        x = torch.empty(8, 256, 1024, dtype=dtype, device="meta")
        stat = torch.empty(8, 32, device="meta")
        scale = torch.empty(256, dtype=dtype, device="meta")
        yield (
            f"group_norm S=1024 {TYPES[dtype]}",
            lambda x=x, s=stat, w=scale: group_norm_stats.group_norm_stats(
                x, x, s, s, w, True, True, True, True
            ),
        )


CONVOLUTIONS = {  # B, I, O, groups, size, kernel: one for every kind of tile
    "3→64 7×7": (64, 3, 64, 1, (112, 112), (7, 7)),
    "32→64": (64, 32, 64, 1, (56, 56), (3, 3)),
    "64→64": (64, 64, 64, 1, (56, 56), (3, 3)),
    "128→128": (64, 128, 128, 1, (28, 28), (3, 3)),
    "512→512, few positions": (64, 512, 512, 1, (7, 7), (3, 3)),
    "256→256, 32 groups": (64, 256, 256, 32, (28, 28), (3, 3)),
    "128→128, one image": (1, 128, 128, 1, (64, 64), (3, 3)),
    "384 depthwise 7×7": (64, 384, 384, 384, (14, 14), (7, 7)),
    "64→64 3-d": (8, 64, 64, 1, (16, 28, 28), (3, 3, 3)),
}


def conv_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype, (name, shape), moments in itertools.product(
        WIDTHS, CONVOLUTIONS.items(), (False, True)
    ):
        batch, i, o, groups, size, kernel = shape
        x = torch.empty(batch, i, *size, dtype=dtype, device="meta")
        g = torch.empty(batch, o, *size, dtype=dtype, device="meta")
        ones, padding = (1,) * len(size), tuple(k // 2 for k in kernel)
        where = (kernel, ones, padding, ones, groups)
        yield (
            f"conv {name} {TYPES[dtype]}{' moments' if moments else ''}",
            lambda x=x, g=g, w=where, m=moments: conv_stats.conv_stats(x, g, *w, True, False, m),
        )


def embedding_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype, moments in itertools.product(WIDTHS, (False, True)):
        g = torch.empty(16, 1024, 768, dtype=dtype, device="meta")
        ids = torch.empty(16, 1024, dtype=torch.int64, device="meta")
        yield (
            f"embedding D=768 {TYPES[dtype]}{' moments' if moments else ''}",
            lambda g=g, i=ids, m=moments: embedding_stats.embedding_stats(i, g, 50257, -1, m),
        )


def tied_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype, t in itertools.product(WIDTHS, (16, 1024)):
        e = torch.empty(16, t, 768, dtype=dtype, device="meta")
        h = torch.empty(16, t, 50304, dtype=dtype, device="meta")
        ids = torch.empty(16, t, dtype=torch.int64, device="meta")
        yield (
            f"tied cross T={t} {TYPES[dtype]}",
            lambda e=e, h=h, i=ids: tied_cross.tied_cross(i, e, h, e),
        )


def all_cases(arch: int = 90) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that between them launch everything the heuristics choose on `arch`."""
    yield from linear_cases(arch)
    yield from norm_cases()
    yield from conv_cases()
    yield from embedding_cases()
    yield from tied_cases()


def launches_of(call: Callable[[], Any], arch: int = 90) -> list[Launch]:
    """What `call` would launch on such a device."""
    before, _common.DEFAULT_ARCH = _common.DEFAULT_ARCH, arch
    try:
        with caught() as launches:
            call()
    finally:
        _common.DEFAULT_ARCH = before
    return launches


def rows(arch: int, cases: Iterator[tuple[str, Callable[[], Any]]]) -> Iterator[str]:
    seen: set[tuple[str, int, int]] = set()
    for name, call in cases:
        for launch in launches_of(call, arch):
            if identity(launch) in seen:
                continue
            seen.add(identity(launch))
            c = build(launch, arch)
            counts = " | ".join(str(c.opcodes[op]) for op in WATCHED)
            yield (f"| {name} | `{launch.kernel.__name__}` | {launch.num_warps * 32} | "
                   f"{c.registers} | {c.stack + c.local} | {c.shared} | {counts} |")  # fmt: skip


def elsewhere(arch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What fills registers most, and differs between architectures: the fused linear kernel."""
    return (case for case in linear_cases(arch) if "fused" in case[0])


def main() -> None:
    out = Path(__file__).parent / "results" / "static.md"
    head = ("case", "kernel", "threads", "registers", "local bytes", "shared bytes", *WATCHED)
    lines = [
        "# Triton kernels as compiled",
        "",
        "Read from the compiled code, without a GPU; no timing. Counts are static instructions.",
        f"Written by `python bench/static_table.py` with triton {triton.__version__}.",
    ]
    for arch in SHARED_LIMIT:
        cases = all_cases(arch) if arch == 90 else elsewhere(arch)
        lines += ["", f"## sm_{arch}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += rows(arch, cases)
    out.parent.mkdir(exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main()
