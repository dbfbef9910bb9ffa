"""Weight gradient of a linear layer with per-sample statistics, in one pass over x and g.

Three exact paths, chosen per call by `config` from their cost:
rank one (T = 1), Gram (short T, norms only), fused (everything else).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gradstats.kernels import _common
from gradstats.kernels._common import cdiv
from gradstats.kernels.linear_config import Config, config
from gradstats.kernels.linear_short import dot, gram_sq_norm, rank_one_m2, rank_one_sq_norm
from gradstats.kernels.norm_common import sum_stats
from gradstats.kernels.sample_sums import Sharing, add_sample, corner, run
from gradstats.kernels.schedule import Schedule
from gradstats.reference import LinearStats

OP = "linear_stats"


@triton.jit
def _next(tile, sample, batch, whole, shared_tile, shared_sample):
    """(tile, sample) that come after these on a program's list."""
    sample += 1
    if sample == batch:
        sample = 0
        if tile >= whole:
            tile += 1
        elif tile + tl.num_programs(0) < whole:
            tile += tl.num_programs(0)
        else:
            tile = shared_tile
            sample = shared_sample
    return tile, sample


@triton.jit
def _put(to, tile, first_o, first_i, len_o, len_i, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """Store a tile at a place of a (len_o, len_i) matrix.

    Addresses hang on the place: those that do not are kept in registers while the loop runs.
    """
    rows = first_o + tl.arange(0, BLOCK_O)
    columns = first_i + tl.arange(0, BLOCK_I)
    inside = (rows < len_o)[:, None] & (columns < len_i)[None, :]
    to += rows.to(tl.int64)[:, None] * len_i + columns[None, :]
    tl.store(to, tile.to(to.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "len_t", "whole", "share"])
def _fused_kernel(
    x, g, dw, m2, sums, spreads, slab, batch, len_t, len_i, len_o, wide_i, wide_o, whole, share,
    x_b, x_t, x_i, g_b, g_t, g_o,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, MOMENTS: tl.constexpr,
    PARTS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """A program's list of work: whole tiles of dW, then its run of the tiles that are shared.

    G_b = Σ_t g_bt x_btᵀ stays in registers for as long as it takes to square it:
    slab[b, tile] = Σ G_b². Σ_b G_b, and with MOMENTS its m2, are dw and m2 where the tile is whole,
    else a slot of sums and spreads for what this program has of it. With PARTS even samples are
    shared, and a slot is a part of one G_b.
    DESCRIBED inputs are tensor descriptors: the copy engine computes addresses and fills tails.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(len_o, BLOCK_O) * tl.cdiv(len_i, BLOCK_I)
    blocks = tl.cdiv(len_t, BLOCK_T)
    own = tl.cdiv(whole - program, tl.num_programs(0))  # whole tiles
    start = program * share
    shared = tl.minimum(start + share, (tiles - whole) * batch * blocks) - start
    steps = own * batch * blocks + tl.maximum(shared, 0)
    shared_tile = whole + start // (batch * blocks)
    shared_sample = start // blocks % batch
    t = -BLOCK_T
    if PARTS:
        t += start % blocks * BLOCK_T
    if not DESCRIBED:
        offs_o = tl.arange(0, BLOCK_O)
        offs_i = tl.arange(0, BLOCK_I)
        offs_t = tl.arange(0, BLOCK_T)
        # 64-bit before the multiplication: B·T·I passes 2³¹ in ordinary training.
        g_first = g + offs_o.to(tl.int64)[:, None] * g_o + offs_t.to(tl.int64)[None, :] * g_t
        x_first = x + offs_t.to(tl.int64)[:, None] * x_t + offs_i.to(tl.int64)[None, :] * x_i

    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    spread = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    tile = tl.where(own > 0, program, shared_tile)
    sample = tl.where(own > 0, 0, shared_sample)
    first_o, first_i = corner(tile, len_o, len_i, BLOCK_O, BLOCK_I)
    # Loads run ahead of products, which follow the list on their own: carried along with the loads,
    # their place would take more registers.
    done = tile
    b = sample
    t_done = t + BLOCK_T
    seen = 0  # samples in total
    # One loop over (tile, sample, block of positions): nested loops would drain the load pipeline
    # at the end of every sample.
    for step in range(0, steps):
        t += BLOCK_T
        if t >= len_t:
            t = 0
            before = tile
            tile, sample = _next(tile, sample, batch, whole, shared_tile, shared_sample)
            if tile != before:
                first_o, first_i = corner(tile, len_o, len_i, BLOCK_O, BLOCK_I)
        if DESCRIBED:
            g_tile = g.load([sample, t, first_o]).reshape(BLOCK_T, BLOCK_O).T
            x_tile = x.load([sample, t, first_i]).reshape(BLOCK_T, BLOCK_I)
        else:
            at = sample.to(tl.int64)
            rows = t.to(tl.int64)
            in_t = offs_t < len_t - t
            # The inputs may carry padding, the outputs do not.
            g_tile = tl.load(
                g_first + (at * g_b + rows * g_t + first_o.to(tl.int64) * g_o),
                mask=(offs_o < wide_o - first_o)[:, None] & in_t[None, :],
                other=0.0,
            )
            x_tile = tl.load(
                x_first + (at * x_b + rows * x_t + first_i.to(tl.int64) * x_i),
                mask=in_t[:, None] & (offs_i < wide_i - first_i)[None, :],
                other=0.0,
            )
        acc = dot(g_tile, x_tile, acc)
        t_done += BLOCK_T
        if (t_done >= len_t) | (step == steps - 1):  # acc is this sample's G_b, or a part of it
            if PARTS:
                slot = (program + (done - whole) * batch + b) * BLOCK_O
                _put(sums, acc, slot, 0, slot + BLOCK_O, BLOCK_I, BLOCK_O, BLOCK_I)
            else:
                total, spread = add_sample(acc, total, spread, seen.to(tl.float32), MOMENTS)
                seen += 1
                # Last, while fewer registers are taken: triton 3.5 spilled when it came first.
                tl.store(slab + b.to(tl.int64) * tiles + done, tl.sum(acc * acc))
                if (b == batch - 1) | (step == steps - 1):
                    if done < whole:
                        o, i = corner(done, len_o, len_i, BLOCK_O, BLOCK_I)
                        _put(dw, total, o, i, len_o, len_i, BLOCK_O, BLOCK_I)
                        if MOMENTS:
                            _put(m2, spread, o, i, len_o, len_i, BLOCK_O, BLOCK_I)
                    else:
                        slot = (program + done - whole) * BLOCK_O
                        _put(sums, total, slot, 0, slot + BLOCK_O, BLOCK_I, BLOCK_O, BLOCK_I)
                        if MOMENTS:
                            _put(
                                spreads, spread, slot, 0, slot + BLOCK_O, BLOCK_I, BLOCK_O, BLOCK_I
                            )
                    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
                    spread = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
                    seen = 0
            acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
            t_done = 0
            done, b = _next(done, b, batch, whole, shared_tile, shared_sample)


def describable(t: Tensor) -> bool:
    """Whether the copy engine can read (B, T, features): 16-bit rows in steps of 16 bytes."""
    in_step = all(t.stride(d) > 0 and t.stride(d) % 8 == 0 for d in (0, 1))
    return in_step and t.stride(2) == 1 and t.element_size() == 2 and t.data_ptr() % 16 == 0


def _fused(x: Tensor, g: Tensor, moments: bool, c: Config) -> tuple[Tensor, Tensor, Tensor]:
    """dW, squared norms and m2 in one pass over the samples."""
    (batch, len_t, len_i), len_o = x.shape, g.shape[2]
    x, g = _common.loadable(x), _common.loadable(g)
    described = c.described and describable(x) and describable(g)
    given: tuple[Any, Any] = (x, g)
    if described:
        blocks = ((x, [1, c.block_t, c.block_i]), (g, [1, c.block_t, c.block_o]))
        given = tuple(TensorDescriptor.from_tensor(t, block) for t, block in blocks)

    tiles, blocks = cdiv(len_o, c.block_o) * cdiv(len_i, c.block_i), cdiv(len_t, c.block_t)
    schedule = c.schedule or Schedule(tiles)
    whole = schedule.whole(tiles)

    def first(outputs: dict[str, Any]) -> None:
        args = {
            "x": given[0], "g": given[1], "batch": batch, "len_t": len_t, "len_i": len_i,
            "len_o": len_o, "wide_i": x.shape[2], "wide_o": g.shape[2],
            "whole": whole, "share": schedule.share,
            "x_b": x.stride(0), "x_t": x.stride(1), "x_i": x.stride(2),
            "g_b": g.stride(0), "g_t": g.stride(1), "g_o": g.stride(2), "DESCRIBED": described,
            "BLOCK_O": c.block_o, "BLOCK_I": c.block_i, "BLOCK_T": c.block_t,
        }  # fmt: skip
        grid = (schedule.grid(tiles, batch * blocks),)
        _common.launch(_fused_kernel, grid, {**args, **outputs}, c.num_warps, c.num_stages)

    sharing = Sharing(
        tiles - whole, schedule.slots(tiles, batch, blocks),
        schedule.share // (1 if schedule.parts else blocks), whole, c.block_o, c.block_i,
        len_o, len_i, blocks if schedule.parts else 0,
    )  # fmt: skip
    dw = torch.empty(len_o, len_i, dtype=x.dtype, device=x.device)
    return run(first, dw, tiles, batch, moments, sharing)


def weight_stats(x: Tensor, g: Tensor, moments: bool, c: Config) -> tuple[Tensor, Tensor, Tensor]:
    if c.path == "fused":
        return _fused(x, g, moments, c)
    dw = g.reshape(-1, g.shape[2]).t() @ x.reshape(-1, x.shape[2])
    if c.path == "gram":
        return dw, gram_sq_norm(x, g, c), x.new_empty(0, dtype=torch.float32)
    m2 = rank_one_m2(x[:, 0], g[:, 0]) if moments else x.new_empty(0, dtype=torch.float32)
    return dw, rank_one_sq_norm(x, g, c), m2


def linear_stats(x: Tensor, g: Tensor, weight: bool, bias: bool, moments: bool) -> LinearStats:
    """As gradstats.reference.linear_stats; float32, bfloat16 and float16, any strides."""
    _common.check_inputs(OP, x=x, g=g)
    if x.dim() != 3 or g.dim() != 3 or x.shape[:2] != g.shape[:2]:
        _common.refuse(OP, f"x is {tuple(x.shape)}, g is {tuple(g.shape)}",
                       "Expected (B, T, I) and (B, T, O)")  # fmt: skip
    if x.dtype != g.dtype:
        _common.refuse(OP, f"x is {x.dtype}, g is {g.dtype}", "Give both one dtype")
    (batch, len_t, len_i), len_o = x.shape, g.shape[2]
    none = x.new_empty(0, dtype=torch.float32)
    dw, w_sq, w_m2, db, b_sq, b_m2 = x.new_empty(0), none, none, x.new_empty(0), none, none
    if weight and x.numel() and g.numel():
        # What is out of step is copied, and the copy can be described.
        described = all(describable(t) or not _common.in_step(t) for t in (x, g))
        plan = (batch, len_t, len_i, len_o, x.dtype, moments, *_common.planned_for(x), described)
        c = config(*plan)
        dw, w_sq, w_m2 = weight_stats(x, g, moments, c)
    elif weight:  # nothing to add up
        dw, w_sq = x.new_zeros(len_o, len_i), none.new_zeros(batch)
        w_m2 = none.new_zeros((len_o, len_i) if moments else (0,))
    if bias:
        db, b_sq, b_m2 = sum_stats(g.sum(1, dtype=torch.float32), moments, g.dtype)
    return dw, db, w_sq, b_sq, w_m2, b_m2
