"""Which module lets samples influence each other: one sample is replaced, the others must not notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradstats.calls import tensors_in


@dataclass(frozen=True)
class Mixing:
    """The module at `path`, of class `kind`, changed other samples by `change` of its largest output."""

    path: str
    kind: str
    change: float


@dataclass
class _Call:
    path: str
    kind: str
    inputs: list[Tensor]
    outputs: list[Tensor]


def find(
    make: Callable[[], nn.Module],
    forward: Callable[[nn.Module, Any], Any],
    batch: Any,
    replaced: Any,
    size: int,
    tolerance: float,
) -> Mixing | None:
    """The first innermost module whose output for samples 1… depends on sample 0; None if there is none.

    `make` gives a fresh model, `forward` runs it; `batch` and `replaced` are alike but for sample 0.
    A module is named where what it got for the other samples is unchanged and what it gave is not,
    so code between modules counts for the module whose forward holds it. Tensors in which no
    dimension of `size` can be told are not judged.
    """
    before, after = _record(make(), forward, batch), _record(make(), forward, replaced)
    if [c.path for c in before] != [c.path for c in after]:
        return None  # another way through the model: nothing can be compared
    for a, b in zip(before, after, strict=True):
        got = _changes(a.inputs, b.inputs, size)
        gave = max(_changes(a.outputs, b.outputs, size), default=0.0)
        outermost = a.path == ""
        if gave > tolerance and (outermost or (got and max(got) <= tolerance)):
            return Mixing(a.path, a.kind, gave)
    return None


def _record(model: nn.Module, forward: Callable[..., Any], batch: Any) -> list[_Call]:
    """Every module's calls, in the order in which they end: inner ones first."""
    calls: list[_Call] = []
    inputs: dict[int, list[list[Tensor]]] = {}
    handles = []

    def copies(*values: Any) -> list[Tensor]:
        return [t.detach().clone() for t in tensors_in(*values)]

    for path, module in model.named_modules():

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs.setdefault(id(module), []).append(copies(*args, kwargs))

        def leave(module: nn.Module, args: Any, kwargs: Any, out: Any, path: str = path) -> None:
            got = inputs[id(module)].pop()
            calls.append(_Call(path, type(module).__name__, got, copies(out)))

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _changes(before: list[Tensor], after: list[Tensor], size: int) -> list[float]:
    """How much samples 1… changed in each tensor that can be judged, relative to its largest entry.

    Where several dimensions could hold the samples, the one in which least changed is believed.
    """
    found = []
    for a, b in zip(before, after, strict=False):
        dims = [d for d, n in enumerate(a.shape) if n == size]
        if not dims or a.shape != b.shape or a.dtype == torch.bool or not a.numel():
            continue
        gap, scale = (a - b).abs().double(), a.abs().max().double().clamp_min(1e-300)
        found.append(min(float(gap.narrow(d, 1, size - 1).max() / scale) for d in dims))
    return found
