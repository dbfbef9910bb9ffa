"""A parameter expanded over samples, so that its gradient comes back one by one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradstats.probes import row_gradient
from gradstats.reference import stats_dtype


class Merge:
    """Chan's merge of chunks: what each adds to the second moment about the common mean."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | None = None

    def add(self, count: int, total: Tensor, m2: Tensor) -> Tensor:
        before, known = self.count, self.sum
        self.count += count
        self.sum = total if known is None else known + total
        if known is None:
            return m2
        gap = known / before - total / count
        return m2 + gap.square() * (before * count / (before + count))


class Expand(torch.autograd.Function):
    """A parameter expanded over one chunk of samples; the gradient comes back per sample."""

    @staticmethod
    def forward(ctx, param, row, m2, start, stop, merge):  # type: ignore[no-untyped-def]
        ctx.part = start, stop, 0 if row is None else row.shape[0] - 1
        ctx.merge = merge
        return param.expand(stop - start, *param.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        start, stop, batch = ctx.part
        wide = g.to(stats_dtype(g.dtype))
        total = wide.sum(0)
        row = m2 = None
        if ctx.needs_input_grad[1]:
            row = row_gradient(wide.new_zeros(batch))
            row[start:stop] = wide.flatten(1).square().sum(1) if g.dim() > 1 else wide.square()
            row[-1] = float(start == 0)
        if ctx.needs_input_grad[2]:
            centred = (wide - total / (stop - start)).square().sum(0)
            m2 = ctx.merge.add(stop - start, total, centred)
        return total.to(g.dtype), row, m2, None, None, None


class NoSample(torch.autograd.Function):
    """A parameter as it is, for a batch of no samples: measured, with nothing to add up."""

    @staticmethod
    def forward(ctx, param, row, m2):  # type: ignore[no-untyped-def]
        return param.view_as(param)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        wide = stats_dtype(g.dtype)
        row = row_gradient(g.new_zeros(0, dtype=wide)) if ctx.needs_input_grad[1] else None
        return g, row, g.new_zeros(g.shape, dtype=wide) if ctx.needs_input_grad[2] else None


class Corrected(TorchFunctionMode):
    """vmap over an embedding's weight forgets `padding_idx`: keep those rows from the gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.embedding:
            return func(*args, **kwargs)
        return _embedding(*args, **kwargs)


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    out = F.embedding(input, weight, padding_idx, *args, **kwargs)
    if padding_idx is None:
        return out
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, out.detach(), out)
