"""Backward of GroupNorm with per-sample statistics: one program per sample and group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats.kernels import _common
from gradstats.kernels._common import next_power_of_2
from gradstats.kernels.norm_common import check, new_slab, reduce_slab
from gradstats.reference import NormStats

TILE = 2048  # elements of x a program holds at a time


@triton.jit
def _group_norm_kernel(
    g, x, mean, rstd, scale, dx, slab, slab_k, size, per_group,
    g_b, g_c, g_s, x_b, x_c, x_s,
    SCALED: tl.constexpr, INPUT: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of one sample (arXiv:1803.08494): x̂ = (x − mean)·rstd, h = g·scale,
    slab[0] = Σ_s g x̂ and slab[1] = Σ_s g per channel, whose weighted sums are the two means of
    dx = rstd·(h − x̂·mean(h x̂) − mean(h)); dx therefore takes a second pass.
    """
    sample = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    m = tl.load(mean + sample * groups + group).to(tl.float32)
    r = tl.load(rstd + sample * groups + group).to(tl.float32)
    offs_s = tl.arange(0, BLOCK)
    inner_gx = tl.zeros((ROWS,), dtype=tl.float32)
    inner_g = tl.zeros((ROWS,), dtype=tl.float32)
    for c0 in range(0, per_group, ROWS):
        row = c0 + tl.arange(0, ROWS)
        in_c = row < per_group
        c = group * per_group + row
        g_rows = g + sample * g_b + c.to(tl.int64)[:, None] * g_c
        x_rows = x + sample * x_b + c.to(tl.int64)[:, None] * x_c
        sum_gx = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        sum_g = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for s0 in range(0, size, BLOCK):
            s = (s0 + offs_s).to(tl.int64)[None, :]
            inside = in_c[:, None] & (s < size)
            gv = tl.load(g_rows + s * g_s, mask=inside, other=0.0).to(tl.float32)
            xv = tl.load(x_rows + s * x_s, mask=inside, other=0.0).to(tl.float32)
            sum_gx += gv * ((xv - m) * r)
            sum_g += gv
        gx_c = tl.sum(sum_gx, axis=1)
        g_c_sum = tl.sum(sum_g, axis=1)
        out = slab + sample * groups * per_group + c
        if WEIGHT:
            tl.store(out, gx_c, mask=in_c)
            out += slab_k
        if BIAS:
            tl.store(out, g_c_sum, mask=in_c)
        if SCALED:
            w = tl.load(scale + c, mask=in_c, other=0.0).to(tl.float32)
            inner_gx += w * gx_c
            inner_g += w * g_c_sum
        else:
            inner_gx += gx_c
            inner_g += g_c_sum
    if INPUT:
        mean_gx = tl.sum(inner_gx) / size / per_group
        mean_g = tl.sum(inner_g) / size / per_group
        for c0 in range(0, per_group, ROWS):
            row = c0 + tl.arange(0, ROWS)
            in_c = row < per_group
            c = group * per_group + row
            g_rows = g + sample * g_b + c.to(tl.int64)[:, None] * g_c
            x_rows = x + sample * x_b + c.to(tl.int64)[:, None] * x_c
            dx_rows = dx + (sample * groups * per_group + c)[:, None] * size
            if SCALED:
                w = tl.load(scale + c, mask=in_c, other=0.0).to(tl.float32)[:, None]
            for s0 in range(0, size, BLOCK):
                s = (s0 + offs_s).to(tl.int64)[None, :]
                inside = in_c[:, None] & (s < size)
                h = tl.load(g_rows + s * g_s, mask=inside, other=0.0).to(tl.float32)
                xv = tl.load(x_rows + s * x_s, mask=inside, other=0.0).to(tl.float32)
                if SCALED:
                    h *= w
                back = (h - (xv - m) * r * mean_gx - mean_g) * r
                tl.store(dx_rows + s, back.to(dx.dtype.element_ty), mask=inside)


def group_norm_tile(size: int, per_group: int) -> tuple[int, int]:
    """(channels, positions) of a group that are held at a time."""
    block = min(max(next_power_of_2(size), 16), TILE)
    return max(min(TILE // block, next_power_of_2(per_group)), 1), block


def group_norm_stats(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor | None,
    input: bool, weight: bool, bias: bool, moments: bool,
) -> NormStats:  # fmt: skip
    """As gradstats.reference.group_norm_stats; float32, bfloat16 and float16."""
    op = "group_norm_stats"
    check(op, g, x, (x.shape[0], mean.shape[-1]), mean=mean, rstd=rstd, scale=scale)
    (batch, channels, size), groups = x.shape, mean.shape[1]
    rows, block = group_norm_tile(size, channels // groups)
    dx = torch.empty(x.shape if input else (0,), dtype=x.dtype, device=x.device)
    slab = new_slab(x, int(weight) + int(bias), batch, 1, channels)
    rstd = rstd.contiguous()
    if x.numel():
        _common.launch(
            _group_norm_kernel,
            (batch, groups),
            {
                "g": g, "x": x, "mean": mean.contiguous(), "rstd": rstd,
                "scale": rstd if scale is None else scale.contiguous(), "dx": dx, "slab": slab,
                "slab_k": slab.stride(0), "size": size, "per_group": channels // groups,
                "g_b": g.stride(0), "g_c": g.stride(1), "g_s": g.stride(2),
                "x_b": x.stride(0), "x_c": x.stride(1), "x_s": x.stride(2),
                "SCALED": scale is not None, "INPUT": input, "WEIGHT": weight, "BIAS": bias,
                "ROWS": rows, "BLOCK": block,
            },
            4,
        )  # fmt: skip
    dtype = x.dtype if scale is None else scale.dtype
    return dx, *reduce_slab(slab, weight, bias, moments, dtype)
