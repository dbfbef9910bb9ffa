"""Inner products of an embedding's and a tied head's per-sample gradients, neither of them formed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats.kernels import _common
from gradstats.kernels._common import cdiv, next_power_of_2
from gradstats.kernels.linear_short import dot

OP = "tied_cross"


@triton.jit
def _cross_kernel(
    ids, e, h, a, slab, len_t, len_s, vocabulary, width, blocks_s, tiles,
    ids_b, ids_t, e_b, e_t, e_d, h_b, h_s, h_v, a_b, a_s, a_d,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """slab[b, tile] = Σ_ts h[s, id_t] (e_t·a_s) over one tile of the T × S positions of a sample.

    ⟨Σ_t onehot(id_t) e_tᵀ, Σ_s h_s a_sᵀ⟩ as a Gram (arXiv:1510.01799), one factor being a gather.
    """
    # In one dimension: the other two have 65535 programs at most, which 16384 positions exceed.
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    t = tile // blocks_s * BLOCK + tl.arange(0, BLOCK)
    s = tile % blocks_s * BLOCK + tl.arange(0, BLOCK)
    in_t = t < len_t
    in_s = s < len_s
    row = tl.load(ids + sample * ids_b + t.to(tl.int64) * ids_t, mask=in_t, other=-1).to(tl.int64)
    known = (row >= 0) & (row < vocabulary)
    # Asked for first: its sectors are scattered over S·V elements and arrive during the products.
    column = h + sample * h_b + s.to(tl.int64)[None, :] * h_s + row[:, None] * h_v
    picked = tl.load(column, mask=known[:, None] & in_s[None, :], other=0.0)
    e_rows = e + sample * e_b + t.to(tl.int64)[:, None] * e_t
    a_rows = a + sample * a_b + s.to(tl.int64)[None, :] * a_s
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for d in range(0, width, BLOCK_D):
        cols = d + tl.arange(0, BLOCK_D)
        in_d = cols < width
        at = cols.to(tl.int64)
        left = tl.load(e_rows + at[None, :] * e_d, mask=in_t[:, None] & in_d[None, :], other=0.0)
        right = tl.load(a_rows + at[:, None] * a_d, mask=in_d[:, None] & in_s[None, :], other=0.0)
        acc = dot(left, right, acc)
    tl.store(slab + sample * tiles + tile, tl.sum(acc * picked.to(tl.float32)))


def tile(positions: int, dtype: torch.dtype) -> tuple[int, int]:
    """(positions, columns) of a program's products."""
    if dtype == torch.float32:
        return min(max(next_power_of_2(positions), 16), 32), 32
    return min(max(next_power_of_2(positions), 16), 64), 64


def tied_cross(ids: Tensor, e: Tensor, h: Tensor, a: Tensor) -> Tensor:
    """As gradstats.reference.tied_cross; float32, bfloat16 and float16, any strides."""
    _common.check_inputs(OP, e=e, h=h, a=a)
    shapes = (ids.shape, e.shape[:2], (h.shape[0], a.shape[2:]), h.shape[:2])
    wanted = (e.shape[:2], ids.shape, (e.shape[0], e.shape[2:]), a.shape[:2])
    if shapes != wanted or not e.dim() == h.dim() == a.dim() == 3:
        _common.refuse(OP, f"ids, e, h and a have shapes {tuple(ids.shape)}, {tuple(e.shape)}, "
                       f"{tuple(h.shape)} and {tuple(a.shape)}",
                       "Expected (B, T), (B, T, D), (B, S, V) and (B, S, D)")  # fmt: skip
    if e.dtype != a.dtype:
        _common.refuse(OP, f"e is {e.dtype}, a is {a.dtype}", "Give both one dtype")
    e, a = _common.loadable(e), _common.loadable(a)  # padding is zero and adds nothing
    (batch, len_t, width), len_s = e.shape, a.shape[1]
    if not (batch and len_t and len_s):
        return torch.zeros(batch, dtype=torch.float32, device=e.device)
    block, block_d = tile(max(len_t, len_s), e.dtype)
    blocks_s = cdiv(len_s, block)
    tiles = cdiv(len_t, block) * blocks_s
    slab = torch.empty(batch, tiles, dtype=torch.float32, device=e.device)
    _common.launch(
        _cross_kernel,
        (batch * tiles,),
        {
            "ids": ids, "e": e, "h": h, "a": a, "slab": slab, "len_t": len_t, "len_s": len_s,
            "vocabulary": h.shape[2], "width": width, "blocks_s": blocks_s, "tiles": tiles,
            "ids_b": ids.stride(0), "ids_t": ids.stride(1),
            "e_b": e.stride(0), "e_t": e.stride(1), "e_d": e.stride(2),
            "h_b": h.stride(0), "h_s": h.stride(1), "h_v": h.stride(2),
            "a_b": a.stride(0), "a_s": a.stride(1), "a_d": a.stride(2),
            "BLOCK": block, "BLOCK_D": block_d,
        },
        4,
        3,
    )  # fmt: skip
    return slab.sum(1)
