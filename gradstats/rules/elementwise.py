"""Elementwise functions of an activation and a broadcast parameter: scales, shifts, positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstats.ops import call
from gradstats.probes import Mark, row_gradient
from gradstats.reference import stats_dtype, sum_stats
from gradstats.rules import Use, position, rule
from gradstats.rules.linear import autocast
from gradstats.rules.view import view


class Spread(torch.autograd.Function):
    """A parameter expanded over the samples (a view); its gradient is theirs, one by one.

    Rows that were looked up for every sample, by `ids` made without samples, have that dimension.

    Autograd sums the gradient of whatever uses the result down to (B, *parameter), which is the
    per-sample gradient; for a shift as large as the activation that is the activation's own.
    """

    @staticmethod
    def forward(ctx, param, row, m2, batch, batch_dim, ndim, ids, num_embeddings, padding_idx):  # type: ignore[no-untyped-def]
        ctx.shape, ctx.dtype, ctx.batch_dim = param.shape, param.dtype, batch_dim
        ctx.rows = num_embeddings, padding_idx
        ctx.save_for_backward(ids)
        aligned = param.reshape((1,) * (ndim - param.dim()) + param.shape)
        size = list(aligned.shape)
        ctx.laid_out = size[batch_dim] != 1
        size[batch_dim] = batch
        return aligned.expand(size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (ids,) = ctx.saved_tensors
        moments = ctx.needs_input_grad[2]
        c = g.movedim(ctx.batch_dim, 0)
        batch = c.shape[0]
        if ids is None:
            total, sq_norm, m2 = sum_stats(c.reshape(batch, *ctx.shape), moments)
        else:
            if ctx.laid_out:
                total, ids = g, ids.movedim(ctx.batch_dim, 0).flatten(1)
            else:
                total = c.sum(0, dtype=stats_dtype(c.dtype))
                ids = ids.reshape(1, -1).expand(batch, -1)
            each = c.reshape(batch, ids.shape[1], c.shape[-1])
            _, sq_norm, m2 = call.embedding_stats(ids, each, *ctx.rows, moments)
        total = total.reshape(ctx.shape).to(ctx.dtype)
        return (
            total if ctx.needs_input_grad[0] else None,
            row_gradient(sq_norm) if ctx.needs_input_grad[1] else None,
            m2 if moments else None,
            None, None, None, None, None, None,
        )  # fmt: skip


def spread(use: Use, param: Tensor, mark: Mark, ndim: int) -> Any:
    """`param` (broadcast against `ndim` dimensions) with a dimension of samples of its own."""
    probe = use.probe(param)
    return Spread.apply(
        param, probe.row, probe.m2, use.batch, use.batch_dim, ndim,
        mark.ids, mark.num_embeddings, mark.padding_idx,
    )  # fmt: skip


_METHODS = (
    "add", "sub", "mul", "div", "true_divide", "add_", "sub_", "mul_", "div_",
    "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__",
    "__mul__", "__rmul__", "__imul__", "__truediv__", "__rtruediv__", "__itruediv__",
    "__div__", "__rdiv__", "__idiv__", "rsub", "maximum", "minimum", "pow", "__pow__",
)  # fmt: skip
_FUNCTIONS = ("add", "sub", "mul", "div", "true_divide", "rsub", "where", "maximum", "minimum",
              "lerp", "addcmul", "pow")  # fmt: skip


# Of the methods, looked up beforehand: a compiler does not see their names.
_OUT_OF_PLACE = {
    getattr(Tensor, name): getattr(torch, name.strip("_"))
    for name in _METHODS
    if hasattr(Tensor, name) and hasattr(torch, name.strip("_"))
}


@rule(
    *(getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)),
    *(getattr(torch, name) for name in _FUNCTIONS),
    per_position=True,
)
def elementwise(use: Use, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not use.tracked(*args):
        return use.unruled(func, args, kwargs)
    if use.positions is not None:
        done = position.per_position(use, func, args, kwargs)
        if done is not None:
            return done
    tensors = [a for a in args if isinstance(a, Tensor)]
    ndim = max(t.dim() for t in tensors)
    flat = [t for t in tensors if use.mark(t) is None and t.dim() == ndim and use.is_flattened(t)]
    if flat and use.batch_dim == 0 and not kwargs:
        return _flattened(use, func, args, flat[0])
    batched = [t for t in tensors if use.mark(t) is None and t.dim() == ndim and use.is_batched(t)]
    if not batched or "out" in kwargs or use.tracked(*kwargs.values()):
        return use.unruled(func, args, kwargs)
    return func(*(_operand(use, a, ndim) for a in args), **kwargs)


def _flattened(use: Use, func: Callable[..., Any], args: Any, flat: Tensor) -> Any:
    """The same on (samples, longest, …), with the parameters shaped to fit."""
    moved, back = [], None
    ndim = use.grouped(flat)[0].dim()
    rows = flat.shape[:1] if ndim > flat.dim() else flat.shape[:2]  # packed ones are (1, rows, …)
    for arg in args:
        if use.tracked(arg):
            arg = view(use, Tensor.reshape, arg, (1,) * (ndim - arg.dim()) + arg.shape)
        elif isinstance(arg, Tensor) and arg.dim() == flat.dim() and arg.shape[: len(rows)] == rows:
            arg, back = use.grouped(arg)
        elif isinstance(arg, Tensor) and arg.dim():
            arg = arg.reshape((1,) * (ndim - arg.dim()) + arg.shape)
        moved.append(arg)
    assert back is not None
    plain = _OUT_OF_PLACE.get(func, func)
    return back(plain(*(_operand(use, arg, ndim) for arg in moved)))


def _operand(use: Use, arg: Any, ndim: int) -> Any:
    if not use.tracked(arg):
        return arg
    mark = use.mark(arg)
    assert mark is not None
    offset = use.batch_dim - (ndim - arg.dim())
    ids = mark.ids
    looked_up = ids is not None and arg.shape[:-1] == ids.shape and arg.shape[offset] == use.batch
    if offset >= 0 and arg.shape[offset] != 1 and not (looked_up and offset == use.batch_dim):
        use.refuse(
            f"parameter {mark.name!r} of shape {tuple(arg.shape)} has its own entry where the "
            "samples are, in an elementwise operation",
            "give it a dimension of size 1 there, or say where the samples are with "
            "attach(batch_dim=...)",
        )
    return spread(use, arg, mark, ndim)


@rule(
    Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to, per_position=True
)  # fmt: skip
def expand(use: Use, func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A class token: one parameter, laid out once for each sample."""
    if not use.tracked(input):
        return use.unruled(func, (input, *args), kwargs)
    shape = func(input.detach(), *args, **kwargs).shape
    if use.positions is not None:
        own = (1,) * (len(shape) - input.dim()) + input.shape
        if shape[:2] != use.positions or not position.aligned(use, input, own):
            return use.unruled(func, (input, *args), kwargs)
        return position.spread(use, input, len(shape)).expand(shape)
    offset = use.batch_dim - (len(shape) - input.dim())
    alike = offset < 0 or input.shape[offset] == 1
    if len(shape) <= use.batch_dim or shape[use.batch_dim] != use.batch or not alike:
        return use.unruled(func, (input, *args), kwargs)
    mark = use.mark(input)
    assert mark is not None
    return spread(use, input, mark, len(shape)).expand(shape)


@rule(F.prelu, torch.prelu, Tensor.prelu)
def prelu(use: Use, func: Callable[..., Any], input: Tensor, weight: Tensor) -> Any:
    """x where it is positive, w·x elsewhere; w is one number, or one for each entry of dim 1."""
    if not use.tracked(weight) or not use.is_batched(input) or use.mark(input) is not None:
        return use.unruled(func, (input, weight), {})
    input = autocast(input)[0]  # type: ignore[assignment]
    if input.dtype != weight.dtype:
        weight = view(use, Tensor.to, weight, input.dtype)
    if weight.numel() > 1 and input.dim() > 1:
        shape = [1] * input.dim()
        shape[1] = weight.shape[0]
        weight = view(use, Tensor.reshape, weight, shape)
    return torch.where(input > 0, input, elementwise(use, torch.mul, input, weight))
