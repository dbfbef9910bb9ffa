"""Weight gradient of a convolution with per-sample statistics: an implicit GEMM per sample.

Patches are addressed in the kernels, never stored. Where they do not overlap (pointwise, strides
as long as the kernel) the convolution is a linear layer; few positions take a Gram; one input
channel per group, conv_depthwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats.kernels import _common, conv_depthwise, conv_gram
from gradstats.kernels._common import cdiv
from gradstats.kernels.conv_config import Split, conv_config
from gradstats.kernels.conv_layout import (
    Geometry,
    arguments,
    channels_last,
    check_size,
    collapse,
    first_tap,
    inside,
    patches,
    three,
)  # fmt: skip
from gradstats.kernels.conv_split import run_split
from gradstats.kernels.linear_config import Config
from gradstats.kernels.linear_short import dot
from gradstats.kernels.linear_stats import linear_stats
from gradstats.kernels.norm_common import sum_stats
from gradstats.kernels.sample_sums import add_sample
from gradstats.reference import LinearStats

OP = "conv_stats"


@triton.jit
def _conv_kernel(
    x, g, dw, m2, slab, batch, len_s, len_c, len_o, taps, per_split, parts, per_part,
    size_d, size_h, size_w, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w,
    dil_d, dil_h, dil_w, kernel_h, kernel_w, out_h, out_w, magic_h, shift_h, magic_w, shift_w,
    x_b, x_d, x_h, x_w, x_group, g_b, g_s, g_o, g_group, wide_c, wide_o, tiles_o, tiles_n,
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, CHANNELS: tl.constexpr,
    UNIT: tl.constexpr, FULL: tl.constexpr, DIMS: tl.constexpr, MOMENTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One tile of dW over the samples of one split, in order, or over a part of one sample.

    G_b[o, (tap, c)] = Σ_s g_bs[o] x_b[s·stride − pad + tap·dil, c] stays in registers for as long
    as it takes to square it: slab[b, tile] = Σ G_b², dw[split] = Σ_b G_b, with MOMENTS its m2.
    A column is a channel of one tap, or CHANNELS channels each of several taps.
    """
    num_tiles = tl.num_programs(0)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    group = tile // (tiles_o * tiles_n)
    tile_o = tile // tiles_n % tiles_o
    tile_n = tile % tiles_n  # neighbouring programs share rows of g, and of x but for a shift
    offs_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_s = tl.arange(0, BLOCK_S)
    in_o = offs_o < wide_o  # the inputs may carry padding, the outputs do not
    if CHANNELS == BLOCK_N:
        blocks_c = tl.cdiv(len_c, CHANNELS)
        tap = tile_n // blocks_c
        offs_c = tile_n % blocks_c * CHANNELS + tl.arange(0, BLOCK_N)
        in_x = offs_c < wide_c
    else:
        tap = tile_n * (BLOCK_N // CHANNELS) + tl.arange(0, BLOCK_N) // CHANNELS
        offs_c = tl.arange(0, BLOCK_N) % CHANNELS
        in_x = tap < taps
        if not FULL:  # where the padding fills the tile, runs of channels are all in or all out
            in_x &= offs_c < wide_c
    tap_w = tap % kernel_w * dil_w
    tap_h = tap // kernel_w % kernel_h * dil_h
    tap_d = tap // (kernel_w * kernel_h) * dil_d
    # 64-bit before the multiplication: a batch of volumes passes 2³¹ elements.
    n_off = tap_d.to(tl.int64) * x_d + tap_h.to(tl.int64) * x_h + tap_w.to(tl.int64) * x_w
    n_off += group.to(tl.int64) * x_group + offs_c
    x_first = x + tl.max_contiguous(tl.multiple_of(n_off, UNIT), UNIT)[None, :]
    g_first = g + group.to(tl.int64) * g_group + offs_o.to(tl.int64)[:, None] * g_o
    g_first += offs_s.to(tl.int64)[None, :] * g_s

    first = split // parts * per_split
    last = tl.minimum(first + per_split, batch)
    first_s = split % parts * per_part
    last_s = tl.minimum(first_s + per_part, len_s)
    blocks_s = tl.cdiv(last_s - first_s, BLOCK_S)
    total = tl.zeros((BLOCK_O, BLOCK_N), dtype=tl.float32)
    spread = tl.zeros((BLOCK_O, BLOCK_N), dtype=tl.float32)
    acc = tl.zeros((BLOCK_O, BLOCK_N), dtype=tl.float32)
    for step in range(0, (last - first) * blocks_s):
        done = step // blocks_s
        s0 = first_s + (step - done * blocks_s) * BLOCK_S
        sample = first.to(tl.int64) + done
        s = s0 + offs_s
        in_s = s < last_s
        d, h, w = first_tap(
            s, out_h, out_w, magic_h, shift_h, magic_w, shift_w,
            stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, DIMS,
        )  # fmt: skip
        s_off = sample * x_b + w.to(tl.int64) * x_w
        if DIMS > 1:
            s_off += h.to(tl.int64) * x_h
        if DIMS > 2:
            s_off += d.to(tl.int64) * x_d
        s_off = tl.multiple_of(s_off, UNIT)
        if CHANNELS == BLOCK_N:  # one tap: what is padding depends on the position alone
            seen = in_s & inside(d + tap_d, h + tap_h, w + tap_w, size_d, size_h, size_w, DIMS)
            seen = seen[:, None] & in_x[None, :]
        else:
            seen = inside(
                d[:, None] + tap_d[None, :], h[:, None] + tap_h[None, :],
                w[:, None] + tap_w[None, :], size_d, size_h, size_w, DIMS,
            )  # fmt: skip
            seen = seen & in_s[:, None] & in_x[None, :]
        g_tile = tl.load(
            g_first + (sample * g_b + s0.to(tl.int64) * g_s),
            mask=in_o[:, None] & in_s[None, :],
            other=0.0,
        )
        x_tile = tl.load(x_first + s_off[:, None], mask=seen, other=0.0)
        acc = dot(g_tile, x_tile, acc)
        if s0 + BLOCK_S >= last_s:  # acc is this sample's G_b, or a part of it
            total, spread = add_sample(acc, total, spread, done.to(tl.float32), MOMENTS)
            # Last, as in linear_stats: fewer registers are taken.
            if not PARTS:
                tl.store(slab + sample * num_tiles + tile, tl.sum(acc * acc))
            acc = tl.zeros((BLOCK_O, BLOCK_N), dtype=tl.float32)

    size = (num_tiles // (tiles_o * tiles_n) * len_o).to(tl.int64) * len_c * taps
    slot = split
    if PARTS:
        slot += split // parts  # one is left out after every sample, as sample_sums counts
    corner = slot * size + (group * len_o + tile_o * BLOCK_O).to(tl.int64) * len_c * taps
    out = tl.arange(0, BLOCK_O)[:, None] * (len_c * taps) + (offs_c * taps + tap)[None, :]
    mask = (offs_o < len_o)[:, None] & ((offs_c < len_c) & (tap < taps))[None, :]
    tl.store(dw + corner + out, total.to(dw.dtype.element_ty), mask=mask)
    if MOMENTS:
        tl.store(m2 + corner + out, spread, mask=mask)


def _fused(
    x: Tensor, g: Tensor, geometry: Geometry, moments: bool, c: Config, split: Split, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dW, squared norms and m2 in one pass over the samples."""
    groups, len_c, len_o = geometry.groups, x.shape[1] // geometry.groups, g.shape[1]
    len_o //= groups
    per_tile = c.block_i // channels
    tiles_n = cdiv(geometry.taps, per_tile) * cdiv(len_c, channels)
    tiles_o = cdiv(len_o, c.block_o)
    unit = min(channels, 16) if x.element_size() == 2 else 1
    x, wide_c = channels_last(x, groups, unit)
    rows = g.flatten(2).transpose(1, 2)  # (B, positions, O)
    wide_o = len_o
    if groups == 1:
        rows = _common.loadable(rows)
        wide_o = rows.shape[2]
    elif g.element_size() == 2:
        last, wide_o = channels_last(g, groups, 16)
        rows = last.flatten(2).transpose(1, 2)

    def first(outputs: dict[str, Any], grid: tuple[int, int]) -> None:
        args = {
            **arguments(x, g, geometry), "g": rows, "len_c": len_c, "len_o": len_o,
            "x_group": wide_c, "wide_c": wide_c, "wide_o": wide_o, "g_b": rows.stride(0),
            "g_s": rows.stride(1), "g_o": rows.stride(2), "g_group": wide_o * rows.stride(2),
            "tiles_o": tiles_o, "tiles_n": tiles_n, "BLOCK_O": c.block_o, "BLOCK_N": c.block_i,
            "BLOCK_S": c.block_t, "CHANNELS": channels, "UNIT": unit, "FULL": wide_c == channels,
        }  # fmt: skip
        _common.launch(_conv_kernel, grid, {**args, **outputs}, c.num_warps, c.num_stages)

    dw = x.new_empty(groups * len_o, len_c, *geometry.kernel)
    tiles = groups * tiles_o * tiles_n
    return run_split(first, dw, tiles, x.shape[0], rows.shape[1], moments, split, c.block_t)


def weight_stats(
    x: Tensor, g: Tensor, geometry: Geometry, moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dw, sq_norm, m2); x: (B, I, D, H, W), g: (B, O, D', H', W')."""
    out = three(g.shape[2:], 1)
    rows = patches(x, geometry, out)
    if rows is not None:
        flat = g.flatten(2).transpose(1, 2)
        dw, _, sq_norm, _, m2, _ = linear_stats(rows, flat, True, False, moments)
        return dw, sq_norm, m2
    if x.shape[1] == geometry.groups > 1:
        return conv_depthwise.weight_stats(x, g, geometry, moments)
    plan = (x.shape[0], prod(out), x.shape[1] // geometry.groups, g.shape[1] // geometry.groups)
    c, split, channels = conv_config(
        *plan, geometry.taps, geometry.groups, x.dtype, moments, *_common.planned_for(x)
    )
    if c.path == "gram":
        return conv_gram.weight_stats(x, g, geometry, c)
    return _fused(x, g, geometry, moments, c, split, channels)


def conv_stats(
    x: Tensor, g: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
    weight: bool, bias: bool, moments: bool,
) -> LinearStats:  # fmt: skip
    """As gradstats.reference.conv_stats; float32, bfloat16 and float16, any strides."""
    _common.check_inputs(OP, x=x, g=g)
    dims = len(kernel_size)
    if x.dim() != dims + 2 or g.dim() != dims + 2 or x.shape[0] != g.shape[0] or dims > 3:
        _common.refuse(OP, f"x is {tuple(x.shape)}, g is {tuple(g.shape)}, the kernel "
                       f"{tuple(kernel_size)}", "Expected 1 to 3 spatial dimensions")  # fmt: skip
    if x.dtype != g.dtype:
        _common.refuse(OP, f"x is {x.dtype}, g is {g.dtype}", "Give both one dtype")
    check_size(OP, x, g)
    none = x.new_empty(0, dtype=torch.float32)
    dw, w_sq, w_m2, db, b_sq, b_m2 = x.new_empty(0), none, none, x.new_empty(0), none, none
    shape = (g.shape[1], x.shape[1] // groups, *kernel_size)
    if weight and x.numel() and g.numel():
        geometry = Geometry(three(kernel_size, 1), three(stride, 1), three(padding, 0),
                            three(dilation, 1), groups, dims)  # fmt: skip
        dw, w_sq, w_m2 = weight_stats(collapse(x), collapse(g), geometry, moments)
        dw, w_m2 = dw.view(shape), w_m2.view(shape) if moments else w_m2
    elif weight:  # nothing to add up
        dw, w_sq = x.new_zeros(shape), none.new_zeros(x.shape[0])
        w_m2 = none.new_zeros(shape if moments else (0,))
    if bias:
        db, b_sq, b_m2 = sum_stats(g.flatten(2).sum(2, dtype=torch.float32), moments, g.dtype)
    return dw, db, w_sq, b_sq, w_m2, b_m2
