"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstats.ops import call
from gradstats.probes import row_gradient
from gradstats.rules import Use, rule
from gradstats.rules.linear import autocast


class Conv(torch.autograd.Function):
    """y = x ⋆ W + b. A transposed convolution swaps the parts of x and grad_output."""

    @staticmethod
    def forward(ctx, x, weight, bias, row_w, m2_w, row_b, m2_b, options):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return torch.convolution(x, weight, bias, *options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        stride, padding, dilation, transposed, output_padding, groups = ctx.options
        needs_x, needs_w, needs_b, *needs = ctx.needs_input_grad
        gx = dw = db = row_w = row_b = w_m2 = b_m2 = None
        if needs_x:
            gx = torch.ops.aten.convolution_backward(
                g, x, weight, None, stride, padding, dilation, transposed, output_padding, groups,
                [True, False, False],
            )[0]  # fmt: skip
        if needs_w or needs_b:
            moments = needs[1] or needs[3]
            where = (weight.shape[2:], stride, padding, dilation, groups)
            if transposed:
                dw, _, w_sq, _, w_m2, _ = call.conv_stats(g, x, *where, needs_w, False, moments)
                if needs_b:
                    flat = g.flatten(2).transpose(1, 2)
                    _, db, _, b_sq, _, b_m2 = call.linear_stats(flat, flat, False, True, moments)
            else:
                dw, db, w_sq, b_sq, w_m2, b_m2 = call.conv_stats(
                    x, g, *where, needs_w, needs_b, moments
                )
            row_w = row_gradient(w_sq) if needs[0] else None
            row_b = row_gradient(b_sq) if needs[2] else None
        return (
            gx,
            dw if needs_w else None,
            db if needs_b else None,
            row_w,
            w_m2 if needs[1] else None,
            row_b,
            b_m2 if needs[3] else None,
            None,
        )


def _tuple(value: Any, n: int) -> list[int]:
    if isinstance(value, Sequence):
        return list(value) * (n if len(value) == 1 else 1)
    return [value] * n


def _apply(
    use: Use, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
) -> Any:
    use.batch_first(x)
    if use.batch_dim != 0:
        use.refuse("a convolution takes its samples in dimension 0", "attach with batch_dim=0")
    probes = *use.probe(weight), *use.probe(bias)
    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    return Conv.apply(x, weight, bias, *probes, options)


@rule(F.conv1d, F.conv2d, F.conv3d)
def conv(
    use: Use, func: Callable[..., Any], input: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    n = weight.dim() - 2
    plain = not use.tracked(weight, bias) or use.mark(input) is not None or input.dim() != n + 2
    if plain:
        return use.unruled(func, (input, weight, bias, stride, padding, dilation, groups), {})
    dilation = _tuple(dilation, n)
    if isinstance(padding, str):
        input, padding = _pad(input, weight, padding, dilation)
    options = (_tuple(stride, n), _tuple(padding, n), dilation, False, [0] * n, groups)
    return _apply(use, input, weight, bias, options)


def _pad(x: Tensor, weight: Tensor, padding: str, dilation: list[int]) -> tuple[Tensor, list[int]]:
    """'valid' and 'same' as numbers; where 'same' is uneven, the end gets one more."""
    totals = [0 if padding == "valid" else d * (k - 1)
              for d, k in zip(dilation, weight.shape[2:], strict=True)]  # fmt: skip
    if any(total % 2 for total in totals):
        ends = [p for total in reversed(totals) for p in (total // 2, total - total // 2)]
        return F.pad(x, ends), [0] * len(totals)
    return x, [total // 2 for total in totals]


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def conv_transpose(
    use: Use, func: Callable[..., Any], input: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    n = weight.dim() - 2
    plain = not use.tracked(weight, bias) or use.mark(input) is not None or input.dim() != n + 2
    if plain:
        rest = (bias, stride, padding, output_padding, groups, dilation)
        return use.unruled(func, (input, weight, *rest), {})
    options = (_tuple(stride, n), _tuple(padding, n), _tuple(dilation, n), True,
               _tuple(output_padding, n), groups)  # fmt: skip
    return _apply(use, input, weight, bias, options)
