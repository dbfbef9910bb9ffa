"""Any loader's batches, grouped into optimizer steps by a count that may change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from gradstats.batches import Samples
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import require, whole
from gradstats.loader import Step, world

__all__ = ["GroupedLoader"]


class GroupedLoader:
    """Iterating gives the `Step`s of one pass over `loader`: each of `accumulation_steps` batches.

    For loaders whose order is their own: of an IterableDataset, with a sampler of yours, torchdata's
    `StatefulDataLoader`. Batches are taken from the loader for one step at a time, in its order, so none
    is lost or repeated when `accumulation_steps` changes; the last step may hold fewer. On several ranks
    the loaders must give equally many samples (as DistributedSampler does, by repeating some; StepLoader
    does it without).

    Args:
        loader: gives batches, each a tensor or a nest of tuples, lists and dicts of tensors, with the
            samples in the first dimension. A mid-epoch checkpoint needs one with a `state_dict`.
        accumulation_steps: batches per step and rank; may be set at any time, for the next step.
        micro_batch_size: samples of a batch (default: `loader.batch_size`).

    Raises InvalidArgumentError where that is not known.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        accumulation_steps: int = 1,
        micro_batch_size: int | None = None,
    ) -> None:
        size = getattr(loader, "batch_size", None) if micro_batch_size is None else micro_batch_size
        if size is None:
            raise InvalidArgumentError(
                f"{type(loader).__name__} does not say how many samples its batches hold; pass "
                "micro_batch_size="
            )
        self.loader, self.micro_batch_size = loader, int(size)
        self.world_size, self.dataset_size = world()[1], None
        self.samples = 0  # handed out in all, over all ranks
        self.epoch = 0  # passes that came to their end
        self._over = False  # whether this one did
        self.accumulation_steps = accumulation_steps

    @property
    def accumulation_steps(self) -> int:
        """Batches of a step on each rank, from the next step on."""
        return self._accumulation

    @accumulation_steps.setter
    def accumulation_steps(self, number: int) -> None:
        self._accumulation = whole("accumulation_steps", number)

    @property
    def batch_size(self) -> int:
        """Samples of a whole step, over all ranks."""
        return self.micro_batch_size * self.world_size * self.accumulation_steps

    def __iter__(self) -> Iterator[Step]:
        """The steps of one pass over the loader, or of what is left of it after `load_state_dict`."""
        self._end_epoch()
        batches = iter(self.loader)
        while not self._over:
            number = self.accumulation_steps
            parts = list(islice(batches, number))
            self._over = len(parts) < number
            if not parts:
                break
            sizes = [Samples(batch, 0).size for batch in parts]
            weights = [size / sum(sizes) for size in sizes]
            everywhere = [size * self.world_size for size in sizes]
            self.samples += sum(everywhere)
            yield Step(everywhere, iter(list(zip(parts, weights, strict=True))))
        self._end_epoch()

    def _end_epoch(self) -> None:
        self.epoch, self._over = self.epoch + self._over, False

    def state_dict(self) -> dict[str, Any]:
        """The loader's state and the count. Raises InvalidArgumentError where the loader has none."""
        if not hasattr(self.loader, "state_dict"):
            raise InvalidArgumentError(
                f"{type(self.loader).__name__} cannot say where it stands in an epoch; use "
                "torchdata.stateful_dataloader.StatefulDataLoader (pip install torchdata), or "
                "gradstats.StepLoader"
            )
        return {
            "version": 1,
            "accumulation_steps": self.accumulation_steps,
            "samples": self.samples,
            "epoch": self.epoch + self._over,
            "loader": self.loader.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`: the next iteration begins after the last step before it.

        After an epoch's last step it may have nothing left to give: go by `epoch`.
        """
        version = state.get("version")
        require(
            version == 1, "version", version, "pass a state that GroupedLoader.state_dict() made"
        )
        self.accumulation_steps, self.samples = state["accumulation_steps"], state["samples"]
        self.epoch, self._over = state["epoch"], False
        self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
