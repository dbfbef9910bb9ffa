"""Views of a parameter: the view is tracked as the parameter is.

Only functions that keep every entry at most once are here, so that norms do not change; the probe
of the second moment is looked at through the same function, and autograd brings its gradient home.
A cast counts: statistics come from the accumulators, not from the rounded gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradstats.probes import ATTRIBUTE, Mark
from gradstats.rules import Use, rule

_SAME_ORDER = (
    torch.unsqueeze, Tensor.unsqueeze, torch.squeeze, Tensor.squeeze, torch.reshape, Tensor.reshape,
    Tensor.view, torch.flatten, Tensor.flatten, Tensor.contiguous, Tensor.to, Tensor.float,
    Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type_as,
)  # fmt: skip
_REORDERED = (
    torch.t, Tensor.t, torch.transpose, Tensor.transpose, torch.permute, Tensor.permute,
    torch.movedim, Tensor.movedim, torch.narrow, Tensor.narrow, torch.select, Tensor.select,
    Tensor.__getitem__, vars(torch._C.TensorBase)["T"].__get__, vars(torch._C.TensorBase)["mT"].__get__,
)  # fmt: skip


@rule(*_SAME_ORDER, *_REORDERED)
def view(use: Use, func: Callable[..., Any], input: Any, *args: Any, **kwargs: Any) -> Any:
    mark = use.mark(input)
    if mark is None or mark.name is None or not _plain(func, args):
        return use.unruled(func, (input, *args), kwargs)
    out = func(input, *args, **kwargs)
    in_order = func in _SAME_ORDER or func is Tensor.__getitem__
    if mark.ids is not None and not (in_order and out.numel() == input.numel()):
        return use.unruled(func, (input, *args), kwargs)
    m2 = mark.m2
    if m2 is not None and mark.ids is None and not _is_cast(func):
        m2 = func(m2, *args, **kwargs)
    if out is not input:
        viewed = Mark(mark.name, m2, mark.ids, mark.num_embeddings, mark.padding_idx)
        setattr(out, ATTRIBUTE, viewed)
    return out


def _is_cast(func: Callable[..., Any]) -> bool:
    return func in (
        Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type_as,
        Tensor.contiguous,
    )  # fmt: skip


def _plain(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Indexing by a tensor or a list may repeat entries, so only basic indexing is a view."""
    if func is not Tensor.__getitem__:
        return True
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    # A tuple of types: the compiler of torch 2.9 cannot trace `int | slice`.
    return all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in index)
