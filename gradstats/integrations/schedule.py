"""A batch size that follows a policy in a training loop of another library, by its accumulation steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gradstats.advice import Rule
from gradstats.errors import InvalidArgumentError
from gradstats.scaling import BatchScaling
from gradstats.schedulers import BatchSizeChange, BatchSizeScheduler, Policy

__all__ = ["Accumulation", "Follower", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """How the batch size, and with it the learning rate, follow the training.

    Args:
        policy: of `gradstats.schedulers`, or a function of `gradstats.schedulers.Seen`.
        rule: how the learning rate follows: "linear", "sqrt", "noise", or None where it stays.
        half_life: as of `gradstats.BatchScaling`, like the next.
        warm_up: in samples.
        min_batch_size: as of `gradstats.BatchSizeScheduler`, like the next four.
        max_batch_size: in samples over all processes.
        every: optimizer steps from one decision to the next.
        cooldown: optimizer steps for which the size stays after a change.
        tokens_per_sample: where the monitor counts tokens.
        micro_batch_size: samples of one backward on one process, where the trainer does not say it.
        by_samples: step the learning-rate schedule so often that it takes as many samples as at the
            first batch size: twice in a step of twice the batch.
    """

    policy: Policy
    rule: Rule | None = None
    half_life: tuple[str, ...] = ()
    warm_up: float = 0
    min_batch_size: int | None = None
    max_batch_size: int | None = None
    every: int | None = None
    cooldown: int = 0
    tokens_per_sample: float | None = None
    micro_batch_size: int | None = None
    by_samples: bool = True


class Accumulation:
    """The accumulation steps of a trainer, in the shape of a loader that a `BatchSizeScheduler` sets.

    Trainers step where the number of batches is a multiple of the accumulation steps. So a new number
    is wanted from when it is set, and holds from the first end of a step on whose number of batches is a
    multiple of it too (with 2 wanted 3, at the next multiple of 6 at the latest).

    Args:
        steps: those at the start.
        micro_batch_size: samples of one backward on one process.
        world_size: processes.
        set_steps: tells the trainer.
    """

    dataset_size: int | None = None

    def __init__(
        self, steps: int, micro_batch_size: int, world_size: int, set_steps: Callable[[int], None]
    ) -> None:
        self.steps = self.accumulation_steps = steps  # that hold; that are wanted
        self.micro_batch_size, self.world_size = micro_batch_size, world_size
        self.samples = 0
        self._set_steps = set_steps

    @property
    def batch_size(self) -> int:
        """Samples of the next step over all processes."""
        return self.steps * self.micro_batch_size * self.world_size

    def count(self, micro_batches: int) -> None:
        """A step of so many backwards is over."""
        self.samples += micro_batches * self.micro_batch_size * self.world_size

    def settle(self, batches: int) -> bool:
        """Between two steps, after `batches` of an epoch: whether what is wanted begins to hold."""
        if self.accumulation_steps == self.steps or batches % self.accumulation_steps:
            return False
        self.steps = self.accumulation_steps
        self._set_steps(self.steps)
        return True


class _Scaling(BatchScaling):
    """Scales by the batch size that holds, not by the one that is wanted."""

    def __init__(
        self, accumulation: Accumulation, optimizer: torch.optim.Optimizer, schedule: Schedule
    ) -> None:
        self._accumulation = accumulation
        super().__init__(
            optimizer,
            batch_size=accumulation.batch_size,
            rule=schedule.rule,
            half_life=schedule.half_life,
            warm_up=schedule.warm_up,
        )

    def update(self, batch_size: int, noise: float | None = None) -> float:
        return super().update(self._accumulation.batch_size, noise)


class Follower:
    """Carries a `Schedule` out. Raises InvalidArgumentError where it does not fit the trainer."""

    def __init__(
        self,
        schedule: Schedule,
        accumulation: Accumulation,
        monitor: Any,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.accumulation = accumulation
        self.changes: list[BatchSizeChange] = []  # from when they held
        self._by_samples = schedule.by_samples
        self._steps = 0
        self._resumed = False
        scaled = schedule.rule is not None or bool(schedule.half_life)
        self.scaling = _Scaling(accumulation, optimizer, schedule) if scaled else None
        try:
            self.scheduler = BatchSizeScheduler(
                schedule.policy,
                accumulation,
                monitor=monitor,
                scaling=self.scaling,
                min_batch_size=schedule.min_batch_size,
                max_batch_size=schedule.max_batch_size,
                every=schedule.every,
                cooldown=schedule.cooldown,
                tokens_per_sample=schedule.tokens_per_sample,
            )
        except BaseException:
            self.close()
            raise

    def step(self, micro_batches: int, batches: int) -> int:
        """After a step of `micro_batches`, the last of `batches` in the epoch.

        Returns how often the learning-rate schedule, which the trainer stepped once, is to be stepped
        besides.
        """
        self._steps += 1
        self.accumulation.count(micro_batches)
        due = self.scheduler.base_steps()
        self.scheduler.step()
        self.settle(batches)
        return max(0, due - 1) if self._by_samples else 0

    def settle(self, batches: int) -> None:
        """Between two steps, after `batches` of the epoch: a size that is wanted holds, where it can."""
        held, again = self.accumulation, self._resumed
        self._resumed = False
        if held.settle(batches) and not again:
            change = BatchSizeChange(self._steps, held.samples, held.batch_size, held.steps)
            self.changes.append(change)
        # A resumed run whose size holds at once goes on with its scaling as it was.
        if self.scaling is not None and self.scaling.batch_size != held.batch_size:
            self.scaling.update(held.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "steps": self._steps,
            "samples": self.accumulation.samples,
            "changes": [asdict(change) for change in self.changes],
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; its batch size is wanted, and holds once `settle` lets it.

        To be followed by `settle`.
        """
        self._resumed = True
        self.changes = [BatchSizeChange(**change) for change in state["changes"]]
        self._steps = state["steps"]
        self.accumulation.samples = state["samples"]
        self.scheduler.load_state_dict(state["scheduler"])

    def close(self) -> None:
        """Leave the optimizer as it was."""
        if self.scaling is not None:
            self.scaling.close()


def micro_batch_size(schedule: Schedule, found: int | None, who: str) -> int:
    """Samples of one backward. Raises InvalidArgumentError where neither says them."""
    size = found if schedule.micro_batch_size is None else schedule.micro_batch_size
    if size is None or size < 1:
        raise InvalidArgumentError(
            f"{who} does not say how many samples a batch of its loader holds; pass "
            "Schedule(micro_batch_size=...)"
        )
    return size
