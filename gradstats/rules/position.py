"""Elementwise parameters where every position is a sample: scales and shifts, position tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradstats.ops import call
from gradstats.probes import row_gradient
from gradstats.reference import stats_dtype, sum_stats
from gradstats.rules import Use


class PositionSpread(torch.autograd.Function):
    """A parameter, of shape `aligned` (1, 1 or T, …), expanded to (B, T, …).

    With `ids` (T,) it is a table, or rows looked up in one: each position touches the row ids[t].
    """

    @staticmethod
    def forward(ctx, param, row, m2, positions, aligned, ids, table, padding_idx):  # type: ignore[no-untyped-def]
        ctx.shape, ctx.dtype, ctx.positions = param.shape, param.dtype, positions
        ctx.table = table, padding_idx
        ctx.m2_shape = None if m2 is None else m2.shape
        ctx.save_for_backward(ids)
        return param.reshape(aligned).expand((*positions, *aligned[2:]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (ids,) = ctx.saved_tensors
        batch, length = ctx.positions
        needs, moments = ctx.needs_input_grad, ctx.needs_input_grad[2]
        if ids is None:
            each = g.reshape(batch * length, *ctx.shape)
            total, sq_norm, m2 = sum_stats(each, moments)
        else:
            laid_out = ids.numel() != length  # rows for each sequence
            total = g if laid_out else g.sum(0, dtype=stats_dtype(g.dtype))
            every = ids.reshape(-1, length).expand(batch, length).reshape(-1, 1)
            _, sq_norm, m2 = call.embedding_stats(
                every, g.reshape(batch * length, 1, -1), *ctx.table, moments
            )
        return (
            total.reshape(ctx.shape).to(ctx.dtype) if needs[0] else None,
            row_gradient(sq_norm) if needs[1] else None,
            m2.reshape(ctx.m2_shape) if moments else None,
            None, None, None, None, None,
        )  # fmt: skip


def per_position(use: Use, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`func` of (B, T, …) activations and of parameters; None where no input is (B, T, …)."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    ndim = max(t.dim() for t in tensors)
    rows = [t for t in tensors if use.mark(t) is None and t.shape[:2] == use.positions
            and t.dim() == ndim and use.is_flattened(t)]  # fmt: skip
    if not rows:
        return None
    params = [t for t in tensors if use.tracked(t)]
    fits = all(aligned(use, p, (1,) * (ndim - p.dim()) + p.shape) for p in params)
    if not fits or "out" in kwargs or use.tracked(*kwargs.values()):
        return use.unruled(func, args, kwargs)
    return func(*(spread(use, a, ndim) if use.tracked(a) else a for a in args), **kwargs)


def aligned(use: Use, param: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of that shape is the same for every position, or has a row for each."""
    assert use.positions is not None
    mark, length = use.mark(param), use.positions[1]
    ids = None if mark is None else mark.ids
    if shape[0] == 1:
        return shape[1] == length or (shape[1] == 1 and ids is None)
    return ids is not None and ids.shape == shape[:2] == use.positions


def spread(use: Use, param: Tensor, ndim: int) -> Any:
    """`param` (broadcast against `ndim` dimensions) with dimensions of sequences and positions."""
    mark = use.mark(param)
    assert mark is not None
    assert use.positions is not None
    shape = (1,) * (ndim - param.dim()) + param.shape
    ids, table, padding_idx = mark.ids, mark.num_embeddings, mark.padding_idx
    if ids is None and shape[1] > 1:
        ids, table = torch.arange(shape[1], device=param.device), shape[1]
    probe = use.probe(param)
    return PositionSpread.apply(
        param, probe.row, probe.m2, use.positions, shape, ids, table, padding_idx
    )
