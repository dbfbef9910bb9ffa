"""Normalisation layers. Batch statistics of a training BatchNorm have no per-sample gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstats.ops import call
from gradstats.probes import row_gradient
from gradstats.reference import stats_dtype
from gradstats.rules import Use, rule


def _autocast_fp32(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """CUDA's autocast runs normalisations in float32; the CPU's leaves them alone."""
    if not torch.is_autocast_enabled("cuda") or tensors[0] is None or not tensors[0].is_cuda:
        return tensors
    narrow = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t is not None and t.dtype in narrow else t for t in tensors)


def _gradients(ctx, stats):  # type: ignore[no-untyped-def]
    """Gradients for (x, weight, bias, row_w, m2_w, row_b, m2_b) out of an op's seven results."""
    dx, dw, db, w_sq, b_sq, w_m2, b_m2 = stats
    needs_x, needs_w, needs_b, row_w, m2_w, row_b, m2_b, *_ = ctx.needs_input_grad
    return (
        dx.reshape(ctx.shape) if needs_x else None,
        dw.reshape(ctx.weight_shape) if needs_w else None,
        db.reshape(ctx.weight_shape) if needs_b else None,
        row_gradient(w_sq) if row_w else None,
        w_m2.reshape(ctx.weight_shape) if m2_w else None,
        row_gradient(b_sq) if row_b else None,
        b_m2.reshape(ctx.weight_shape) if m2_b else None,
    )


def _flags(ctx) -> tuple[bool, bool, bool, bool]:  # type: ignore[no-untyped-def]
    needs = ctx.needs_input_grad
    return needs[0], needs[1], needs[2], needs[4] or needs[6]


class LayerNorm(torch.autograd.Function):
    """Layer normalisation over the last dimensions, or RMS normalisation with `rms`."""

    @staticmethod
    def forward(ctx, x, weight, bias, row_w, m2_w, row_b, m2_b, shape, eps, rms, batch_dim):  # type: ignore[no-untyped-def]
        ctx.shape, ctx.weight_shape, ctx.batch_dim = x.shape, tuple(shape), batch_dim
        dims = tuple(range(-len(shape), 0))
        mean = None
        wide = stats_dtype(x.dtype)
        if rms:
            xw = x.to(wide)
            eps = torch.finfo(wide).eps if eps is None else eps
            rstd = torch.rsqrt(xw.square().mean(dims, keepdim=True) + eps)
            out = xw * rstd
            out = (out if weight is None else out * weight.to(wide)).to(x.dtype)
        else:
            out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
            if mean.dtype != wide:  # a pure bfloat16 layer rounds them; the statistics do not
                var, mean = torch.var_mean(x.to(wide), dims, correction=0, keepdim=True)
                rstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, weight, mean, rstd = ctx.saved_tensors
        batch, width = x.shape[ctx.batch_dim], math.prod(ctx.weight_shape)
        to, rest = ctx.batch_dim, -1 if batch else 1  # -1 says nothing where there is no sample

        def rows(t: Tensor | None, *last: int) -> Tensor | None:
            return None if t is None else t.movedim(to, 0).reshape(batch, rest, *last)

        dx, *rest = call.layer_norm_stats(
            rows(g, width), rows(x, width), rows(mean), rows(rstd),
            None if weight is None else weight.reshape(-1), *_flags(ctx),
        )  # fmt: skip
        if to != 0 and ctx.needs_input_grad[0]:
            dx = dx.reshape(x.movedim(to, 0).shape).movedim(0, to)
        return *_gradients(ctx, (dx, *rest)), None, None, None, None


def _layer_norm(
    use: Use, func: Callable[..., Any], x: Tensor, shape: Sequence[int], weight: Tensor | None,
    bias: Tensor | None, eps: float | None, rms: bool,
) -> Any:  # fmt: skip
    last = x.dim() - len(shape) <= use.batch_dim
    mixes = use.positions is not None and len(shape) > 1  # may be over positions too
    if not use.tracked(weight, bias) or use.mark(x) is not None or last or mixes:
        args = (x, shape, weight, eps) if rms else (x, shape, weight, bias, eps)
        return use.unruled(func, args, {})
    x, back = use.grouped(x)
    probes = *use.probe(weight), *use.probe(bias)
    x, weight, bias = _autocast_fp32(x, weight, bias)  # type: ignore[assignment]
    return back(LayerNorm.apply(x, weight, bias, *probes, list(shape), eps, rms, use.batch_dim))


@rule(F.layer_norm, torch.layer_norm, per_position=True)
def layer_norm(
    use: Use, func: Callable[..., Any], input: Tensor, normalized_shape: Sequence[int],
    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
) -> Any:  # fmt: skip
    return _layer_norm(use, func, input, normalized_shape, weight, bias, eps, rms=False)


@rule(F.rms_norm, torch.rms_norm, per_position=True)
def rms_norm(
    use: Use, func: Callable[..., Any], input: Tensor, normalized_shape: Sequence[int],
    weight: Tensor | None = None, eps: float | None = None,
) -> Any:  # fmt: skip
    return _layer_norm(use, func, input, normalized_shape, weight, None, eps, rms=True)


class GroupNorm(torch.autograd.Function):
    """Group normalisation of (B, C, *spatial)."""

    @staticmethod
    def forward(ctx, x, weight, bias, row_w, m2_w, row_b, m2_b, groups, eps):  # type: ignore[no-untyped-def]
        batch, channels = x.shape[:2]
        ctx.shape, ctx.weight_shape = x.shape, (channels,)
        x = x.contiguous()
        size = x[0, 0].numel() if batch else 1
        wide = stats_dtype(x.dtype)
        out, mean, rstd = torch.native_group_norm(
            x, weight, bias, batch, channels, size, groups, eps
        )
        if mean.dtype != wide:
            grouped = x.to(wide).reshape(batch, groups, channels // groups * size)
            var, mean = torch.var_mean(grouped, -1, correction=0)
            rstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, weight, mean, rstd = ctx.saved_tensors
        shape = (*x.shape[:2], -1 if len(x) else 1)
        stats = call.group_norm_stats(
            g.reshape(shape), x.reshape(shape), mean, rstd, weight,
            *_flags(ctx),
        )  # fmt: skip
        return *_gradients(ctx, stats), None, None


@rule(F.group_norm, torch.group_norm)
def group_norm(
    use: Use, func: Callable[..., Any], input: Tensor, num_groups: int,
    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *args: Any,
) -> Any:  # fmt: skip
    if not use.tracked(weight, bias) or use.mark(input) is not None:
        return use.unruled(func, (input, num_groups, weight, bias, eps, *args), {})
    use.batch_first(input)
    if use.batch_dim != 0:
        use.refuse("group_norm takes its samples in dimension 0", "attach with batch_dim=0")
    probes = *use.probe(weight), *use.probe(bias)
    input, weight, bias = _autocast_fp32(input, weight, bias)  # type: ignore[assignment]
    return GroupNorm.apply(input, weight, bias, *probes, num_groups, eps)


def _in_wide(x: Tensor, *params: Tensor | None) -> Tensor:
    """x as wide as the parameters, which torch's kernels compute in."""
    wider = [p.dtype for p in params if p is not None]
    return x.to(torch.promote_types(x.dtype, wider[0])) if wider else x


def _scale_and_shift(use: Use, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
    """x · weight + bias per channel, through the elementwise rule."""
    from gradstats.rules.elementwise import elementwise

    for tensor, func in ((weight, torch.mul), (bias, torch.add)):
        if tensor is None:
            continue
        if use.tracked(tensor):
            from gradstats.rules.view import view

            shape = (-1,) + (1,) * (x.dim() - 2)
            x = elementwise(use, func, x, view(use, Tensor.view, tensor, shape))
        else:
            x = func(x, tensor.view((-1,) + (1,) * (x.dim() - 2)))
    return x


@rule(F.batch_norm, torch.batch_norm)
def batch_norm(
    use: Use, func: Callable[..., Any], input: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *args: Any,
) -> Any:  # fmt: skip
    if training or running_mean is None:
        use.refuse(
            "BatchNorm in training mode mixes the samples of a batch, so no per-sample gradient "
            "exists for anything before it",
            "call .eval() on it, use GroupNorm, LayerNorm or InstanceNorm, or compare micro-batches "
            "with attach(method='micro_batch')",
        )
    if not use.tracked(weight, bias):
        rest = (running_mean, running_var, weight, bias, training, momentum, eps, *args)
        return use.unruled(func, (input, *rest), {})
    use.batch_first(input)
    wide = _in_wide(input, weight, bias)
    out = F.batch_norm(wide, running_mean, running_var, None, None, False, momentum, eps)
    return _scale_and_shift(use, out, weight, bias).to(input.dtype)


@rule(F.instance_norm, torch.instance_norm)
def instance_norm(
    use: Use, func: Callable[..., Any], input: Tensor, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5, *args: Any,
) -> Any:  # fmt: skip
    rest = (use_input_stats, momentum, eps, *args)
    if not use.tracked(weight, bias):
        return use.unruled(func, (input, running_mean, running_var, weight, bias, *rest), {})
    use.batch_first(input)
    wide = _in_wide(input, weight, bias)
    out = func(wide, running_mean, running_var, None, None, *rest)
    return _scale_and_shift(use, out, weight, bias).to(input.dtype)
