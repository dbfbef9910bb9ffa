"""What kernels that walk over samples share: adding a sample, and joining what programs summed.

A program walks the samples of one split. Where there are too few of them to fill the card, several
programs share a sample instead, each with a part of its positions; the sample's contribution exists
only when its parts are added, so the second kernel takes the squares then. All orders are fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats.kernels import _common
from gradstats.kernels._common import cdiv

BLOCK = 1024


@triton.jit
def add_sample(c, total, spread, n, MOMENTS: tl.constexpr):
    """(sum, m2) of n samples and one more: m2 += d²·n/(n+1), d = c − mean (Welford 1962)."""
    if MOMENTS:
        d = c - total * (1.0 / tl.maximum(n, 1.0))
        spread += d * (d * (n / (n + 1.0)))
    return total + c, spread


@triton.jit
def _merge_kernel(
    sums, spreads, dw, m2, size, batch, per_split, splits,
    MOMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the splits' sums in order; merge (n, sum, m2) by Chan, Golub & LeVeque (1979):
    m2 = m2_a + m2_b + (mean_b − mean_a)²·n_a n_b/(n_a + n_b).
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(sums + at, mask=inside, other=0.0)
    if MOMENTS:
        spread = tl.load(spreads + at, mask=inside, other=0.0)
    seen = tl.minimum(per_split, batch).to(tl.float32)
    here = at
    for s in range(1, splits):
        here += size
        more = tl.load(sums + here, mask=inside, other=0.0)
        n = tl.minimum(per_split, batch - s * per_split).to(tl.float32)
        if MOMENTS:
            d = more * (1.0 / n) - total * (1.0 / seen)
            spread += tl.load(spreads + here, mask=inside, other=0.0)
            spread += d * (d * (seen * n / (seen + n)))
        total += more
        seen += n
    tl.store(dw + at, total.to(dw.dtype.element_ty), mask=inside)
    if MOMENTS:
        tl.store(m2 + at, spread, mask=inside)


@triton.jit
def _join_kernel(
    sums, dw, m2, slab, size, batch, parts, MOMENTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add each sample's parts, square: slab[b, block] = Σ c_b², dw = Σ_b c_b, m2 by Welford."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    spread = tl.zeros((BLOCK,), dtype=tl.float32)
    here = sums + at
    n = 0.0
    for b in range(0, batch):
        c = tl.zeros((BLOCK,), dtype=tl.float32)
        for _ in range(0, parts):
            c += tl.load(here, mask=inside, other=0.0)
            here += size
        tl.store(slab + b * tl.num_programs(0).to(tl.int64) + block, tl.sum(c * c))
        total, spread = add_sample(c, total, spread, n, MOMENTS)
        n += 1.0
    tl.store(dw + at, total.to(dw.dtype.element_ty), mask=inside)
    if MOMENTS:
        tl.store(m2 + at, spread, mask=inside)


@dataclass(frozen=True)
class Walk:
    """Who takes which samples: `per_split` for each of `splits` programs, or a part of one each."""

    per_split: int
    splits: int
    parts: int
    per_part: int

    @property
    def programs(self) -> int:
        return self.splits * self.parts


def walk(batch: int, t: int, splits: int, parts: int, block_t: int) -> Walk:
    """Every split has samples, every part positions, and only the last part a ragged end."""
    if parts > 1:
        per_part = cdiv(cdiv(t, parts), block_t) * block_t
        return Walk(1, batch, cdiv(t, per_part), per_part)
    per_split = cdiv(batch, splits)
    return Walk(per_split, cdiv(batch, per_split), 1, t)


def run(
    w: Walk, batch: int, tiles: int, dw: Tensor, moments: bool,
    first: Callable[[dict[str, Any], tuple[int, int]], None],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch `first` with its outputs and grid, then what joins them: (dw, sq_norm, m2)."""
    f32 = {"dtype": torch.float32, "device": dw.device}
    m2 = torch.empty(dw.shape if moments else (0,), **f32)
    whole, size = w.parts == 1, dw.numel()
    sums, spreads = dw, m2
    if w.programs > 1:
        sums = torch.empty(w.programs, size, **f32)
        spreads = torch.empty((w.programs, size) if moments and whole else (0,), **f32)
    slab = torch.empty(batch, tiles if whole else cdiv(size, BLOCK), **f32)
    outputs = {"dw": sums, "m2": spreads, "slab": slab, "MOMENTS": moments and whole}
    plan = {"batch": batch, "per_split": w.per_split, "parts": w.parts, "per_part": w.per_part}
    first({**outputs, **plan, "WHOLE": whole}, (tiles, w.programs))
    shared = {"sums": sums, "dw": dw, "m2": m2, "size": size, "batch": batch}
    shared |= {"MOMENTS": moments, "BLOCK": BLOCK}
    grid = (cdiv(size, BLOCK),)
    if not whole:
        _common.launch(_join_kernel, grid, {**shared, "slab": slab, "parts": w.parts}, 4)
    elif w.splits > 1:
        shared |= {"spreads": spreads, "per_split": w.per_split, "splits": w.splits}
        _common.launch(_merge_kernel, grid, shared, 4)
    return dw, slab.sum(1), m2
