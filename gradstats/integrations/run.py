"""What the adapters to trainers have in common: a monitor, its rows and its schedule in a loop of theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradstats.attaching import attach
from gradstats.errors import InvalidArgumentError
from gradstats.integrations.metrics import PREFIX
from gradstats.integrations.schedule import Accumulation, Follower, Schedule
from gradstats.loggers import Log, Sink
from gradstats.stats import GradStats

__all__ = ["Run", "Settings"]


@dataclass
class Settings:
    """What a user says to an adapter.

    Args:
        log_every: optimizer steps between rows (default: as the trainer logs, else 10).
        layers: also each layer's share of tr Σ.
        prefix: of the names under which the trainer's own trackers get the numbers.
        sinks: more functions sink(row, step), called on the first process alone; yours to close.
        schedule: lets the batch size follow a policy.
        options: of `gradstats.attach`.
    """

    log_every: int | None = None
    layers: bool = False
    prefix: str = PREFIX
    sinks: Sequence[Sink] = ()
    schedule: Schedule | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Run:
    """One training: `measure` after the backward that completes a step, then `row` and `follow`.

    Args:
        tracker: what gets each row besides the sinks, on the first process.
        accumulation: makes what a schedule sets; called where there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        *,
        grad_scaler: Any,
        log_every: int,
        first: bool,
        tracker: Sink,
        accumulation: Callable[[Schedule], Accumulation],
    ) -> None:
        scaler = {} if grad_scaler is None else {"grad_scaler": grad_scaler}
        self.monitor = attach(model, optimizer=optimizer, **{**scaler, **settings.options})
        try:
            sinks = (tracker, *settings.sinks) if first else ()
            every = settings.log_every or log_every
            self.log = Log(self.monitor, *sinks, every=every, layers=settings.layers)
            self.follower: Follower | None = None
            if settings.schedule is not None:
                held = accumulation(settings.schedule)
                self.follower = Follower(settings.schedule, held, self.monitor, optimizer)
        except BaseException:
            self.monitor.detach()
            raise
        self.stats: GradStats | None = None

    def measure(self) -> GradStats | None:
        """After the backward that completes a step, before anything else reads the gradients."""
        self.stats = self.monitor.step()
        return self.stats

    def row(self, **numbers: float | Tensor) -> None:
        """Count the step that was measured, and give the trackers a row where one is due.

        `numbers`: its loss. Its learning rate is the scaled one, where a schedule scales it.
        """
        if self.follower is not None and self.follower.scaling is not None:
            numbers["learning_rate"] = self.follower.scaling.learning_rates()[0]
        self.log.step(self.stats, **numbers)
        self.stats = None

    def follow(self, micro_batches: int, batches: int) -> int:
        """After the optimizer's step, the batch size. Arguments and result as of `Follower.step`."""
        return 0 if self.follower is None else self.follower.step(micro_batches, batches)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, with which a resumed training goes on as this one."""
        return {
            "version": 1,
            "monitor": self.monitor.state_dict(),
            "log": self.log.state_dict(),
            "schedule": None if self.follower is None else self.follower.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. Raises InvalidArgumentError where it is of another kind."""
        if state.get("version") != 1:
            raise InvalidArgumentError(
                f"the checkpoint's state of gradstats is of version {state.get('version')!r}, and this "
                "gradstats reads version 1; go on with the version that wrote it"
            )
        self.monitor.load_state_dict(state["monitor"])
        self.log.load_state_dict(state["log"])
        if self.follower is not None and state["schedule"] is not None:
            self.follower.load_state_dict(state["schedule"])

    def close(self) -> None:
        """Leave model and optimizer as they were. What was measured can still be read."""
        self.monitor.detach()
        if self.follower is not None:
            self.follower.close()
