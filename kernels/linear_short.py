"""Per-sample squared norms of a linear layer's weight gradient without forming the gradients.

For one position (rank one) and for few positions (Gram); dW itself is then an ordinary GEMM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats.kernels import _common
from gradstats.kernels._common import cdiv
from gradstats.kernels.linear_config import Config, gram_parts

JOINED = 2048  # elements of a tile that are joined at a time
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a·b with exact products and fp32 sums: no tf32."""
    if INTERPRETED:  # which would multiply the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _gram(
    base, row_a, row_b, len_t, first, last, stride_t, stride_k,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """One BLOCK_T × BLOCK_T tile of the inner products of a sample's rows, in fp32, over the columns
    [first, last). ALIKE rows are read once."""
    in_a = row_a < len_t
    in_b = row_b < len_t
    a = base + row_a.to(tl.int64)[:, None] * stride_t
    b = base + row_b.to(tl.int64)[None, :] * stride_t
    acc = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for k in range(first, last, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        in_k = cols < last
        at = cols.to(tl.int64) * stride_k
        left = tl.load(a + at[None, :], mask=in_a[:, None] & in_k[None, :], other=0.0)
        if ALIKE:
            right = tl.trans(left)
        else:
            right = tl.load(b + at[:, None], mask=in_k[:, None] & in_b[None, :], other=0.0)
        acc = dot(left, right, acc)
    return acc


@triton.jit
def _both(
    x, g, row, col, part, per_i, per_o, len_t, len_i, len_o, x_t, x_i, g_t, g_o,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """The tiles of x and of g, over one part of the columns of each."""
    a = row * BLOCK_T + tl.arange(0, BLOCK_T)
    b = col * BLOCK_T + tl.arange(0, BLOCK_T)
    first, last = part * per_i, tl.minimum((part + 1) * per_i, len_i)
    xx = _gram(x, a, b, len_t, first, last, x_t, x_i, BLOCK_T, BLOCK_K, ALIKE)
    first, last = part * per_o, tl.minimum((part + 1) * per_o, len_o)
    return xx, _gram(g, a, b, len_t, first, last, g_t, g_o, BLOCK_T, BLOCK_K, ALIKE)


@triton.jit
def _leave(
    xx, gg, out, sample, row, col, part, pairs, times,
    BLOCK_T: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The sum of the products, or where columns are shared the tiles, for what joins them."""
    pair = row * (row + 1) // 2 + col
    if PARTS == 1:
        found = times * tl.sum(xx * gg)
        if pairs == 1:  # nothing to add: rounding may leave a tiny negative where it cancels
            found = tl.maximum(found, 0.0)
        tl.store(out + sample * pairs + pair, found)
    else:
        rows = tl.arange(0, BLOCK_T)
        at = rows[:, None] * BLOCK_T + rows[None, :]
        at += ((sample * pairs + pair) * PARTS + part) * 2 * BLOCK_T * BLOCK_T
        tl.store(out + at, xx)
        tl.store(out + at + BLOCK_T * BLOCK_T, gg)


@triton.jit
def _gram_kernel(
    x, g, out, len_t, len_i, len_o, pairs, per_i, per_o, x_b, x_t, x_i, g_b, g_t, g_o,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[b, pair] = Σ_ts (x_t·x_s)(g_t·g_s) over one pair of row blocks (arXiv:1510.01799).

    Only the lower triangle of blocks is computed; those below the diagonal count twice. With PARTS
    above 1, each takes a part of the columns, and `out` holds both factors' parts.
    """
    sample = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    row = tl.program_id(1)
    col = tl.program_id(2)
    x += sample * x_b
    g += sample * g_b
    if col == row:
        xx, gg = _both(
            x, g, row, col, part, per_i, per_o, len_t, len_i, len_o, x_t, x_i, g_t, g_o,
            BLOCK_T, BLOCK_K, True,
        )  # fmt: skip
        _leave(xx, gg, out, sample, row, col, part, pairs, 1.0, BLOCK_T, PARTS)
    elif col < row:
        xx, gg = _both(
            x, g, row, col, part, per_i, per_o, len_t, len_i, len_o, x_t, x_i, g_t, g_o,
            BLOCK_T, BLOCK_K, False,
        )  # fmt: skip
        _leave(xx, gg, out, sample, row, col, part, pairs, 2.0, BLOCK_T, PARTS)


@triton.jit
def _gram_join_kernel(
    tiles, sq_norm, blocks, pairs, SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """Add up the parts of both factors of a sample's tiles, multiply, sum; all in a fixed order."""
    sample = tl.program_id(0).to(tl.int64)
    at = tiles + sample * pairs * (2 * PARTS * SIZE) + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(0, blocks):
        for col in range(0, row + 1):
            times = tl.where(row == col, 1.0, 2.0)
            for _ in range(0, SIZE, BLOCK):
                xx = tl.zeros((BLOCK,), dtype=tl.float32)
                gg = tl.zeros((BLOCK,), dtype=tl.float32)
                for part in tl.static_range(PARTS):
                    xx += tl.load(at + 2 * part * SIZE)
                    gg += tl.load(at + (2 * part + 1) * SIZE)
                acc += times * (xx * gg)
                at += BLOCK
            at += (2 * PARTS - 1) * SIZE
    tl.store(sq_norm + sample, tl.maximum(tl.sum(acc), 0.0))


@triton.jit
def _row_sq(base, width, stride, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(0, width, BLOCK):
        cols = k + tl.arange(0, BLOCK)
        v = tl.load(base + cols.to(tl.int64) * stride, mask=cols < width, other=0.0).to(tl.float32)
        acc += v * v
    return tl.sum(acc)


@triton.jit
def _rank_one_kernel(x, g, sq_norm, len_i, len_o, x_b, x_i, g_b, g_o, BLOCK: tl.constexpr):
    """T = 1: ‖g xᵀ‖² = ‖g‖²·‖x‖² (arXiv:1510.01799)."""
    sample = tl.program_id(0).to(tl.int64)
    xx = _row_sq(x + sample * x_b, len_i, x_i, BLOCK)
    gg = _row_sq(g + sample * g_b, len_o, g_o, BLOCK)
    tl.store(sq_norm + sample, xx * gg)


def gram_sq_norm(x: Tensor, g: Tensor, c: Config) -> Tensor:
    x, g = _common.loadable(x), _common.loadable(g)  # padding is zero and adds nothing
    (batch, len_t, len_i), len_o = x.shape, g.shape[2]
    blocks = cdiv(len_t, c.block_t)
    pairs = blocks * (blocks + 1) // 2
    parts = gram_parts(batch * pairs, max(len_i, len_o), c, _common.num_sms(x))
    size = c.block_t**2
    shape = (batch, pairs) if parts == 1 else (batch, pairs, parts, 2, size)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    per_i, per_o = (cdiv(cdiv(n, c.block_i), parts) * c.block_i for n in (len_i, len_o))
    _common.launch(
        _gram_kernel,
        (batch * parts, blocks, blocks),
        {
            "x": x, "g": g, "out": out, "len_t": len_t, "len_i": len_i, "len_o": len_o,
            "pairs": pairs, "per_i": per_i, "per_o": per_o,
            "x_b": x.stride(0), "x_t": x.stride(1), "x_i": x.stride(2),
            "g_b": g.stride(0), "g_t": g.stride(1), "g_o": g.stride(2),
            "BLOCK_T": c.block_t, "BLOCK_K": c.block_i, "PARTS": parts,
        },
        c.num_warps,
        c.num_stages,
    )  # fmt: skip
    if parts == 1:
        # A sum over t and s of either sign: rounding may leave a tiny negative where it cancels.
        return out.view(batch) if pairs == 1 else out.sum(1).clamp_min_(0)
    sq_norm = torch.empty(batch, dtype=torch.float32, device=x.device)
    args = {"tiles": out, "sq_norm": sq_norm, "blocks": blocks, "pairs": pairs,
            "SIZE": size, "BLOCK": min(size, JOINED), "PARTS": parts}  # fmt: skip
    _common.launch(_gram_join_kernel, (batch,), args, 8)
    return sq_norm


def rank_one_sq_norm(x: Tensor, g: Tensor, c: Config) -> Tensor:
    sq_norm = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _common.launch(
        _rank_one_kernel,
        (x.shape[0],),
        {
            "x": x, "g": g, "sq_norm": sq_norm, "len_i": x.shape[2], "len_o": g.shape[2],
            "x_b": x.stride(0), "x_i": x.stride(2), "g_b": g.stride(0), "g_o": g.stride(2),
            "BLOCK": c.block_i,
        },
        c.num_warps,
    )  # fmt: skip
    return sq_norm


def rank_one_m2(x: Tensor, g: Tensor) -> Tensor:
    """Σ_b (g_b x_bᵀ − mean)² of (B, I) and (B, O), from products of centred factors.

    With g = ḡ + δ, x = x̄ + ε and C = Σ_b δεᵀ, the contributions less ḡx̄ᵀ sum to C, their squares to
    Σ_b (δ² + 2ḡδ)(ε² + 2x̄ε) − 2ḡx̄C + ḡ²Σε² + x̄²Σδ². Every term is as small as the spread itself,
    where (g²)ᵀ(x²) − dW²/B would lose samples that are nearly alike.
    """
    x, g = x.float(), g.float()
    x_mean, g_mean = x.mean(0), g.mean(0)
    e, d = x - x_mean, g - g_mean
    c = d.t() @ e
    m2 = (d * (d + 2 * g_mean)).t() @ (e * (e + 2 * x_mean))
    m2.addcmul_(torch.outer(g_mean, x_mean), c, value=-2)
    m2.addr_(g_mean.square(), e.square().sum(0)).addr_(d.square().sum(0), x_mean.square())
    return m2.addcmul_(c, c, value=-1 / x.shape[0]).clamp_min_(0)
