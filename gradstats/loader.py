"""A loader of optimizer steps: fixed micro-batches in a seeded order, grouped by a count that may change.

What a data loader prefetches are micro-batches, and how many of them make a step is decided when the
step begins. So the batch size changes at once and no prefetched sample is thrown away. Where an epoch
stands is one number, the samples that were handed out, so it can be resumed anywhere, with any number
of ranks, micro-batch size or workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset

from gradstats.errors import InvalidArgumentError, OrderError
from gradstats.estimators import require, whole
from gradstats.plan import epoch_order, row_sizes, rows, share

__all__ = ["Step", "StepLoader"]

OWN = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "generator")


class Step:
    """The micro-batches of one optimizer step: iterating gives (micro-batch, weight).

    ``(weight * mean_loss).backward()`` for each, summed over the micro-batches and averaged over ranks,
    gives the gradient of the mean loss over the step's `num_samples` samples (of all ranks), also where
    the last micro-batches of an epoch are smaller.
    """

    def __init__(self, sizes: Sequence[int], parts: Iterator[tuple[Any, float]]) -> None:
        self.num_samples = sum(sizes)
        self.accumulation_steps = len(sizes)
        self._parts = parts

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        return self._parts

    def __len__(self) -> int:
        return self.accumulation_steps


class StepLoader:
    """Iterating gives the `Step`s of the present epoch that are left; then the next epoch begins.

    ```python
    loader = gradstats.StepLoader(dataset, micro_batch_size=32, batch_size=128)
    while loader.epoch < epochs:
        for step in loader:
            for (x, y), weight in step:
                (weight * loss_fn(model(x), y)).backward()
            optimizer.step()
            optimizer.zero_grad()
    ```
    Args:
        dataset: any map-style dataset.
        micro_batch_size: samples that go through a rank's model at once.
        batch_size: samples per optimizer step over all ranks, a multiple of
            ``micro_batch_size × world_size``; `accumulation_steps` may be set to another number at any
            time, and holds from the next step on. So may `micro_batch_size`: what workers prefetched
            is then loaded again.
        shuffle: whether an epoch's order is drawn at random, from `seed` and the epoch's number.
        seed: the same on all ranks.
        full: only micro-batches of full size. What is left of an epoch comes first in the next one.
        rank, world_size: of this process (default: those of torch.distributed where it is initialised).
        options: for `torch.utils.data.DataLoader`: num_workers, collate_fn, pin_memory, …

    Every sample of an epoch is handed out once over all ranks, in `shuffle`d order, whatever changes
    meanwhile, and every rank gets as many steps and micro-batches as the others. A step that the loop
    leaves early loses nothing: the next goes on with its remaining micro-batches. Workers' random
    numbers (augmentation) are seeded by `seed` and the epoch, and start again when resumed.

    Raises InvalidArgumentError for sizes that do not fit each other or the dataset.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        micro_batch_size: int,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        full: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> None:
        if rank is None or world_size is None:
            rank, world_size = world()
        require(world_size >= 1, "world_size", world_size, "pass a number of at least 1")
        require(
            0 <= rank < world_size, "rank", rank, f"pass a number below world_size={world_size}"
        )
        require(seed >= 0, "seed", seed, "pass a whole number of at least 0")
        taken = [name for name in OWN if name in options]
        require(not taken, "options", taken, "StepLoader sets these itself")
        in_order = options.get("in_order", True)
        require(in_order, "in_order", in_order, "samples are counted by their order")
        indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if isinstance(dataset, IterableDataset) or not indexed:
            raise InvalidArgumentError(
                "StepLoader needs a dataset with indices and a length, not an IterableDataset or the "
                f"like ({type(dataset).__name__}); group the batches of its own loader by "
                "gradstats.GroupedLoader"
            )
        self.dataset_size = len(cast(Sized, dataset))
        unit = whole("micro_batch_size", micro_batch_size) * world_size
        valid = whole("batch_size", batch_size) % unit == 0
        parts = f"micro_batch_size × world_size = {micro_batch_size} × {world_size}"
        require(valid, "batch_size", batch_size, f"pass a multiple of {parts}")
        fits = batch_size <= self.dataset_size
        require(fits, "batch_size", batch_size, f"the dataset has {self.dataset_size} samples")
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.seed, self.full = shuffle, seed, full
        self.epoch = 0
        self.position = 0  # samples of this epoch's order that were handed out
        self.samples = 0  # handed out in all, over all ranks
        self._micro = self._next_micro = micro_batch_size
        self._accumulation = batch_size // unit
        self._carried: list[int] = []  # left over by the epoch before
        self._order: NDArray[np.int64] = np.empty(0, np.int64)
        self._order_of: int | None = None  # the epoch it is of
        self._steps = 0  # begun; only the last one's micro-batches may be taken
        self._began = 0  # the position where it began, while some of it is left
        self._batches: Iterator[Any] | None = None
        self._generator = torch.Generator()
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=_Indices(self._micro_batches),
            generator=self._generator,
            **options,
        )

    @property
    def micro_batch_size(self) -> int:
        """Samples that go through a rank's model at once, from the next step on."""
        return self._next_micro

    @micro_batch_size.setter
    def micro_batch_size(self, size: int) -> None:
        self._next_micro = whole("micro_batch_size", size)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a step on each rank, from the next step on."""
        return self._accumulation

    @accumulation_steps.setter
    def accumulation_steps(self, number: int) -> None:
        self._accumulation = whole("accumulation_steps", number)

    @property
    def batch_size(self) -> int:
        """Samples of a whole step, over all ranks."""
        return self._next_micro * self.world_size * self._accumulation

    def __iter__(self) -> Iterator[Step]:
        """The steps that are left of this epoch.

        Raises OrderError where nothing was taken of the step before.
        """
        order = self._epoch_order()
        while True:
            if self._micro != self._next_micro:
                self._micro, self._batches = self._next_micro, None
            left = len(order) - self.position
            row = row_sizes(left, self._micro, self.world_size, full=self.full)
            sizes = list(islice(row, self._accumulation))
            if not sizes:
                break
            before = self._began = self.position
            self._steps += 1
            yield Step(sizes, self._parts(sizes, self._steps))
            if self.position == before:
                raise OrderError(
                    "a step of the StepLoader was passed over: nothing was taken of it, so the next one "
                    "would be the same for ever. Iterate over each step's micro-batches"
                )
        self._carried = order[self.position :].tolist()
        self.epoch, self.position, self._began, self._batches = self.epoch + 1, 0, 0, None

    # ---- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands, as plain numbers; the same on all ranks.

        A step that was not handed out in full counts as not begun.
        """
        return {
            "version": 1,
            "dataset_size": self.dataset_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": self.epoch,
            "position": self._began,
            "samples": self.samples - (self.position - self._began),
            "carried": list(self._carried),
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, on any number of ranks; the next iteration starts there.

        The batch size is the state's, as near as this loader's micro-batches come to it. Raises
        InvalidArgumentError for the state of another dataset or order.
        """
        own = (1, self.dataset_size, self.seed, self.shuffle)
        seen = tuple(state.get(key) for key in ("version", "dataset_size", "seed", "shuffle"))
        if seen != own:
            raise InvalidArgumentError(
                f"the state has (version, dataset_size, seed, shuffle) = {seen}, this loader {own}; "
                "samples would be lost or repeated. Load it with the dataset and seed it was made with"
            )
        self.epoch, self.position, self.samples = (
            state[key] for key in ("epoch", "position", "samples")
        )
        self._carried, self._order_of = list(state["carried"]), None
        self._accumulation = max(1, round(state["batch_size"] / (self._micro * self.world_size)))
        self._began, self._batches, self._steps = self.position, None, self._steps + 1

    # ---- what goes to the data loader --------------------------------------------------------------

    def _parts(self, sizes: Sequence[int], step: int) -> Iterator[tuple[Any, float]]:
        """The micro-batches of a step, each handed out when it is asked for."""
        total = sum(sizes)
        for number, size in enumerate(sizes, 1):
            if self._steps != step:
                raise OrderError("micro-batches of a step were asked for after the next step began")
            if self._batches is None:
                # Workers are seeded by where they begin; no generator but this one is drawn from.
                place = (self.seed, self.epoch, self.position, self.rank)
                words = np.random.SeedSequence(place).generate_state(1, np.uint64)
                self._generator.manual_seed(int(words[0]))
                self._batches = iter(self._loader)
            try:
                batch = next(self._batches)
            except BaseException:
                self._batches = None  # its workers may be past this micro-batch: it is loaded again
                raise
            self.position += size
            self.samples += size
            if number == len(sizes):
                self._began = self.position
            first, end = share(size, self.rank, self.world_size)
            yield batch, (end - first) * self.world_size / total

    def _micro_batches(self) -> Iterator[list[int]]:
        order = self._epoch_order()
        places = (self._micro, self.rank, self.world_size)
        for first, end in rows(self.position, len(order), *places, full=self.full):
            yield order[first:end].tolist()

    def _epoch_order(self) -> NDArray[np.int64]:
        """Sample numbers in the order of this epoch, the same on all ranks."""
        if self._order_of != self.epoch:
            order = epoch_order(self.dataset_size, self.seed if self.shuffle else None, self.epoch)
            if self._carried:
                order = np.concatenate([np.asarray(self._carried, np.int64), order])
            self._order, self._order_of = order, self.epoch
        return self._order


class _Indices:
    """A batch sampler that begins where the loader stands each time it is iterated."""

    def __init__(self, draw: Callable[[], Iterator[list[int]]]) -> None:
        self._draw = draw

    def __iter__(self) -> Iterator[list[int]]:
        return self._draw()


def world() -> tuple[int, int]:
    """(rank, world_size) of this process."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
