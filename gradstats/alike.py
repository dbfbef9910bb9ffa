"""Whether a module run sample by sample gives what it gives for the batch: outputs and gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_NARROW = (torch.float16, torch.bfloat16)


class Results(NamedTuple):
    """What a run of a module gave."""

    outputs: list[Tensor]
    gradients: list[Tensor]  # of a fixed function of the outputs, by parameter


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in a nest of tuples, lists and dicts, in order."""
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def results(out: Any, params: list[Tensor]) -> Results:
    """The tensors of `out`, and the gradients of a fixed function of them."""
    outputs = tensors(out)
    smooth = [t for t in outputs if t.requires_grad]
    ramps = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device) for t in smooth]
    grads: Any = [None] * len(params)
    if smooth:
        ramps = [r.view(t.shape) for t, r in zip(smooth, ramps, strict=True)]
        grads = torch.autograd.grad(smooth, params, ramps, allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    return Results([t.detach() for t in outputs], zeros)


def require(ours: Results, theirs: Results) -> None:
    """Raises ValueError where they differ by more than rounding.

    In narrow types sums of gradients that cancel hold much rounding; outputs are sums over no samples.
    """
    narrow = any(
        t.dtype in _NARROW or torch.is_autocast_enabled(t.device.type) for t in theirs.outputs
    )
    for found, wanted, tolerance in (
        (ours.outputs, theirs.outputs, 2e-2 if narrow else 1e-3),
        (ours.gradients, theirs.gradients, 2e-1 if narrow else 1e-3),
    ):
        for a, b in zip(found, wanted, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise ValueError(
                    f"a result of {a.dtype} and shape {tuple(a.shape)}, not {b.dtype} and {tuple(b.shape)}"
                )
            if b.is_floating_point() and b.numel():
                gap = (a - b).norm()
                if not gap <= tolerance * b.norm() + 1e-12:
                    raise ValueError("its results differ when each sample runs alone")
