"""A first look at a workload, before hours are spent on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import gradstats
from gradstats.errors import GradStatsError, InvalidArgumentError, first_line
from gradstats.kept import kept
from gradstats.workbench.sweep.settings import Settings
from gradstats.workbench.sweep.state import fingerprint, load_seeded
from gradstats.workbench.workload import Workload

__all__ = ["First", "look_over"]

FEW = 4  # samples of the batch that is tried


@dataclass(frozen=True)
class First:
    """What the workload is. `unmeasured`: why its per-sample gradients cannot be, or None."""

    learning_rate: float
    batch_size: int | None
    num_samples: int
    num_validation: int
    on_gpu: bool
    fingerprint: str
    coverage: float
    unmeasured: str | None


def look_over(settings: Settings) -> First:
    """Make the workload, and try a batch of few samples. Random numbers are put back.

    Raises InvalidArgumentError where that fails.
    """
    put_back = kept(())
    try:
        workload = load_seeded(settings.target, 0)
        optimizer = workload.optimizer
        assert isinstance(optimizer, torch.optim.Optimizer)
        print_ = fingerprint(workload)  # before anything could change it
        batch = workload.take(range(min(FEW, workload.num_samples)))
        try:
            workload.loss(batch)
        except InvalidArgumentError:
            raise
        except Exception as error:
            raise InvalidArgumentError(
                f"the loss of a batch of {min(FEW, workload.num_samples)} samples of {settings.target} "
                f"failed: {first_line(error)}"
            ) from error
        coverage, unmeasured = _measurable(workload)
        rate = float(optimizer.param_groups[0]["lr"])
        if settings.learning_rate is None and rate <= 0:
            raise InvalidArgumentError(
                f"the optimizer of {settings.target} has learning rate {rate:g}; give one above 0"
            )
        return First(
            rate, workload.batch_size, workload.num_samples, workload.num_validation,
            workload.device.type == "cuda", print_, coverage, unmeasured,
        )  # fmt: skip
    finally:
        put_back()


def _measurable(workload: Workload) -> tuple[float, str | None]:
    """The share of the parameters that is measured, and why it is 0."""
    batch = workload.take(range(min(FEW, workload.num_samples)))
    workload.model.train()
    try:
        with gradstats.attach(workload.model) as monitor:
            workload.loss(batch).backward()
            stats = monitor.step()
            assert stats is not None
            fraction = stats.coverage.fraction
            return fraction, None if fraction > 0 else next(iter(stats.coverage.missing.values()))
    except GradStatsError as error:
        return 0.0, str(error)
