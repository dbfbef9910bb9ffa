"""Statistics of a convolution with one input channel per group, where a matrix product would be
nearly empty: products of shifted rows, added up over positions.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gradstats.kernels import _common
from gradstats.kernels._common import cdiv
from gradstats.kernels.conv_config import Split
from gradstats.kernels.conv_layout import Geometry, arguments, channels_last, first_tap, inside
from gradstats.kernels.conv_split import run_split
from gradstats.kernels.sample_sums import add_sample

TAPS, CHANNELS, POSITIONS = 4, 32, 16  # of a program at a time
PROGRAMS = 8  # per multiprocessor, as far as there are samples to share out
STAGES = 2


@triton.jit
def _depthwise_kernel(
    x, g, dw, m2, slab, batch, len_s, len_o, per_group, taps, per_split, parts, per_part,
    size_d, size_h, size_w, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w,
    dil_d, dil_h, dil_w, kernel_h, kernel_w, out_h, out_w, magic_h, shift_h, magic_w, shift_w,
    x_b, x_d, x_h, x_w, x_c, g_b, g_s, g_o, tiles_k,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, STAGES: tl.constexpr,
    DIMS: tl.constexpr, MOMENTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """C_b[tap, o] = Σ_s g_bs[o] x_b[s·stride − pad + tap·dil, o // per_group] for some taps and
    channels, over the samples of one split or a part of one sample: slab[b, tile] = Σ C_b²,
    dw[split] = Σ_b C_b, and with MOMENTS its m2.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    o = tile // tiles_k * CHANNELS + tl.arange(0, CHANNELS)
    tap = tile % tiles_k * TAPS + tl.arange(0, TAPS)
    in_o = o < len_o
    tap_w = tap % kernel_w * dil_w
    tap_h = tap // kernel_w % kernel_h * dil_h
    tap_d = tap // (kernel_w * kernel_h) * dil_d
    tap_off = tap_d.to(tl.int64) * x_d + tap_h.to(tl.int64) * x_h + tap_w.to(tl.int64) * x_w
    x_first = x + (o // per_group).to(tl.int64)[None, None, :] * x_c + tap_off[:, None, None]
    g_first = g + o.to(tl.int64)[None, :] * g_o
    first = split // parts * per_split
    last = tl.minimum(first + per_split, batch)
    first_s = split % parts * per_part
    last_s = tl.minimum(first_s + per_part, len_s)
    blocks_s = tl.cdiv(last_s - first_s, POSITIONS)
    total = tl.zeros((TAPS, CHANNELS), dtype=tl.float32)
    spread = tl.zeros((TAPS, CHANNELS), dtype=tl.float32)
    acc = tl.zeros((TAPS, POSITIONS, CHANNELS), dtype=tl.float32)
    for step in tl.range(0, (last - first) * blocks_s, num_stages=STAGES):
        done = step // blocks_s
        s0 = first_s + (step - done * blocks_s) * POSITIONS
        sample = first.to(tl.int64) + done
        s = s0 + tl.arange(0, POSITIONS)
        in_s = s < last_s
        d, h, w = first_tap(
            s, out_h, out_w, magic_h, shift_h, magic_w, shift_w,
            stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, DIMS,
        )  # fmt: skip
        seen = inside(
            d[None, :] + tap_d[:, None], h[None, :] + tap_h[:, None], w[None, :] + tap_w[:, None],
            size_d, size_h, size_w, DIMS,
        )  # fmt: skip
        seen &= (tap < taps)[:, None] & in_s[None, :]
        s_off = d.to(tl.int64) * x_d + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
        x_rows = tl.load(
            x_first + (sample * x_b + s_off)[None, :, None],
            mask=seen[:, :, None] & in_o[None, None, :],
            other=0.0,
        )
        g_rows = tl.load(
            g_first + sample * g_b + s.to(tl.int64)[:, None] * g_s,
            mask=in_s[:, None] & in_o[None, :],
            other=0.0,
        )
        acc += x_rows.to(tl.float32) * g_rows.to(tl.float32)[None, :, :]
        if s0 + POSITIONS >= last_s:
            c = tl.sum(acc, axis=1)
            if not PARTS:
                tl.store(slab + sample * tl.num_programs(0) + tile, tl.sum(c * c))
            total, spread = add_sample(c, total, spread, done.to(tl.float32), MOMENTS)
            acc = tl.zeros((TAPS, POSITIONS, CHANNELS), dtype=tl.float32)
    slot = split
    if PARTS:
        slot += split // parts  # one is left out after every sample, as sample_sums counts
    out = slot.to(tl.int64) * len_o * taps + o.to(tl.int64)[None, :] * taps + tap[:, None]
    mask = in_o[None, :] & (tap < taps)[:, None]
    tl.store(dw + out, total.to(dw.dtype.element_ty), mask=mask)
    if MOMENTS:
        tl.store(m2 + out, spread, mask=mask)


def weight_stats(
    x: Tensor, g: Tensor, geometry: Geometry, moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dw, sq_norm, m2); x: (B, I, D, H, W) with I groups, g: (B, O, D', H', W')."""
    len_o, batch = g.shape[1], x.shape[0]
    x, g = channels_last(x, 1, 16)[0], channels_last(g, 1, 16)[0]
    rows = g.flatten(2).transpose(1, 2)  # (B, positions, O), perhaps with more columns
    len_s = rows.shape[1]
    tiles_k = cdiv(geometry.taps, TAPS)
    tiles = cdiv(len_o, CHANNELS) * tiles_k

    def first(outputs: dict[str, Any], grid: tuple[int, int]) -> None:
        args = {
            **arguments(x, g, geometry), "g": rows, "len_o": len_o,
            "per_group": len_o // geometry.groups, "x_c": x.stride(1), "g_b": rows.stride(0),
            "g_s": rows.stride(1), "g_o": rows.stride(2), "tiles_k": tiles_k, "TAPS": TAPS,
            "CHANNELS": CHANNELS, "POSITIONS": POSITIONS, "STAGES": STAGES,
        }  # fmt: skip
        _common.launch(_depthwise_kernel, grid, {**args, **outputs}, 4)

    wanted = max(PROGRAMS * _common.num_sms(x) // tiles, 1)  # bounds the partial sums too
    splits = min(batch, wanted)
    parts = min(wanted // batch, cdiv(len_s, 4 * POSITIONS)) if splits == batch else 1
    dw = x.new_empty(len_o, 1, *geometry.kernel)
    return run_split(first, dw, tiles, batch, len_s, moments, Split(splits, parts), POSITIONS)
