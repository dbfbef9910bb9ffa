"""`attach(sample="token")`: every position of every sequence is a sample.

The gradient of a weight that sees (batch, positions, …) is a sum over positions, Σ_bt g_bt a_btᵀ. Here
each term is a sample of its own: the part of the gradient that arrives through this position's row of
the layer, from whatever terms of the loss. It is not the gradient of this position's term of the loss;
attention makes the one depend on rows of others. So rules see (batch·positions, 1, …), and what mixes
positions before it meets a parameter (a convolution, a recurrence, a pooled head) has no such terms: it
is reported as not covered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradstats import layout
from gradstats.calls import function_name, named, tensors_in
from gradstats.errors import BatchDimError
from gradstats.grouping import Flattened
from gradstats.interpose import Interposer
from gradstats.layout import NeedsLayout
from gradstats.probes import UseOf
from gradstats.rules import PER_POSITION, RULES


class NotPerPosition(Exception):
    """An input of a rule does not hold one row per position; the text says what it holds."""


class Positions:
    """(B, T, …) as (B·T, 1, …): each position a sample."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape

    def gather(self, rows: Tensor) -> Tensor:
        return rows.flatten(0, 1).unsqueeze(1)

    def scatter(self, samples: Tensor) -> Tensor:
        return samples.reshape(*self._shape, *samples.shape[2:])


class FlatPositions:
    """Rows that are (T·B, …), brought to (B·T, 1, …)."""

    def __init__(self, batch: int) -> None:
        self._rows = Flattened(batch, samples_first=False)
        self._batch = batch

    def gather(self, rows: Tensor) -> Tensor:
        return self._rows.gather(rows).flatten(0, 1).unsqueeze(1)

    def scatter(self, samples: Tensor) -> Tensor:
        return self._rows.scatter(samples.reshape(self._batch, -1, *samples.shape[2:]))


class TokenInterposer(Interposer):
    """As its base, with `batch` = B·T samples: the first two dimensions of the model's input."""

    positions: tuple[int, int] = (0, 0)  # (B, T) of the pass that runs

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lengths: dict[int, dict[str, bool]] = {}  # T -> what `layout.lengths` found

    @property
    def sequences(self) -> int:
        return self.positions[0]

    def _batch_size(self, path: str, args: Any, kwargs: Any) -> int:
        for tensor in tensors_in(*args, kwargs):
            if _has_positions(tensor):
                batch, length = tensor.shape[:2]
                if torch.compiler.is_compiling():  # the rows need numbers
                    batch, length = len((0,) * batch), len((0,) * length)
                self.positions = batch, length
                return batch * length
        raise BatchDimError(
            f"{named(path)} was called without (batch, positions) ids and without a (batch, positions, "
            'features) tensor, and with sample="token" every position is a sample. Attach to the part '
            'of the model that gets one, or use sample="example".'
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.current is None or self.suspended:
            return func(*args, **kwargs)
        found = RULES.get(func)
        if found is None or not torch.is_grad_enabled():
            return self.unruled(func, args, kwargs)
        if func not in PER_POSITION:
            reason = f"{function_name(func)} does not give every position a part of its gradient"
            return self.unruled(func, args, kwargs, reason)
        try:
            return found(self, func, *args, **kwargs)
        except NotPerPosition as why:
            return self.unruled(func, args, kwargs, str(why))

    def _fall_back_or_note(self, name: str, reason: str, earlier: tuple[UseOf, ...]) -> None:
        """Samples can run alone, positions cannot: there is no fallback."""
        if torch.compiler.is_compiling() and earlier and name not in self.shared:
            self._found_shared(name)
            return
        self.uncovered.setdefault(name, f'{reason} (sample="token")')

    def is_batched(self, tensor: Tensor) -> bool:
        """Whether `tensor` holds a row for each position, in the order of (batch, positions)."""
        return self._order(tensor) == layout.SAMPLES_FIRST

    def batch_first(self, tensor: Tensor) -> Tensor:
        if not self.is_batched(tensor):
            raise NotPerPosition(self._elsewhere(tensor, "not a row for each of the"))
        return tensor

    def _groups(self, tensor: Tensor) -> Any:
        batch, length = self.positions
        if _has_positions(tensor) and tensor.shape[:2] == (batch, length):
            if length > 1 and length in tensor.shape[2:] and not self._first_is_positions():
                raise NotPerPosition(
                    self._elsewhere(tensor, "which has another dimension as long as its")
                    + "; measure with sequences of another length"
                )
            return Positions((batch, length))
        turned = self._order(tensor) == layout.POSITIONS_FIRST
        return FlatPositions(batch) if turned else None

    def _first_is_positions(self) -> bool:
        """Whether (B, T, T) that the present module meets has its positions in dimension 1."""
        if torch.compiler.is_compiling():
            return False
        if self.positions[1] not in self.lengths:
            raise NeedsLayout
        return self.lengths[self.positions[1]].get(self.stack[-1].path, False)

    def _look(self, before: layout.State, original: Any, args: Any, kwargs: Any) -> None:
        self.looked = True
        if self.sequences > 1:
            super()._look(before, original, args, kwargs)
        found = layout.lengths(self, before, original, args, kwargs)
        self.lengths[self.positions[1]] = found

    def _order(self, tensor: Tensor) -> str | None:
        """How a tensor of B·T rows lies; None for any other."""
        if not tensor.dim() or tensor.shape[0] != self.batch:
            return None
        if 1 in self.positions:
            return layout.SAMPLES_FIRST
        if torch.compiler.is_compiling():
            return None
        found = self.layouts.get(self.stack[-1].path)
        if found is None and not self.looked:
            raise NeedsLayout
        return found

    def _elsewhere(self, tensor: Tensor, what: str) -> str:
        batch, length = self.positions
        return (
            f"{self._where()} got an input of shape {tuple(tensor.shape)}, {what} {length} positions "
            f"of {batch} sequences"
        )


def _has_positions(tensor: Tensor) -> bool:
    """(batch, positions) ids, or (batch, positions, features)."""
    return tensor.dim() > 1 + tensor.is_floating_point()
