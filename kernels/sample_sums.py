"""What kernels that walk over samples share: adding a sample, and joining what programs summed.

A program has some of a tile's samples. Where there are too few of them to fill the card, several
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
from gradstats.kernels._common import cdiv, next_power_of_2

BLOCK = 1024


@triton.jit
def corner(tile, len_o, len_i, block_o, block_i):
    """First row and column of a tile. Neighbours share rows of g and of x, found in L2 then."""
    tiles_i = tl.cdiv(len_i, block_i)
    tiles_o = tl.cdiv(len_o, block_o)
    row, column = tl.swizzle2d(tile // tiles_i, tile % tiles_i, tiles_o, tiles_i, 8)
    return row * block_o, column * block_i


@triton.jit
def add_sample(c, total, spread, n, MOMENTS: tl.constexpr):
    """(sum, m2) of n samples and one more: m2 += d²·n/(n+1), d = c − mean (Welford 1962)."""
    if MOMENTS:
        d = c - total * (1.0 / tl.maximum(n, 1.0))
        spread += d * (d * (n / (n + 1.0)))
    return total + c, spread


@triton.jit
def _place(whole, width, rows, len_o, len_i, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(shared tile, offsets in its slots, offsets in the result, which of them exist)."""
    shared = tl.program_id(1)
    blocks = tl.cdiv(width, COLUMNS)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    first_o, first_i = corner(whole + shared, len_o, len_i, rows, width)
    inside = ((row < rows) & (first_o + row < len_o))[:, None]
    inside &= ((column < width) & (first_i + column < len_i))[None, :]
    in_slot = row.to(tl.int64)[:, None] * width + column[None, :]
    out = (first_o + row).to(tl.int64)[:, None] * len_i + (first_i + column)[None, :]
    return shared, in_slot, out, inside


@triton.jit(do_not_specialize=["batch", "share", "whole"])
def _merge_kernel(
    sums, spreads, dw, m2, batch, share, whole, size, width, rows, len_o, len_i,
    MOMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add what programs summed of a shared tile, in order; merge (n, sum, m2) by Chan, Golub &
    LeVeque (1979): m2 = m2_a + m2_b + (mean_b − mean_a)²·n_a n_b/(n_a + n_b).

    `share` samples of the row of shared tiles are a program's.
    """
    shared, in_slot, out, inside = _place(whole, width, rows, len_o, len_i, ROWS, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    spread = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    first = shared * batch
    last = first + batch
    seen = 0.0
    for program in range(first // share, tl.cdiv(last, share)):
        n = tl.minimum((program + 1) * share, last) - tl.maximum(program * share, first)
        n = n.to(tl.float32)
        here = (program + shared).to(tl.int64) * size + in_slot
        more = tl.load(sums + here, mask=inside, other=0.0)
        if MOMENTS:
            d = more * (1.0 / n) - total * (1.0 / tl.maximum(seen, 1.0))
            spread += tl.load(spreads + here, mask=inside, other=0.0)
            spread += d * (d * (seen * n / (seen + n)))
        total += more
        seen += n
    tl.store(dw + out, total.to(dw.dtype.element_ty), mask=inside)
    if MOMENTS:
        tl.store(m2 + out, spread, mask=inside)


@triton.jit(do_not_specialize=["batch", "blocks", "share", "whole"])
def _join_kernel(
    sums, dw, m2, slab, batch, blocks, share, whole, size, width, rows, len_o, len_i,
    MOMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add each sample's parts, square: slab[b, block] = Σ c_b², dw = Σ_b c_b, m2 by Welford.

    `share` of the row's blocks, `blocks` for every sample, are a program's.
    """
    shared, in_slot, out, inside = _place(whole, width, rows, len_o, len_i, ROWS, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    spread = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    column = shared * tl.num_programs(0) + tl.program_id(0)
    columns = tl.num_programs(0) * tl.num_programs(1)
    n = 0.0
    for b in range(0, batch):
        sample = shared * batch + b  # in the row
        c = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for program in range(sample * blocks // share, tl.cdiv((sample + 1) * blocks, share)):
            here = (program + sample).to(tl.int64) * size + in_slot
            c += tl.load(sums + here, mask=inside, other=0.0)
        tl.store(slab + b * columns.to(tl.int64) + column, tl.sum(c * c))
        total, spread = add_sample(c, total, spread, n, MOMENTS)
        n += 1.0
    tl.store(dw + out, total.to(dw.dtype.element_ty), mask=inside)
    if MOMENTS:
        tl.store(m2 + out, spread, mask=inside)


@dataclass(frozen=True)
class Sharing:
    """What is shared: the last `tiles` of a (len_o, len_i) matrix after `whole` ones, cut in slots.

    The samples of these tiles are a row. A program has `share` of them; with `parts`, `share` of
    the blocks in which every sample is cut.
    """

    tiles: int
    slots: int
    share: int
    whole: int
    rows: int
    width: int
    len_o: int
    len_i: int
    parts: int = 0  # blocks of a sample; 0: samples are not cut


def run(
    first: Callable[[dict[str, Any]], None], dw: Tensor, tiles: int, batch: int, moments: bool,
    s: Sharing,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch `first` with its outputs, then what joins the slots: (dw, sq_norm, m2)."""
    f32 = {"dtype": torch.float32, "device": dw.device}
    columns = min(next_power_of_2(s.width), BLOCK)
    rows = BLOCK // columns
    grid = (cdiv(s.rows, rows) * cdiv(s.width, columns), s.tiles)
    m2 = torch.empty(dw.shape if moments else (0,), **f32)
    size, both = s.rows * s.width, moments and not s.parts
    sums = torch.empty(s.slots, size, **f32)
    spreads = torch.empty((s.slots, size) if both else (0,), **f32)
    slab = torch.empty(batch, grid[0] * grid[1] if s.parts else tiles, **f32)
    first({"dw": dw, "m2": m2, "sums": sums, "spreads": spreads, "slab": slab, "MOMENTS": both,
           "PARTS": bool(s.parts)})  # fmt: skip
    args = {
        "sums": sums, "dw": dw, "m2": m2, "batch": batch, "share": s.share, "whole": s.whole,
        "size": size, "width": s.width, "rows": s.rows, "len_o": s.len_o, "len_i": s.len_i,
        "MOMENTS": moments, "ROWS": rows, "COLUMNS": columns,
    }  # fmt: skip
    if s.parts:
        _common.launch(_join_kernel, grid, {**args, "slab": slab, "blocks": s.parts}, 4)
    elif s.tiles:
        _common.launch(_merge_kernel, grid, {**args, "spreads": spreads}, 4)
    return dw, slab.sum(1), m2
