"""How fast memory and matrix products are here: what no operation can be faster than."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gradstats.workbench.bench.timing import interleave

__all__ = ["Ceilings", "measure_ceilings"]

SMALLEST, LARGEST = 2**25, 2**29  # bytes of an array
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Ceilings:
    """Of the fastest turn. `copy` and `triad` (a = b + s·c) count each byte read or written once."""

    bytes_per_second: float
    flops_per_second: float
    copy: float
    triad: float
    array_bytes: int
    matrix_size: int
    threads: int

    def seconds(self, bytes_: float, flops: float) -> tuple[float, str]:
        """The least time for so much work, and what sets it: "bandwidth" or "matrix"."""
        moving, multiplying = bytes_ / self.bytes_per_second, flops / self.flops_per_second
        return (moving, "bandwidth") if moving >= multiplying else (multiplying, "matrix")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_ceilings(
    *,
    rounds: int = 7,
    matrix_size: int = 2048,
    array_bytes: int | None = None,
    device: str = "cpu",
) -> Ceilings:
    """Bandwidth by arrays larger than the caches, and products of square matrices, in turns.

    In float32 on the CPU with the threads that torch has, bfloat16 products on CUDA. `array_bytes` of each
    of three arrays: by default four times the largest cache, within 32 and 512 MiB.
    """
    size = min(max(4 * last_level_cache(), SMALLEST), LARGEST) if device == "cpu" else LARGEST
    size = array_bytes or size
    a, b, c = (torch.full((size // 4,), float(i), device=device) for i in range(3))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(matrix_size, matrix_size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: a.copy_(b),
        "triad": lambda: torch.add(b, c, alpha=3.0, out=a),
        "matrix": lambda: torch.mm(left, right, out=product),
    }
    seconds = interleave(calls, rounds=rounds, turn_seconds=0.0, device=device)
    best = {name: min(times) for name, times in seconds.items()}
    copy, triad = 2 * size / best["copy"], 3 * size / best["triad"]
    return Ceilings(
        bytes_per_second=max(copy, triad),
        flops_per_second=2.0 * matrix_size**3 / best["matrix"],
        copy=copy,
        triad=triad,
        array_bytes=size,
        matrix_size=matrix_size,
        threads=torch.get_num_threads(),
    )


def last_level_cache() -> int:
    """Bytes of the largest cache, as Linux tells it; 0 where it does not."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = [0]
    if os.name == "posix" and CACHES.exists():
        for file in CACHES.glob("index*/size"):
            text = file.read_text().strip()
            if text[:-1].isdecimal() and text[-1] in units:
                found.append(int(text[:-1]) * units[text[-1]])
    return max(found)
