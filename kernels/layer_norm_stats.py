"""Backward of LayerNorm and RMSNorm with per-sample statistics.

One read of x and g: dx is written in the pass that sums each sample's contributions to scale and
shift. These sums go to a slab, which a second kernel reduces in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats.kernels import _common
from gradstats.kernels._common import cdiv, next_power_of_2
from gradstats.kernels.norm_common import check, new_slab, reduce_slab
from gradstats.reference import NormStats

MAX_WIDTH = 8192  # a row and two running sums must fit in one program's registers
TILE = 2048  # elements of x a program holds at a time, four programs on a multiprocessor
MAX_SPLITS = 64
STAGES = 2  # the next rows load while these are summed


@triton.jit
def _layer_norm_kernel(
    g, x, mean, rstd, scale, dx, slab, slab_k, len_t, width, per_split,
    g_b, g_t, g_d, x_b, x_t, x_d,
    CENTRED: tl.constexpr, SCALED: tl.constexpr, INPUT: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of one sample: x̂ = (x − mean)·rstd, h = g·scale,
    dx = rstd·(h − x̂·mean(h x̂) − mean(h)), slab[0] = Σ_t g x̂ and slab[1] = Σ_t g.

    CENTRED is LayerNorm (arXiv:1607.06450); without it, RMSNorm (arXiv:1910.07467), whose mean is
    0 and which has no mean(h).
    """
    sample = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    in_d = cols < width
    g_cols = g + sample * g_b + cols.to(tl.int64)[None, :] * g_d
    x_cols = x + sample * x_b + cols.to(tl.int64)[None, :] * x_d
    if SCALED:
        w = tl.load(scale + cols, mask=in_d, other=0.0).to(tl.float32)[None, :]
    sum_gx = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    sum_g = tl.zeros((ROWS, BLOCK), dtype=tl.float32)

    first = split * per_split
    last = tl.minimum(first + per_split, len_t)
    for t in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = t + tl.arange(0, ROWS)
        in_t = rows < last
        rows = rows.to(tl.int64)
        inside = in_t[:, None] & in_d[None, :]
        gv = tl.load(g_cols + rows[:, None] * g_t, mask=inside, other=0.0).to(tl.float32)
        xv = tl.load(x_cols + rows[:, None] * x_t, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + sample * len_t + rows, mask=in_t, other=0.0).to(tl.float32)[:, None]
        if CENTRED:
            m = tl.load(mean + sample * len_t + rows, mask=in_t, other=0.0).to(tl.float32)
            xv -= m[:, None]
        # Outside the row g is 0, and so is every product with it.
        xhat = xv * r
        if WEIGHT:
            sum_gx += gv * xhat
        if BIAS:
            sum_g += gv
        if INPUT:
            h = gv * w if SCALED else gv
            back = h - xhat * (tl.sum(h * xhat, axis=1) / width)[:, None]
            if CENTRED:
                back -= (tl.sum(h, axis=1) / width)[:, None]
            at = dx + (sample * len_t + rows)[:, None] * width + cols[None, :]
            tl.store(at, (back * r).to(dx.dtype.element_ty), mask=inside)

    out = slab + (sample * tl.num_programs(1) + split) * width + cols
    if WEIGHT:
        tl.store(out, tl.sum(sum_gx, axis=0), mask=in_d)
        out += slab_k
    if BIAS:
        tl.store(out, tl.sum(sum_g, axis=0), mask=in_d)


@dataclass(frozen=True)
class LayerNormConfig:
    """`rows` of a sample at a time, all `block` ≥ D columns; a sample is shared by `splits`."""

    rows: int
    block: int
    splits: int
    num_warps: int


def layer_norm_config(
    batch: int, t: int, d: int, num_sms: int = _common.DEFAULT_SMS
) -> LayerNormConfig:
    """Four programs per multiprocessor, as far as there are rows to share."""
    block = max(next_power_of_2(d), 16)
    rows = max(min(TILE // block, next_power_of_2(t)), 1)
    splits = min(cdiv(max(t, 1), rows), cdiv(4 * num_sms, max(batch, 1)), MAX_SPLITS)
    return LayerNormConfig(rows, block, splits, min(max(rows * block // 512, 4), 16))


def layer_norm_stats(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, scale: Tensor | None,
    input: bool, weight: bool, bias: bool, moments: bool,
) -> NormStats:  # fmt: skip
    """As gradstats.reference.layer_norm_stats; float32, bfloat16 and float16, D up to 8192."""
    op = "layer_norm_stats"
    check(op, g, x, tuple(x.shape[:2]), mean=mean, rstd=rstd, scale=scale)
    batch, len_t, width = x.shape
    if width > MAX_WIDTH:
        _common.refuse(op, f"D is {width}", f"At most {MAX_WIDTH}; use the reference backend")
    c = layer_norm_config(batch, len_t, width, _common.num_sms(x))
    per_split = cdiv(cdiv(len_t, c.splits), c.rows) * c.rows
    splits = cdiv(len_t, max(per_split, 1))
    dx = torch.empty(x.shape if input else (0,), dtype=x.dtype, device=x.device)
    slab = new_slab(x, int(weight) + int(bias), batch, splits, width)
    rstd = rstd.contiguous()
    if x.numel():
        _common.launch(
            _layer_norm_kernel,
            (batch, splits),
            {
                "g": g, "x": x, "mean": rstd if mean is None else mean.contiguous(), "rstd": rstd,
                "scale": rstd if scale is None else scale.contiguous(), "dx": dx, "slab": slab,
                "slab_k": slab.stride(0), "len_t": len_t, "width": width, "per_split": per_split,
                "g_b": g.stride(0), "g_t": g.stride(1), "g_d": g.stride(2),
                "x_b": x.stride(0), "x_t": x.stride(1), "x_d": x.stride(2),
                "CENTRED": mean is not None, "SCALED": scale is not None, "INPUT": input,
                "WEIGHT": weight, "BIAS": bias, "ROWS": c.rows, "BLOCK": c.block, "STAGES": STAGES,
            },
            c.num_warps,
        )  # fmt: skip
    dtype = x.dtype if scale is None else scale.dtype
    return dx, *reduce_slab(slab, weight, bias, moments, dtype)
