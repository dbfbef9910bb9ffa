"""Training on from a checkpoint with larger batches, and the noise scale there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from gradstats.attaching import attach
from gradstats.errors import GradStatsError
from gradstats.estimators import NoiseScale
from gradstats.workbench.critical.result import Run
from gradstats.workbench.workload import Workload

__all__ = ["Evaluation", "branch", "noise_scale_at", "optimizer_of", "train"]

AT_ONCE = (
    4  # batches that are evaluated at once: without gradients, less memory than training on one
)
FEWEST = 16  # estimates, for an interval
PARTS = 8  # batches whose gradients make one estimate of |G|², which single ones know too badly


class Evaluation:
    """The mean loss over samples that stay the same: of the data's, or of those held out."""

    def __init__(
        self, workload: Workload, samples: int, batch_size: int, *, held_out: bool
    ) -> None:
        self._workload, self._size = workload, AT_ONCE * batch_size
        self.held_out = held_out
        of = workload.num_validation if self.held_out else workload.num_samples
        self._chosen: list[int] = np.random.default_rng(0).permutation(of)[:samples].tolist()
        self.samples = len(self._chosen)

    def __call__(self) -> float:
        """As the model is: without dropout, BatchNorm by its running statistics, no gradients."""
        modules = [(module, module.training) for module in self._workload.model.modules()]
        take = self._workload.take_validation if self.held_out else self._workload.take
        self._workload.model.eval()
        total = 0.0
        try:
            with torch.no_grad():
                for first in range(0, self.samples, self._size):
                    part = self._chosen[first : first + self._size]
                    total += len(part) * float(self._workload.loss(take(part)))
        finally:
            for module, mode in modules:
                module.training = mode
        return total / self.samples


def optimizer_of(workload: Workload) -> torch.optim.Optimizer:
    """The workload's, which is an optimizer once the workload is made."""
    assert isinstance(workload.optimizer, torch.optim.Optimizer)
    return workload.optimizer


def train(workload: Workload, parts: Iterator[Any], count: int) -> None:
    """One optimizer step of `count` batches in a row, whose mean losses weigh alike."""
    optimizer = optimizer_of(workload)
    optimizer.zero_grad()
    for _ in range(count):
        (workload.loss(next(parts)) / count).backward()
    optimizer.step()


def branch(
    workload: Workload,
    *,
    multiplier: int,
    seed: int,
    batch_size: int,
    every: int,
    evaluations: int,
    scale: float,
    evaluate: Callable[[], float],
    start_loss: float,
    advance: Callable[[], object],
) -> Run:
    """Train from the checkpoint that the workload is at, in batches of `multiplier` × `batch_size`.

    A larger batch is made of `multiplier` batches in a row, so whatever the multiplier the same samples
    come in the same order. Evaluated after each `every` samples; learning rates times `scale`.
    """
    torch.manual_seed(seed)
    for group in optimizer_of(workload).param_groups:
        group["lr"] = group["lr"] * scale
    parts = workload.batches(batch_size, seed=seed)
    curve = [(0, start_loss)]
    for point in range(1, evaluations + 1):
        for _ in range(every // (multiplier * batch_size)):
            train(workload, parts, multiplier)
        loss = evaluate()
        advance()
        if not math.isfinite(loss):
            return Run(multiplier, seed, tuple(curve), ok=False)
        curve.append((point * every, loss))
    return Run(multiplier, seed, tuple(curve))


def noise_scale_at(
    workload: Workload, batch_size: int, samples: int, seed: int
) -> tuple[NoiseScale | None, str]:
    """The noise scale of the weights as they are, from about so many samples; and why, where None.

    By every sample's gradient, or where the model does not allow that, by the gradients of batches.
    """
    reasons: list[str] = []
    for method in ("per_sample", "micro_batch"):
        try:
            return _noise_scale(workload, method, batch_size, samples, seed), ""
        except GradStatsError as error:
            reasons.append(str(error))
    return None, reasons[0]


def _noise_scale(
    workload: Workload, method: Any, batch_size: int, samples: int, seed: int
) -> NoiseScale:
    steps = max(FEWEST, samples // (PARTS * batch_size))
    batches = workload.batches(batch_size, seed=seed)
    optimizer = optimizer_of(workload)
    optimizer.zero_grad()
    with attach(workload.model, method=method, half_life=math.inf, per_layer=False) as monitor:
        for _ in range(steps):
            for _ in range(PARTS):
                workload.loss(next(batches)).backward()
            stats = monitor.step()
            optimizer.zero_grad()
            if stats is not None and stats.coverage.fraction < 1:
                missing = ", ".join(list(stats.coverage.missing)[:3])
                raise GradStatsError(f"not every parameter could be measured ({missing})")
        return monitor.noise_scale()
