"""Weight gradient of an embedding with per-sample statistics, from the looked-up rows alone.

One stable sort puts equal ids together and, among them, each sample's rows in order. A run is the
rows of one id in one sample, so its sum is that sample's contribution to one row of the weight.
Nothing has B × V elements, no two programs write to one place, and nothing waits for the host.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats.kernels import _common
from gradstats.kernels._common import cdiv, next_power_of_2

OP = "embedding_stats"
BLOCK = 256  # columns of a row: 16-byte loads of one warp
STAGES = 4  # rows under way


@triton.jit
def _runs_kernel(
    keys, order, bounds, g, dw, m2, slab, sums, spreads, counts,
    batch, len_t, width, positions, g_b, g_t, g_d,
    MOMENTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The runs that begin in one chunk of the sorted positions, in order; key = id·B + sample.

    c = Σ g over a run; slab at the run's last position = Σ c²; per id the sum of c and, with
    MOMENTS, Welford's m2, to which the B − n samples that did not look it up add mean²·n(B − n)/B.
    An id that another chunk shares goes to `sums`: [chunk, 0] if it began before, else [chunk, 1].
    """
    chunk = tl.program_id(0).to(tl.int64)
    first = tl.load(bounds + chunk)
    last = tl.load(bounds + chunk + 1)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_d = cols < width
    g_cols = g + cols.to(tl.int64) * g_d
    end = tl.load(bounds + tl.num_programs(0))  # rows of the padding id are sorted past it
    before = tl.load(keys + first - 1, mask=first > 0, other=-1)
    began_before = (first > 0) & (
        before // batch == tl.load(keys + first, mask=first < end, other=-1) // batch
    )
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    spread = tl.zeros((BLOCK,), dtype=tl.float32)
    n = 0.0
    for p in tl.range(first, last, num_stages=STAGES):
        row = tl.load(order + p)
        key = tl.load(keys + p)
        following = tl.load(keys + p + 1, mask=p + 1 < end, other=-1)
        b = row // len_t
        at = b.to(tl.int64) * g_b + (row - b * len_t).to(tl.int64) * g_t
        acc += tl.load(g_cols + at, mask=in_d, other=0.0).to(tl.float32)
        if following != key:  # acc is this sample's contribution to this row of the weight
            tl.store(slab + tl.program_id(1).to(tl.int64) * positions + row, tl.sum(acc * acc))
            if MOMENTS:
                d = acc - total * (1.0 / tl.maximum(n, 1.0))
                spread += d * (d * (n / (n + 1.0)))
            n += 1.0
            total += acc
            acc = tl.zeros((BLOCK,), dtype=tl.float32)
            row_id = key // batch
            goes_on = (following >= 0) & (following // batch == row_id)
            if (p + 1 == last) | (goes_on == 0):
                if began_before | goes_on:
                    part = 2 * chunk + tl.where(began_before, 0, 1)
                    tl.store(sums + part * width + cols, total, mask=in_d)
                    tl.store(counts + part, n)
                    if MOMENTS:
                        tl.store(spreads + part * width + cols, spread, mask=in_d)
                else:
                    tl.store(dw + row_id * width + cols, total.to(dw.dtype.element_ty), mask=in_d)
                    if MOMENTS:
                        spread += total * (total * ((batch - n) / (n * batch)))
                        tl.store(m2 + row_id * width + cols, spread, mask=in_d)
                began_before = began_before & False  # only a chunk's first id may have
                total = tl.zeros((BLOCK,), dtype=tl.float32)
                spread = tl.zeros((BLOCK,), dtype=tl.float32)
                n = 0.0


@triton.jit
def _join_kernel(
    keys, bounds, dw, m2, sums, spreads, counts, batch, width,
    MOMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up, chunk by chunk, the id that begins in this chunk and goes on in the next ones;
    (n, sum, m2) are merged by Chan, Golub & LeVeque (1979).
    """
    chunks = tl.num_programs(0)
    chunk = tl.program_id(0).to(tl.int64)
    first = tl.load(bounds + chunk)
    last = tl.load(bounds + chunk + 1)
    end = tl.load(bounds + chunks)
    if (first < last) & (last < end):
        row_id = tl.load(keys + last - 1) // batch
        goes_on = tl.load(keys + last) // batch == row_id
        began_before = tl.load(keys + first - 1, mask=first > 0, other=-1) // batch == row_id
        if goes_on & ((first == 0) | (began_before == 0)):
            cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            in_d = cols < width
            part = 2 * chunk + 1
            total = tl.load(sums + part * width + cols, mask=in_d, other=0.0)
            spread = tl.zeros((BLOCK,), dtype=tl.float32)
            if MOMENTS:
                spread += tl.load(spreads + part * width + cols, mask=in_d, other=0.0)
            seen = tl.load(counts + part)
            chunk += 1
            while goes_on:
                here = tl.load(bounds + chunk)
                after = tl.load(bounds + chunk + 1)
                if here < after:  # no run begins in a chunk that one run fills
                    part = 2 * chunk
                    n = tl.load(counts + part)
                    more = tl.load(sums + part * width + cols, mask=in_d, other=0.0)
                    if MOMENTS:
                        d = more * (1.0 / n) - total * (1.0 / seen)
                        spread += tl.load(spreads + part * width + cols, mask=in_d, other=0.0)
                        spread += d * (d * (seen * n / (seen + n)))
                    total += more
                    seen += n
                chunk += 1
                goes_on = tl.load(keys + after, mask=after < end, other=-1) // batch == row_id
                goes_on = goes_on & (after < end)
            tl.store(dw + row_id * width + cols, total.to(dw.dtype.element_ty), mask=in_d)
            if MOMENTS:
                spread += total * (total * ((batch - seen) / (seen * batch)))
                tl.store(m2 + row_id * width + cols, spread, mask=in_d)


def chunk_size(positions: int) -> int:
    """Positions per program: both walks, over a chunk and over the chunks of one id, are short."""
    return min(max(next_power_of_2(math.isqrt(positions)) // 4, 8), 256)


def _sorted(
    ids: Tensor, num_embeddings: int, padding_idx: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys in order, where each came from, and the first run of every chunk and past the last."""
    batch, len_t = ids.shape
    keys = ids.long() * batch + torch.arange(batch, device=ids.device).unsqueeze(1)
    past = num_embeddings * batch
    if padding_idx >= 0:
        keys.masked_fill_(ids == padding_idx, past)
    keys, order = keys.flatten().sort(stable=True)
    # A chunk begins where the run that holds the position before it ends.
    bounds = torch.searchsorted(keys, keys[chunk - 1 :: chunk].contiguous(), right=True)
    end = torch.searchsorted(keys, keys.new_full((1,), past))
    starts = torch.cat([end.new_zeros(1), bounds[: cdiv(batch * len_t, chunk) - 1], end])
    return keys, order if order.numel() >= 2**31 else order.int(), torch.minimum(starts, end)


def embedding_stats(
    ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int, moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As gradstats.reference.embedding_stats; float32, bfloat16 and float16, any strides."""
    _common.check_inputs(OP, g=g)
    if g.dim() != 3 or ids.shape != g.shape[:2]:
        _common.refuse(OP, f"ids are {tuple(ids.shape)}, g is {tuple(g.shape)}",
                       "Expected (B, T) and (B, T, D)")  # fmt: skip
    if ids.dtype not in (torch.int64, torch.int32):
        _common.refuse(OP, f"ids have dtype {ids.dtype}", "Supported: int64, int32")
    (batch, len_t, width), f32 = g.shape, {"dtype": torch.float32, "device": g.device}
    dw = g.new_zeros(num_embeddings, width)  # most rows of a large vocabulary stay so
    m2 = torch.zeros((num_embeddings, width) if moments else (0,), **f32)
    if not g.numel():
        return dw, torch.zeros(batch, **f32), m2
    chunk = chunk_size(batch * len_t)
    chunks, blocks = cdiv(batch * len_t, chunk), cdiv(width, BLOCK)
    keys, order, bounds = _sorted(ids, num_embeddings, padding_idx, chunk)
    slab = torch.zeros(blocks, batch, len_t, **f32)
    sums = torch.empty(2 * chunks, width, **f32)
    spreads = torch.empty((2 * chunks, width) if moments else (0,), **f32)
    shared = {
        "keys": keys, "bounds": bounds, "dw": dw, "m2": m2, "sums": sums, "spreads": spreads,
        "counts": torch.empty(2 * chunks, **f32), "batch": batch, "width": width,
        "MOMENTS": moments, "BLOCK": min(BLOCK, max(next_power_of_2(width), 32)),
    }  # fmt: skip
    rows = {
        "order": order, "g": g, "slab": slab, "len_t": len_t, "positions": batch * len_t,
        "g_b": g.stride(0), "g_t": g.stride(1), "g_d": g.stride(2), "STAGES": STAGES,
    }  # fmt: skip
    _common.launch(_runs_kernel, (chunks, blocks), {**shared, **rows}, 1)
    _common.launch(_join_kernel, (chunks, blocks), shared, 1)
    return dw, slab.sum((0, 2)), m2
