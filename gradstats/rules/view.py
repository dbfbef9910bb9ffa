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

from gradstats.probes import ATTRIBUTE, Mark, Part
from gradstats.rules import Use, rule
from gradstats.rules.reorder import note_index

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


@rule(*_SAME_ORDER, *_REORDERED, per_position=True)
def view(use: Use, func: Callable[..., Any], input: Any, *args: Any, **kwargs: Any) -> Any:
    mark = use.mark(input)
    if func is Tensor.__getitem__:
        note_index(use, input, args[0])
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
        part = mark.part
        if part is None and mark.ids is None and func is Tensor.__getitem__ and input.is_leaf:
            part = _rows(input, args[0])
        viewed = Mark(mark.name, m2, mark.ids, mark.num_embeddings, mark.padding_idx, part)
        setattr(out, ATTRIBUTE, viewed)
    return out


def _rows(param: Tensor, index: Any) -> Part | None:
    """The part that basic indexing takes of a parameter, where that is a run of rows."""
    first = index[0] if isinstance(index, tuple) else index
    n = param.shape[0] if param.dim() else 0
    if isinstance(first, int):
        return 0, first % n, first % n + 1
    if isinstance(first, slice):
        kept = range(n)[first]  # slice.indices, but the compiler of torch 2.9 can trace it
        begin, end = kept.start, kept.stop
        return (0, begin, end) if kept.step == 1 and (begin, end) != (0, n) else None
    return None


@rule(torch.split, Tensor.split, torch.chunk, Tensor.chunk, torch.unbind, Tensor.unbind,
      per_position=True)  # fmt: skip
def parts(use: Use, func: Callable[..., Any], input: Any, *args: Any, **kwargs: Any) -> Any:
    """A parameter cut into pieces, as the packed projections of attention are."""
    mark = use.mark(input)
    if mark is None or mark.name is None or mark.ids is not None:
        return use.unruled(func, (input, *args), kwargs)
    along = kwargs.get("dim", args[0] if args and func in (torch.unbind, Tensor.unbind) else
                       args[1] if len(args) > 1 else 0)  # fmt: skip
    pieces = _cut(func, along, input, *args, **kwargs)
    others = pieces if mark.m2 is None else _cut(func, along, mark.m2, *args, **kwargs)
    along %= max(input.dim(), 1)
    whole = mark.part is None and input.is_leaf
    begin = 0
    for piece, other in zip(pieces, others, strict=True):
        count = piece.shape[along] if piece.dim() == input.dim() else 1
        part = (along, begin, begin + count) if whole else mark.part
        begin += count
        setattr(piece, ATTRIBUTE, Mark(mark.name, None if mark.m2 is None else other, part=part))
    return pieces


def _cut(func: Callable[..., Any], along: int, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    pieces = func(input, *args, **kwargs)
    if not torch.compiler.is_compiling():
        return pieces
    # The compiler cannot mark an entry of a result; these are results of their own.
    if pieces[0].dim() < input.dim():
        return tuple(input.select(along, i) for i in range(len(pieces)))
    begin, cut = 0, []
    for piece in pieces:
        cut.append(input.narrow(along, begin, piece.shape[along]))
        begin += piece.shape[along]
    return tuple(cut)


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
