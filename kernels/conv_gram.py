"""Per-sample squared norms of a convolution with few positions; dW is then the library's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats.kernels import _common
from gradstats.kernels._common import cdiv
from gradstats.kernels.conv_layout import Geometry, arguments, channels_last, first_tap, inside
from gradstats.kernels.linear_config import Config
from gradstats.kernels.linear_short import _gram, dot


@triton.jit
def _conv_gram_kernel(
    x, g, slab, len_s, len_c, len_o, taps, blocks, pairs,
    size_d, size_h, size_w, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w,
    dil_d, dil_h, dil_w, kernel_h, kernel_w, out_h, out_w, magic_h, shift_h, magic_w, shift_w,
    x_b, x_d, x_h, x_w, x_group, g_b, g_s, g_o, g_group,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """slab[b, group, pair] = Σ_st (p_s·p_t)(g_s·g_t) over one pair of row blocks
    (arXiv:1510.01799), p_s being the patch that position s sees. Blocks below the diagonal count
    twice, those above are not computed.
    """
    sample = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    row = tl.program_id(2) // blocks
    col = tl.program_id(2) % blocks
    if col <= row:
        a = row * BLOCK_S + tl.arange(0, BLOCK_S)
        b = col * BLOCK_S + tl.arange(0, BLOCK_S)
        da, ha, wa = first_tap(
            a, out_h, out_w, magic_h, shift_h, magic_w, shift_w,
            stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, DIMS,
        )  # fmt: skip
        db, hb, wb = first_tap(
            b, out_h, out_w, magic_h, shift_h, magic_w, shift_w,
            stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, DIMS,
        )  # fmt: skip
        base = x + sample * x_b + group.to(tl.int64) * x_group
        at_a = base + da.to(tl.int64) * x_d + ha.to(tl.int64) * x_h + wa.to(tl.int64) * x_w
        at_b = base + db.to(tl.int64) * x_d + hb.to(tl.int64) * x_h + wb.to(tl.int64) * x_w
        pp = tl.zeros((BLOCK_S, BLOCK_S), dtype=tl.float32)
        blocks_c = tl.cdiv(len_c, BLOCK_K)
        for step in range(0, taps * blocks_c):
            tap = step // blocks_c
            c = (step - tap * blocks_c) * BLOCK_K + tl.arange(0, BLOCK_K)
            tw = tap % kernel_w * dil_w
            th = tap // kernel_w % kernel_h * dil_h
            td = tap // (kernel_w * kernel_h) * dil_d
            shift = td.to(tl.int64) * x_d + th.to(tl.int64) * x_h + tw.to(tl.int64) * x_w
            in_a = inside(da + td, ha + th, wa + tw, size_d, size_h, size_w, DIMS) & (a < len_s)
            in_b = inside(db + td, hb + th, wb + tw, size_d, size_h, size_w, DIMS) & (b < len_s)
            in_c = c < len_c
            left = tl.load(
                at_a[:, None] + (shift + c)[None, :], mask=in_a[:, None] & in_c[None, :], other=0.0
            )
            right = tl.load(
                at_b[None, :] + (shift + c)[:, None], mask=in_c[:, None] & in_b[None, :], other=0.0
            )
            pp = dot(left, right, pp)
        rows = g + sample * g_b + group.to(tl.int64) * g_group
        gg = _gram(rows, a, b, len_s, 0, len_o, g_s, g_o, BLOCK_S, BLOCK_K, False)
        times = tl.where(row == col, 1.0, 2.0)
        at = (sample * tl.num_programs(1) + group) * pairs + row * (row + 1) // 2 + col
        tl.store(slab + at, times * tl.sum(pp * gg))


def weight_stats(
    x: Tensor, g: Tensor, geometry: Geometry, c: Config
) -> tuple[Tensor, Tensor, Tensor]:
    groups, len_o = geometry.groups, g.shape[1] // geometry.groups
    dims = geometry.dims  # to the library a plane is no volume

    def real(t: Tensor) -> Tensor:
        return t.reshape(*t.shape[:2], *t.shape[5 - dims :])

    like = x.new_empty(g.shape[1], x.shape[1] // groups, *geometry.kernel[3 - dims :])
    options = (o[3 - dims :] for o in (geometry.stride, geometry.padding, geometry.dilation))
    dw = torch.ops.aten.convolution_backward(
        real(g), real(x), like, None, *options, False, [0] * dims, groups, [False, True, False]
    )[1].contiguous()  # whatever format its inputs have, as its fake kernel says
    (x, wide_c), (last, wide_o) = channels_last(x, groups, 16), channels_last(g, groups, 16)
    rows = last.flatten(2).transpose(1, 2)
    batch, len_s, _ = rows.shape
    blocks = cdiv(len_s, c.block_t)
    pairs = blocks * (blocks + 1) // 2
    slab = torch.empty(batch, groups * pairs, dtype=torch.float32, device=x.device)
    _common.launch(
        _conv_gram_kernel,
        (batch, groups, blocks * blocks),
        {
            **arguments(x, g, geometry), "g": rows, "slab": slab,
            "len_c": like.shape[1], "len_o": len_o, "blocks": blocks, "pairs": pairs,
            "x_group": wide_c, "g_b": rows.stride(0), "g_s": rows.stride(1),
            "g_o": rows.stride(2), "g_group": wide_o,
            "BLOCK_S": c.block_t, "BLOCK_K": c.block_i,
        },
        c.num_warps,
        c.num_stages,
    )  # fmt: skip
    # A sum over s and t of either sign: rounding may leave a tiny negative where it cancels.
    return dw, slab.sum(1).clamp_min_(0), x.new_empty(0, dtype=torch.float32)
