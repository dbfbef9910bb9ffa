"""LSTM, GRU and plain recurrent networks, spelled out step by step.

The input's products are one linear layer over all positions. The state's are one too, once its
gradients at every position are known: they arrive at a term of zeros that each step adds. The states
themselves come as the gradient of a second term of zeros, from where the outputs are put together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstats.ops import call
from gradstats.probes import row_gradient
from gradstats.rules import Use, rule
from gradstats.rules.linear import autocast, project


class StateProducts(torch.autograd.Function):
    """Zeros (T, B, gates), whose gradient is that of W h + b at every step, and zeros (B, T, H).

    The second one's gradient is h before every step: `Outputs` sends it.
    """

    @staticmethod
    def forward(ctx, weight, bias, row_w, m2_w, row_b, m2_b, start, products):  # type: ignore[no-untyped-def]
        slot = start.new_zeros(start.shape[0], products.shape[0], start.shape[1])
        return torch.zeros_like(products), slot

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, h):  # type: ignore[no-untyped-def]
        needs = ctx.needs_input_grad
        dw, db, w_sq, b_sq, w_m2, b_m2 = call.linear_stats(
            h, g.transpose(0, 1).to(h.dtype), needs[0], needs[1], needs[3] or needs[5]
        )
        return (
            dw if needs[0] else None,
            db if needs[1] else None,
            row_gradient(w_sq) if needs[2] else None,
            w_m2 if needs[3] else None,
            row_gradient(b_sq) if needs[4] else None,
            b_m2 if needs[5] else None,
            None,
            None,
        )


class Outputs(torch.autograd.Function):
    """Outputs of all steps (T, B, H), and the last of the other states as it is."""

    @staticmethod
    def forward(ctx, slot, start, backwards, rest, *outputs):  # type: ignore[no-untyped-def]
        out = torch.stack(outputs)
        ctx.backwards = backwards
        ctx.save_for_backward(start, out)
        return out, None if rest is None else rest.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, g_rest):  # type: ignore[no-untyped-def]
        start, out = ctx.saved_tensors
        start = start.unsqueeze(0)
        h = torch.cat((out[1:], start) if ctx.backwards else (start, out[:-1]))
        return h.transpose(0, 1).to(start.dtype), None, None, g_rest, *g.unbind(0)


def _lstm(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (x + h).chunk(4, 1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, 1), h.chunk(3, 1)
    update = torch.sigmoid(x_z + h_z)
    new = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return ((state[0] - new) * update + new,)


def _tanh(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.tanh(x + h),)


def _relu(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.relu(x + h),)


_CELLS: dict[Callable[..., Any], Callable[..., tuple[Tensor, ...]]] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _tanh,
    torch.rnn_relu: _relu,
}


@rule(*_CELLS)
def recurrent(use: Use, func: Callable[..., Any], input: Tensor, *args: Any) -> Any:
    """(input, hx, weights, has_biases, num_layers, dropout, training, bidirectional, batch_first)."""
    if isinstance(args[0], Tensor) and isinstance(args[1], Tensor):  # a PackedSequence
        return use.unruled(func, (input, *args), {})
    hx, weights, biases, layers, dropout, training, both, batch_first = args
    start = tuple(hx) if func is torch.lstm else (hx,)
    if func is torch.lstm or input.is_cuda:  # elsewhere autocast casts the products alone
        start = autocast(*start)
    each = 4 if biases else 2
    x = input.transpose(0, 1) if batch_first else input
    served = use.tracked(*weights) and input.dim() == 3 and x.shape[1] == use.batch
    # A projection of the state (proj_size) has a weight more.
    if not served or len(weights) != layers * (1 + both) * each:
        return use.unruled(func, (input, *args), {})
    last: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        directions = []
        for backwards in range(1 + both):
            k = layer * (1 + both) + backwards
            own = weights[k * each : (k + 1) * each]
            own = own if biases else (*own, None, None)
            out, state = _run(
                use, _CELLS[func], x, tuple(s[k] for s in start), own, bool(backwards)
            )
            directions.append(out)
            last.append(state)
        x = torch.cat(directions, 2) if both else directions[0]
        if dropout and training and layer + 1 < layers:
            x = F.dropout(x, dropout)
    out = x.transpose(0, 1) if batch_first else x
    return out, *(torch.stack(parts) for parts in zip(*last, strict=True))


def _run(
    use: Use, cell: Callable[..., tuple[Tensor, ...]], x: Tensor, state: tuple[Tensor, ...],
    weights: Any, backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """One layer in one direction: outputs (T, B, H) and the last state."""
    w_x, w_h, b_x, b_h = weights
    products = project(use, x, w_x, b_x, 1)
    steps = x.shape[0]
    start = state[0].detach()
    at: Any = range(steps)
    taps: Any = None
    if use.tracked(w_h, b_h):
        probes = *use.probe(w_h), *use.probe(b_h)
        taps, slot = StateProducts.apply(w_h, b_h, *probes, start, products.detach())
    w_h, b_h = autocast(w_h.detach(), None if b_h is None else b_h.detach())
    outputs: list[Any] = [None] * steps
    for t in reversed(at) if backwards else at:
        h = F.linear(state[0], w_h, b_h)  # type: ignore[arg-type]
        if taps is not None:
            h = h + taps[t]
        state = cell(products[t], h, state)
        outputs[t] = state[0]
    if taps is None:
        return torch.stack(outputs), state
    rest = state[1] if len(state) > 1 else None
    out, rest = Outputs.apply(slot, start, backwards, rest, *outputs)
    last = out[0 if backwards else -1]
    return out, (last,) if rest is None else (last, rest)
