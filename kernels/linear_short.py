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
from gradstats.kernels.linear_config import Config

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
    base, row_a, row_b, len_t, width, stride_t, stride_k,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One BLOCK_T × BLOCK_T tile of the inner products of a sample's rows, in fp32."""
    in_a = row_a < len_t
    in_b = row_b < len_t
    a = base + row_a.to(tl.int64)[:, None] * stride_t
    b = base + row_b.to(tl.int64)[None, :] * stride_t
    acc = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        in_k = cols < width
        at = cols.to(tl.int64) * stride_k
        left = tl.load(a + at[None, :], mask=in_a[:, None] & in_k[None, :], other=0.0)
        right = tl.load(b + at[:, None], mask=in_k[:, None] & in_b[None, :], other=0.0)
        acc = dot(left, right, acc)
    return acc


@triton.jit
def _gram_kernel(
    x, g, slab, len_t, len_i, len_o, pairs, x_b, x_t, x_i, g_b, g_t, g_o,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """slab[b, pair] = Σ_ts (x_t·x_s)(g_t·g_s) over one pair of row blocks (arXiv:1510.01799).

    Only the lower triangle of blocks is computed; those below the diagonal count twice.
    """
    sample = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    col = tl.program_id(2)
    if col <= row:
        a = row * BLOCK_T + tl.arange(0, BLOCK_T)
        b = col * BLOCK_T + tl.arange(0, BLOCK_T)
        xx = _gram(x + sample * x_b, a, b, len_t, len_i, x_t, x_i, BLOCK_T, BLOCK_K)
        gg = _gram(g + sample * g_b, a, b, len_t, len_o, g_t, g_o, BLOCK_T, BLOCK_K)
        times = tl.where(row == col, 1.0, 2.0)
        tl.store(slab + sample * pairs + row * (row + 1) // 2 + col, times * tl.sum(xx * gg))


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
    batch, len_t, len_i = x.shape
    blocks = cdiv(len_t, c.block_t)
    pairs = blocks * (blocks + 1) // 2
    slab = torch.empty(batch, pairs, dtype=torch.float32, device=x.device)
    _common.launch(
        _gram_kernel,
        (batch, blocks, blocks),
        {
            "x": x, "g": g, "slab": slab, "len_t": len_t, "len_i": len_i, "len_o": g.shape[2],
            "pairs": pairs, "x_b": x.stride(0), "x_t": x.stride(1), "x_i": x.stride(2),
            "g_b": g.stride(0), "g_t": g.stride(1), "g_o": g.stride(2),
            "BLOCK_T": c.block_t, "BLOCK_K": c.block_i,
        },
        c.num_warps,
        c.num_stages,
    )  # fmt: skip
    # A sum over t and s of either sign: rounding may leave a tiny negative where it cancels.
    return slab.sum(1).clamp_min_(0)


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
