"""Functions that may put samples into another order, which no shape shows.

They are computed as they are; in a model's first forward what they displaced is noted, and whether a
parameter meets samples that are not in order is then found by moving one (`gradstats.layout`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradstats.rules import Use, rule


@rule(torch.index_select, Tensor.index_select, per_position=True)
def index_select(
    use: Use, func: Callable[..., Any], input: Tensor, dim: int, index: Tensor, **kwargs: Any
) -> Any:
    if dim == 0:
        note_index(use, input, index)
    return use.unruled(func, (input, dim, index), kwargs)


@rule(torch.flip, Tensor.flip, torch.roll, Tensor.roll, per_position=True)
def turned(use: Use, func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if _watched(use, input):
        numbers = torch.arange(use.batch).view(-1, *(1,) * (input.dim() - 1))
        _note(use, func(numbers, *args, **kwargs).flatten())
    return use.unruled(func, (input, *args), kwargs)


def note_index(use: Use, input: Tensor, index: object) -> None:
    """`input[index]`, or with a tuple whose first entry it is."""
    if not _watched(use, input):
        return
    first = index[0] if isinstance(index, tuple) and index else index
    if isinstance(first, list) and len(first) == use.batch and all(type(i) is int for i in first):
        first = torch.tensor(first)
    if not isinstance(first, Tensor) or first.dtype not in (torch.int64, torch.int32):
        return
    if first.shape == (use.batch,):
        _note(use, first.detach().cpu() % use.batch)


def _watched(use: Use, input: Tensor) -> bool:
    """Whether this is a model's first forward, with values to look at, and `input` holds its samples."""
    if torch.compiler.is_compiling() or not use.watching or use.positions is not None:
        return False
    if use.batch < 2 or torch._C._are_functorch_transforms_active():
        return False
    return isinstance(input, Tensor) and use.mark(input) is None and use.is_batched(input)


def _note(use: Use, order: Tensor) -> None:
    displaced = (order != torch.arange(use.batch)).nonzero()
    if len(displaced):
        use.note_displaced(int(displaced[0]))
