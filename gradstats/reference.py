"""The definition of every statistics operation, in plain PyTorch.

Each function computes the parameter gradient of one layer together with its per-sample statistics.
Samples are walked one at a time, so nothing of size batch x parameters is ever alive. The other
backends (C++, Triton, CUDA) implement the same signatures and are compared with these.

Conventions, shared by all backends. B samples, T positions, I in, O out, D features, V rows.
`*_sq_norm` is (B,): the squared norm of each sample's contribution to the gradient.
`*_m2` has the gradient's shape: sum over the call's samples of (contribution - their mean)^2.
Statistics are float32, or float64 for float64 inputs; gradients keep the inputs' dtype.
What was not asked for comes back as an empty tensor of shape (0,).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

LinearStats = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
NormStats = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics of `dtype` inputs are computed in: float64 stays, the rest is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Welford:
    """Sum, squared norms and centred second moment of contributions that arrive one by one."""

    def __init__(self, shape: Sequence[int], batch: int, like: Tensor, moments: bool) -> None:
        kind = {"dtype": stats_dtype(like.dtype), "device": like.device}
        self.count = 0
        self.sum = torch.zeros(shape, **kind)  # type: ignore[call-overload]
        self.sq_norm = torch.zeros(batch, **kind)  # type: ignore[call-overload]
        self.m2 = torch.zeros(shape if moments else (0,), **kind)  # type: ignore[call-overload]
        self.moments = moments

    def add(self, contribution: Tensor) -> None:
        """One more sample (Welford 1962): m2 grows by (c - mean before) * (c - mean after)."""
        self.sq_norm[self.count] = contribution.square().sum()
        before = self.sum / max(self.count, 1)
        self.count += 1
        self.sum += contribution
        if self.moments and self.count > 1:
            self.m2 += (contribution - before) * (contribution - self.sum / self.count)

    def add_all(self, contributions: Iterable[Tensor]) -> Welford:
        for contribution in contributions:
            self.add(contribution)
        return self


def linear_stats(x: Tensor, g: Tensor, weight: bool, bias: bool, moments: bool) -> LinearStats:
    """Weight gradient of y = x Wᵀ + b with per-sample statistics.

    x: (B, T, I) activation, g: (B, T, O) grad_output, any strides.
    Sample b contributes G_b = Σ_t g_bt x_btᵀ to the weight, Σ_t g_bt to the bias.
    Returns (dw (O, I), db (O,), w_sq_norm (B,), b_sq_norm (B,), w_m2 (O, I), b_m2 (O,)).
    """
    wide = stats_dtype(x.dtype)
    batch, _, i = x.shape
    o = g.shape[-1]
    dw, w_sq, w_m2 = _nothing(x)
    db, b_sq, b_m2 = _nothing(g)
    if weight:
        w = Welford((o, i), batch, x, moments)
        w.add_all(gb.to(wide).t() @ xb.to(wide) for gb, xb in zip(g, x, strict=True))
        dw, w_sq, w_m2 = w.sum.to(x.dtype), w.sq_norm, w.m2
    if bias:
        db, b_sq, b_m2 = sum_stats(g.sum(1, dtype=wide), moments)
        db = db.to(g.dtype)
    return dw, db, w_sq, b_sq, w_m2, b_m2


def sum_stats(c: Tensor, moments: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of contributions that are already at hand.

    c: (B, *shape). Returns (sum (*shape), sq_norm (B,), m2 (*shape)).
    """
    wide = c.to(stats_dtype(c.dtype))
    total = wide.sum(0)
    sq_norm = wide.square().flatten(1).sum(1) if c.dim() > 1 else wide.square()
    m2 = wide.new_empty(0)
    if moments:
        m2 = (wide - total / max(c.shape[0], 1)).square().sum(0)
    return total, sq_norm, m2


def _nothing(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient, sq_norm, m2) of a parameter that was not asked for: no two share memory."""
    wide = stats_dtype(like.dtype)
    return like.new_empty(0), like.new_empty(0, dtype=wide), like.new_empty(0, dtype=wide)


def _affine(
    g: Tensor, xhat: Tensor, over: int, weight: bool, bias: bool, moments: bool, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Statistics of a scale and shift, their contributions being sums over dimension `over`."""
    dw, w_sq, w_m2 = _nothing(g)
    db, b_sq, b_m2 = _nothing(g)
    if weight:
        dw, w_sq, w_m2 = sum_stats((g * xhat).sum(over), moments)
    if bias:
        db, b_sq, b_m2 = sum_stats(g.sum(over), moments)
    return dw.to(dtype), db.to(dtype), w_sq, b_sq, w_m2, b_m2


def layer_norm_stats(
    g: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    scale: Tensor | None,
    input: bool,
    weight: bool,
    bias: bool,
    moments: bool,
) -> NormStats:
    """Backward of LayerNorm (RMSNorm where `mean` is None) with per-sample statistics.

    g, x: (B, T, D); mean, rstd: (B, T) in the statistics dtype; scale: (D,) or None.
    x̂ = (x − mean)·rstd; sample b contributes Σ_t g x̂ to the scale and Σ_t g to the shift.
    Returns (dx (B, T, D), dw (D,), db (D,), w_sq_norm, b_sq_norm (B,), w_m2, b_m2 (D,)).
    """
    wide = stats_dtype(x.dtype)
    gw, rstd = g.to(wide), rstd.to(wide).unsqueeze(-1)
    xhat = x.to(wide) if mean is None else x.to(wide) - mean.to(wide).unsqueeze(-1)
    xhat = xhat * rstd
    dx = x.new_empty(0)
    if input:
        gx = gw if scale is None else gw * scale.to(wide)
        inner = gx - xhat * (gx * xhat).mean(-1, keepdim=True)
        if mean is not None:
            inner = inner - gx.mean(-1, keepdim=True)
        dx = (inner * rstd).to(x.dtype).contiguous()  # as compiled graphs take it to be
    dtype = x.dtype if scale is None else scale.dtype
    return dx, *_affine(gw, xhat, 1, weight, bias, moments, dtype)  # type: ignore[return-value]


def group_norm_stats(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    input: bool,
    weight: bool,
    bias: bool,
    moments: bool,
) -> NormStats:
    """Backward of GroupNorm with per-sample statistics.

    g, x: (B, C, S); mean, rstd: (B, groups) in the statistics dtype; scale: (C,) or None.
    Returns (dx (B, C, S), dw (C,), db (C,), w_sq_norm, b_sq_norm (B,), w_m2, b_m2 (C,)).
    """
    wide = stats_dtype(x.dtype)
    batch, channels, _ = x.shape
    groups = mean.shape[1]

    def per_channel(t: Tensor) -> Tensor:
        return t.to(wide).repeat_interleave(channels // groups, dim=1).unsqueeze(-1)

    gw = g.to(wide)
    xhat = (x.to(wide) - per_channel(mean)) * per_channel(rstd)
    dx = x.new_empty(0)
    if input:
        gx = gw if scale is None else gw * scale.to(wide).unsqueeze(-1)
        each = (batch, groups, x[0].numel() // groups if batch else 0)
        grouped, hat = gx.reshape(each), xhat.reshape(each)
        inner = grouped - grouped.mean(-1, keepdim=True)
        inner = inner - hat * (grouped * hat).mean(-1, keepdim=True)
        dx = (inner.reshape(x.shape) * per_channel(rstd)).to(x.dtype)
    dtype = x.dtype if scale is None else scale.dtype
    return dx, *_affine(gw, xhat, 2, weight, bias, moments, dtype)  # type: ignore[return-value]


def embedding_stats(
    ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int, moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight gradient of a lookup with per-sample statistics.

    ids: (B, T) integers in [0, V); g: (B, T, D). Rows looked up more than once by a sample add up
    before they are squared. `padding_idx` (-1: none) gets no gradient.
    Returns (dw (V, D), sq_norm (B,), m2 (V, D) or empty).
    """
    wide = stats_dtype(g.dtype)
    total = Welford((num_embeddings, g.shape[-1]), ids.shape[0], g, moments)

    def contribution(row_ids: Tensor, rows: Tensor) -> Tensor:
        keep = (row_ids != padding_idx).unsqueeze(-1)
        return torch.zeros_like(total.sum).index_add_(0, row_ids, rows.to(wide) * keep)

    total.add_all(contribution(i, r) for i, r in zip(ids.long(), g, strict=True))
    return total.sum.to(g.dtype), total.sq_norm, total.m2


def tied_cross(ids: Tensor, e: Tensor, h: Tensor, a: Tensor) -> Tensor:
    """Inner product, per sample, of the two gradients of a weight that is embedding and head.

    ids: (B, T) integers in [0, V), or -1 for no row; e: (B, T, D) grad_output of the lookup;
    h: (B, S, V) grad_output of the head, a: (B, S, D) its activation.
    Returns (B,): ⟨Σ_t onehot(id_t) e_tᵀ, Σ_s h_s a_sᵀ⟩ = Σ_ts h[s, id_t] (e_t·a_s). The squared norm
    of the sum of both gradients has it twice.
    """
    wide = stats_dtype(e.dtype)
    cross = torch.zeros(e.shape[0], dtype=wide, device=e.device)
    for i, (row, eb, hb, ab) in enumerate(zip(ids.long(), e, h, a, strict=True)):
        picked = hb.to(wide)[:, row.clamp_min(0)] * (row >= 0)
        cross[i] = (picked * (ab.to(wide) @ eb.to(wide).t())).sum()
    return cross


def conv_stats(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    weight: bool,
    bias: bool,
    moments: bool,
) -> LinearStats:
    """Weight gradient of a 1-, 2- or 3-d convolution (cross-correlation) with statistics.

    x: (B, I, *spatial), g: (B, O, *out); zero padding, symmetric.
    Returns (dw (O, I/groups, *kernel_size), db (O,), w_sq_norm, b_sq_norm (B,), w_m2, b_m2).
    """
    wide = stats_dtype(x.dtype)
    shape = (g.shape[1], x.shape[1] // groups, *kernel_size)
    dw, w_sq, w_m2 = _nothing(x)
    db, b_sq, b_m2 = _nothing(g)
    if weight:
        like = x.new_empty(shape, dtype=wide)

        def contribution(xb: Tensor, gb: Tensor) -> Tensor:
            grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
                gb.unsqueeze(0).to(wide), xb.unsqueeze(0).to(wide), like, None, stride, padding,
                dilation, False, [0] * len(kernel_size), groups, [False, True, False],
            )  # fmt: skip
            return grads[1]

        w = Welford(shape, x.shape[0], x, moments)
        w.add_all(contribution(xb, gb) for xb, gb in zip(x, g, strict=True))
        dw, w_sq, w_m2 = w.sum.to(x.dtype), w.sq_norm, w.m2
    if bias:
        db, b_sq, b_m2 = sum_stats(g.flatten(2).sum(2, dtype=wide), moments)
        db = db.to(g.dtype)
    return dw, db, w_sq, b_sq, w_m2, b_m2


def multi_sq_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Squared norm of each tensor of a list, any shapes. Returns (n,)."""
    if not tensors:
        return torch.zeros(0)
    kinds = {stats_dtype(t.dtype) for t in tensors}
    wide = torch.float64 if kinds == {torch.float64} else torch.float32
    if tensors[0].is_cuda and len(kinds) == 1:
        return in_few_launches(tensors, wide)
    return torch.stack([t.to(stats_dtype(t.dtype)).square().sum().to(wide) for t in tensors])


def in_few_launches(tensors: Sequence[Tensor], wide: torch.dtype) -> Tensor:
    """The same on a card, where the loop above would launch three kernels for each tensor."""
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=wide)).square()
