"""Products of an activation with a weight: linear, matmul, addmm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstats.ops import call, native_linear
from gradstats.probes import row_gradient
from gradstats.rules import Use, rule
from gradstats.rules.chain import FLIPPED, PRODUCT, SHIFT, three
from gradstats.rules.view import view


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The arguments as autocast would cast them for a matrix product or a convolution."""
    first = next(t for t in tensors if t is not None)
    kind = first.device.type
    if not torch.is_autocast_enabled(kind) or first.dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


class Linear(torch.autograd.Function):
    """y = x Wᵀ + b, or y = x W + b with `transposed`; x has its samples in dimension `batch_dim`."""

    @staticmethod
    def forward(ctx, x, weight, bias, row_w, m2_w, row_b, m2_b, batch_dim, transposed, joints):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.batch_dim, ctx.transposed, ctx.joints = batch_dim, transposed, joints
        if not transposed:
            out = F.linear(x, weight, bias)
            # A view made in here could not be modified in place by the model; this is not one.
            return out if x.dim() == 2 else torch.ops.aten._unsafe_view(out, out.shape)
        if bias is not None and x.dim() == 2:
            return torch.addmm(bias, x, weight)
        out = torch.matmul(x, weight) if bias is None else torch.matmul(x, weight) + bias
        return torch.ops.aten._unsafe_view(out, out.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        needs_x, needs_w, needs_b, *_ = ctx.needs_input_grad
        gx = None
        if needs_x:
            gx = g @ (weight.t() if ctx.transposed else weight)
        dw = db = row_w = row_b = None
        m2_w = m2_b = None
        if needs_w or needs_b:
            xs, gs = three(x, ctx.batch_dim), three(g, ctx.batch_dim)
            moments = ctx.needs_input_grad[4] or ctx.needs_input_grad[6]
            flipped = ctx.transposed and needs_w
            left, right = (gs, xs) if flipped else (xs, gs)
            with_bias = needs_b and not flipped
            dw, db, w_sq, b_sq, m2_w, m2_b = call.linear_stats(
                left, right, needs_w, with_bias, moments
            )
            if flipped and needs_b:  # the bias belongs to the output side, here the left one
                _, db, _, b_sq, _, m2_b = call.linear_stats(xs, gs, False, True, moments)
            of_w, of_b = ctx.joints
            if needs_w:
                row_w = row_gradient(w_sq) if of_w is None else of_w.of_product(
                    id(ctx), w_sq, right, left)  # fmt: skip
            if needs_b:
                row_b = row_gradient(b_sq) if of_b is None else of_b.of_sum(id(ctx), b_sq, gs)
        needs = ctx.needs_input_grad
        return (
            gx,
            dw if needs_w else None,
            db if needs_b else None,
            row_w if needs[3] else None,
            m2_w if needs[4] else None,
            row_b if needs[5] else None,
            m2_b if needs[6] else None,
            None,
            None,
            None,
        )


def _apply(
    use: Use, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False
) -> Any:
    x, back = use.grouped(x)
    return back(_product(use, x, weight, bias, use.batch_dim, transposed))


def project(
    use: Use, x: Tensor, weight: Tensor | None, bias: Tensor | None, batch_dim: int
) -> Tensor:
    """x Wᵀ + b inside a function whose inputs have their samples in a dimension of its own."""
    assert weight is not None
    if not use.tracked(weight, bias):
        return F.linear(x, weight, bias)
    if use.positions is not None:  # (batch, positions, …) is how those are found
        x = x.transpose(0, batch_dim)
        return _apply(use, x, weight, bias).transpose(0, batch_dim)  # type: ignore[no-any-return]
    return _product(use, x, weight, bias, batch_dim)


def _product(
    use: Use, x: Tensor, weight: Tensor, bias: Tensor | None, batch_dim: int,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    joints = use.joint(weight), use.joint(bias)
    of_w, of_b = (use.chain(weight), use.chain(bias)) if use.tracing else (None, None)
    probes = *use.probe(weight), *use.probe(bias)
    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    native = None if transposed or batch_dim != 0 else native_linear(x, weight)
    if native is not None:
        out: Any = native(x, weight, bias, *probes, *joints)
    else:
        out = Linear.apply(x, weight, bias, *probes, batch_dim, transposed, joints)
    if of_w is not None:
        kind = FLIPPED if transposed else PRODUCT
        out = of_w.link(out, probes[0], kind, three(x, batch_dim), batch_dim)
    if of_b is not None:
        out = of_b.link(out, probes[2], SHIFT, out, batch_dim)
    return out  # type: ignore[no-any-return]


@rule(F.linear, per_position=True)
def linear(
    use: Use, func: Callable[..., Any], input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    if not use.tracked(weight, bias) or weight.dim() != 2 or _marked(use, input):
        return use.unruled(func, (input, weight, bias), {})
    return _apply(use, input, weight, bias)


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, per_position=True)
def matmul(use: Use, func: Callable[..., Any], input: Tensor, other: Tensor) -> Any:
    if use.tracked(other) and not _marked(use, input) and other.dim() == 2:
        return _apply(use, input, other, None, transposed=True)
    if use.tracked(input) and not _marked(use, other) and input.dim() == 2 and other.dim() > 2:
        return _apply(use, other.transpose(-1, -2), input, None).transpose(-1, -2)
    return use.unruled(func, (input, other), {})


@rule(torch.addmm, Tensor.addmm, per_position=True)
def addmm(
    use: Use, func: Callable[..., Any], input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs: Any
) -> Any:
    plain = kwargs.get("beta", 1) == 1 and kwargs.get("alpha", 1) == 1 and "out" not in kwargs
    is_bias = input.dim() == 1 and input.shape[0] == mat2.shape[1]
    if not plain or not is_bias or _marked(use, mat1) or not _weight_like(use, mat2):
        return use.unruled(func, (input, mat1, mat2), kwargs)
    return _apply(use, mat1, mat2, input, transposed=True)


def _marked(use: Use, tensor: object) -> bool:
    return use.mark(tensor) is not None


def _weight_like(use: Use, tensor: Tensor) -> bool:
    return use.tracked(tensor) or not tensor.requires_grad


@rule(F.bilinear)
def bilinear(
    use: Use, func: Callable[..., Any], input1: Tensor, input2: Tensor, weight: Tensor,
    bias: Tensor | None = None,
) -> Any:  # fmt: skip
    """x₁ᵀ W_o x₂ + b: linear in the outer product of its inputs, (B, …, I₁·I₂)."""
    marked = _marked(use, input1) or _marked(use, input2)
    if marked or not use.tracked(weight, bias):
        return use.unruled(func, (input1, input2, weight, bias), {})
    use.batch_first(input1)
    pairs = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
    flat = view(use, Tensor.reshape, weight, (weight.shape[0], -1))
    with torch.autocast(pairs.device.type, enabled=False):  # which leaves bilinear as it is
        return _apply(use, pairs, flat, bias)
