"""Shared by the kernels of normalisations and biases: from a slab of contributions to statistics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats.kernels import _common
from gradstats.kernels._common import cdiv

ROWS_AT_ONCE, COLS_AT_ONCE = 32, 32


def check(op: str, g: Tensor, x: Tensor, stat: tuple[int, ...], **given: Tensor | None) -> None:
    if x.dim() != 3:
        _common.refuse(op, f"x has shape {tuple(x.shape)}", "Expected three dimensions")
    _common.check_inputs(op, g=g, x=x, **given)
    features = {"scale": (x.shape[2] if op == "layer_norm_stats" else x.shape[1],)}
    for name, t in {"g": g, **given}.items():
        expected = tuple(x.shape) if name == "g" else features.get(name, stat)
        if t is not None and tuple(t.shape) != expected:
            _common.refuse(op, f"{name} has shape {tuple(t.shape)}", f"Expected {expected}")


def new_slab(x: Tensor, kinds: int, batch: int, splits: int, width: int) -> Tensor:
    """Room for contributions; every element gets written, unless there is nothing to read."""
    new = torch.empty if x.numel() else torch.zeros
    return new(kinds, batch, splits, width, dtype=torch.float32, device=x.device)


@triton.jit
def _contribution(
    base, rows, in_cols, batch, splits, width, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """(ROWS, COLS) of the slab, its splits added in order."""
    inside = (rows < batch)[:, None] & in_cols[None, :]
    at = base + (rows.to(tl.int64) * splits * width)[:, None]
    acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for _ in range(0, splits):
        acc += tl.load(at, mask=inside, other=0.0)
        at += width
    return acc


@triton.jit
def _reduce_kernel(
    slab, slab_k, dw, db, sq, w_m2, b_m2, batch, splits, width, first_kind,
    MOMENTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Contributions c_b to statistics: Σ c_b, c_b² summed over this block's columns, Σ (c_b − c̄)².

    Two passes over the slab, which L2 holds, rather than a running mean: rows stay vectors.
    """
    kind = tl.program_id(1)
    is_scale = kind + first_kind == 0
    kind = kind.to(tl.int64)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_cols = cols < width
    base = slab + kind * slab_k + cols[None, :]
    acc = tl.zeros((COLS,), dtype=tl.float32)
    for b in range(0, batch, ROWS):
        rows = b + tl.arange(0, ROWS)
        c = _contribution(base, rows, in_cols, batch, splits, width, ROWS, COLS)
        at = sq + (kind * batch + rows) * tl.num_programs(0) + tl.program_id(0)
        tl.store(at, tl.sum(c * c, axis=1), mask=rows < batch)
        acc += tl.sum(c, axis=0)
    if is_scale:
        tl.store(dw + cols, acc.to(dw.dtype.element_ty), mask=in_cols)
    else:
        tl.store(db + cols, acc.to(db.dtype.element_ty), mask=in_cols)
    if MOMENTS:
        mean = acc / batch
        spread = tl.zeros((COLS,), dtype=tl.float32)
        for b in range(0, batch, ROWS):
            rows = b + tl.arange(0, ROWS)
            c = _contribution(base, rows, in_cols, batch, splits, width, ROWS, COLS)
            d = tl.where((rows < batch)[:, None], c - mean[None, :], 0.0)
            spread += tl.sum(d * d, axis=0)
        if is_scale:
            tl.store(w_m2 + cols, spread, mask=in_cols)
        else:
            tl.store(b_m2 + cols, spread, mask=in_cols)


def reduce_slab(
    slab: Tensor, weight: bool, bias: bool, moments: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """slab: (kinds, B, splits, D), the scale's contributions first, the shift's after.

    Returns (dw, db, w_sq_norm, b_sq_norm, w_m2, b_m2), the gradients in `dtype`.
    """
    kinds, batch, splits, width = slab.shape
    blocks = cdiv(width, COLS_AT_ONCE)
    dw, db = (slab.new_empty(width if on else 0, dtype=dtype) for on in (weight, bias))
    w_m2, b_m2 = (slab.new_empty(width if on and moments else 0) for on in (weight, bias))
    sq = slab.new_empty(kinds, batch, blocks)
    if kinds and slab.numel():
        _common.launch(
            _reduce_kernel,
            (blocks, kinds),
            {
                "slab": slab, "slab_k": slab.stride(0), "dw": dw, "db": db, "sq": sq,
                "w_m2": w_m2, "b_m2": b_m2, "batch": batch, "splits": splits, "width": width,
                "first_kind": int(not weight),
                "MOMENTS": moments, "ROWS": ROWS_AT_ONCE, "COLS": COLS_AT_ONCE,
            },
            4,
        )  # fmt: skip
    else:  # no samples: nothing to add up
        for t in (dw, db, w_m2, b_m2, sq):
            t.zero_()
    w_sq = sq[0].sum(1) if weight else slab.new_empty(0)
    b_sq = sq[-1].sum(1) if bias else slab.new_empty(0)
    return dw, db, w_sq, b_sq, w_m2, b_m2


def sum_stats(c: Tensor, moments: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, sq_norm, m2) of contributions (B, D) in float32, the sum in `dtype`.

    As gradstats.reference.sum_stats, whose eight operations are eight launches: more than the work.
    """
    slab = c.contiguous().view(1, c.shape[0], 1, c.shape[1])
    _, total, _, sq_norm, _, m2 = reduce_slab(slab, False, True, moments, dtype)
    return total, sq_norm, m2
