"""What a command trains: a model, its loss, its data and its optimizer, from the user's factory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, default_collate

from gradstats.batches import Samples
from gradstats.errors import InvalidArgumentError
from gradstats.plan import epoch_order
from gradstats.trial import joined
from gradstats.workbench.factory import call_factory

__all__ = ["GIVES", "Workload", "load", "workload"]

GIVES = (
    "(model, loss_fn, data), (model, loss_fn, data, optimizer) or a gradstats.Workload, where data is "
    "a dataset, a DataLoader or one batch of tensors"
)
Optimizers = torch.optim.Optimizer | Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Workload:
    """A training to try things on.

    Args:
        model: on the device to train on.
        loss_fn: called loss_fn(model, batch), or, where it is an nn.Module or a function of
            torch.nn.functional, loss_fn(model(x), y) with batch = (x, y); a mean over the batch.
        data: a map-style dataset, a DataLoader of one (its dataset and collate_fn are used), or one
            batch (a nest of tensors with the samples in dimension 0), whose samples are then the data.
        optimizer: over the model's parameters, or a function that makes it from a list of them.
            Default: AdamW with its own settings.
        validation: like `data`, held out.
        batch_size: samples per step at present, where a command is not told.
    """

    model: nn.Module
    loss_fn: Callable[..., Any]
    data: Any
    optimizer: Optimizers | None = None
    validation: Any = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module) or not callable(self.loss_fn):
            kinds = f"({type(self.model).__name__}, {type(self.loss_fn).__name__}, …)"
            raise InvalidArgumentError(
                f"a workload was made of {kinds}; the first must be an nn.Module, the second a function"
            )
        params = [p for p in self.model.parameters() if p.requires_grad]
        if not params:
            raise InvalidArgumentError(
                f"{type(self.model).__name__} has no trainable parameter, so there is nothing to train"
            )
        self.device = params[0].device
        self.default_optimizer = self.optimizer is None
        made = torch.optim.AdamW if self.optimizer is None else self.optimizer
        if not isinstance(made, torch.optim.Optimizer):
            made = made(params)
        if not isinstance(made, torch.optim.Optimizer):
            raise InvalidArgumentError(
                f"the workload's optimizer is a {type(made).__name__}; pass a torch.optim.Optimizer, or "
                "a function that makes one from a list of parameters"
            )
        held = {id(p) for group in made.param_groups for p in group["params"]}
        if not any(id(p) in held for p in params):
            raise InvalidArgumentError(
                f"the workload's {type(made).__name__} holds none of the model's trainable parameters; "
                "make it from those of the model that is returned"
            )
        self.optimizer: torch.optim.Optimizer = made
        self._loss = joined(self.loss_fn)
        self._data = _Source(self.data, "data")
        self._validation = (
            None if self.validation is None else _Source(self.validation, "validation")
        )
        if isinstance(self.data, DataLoader) and self.batch_size is None:
            self.batch_size = self.data.batch_size

    @property
    def num_samples(self) -> int:
        """Samples in the data."""
        return self._data.size

    @property
    def num_validation(self) -> int:
        """Samples held out; 0 where there are none."""
        return 0 if self._validation is None else self._validation.size

    @property
    def batch_norm_layers(self) -> tuple[str, ...]:
        """Names of the BatchNorm layers that use the batch's own statistics."""
        kind = nn.modules.batchnorm._BatchNorm
        return tuple(
            name
            for name, module in self.model.named_modules()
            if isinstance(module, kind) and (module.training or not module.track_running_stats)
        )

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch, with its graph.

        Raises InvalidArgumentError where it is not a scalar.
        """
        loss = self._loss(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            seen = (
                f"a tensor of shape {tuple(loss.shape)}"
                if isinstance(loss, Tensor)
                else repr(type(loss))
            )
            raise InvalidArgumentError(f"loss_fn gave {seen}; it must give the mean loss, a scalar")
        return loss.reshape(())

    def take(self, indices: Sequence[int]) -> Any:
        """The batch of these samples of the data, on the model's device; an index may be repeated."""
        return self._to_device(self._data.take(indices))

    def take_validation(self, indices: Sequence[int]) -> Any:
        """The batch of these of the samples held out."""
        return self._to_device(self._held_out().take(indices))

    def batches(self, size: int, *, seed: int = 0, start: int = 0) -> Iterator[Any]:
        """Batches of `size` samples without end: shuffled epochs one after the other.

        A batch may reach into the next epoch, or be larger than the data; `start` samples are passed
        over, so that a run can go on where it stopped.
        """
        epoch, position = divmod(start, self.num_samples)
        order = epoch_order(self.num_samples, seed, epoch)[position:]
        while True:
            while len(order) < size:
                epoch += 1
                order = np.concatenate([order, epoch_order(self.num_samples, seed, epoch)])
            yield self.take(order[:size].tolist())
            order = order[size:]

    def validation_batches(self, size: int) -> Iterator[Any]:
        """The samples held out, once, in order; the last batch may be smaller."""
        held = self._held_out()
        for first in range(0, held.size, size):
            yield self._to_device(held.take(range(first, min(first + size, held.size))))

    def _held_out(self) -> _Source:
        if self._validation is None:
            raise InvalidArgumentError(
                "the workload has no samples held out; give gradstats.Workload(validation=...)"
            )
        return self._validation

    def _to_device(self, batch: Any) -> Any:
        move = self.device
        return pytree.tree_map_only(Tensor, lambda t: t.to(move, non_blocking=True), batch)


class _Source:
    """Samples by number, of a dataset or of one batch."""

    def __init__(self, data: Any, what: str) -> None:
        collate: Any = default_collate
        if isinstance(data, DataLoader):
            data, collate = data.dataset, data.collate_fn
        self._samples: Samples | None = None
        if isinstance(data, IterableDataset) or not _indexed(data):
            try:
                self._samples = Samples(data, 0)
            except ValueError as error:
                raise InvalidArgumentError(
                    f"the workload's {what} is a {type(data).__name__}, which is neither a dataset with "
                    "indices and a length, nor a DataLoader of one, nor a batch of tensors"
                ) from error
            self.size = self._samples.size
        else:
            self.size = len(cast(Sized, data))
        if self.size < 1:
            raise InvalidArgumentError(f"the workload's {what} holds no samples")
        self._data, self._collate = data, collate

    def take(self, indices: Sequence[int]) -> Any:
        if self._samples is not None:
            return self._samples.take(list(indices))
        return self._collate([self._data[i] for i in indices])


def _indexed(data: Any) -> bool:
    """Whether it is a dataset, not a batch: tuples, lists and dicts of tensors are batches."""
    if isinstance(data, (Tensor, dict)):
        return False
    if isinstance(data, (tuple, list)):  # a list of samples, or of a batch's parts
        return not any(isinstance(part, Tensor) for part in data)
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def workload(made: Any) -> Workload:
    """A `Workload` from what a factory returned.

    Raises InvalidArgumentError where it is something else.
    """
    if isinstance(made, Workload):
        return made
    if not isinstance(made, (tuple, list)) or len(made) not in (3, 4):
        seen = type(made).__name__
        seen += f" of {len(made)}" if isinstance(made, (tuple, list)) else ""
        raise InvalidArgumentError(f"the factory must return {GIVES}, not a {seen}")
    return Workload(*made)


def load(target: str, *, seed: int = 0) -> Workload:
    """The workload that `module:factory` makes, right after torch's random numbers are seeded.

    Raises InvalidArgumentError where it cannot be found, fails, or gives something else.
    """
    torch.manual_seed(seed)
    made = call_factory(target, GIVES)
    try:
        return workload(made)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{target}(): {error}") from error
