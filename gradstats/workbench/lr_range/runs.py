"""Short trainings at one learning rate each, all from the same weights, that leave no trace."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.kept import kept
from gradstats.plan import epoch_order
from gradstats.workbench.lr_range.fingerprint import fingerprint
from gradstats.workbench.workload import Workload

__all__ = ["CHUNK", "Runs"]

HELD_OUT = 0.2  # of the data, at most, where the workload has no validation data
CHUNK = 32
FEWEST = 10  # samples of which some are held out


class Runs:
    """Trains `steps` steps at a rate, from the workload's present state, and gives the loss after them.

    The loss is the mean over `loss_samples` samples at most that no run trains on: of the workload's
    validation data, else held out of its data here (where there are fewer than ten, all serve for both).
    It is taken as the model trains, dropout and batch statistics included, with the same random numbers
    each time. Runs of the same seed see the same batches in the same order, and the same random numbers.

    The loss is taken in batches of `chunk`.

    A rate is that of the first parameter group whose rate is above zero; those of the others keep their
    ratio to it.

    `put_back()` restores everything (see `gradstats.kept`) and compares fingerprints.

    Raises InvalidArgumentError where no group has a learning rate above zero.
    """

    def __init__(
        self, workload: Workload, *, steps: int, loss_samples: int, seed: int, chunk: int = CHUNK
    ) -> None:
        self.workload, self.steps, self.seed = workload, steps, seed
        self.model = workload.model
        self.optimizer = cast(torch.optim.Optimizer, workload.optimizer)
        rates = [float(group.get("lr", math.nan)) for group in self.optimizer.param_groups]
        known = [rate for rate in rates if rate > 0]
        if not known or not all(map(math.isfinite, rates)):
            raise InvalidArgumentError(
                f"the optimizer's learning rates are {rates}; one must be above 0, as the range is of it"
            )
        self.present_rate = known[0]
        self._ratios = [rate / known[0] for rate in rates]
        step = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        self._closure = step is not None and step.default is inspect.Parameter.empty
        self.count = 0  # steps taken
        self.before = fingerprint(self.model, self.optimizer)
        self._put_back = kept([self.model, self.optimizer])
        self._split(loss_samples)
        self._chunk = min(chunk, loss_samples)
        self.start_loss = self._loss_now()
        self._losses: dict[tuple[int, int, float], float] = {}
        if not math.isfinite(self.start_loss):
            self.put_back()
            raise GradStatsError(
                f"the loss before the first step is {self.start_loss}; there is no rate that it falls at"
            )

    def loss(self, rate: float, batch_size: int, repeat: int) -> float:
        """The loss after a run; infinite where a loss on the way was not finite. Known ones are not run."""
        key = (batch_size, repeat, rate)
        if key not in self._losses:
            self._losses[key] = self._run(rate, batch_size, repeat)
        return self._losses[key]

    def known_rates(self, batch_size: int, repeats: int) -> list[float]:
        """The rates that all repeats have run at, in order."""
        rates = {rate for size, _, rate in self._losses if size == batch_size}
        every = range(repeats)
        return sorted(r for r in rates if all((batch_size, s, r) in self._losses for s in every))

    def put_back(self) -> dict[str, str]:
        """Restore all, and return the fingerprint.

        Raises GradStatsError where something is not what it was, and names it.
        """
        self._put_back()
        after = fingerprint(self.model, self.optimizer)
        changed = [name for name, value in self.before.items() if after[name] != value]
        if changed:
            raise GradStatsError(
                f"the {' and '.join(changed)} could not be restored after the range test; "
                "take the model and the optimizer from a checkpoint"
            )
        return after

    def _run(self, rate: float, batch_size: int, repeat: int) -> float:
        self._put_back()
        _seed_all(self.seed + repeat)
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * ratio)
            else:
                group["lr"] = rate * ratio
        self.optimizer.zero_grad()
        draw = self._batches(batch_size, self.seed + repeat)
        for _ in range(self.steps):
            if not math.isfinite(self._step(next(draw))):
                return math.inf
        loss = self._loss_now(restore=False)
        return loss if math.isfinite(loss) else math.inf

    def _step(self, batch: Any) -> float:
        def closure() -> float:
            self.optimizer.zero_grad()
            loss = self.workload.loss(batch)
            loss.backward()
            return float(loss.detach())

        self.count += 1
        if self._closure:  # as LBFGS, which evaluates the loss itself, and more than once
            return float(self.optimizer.step(closure))
        loss = closure()
        self.optimizer.step()
        return loss

    def _split(self, loss_samples: int) -> None:
        made, order = self.workload, epoch_order(self.workload.num_samples, self.seed, 0)
        self._held = self._train = order
        if made.num_validation == 0 and len(order) >= FEWEST:
            count = min(loss_samples, int(HELD_OUT * len(order)))
            self._held, self._train = order[:count], order[count:]
        self._held = self._held[:loss_samples]
        self._loss_samples = loss_samples

    def _batches(self, size: int, seed: int) -> Iterator[Any]:
        """Batches of the training samples: shuffled epochs one after the other."""
        order, epoch = np.empty(0, np.int64), 0
        while True:
            while len(order) < size:
                shuffled = self._train[epoch_order(len(self._train), seed, epoch)]
                order, epoch = np.concatenate([order, shuffled]), epoch + 1
            yield self.workload.take(order[:size].tolist())
            order = order[size:]

    def _loss_now(self, restore: bool = True) -> float:
        """The mean loss over the samples that no run trains on."""
        _seed_all(self.seed)
        total = count = 0.0
        with torch.no_grad():
            for batch, number in self._loss_batches(self._chunk):
                total += float(self.workload.loss(batch)) * number
                count += number
        if restore:
            self._put_back()
        return total / count

    def _loss_batches(self, size: int) -> Iterator[tuple[Any, int]]:
        if self.workload.num_validation:
            left = min(self._loss_samples, self.workload.num_validation)
            for batch in self.workload.validation_batches(size):
                if left < 1:
                    return
                yield batch, min(size, left)
                left -= size
            return
        for first in range(0, len(self._held), size):
            part = self._held[first : first + size].tolist()
            yield self.workload.take(part), len(part)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    if (
        torch.cuda.is_initialized()
    ):  # else torch.manual_seed would queue a call for when it is, every time
        torch.cuda.manual_seed_all(seed)
