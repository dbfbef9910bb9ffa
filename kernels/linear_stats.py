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

from gradstats.kernels import _common, sample_sums
from gradstats.kernels._common import cdiv
from gradstats.kernels.linear_config import Config, config
from gradstats.kernels.linear_short import dot, gram_sq_norm, rank_one_m2, rank_one_sq_norm
from gradstats.kernels.sample_sums import add_sample
from gradstats.reference import LinearStats, sum_stats

OP = "linear_stats"


@triton.jit
def _fused_kernel(
    x, g, dw, m2, slab, batch, len_t, len_i, len_o, wide_i, wide_o, per_split, parts, per_part,
    x_b, x_t, x_i, g_b, g_t, g_o,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, MOMENTS: tl.constexpr,
    WHOLE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One tile of dW over the samples of one split, in order, or over a part of one sample.

    G_b = Σ_t g_bt x_btᵀ stays in registers for as long as it takes to square it:
    slab[b, tile] = Σ G_b², dw[split] = Σ_b G_b, and with MOMENTS its m2. Without WHOLE, dw[b, part].
    DESCRIBED inputs are tensor descriptors: the copy engine computes addresses and fills tails.
    """
    num_tiles = tl.num_programs(0)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_o = tl.cdiv(len_o, BLOCK_O)
    tiles_i = tl.cdiv(len_i, BLOCK_I)
    # Neighbouring programs share rows of g and of x, so that both are found in L2.
    tile_o, tile_i = tl.swizzle2d(tile // tiles_i, tile % tiles_i, tiles_o, tiles_i, 8)
    if not DESCRIBED:
        offs_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
        offs_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
        offs_t = tl.arange(0, BLOCK_T)
        in_go = offs_o < wide_o  # the inputs may carry padding, the outputs do not
        in_xi = offs_i < wide_i
        # 64-bit before the multiplication: B·T·I passes 2³¹ in ordinary training.
        g_first = g + offs_o.to(tl.int64)[:, None] * g_o + offs_t.to(tl.int64)[None, :] * g_t
        x_first = x + offs_t.to(tl.int64)[:, None] * x_t + offs_i.to(tl.int64)[None, :] * x_i

    first = split // parts * per_split
    last = tl.minimum(first + per_split, batch)
    first_t = split % parts * per_part
    last_t = tl.minimum(first_t + per_part, len_t)
    blocks_t = tl.cdiv(last_t - first_t, BLOCK_T)
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    spread = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    # One loop over (sample, block of positions): nested loops would drain the load pipeline at the
    # end of every sample.
    for step in range(0, (last - first) * blocks_t):
        done = step // blocks_t
        t = first_t + (step - done * blocks_t) * BLOCK_T
        sample = first.to(tl.int64) + done
        if DESCRIBED:
            at = first + done
            g_tile = g.load([at, t, tile_o * BLOCK_O]).reshape(BLOCK_T, BLOCK_O).T
            x_tile = x.load([at, t, tile_i * BLOCK_I]).reshape(BLOCK_T, BLOCK_I)
        else:
            rows = t.to(tl.int64)
            in_t = offs_t < last_t - t
            g_tile = tl.load(
                g_first + (sample * g_b + rows * g_t),
                mask=in_go[:, None] & in_t[None, :],
                other=0.0,
            )
            x_tile = tl.load(
                x_first + (sample * x_b + rows * x_t),
                mask=in_t[:, None] & in_xi[None, :],
                other=0.0,
            )
        acc = dot(g_tile, x_tile, acc)
        if t + BLOCK_T >= last_t:  # acc is this sample's G_b, or a part of it
            total, spread = add_sample(acc, total, spread, done.to(tl.float32), MOMENTS)
            # Last, while fewer registers are taken: triton 3.5 spilled when it came first.
            if WHOLE:
                tl.store(slab + sample * num_tiles + tile, tl.sum(acc * acc))
            acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)

    corner = (split.to(tl.int64) * len_o + tile_o * BLOCK_O) * len_i + tile_i * BLOCK_I
    out = tl.arange(0, BLOCK_O)[:, None] * len_i + tl.arange(0, BLOCK_I)[None, :]
    in_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O) < len_o
    in_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I) < len_i
    inside = in_o[:, None] & in_i[None, :]
    tl.store(dw + corner + out, total.to(dw.dtype.element_ty), mask=inside)
    if MOMENTS:
        tl.store(m2 + corner + out, spread, mask=inside)


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

    def first(outputs: dict[str, Any], grid: tuple[int, int]) -> None:
        args = {
            "x": given[0], "g": given[1], "len_t": len_t, "len_i": len_i, "len_o": len_o,
            "wide_i": x.shape[2], "wide_o": g.shape[2],
            "x_b": x.stride(0), "x_t": x.stride(1), "x_i": x.stride(2),
            "g_b": g.stride(0), "g_t": g.stride(1), "g_o": g.stride(2), "DESCRIBED": described,
            "BLOCK_O": c.block_o, "BLOCK_I": c.block_i, "BLOCK_T": c.block_t,
        }  # fmt: skip
        _common.launch(_fused_kernel, grid, {**args, **outputs}, c.num_warps, c.num_stages)

    tiles = cdiv(len_o, c.block_o) * cdiv(len_i, c.block_i)
    dw = torch.empty(len_o, len_i, dtype=x.dtype, device=x.device)
    w = sample_sums.walk(batch, len_t, c.splits, c.parts, c.block_t)
    return sample_sums.run(w, batch, tiles, dw, moments, first)


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
        c = config(batch, len_t, len_i, len_o, x.dtype, moments, *_common.planned_for(x))
        dw, w_sq, w_m2 = weight_stats(x, g, moments, c)
    elif weight:  # nothing to add up
        dw, w_sq = x.new_zeros(len_o, len_i), none.new_zeros(batch)
        w_m2 = none.new_zeros((len_o, len_i) if moments else (0,))
    if bias:
        db, b_sq, b_m2 = sum_stats(g.sum(1, dtype=torch.float32), moments)
    return dw, db.to(g.dtype), w_sq, b_sq, w_m2, b_m2
