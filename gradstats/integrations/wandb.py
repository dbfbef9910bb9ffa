"""A sink that logs rows to Weights & Biases."""

from __future__ import annotations

from typing import Any

from gradstats.errors import InvalidArgumentError
from gradstats.integrations.extra import library
from gradstats.integrations.metrics import PREFIX, metrics
from gradstats.loggers import Row

__all__ = ["WandB"]


class WandB:
    """Logs to a run of yours (default: the present one), under `prefix`, infinite numbers and NaN too.

    The numbers are drawn over ``<prefix>step``, optimizer steps, and not over the run's own step: that one
    only goes up, whatever else logs to the run. Works offline (``wandb.init(mode="offline")``).

    Raises InvalidArgumentError where no run was begun.
    """

    def __init__(self, run: Any = None, *, prefix: str = PREFIX) -> None:
        wandb = library("wandb", "wandb")
        self.run = wandb.run if run is None else run
        if self.run is None:
            raise InvalidArgumentError(
                "no run of wandb was begun; call wandb.init() first, or pass run="
            )
        self._prefix = prefix
        self.run.define_metric(f"{prefix}step")
        self.run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")

    def __call__(self, row: Row, step: int) -> None:
        self.run.log({**metrics(row, self._prefix), f"{self._prefix}step": step})
