"""A monitor in a training loop of Accelerate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradstats.integrations.extra import library
from gradstats.integrations.metrics import PREFIX, metrics
from gradstats.integrations.run import Run, Settings
from gradstats.integrations.schedule import Accumulation, Schedule, micro_batch_size
from gradstats.loggers import Sink
from gradstats.monitor import Monitor
from gradstats.stats import GradStats

library("accelerate", "accelerate")

__all__ = ["Watch"]


class Watch:
    """Measures in a loop of `accelerator.accumulate()`; rows go to the accelerator's trackers.

    ```python
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    watch = Watch(accelerator, model, optimizer)
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = loss_fn(model(x), y)
            accelerator.backward(loss)
            watch.step(loss)  # after backward, before clipping and optimizer.step()
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    ```
    `accelerator.save_state` and `load_state` hold what it needs to go on with the same estimate. Under a
    `schedule`, `extra_steps` says how often the last step calls for a step of the learning-rate schedule
    besides the one that it gets anyway (see `Schedule.by_samples`).

    Args:
        accelerator: of the loop.
        model, optimizer: what `accelerator.prepare` returned.
        log_every: optimizer steps between rows, which `accelerator.log` gets.
        layers: also each layer's share of tr Σ.
        prefix: of the names in the trackers. Infinite numbers and NaN are left out there.
        sinks: more functions sink(row, step), as of `gradstats.loggers`, called on the first process; they
            are not closed.
        schedule: sets `accelerator.gradient_accumulation_steps` by a policy; with `micro_batch_size`.
        options: of `gradstats.attach`.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: Any,
        *,
        log_every: int = 10,
        layers: bool = False,
        prefix: str = PREFIX,
        sinks: Sequence[Sink] = (),
        schedule: Schedule | None = None,
        **options: Any,
    ) -> None:
        self._accelerator = accelerator
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.run = Run(
            model,
            inner,
            Settings(log_every, layers, prefix, sinks, schedule, options),
            grad_scaler=accelerator.scaler,
            log_every=log_every,
            first=accelerator.is_main_process,
            tracker=lambda row, step: accelerator.log(metrics(row, prefix, finite=True), step=step),
            accumulation=lambda schedule: _accumulation(accelerator, schedule),
        )
        self._losses: list[Tensor] = []
        self._backwards = 0  # since the last step
        self._batches = 0  # of the last step
        self.extra_steps = 0
        self._hook = inner.register_step_post_hook(self._after_step)
        accelerator.register_for_checkpointing(self)

    @property
    def monitor(self) -> Monitor:
        """The monitor."""
        return self.run.monitor

    def step(self, loss: Tensor | None = None) -> GradStats | None:
        """After every `accelerator.backward`; the record where that completed an optimizer step.

        `loss`: of the micro-batch, for the rows.
        """
        self._backwards += 1
        if loss is not None:
            self._losses.append(loss.detach())
        if not self._accelerator.sync_gradients:
            return None
        stats = self.run.measure()
        self.run.row(**({"loss": torch.stack(self._losses).mean()} if self._losses else {}))
        self._losses, self._batches, self._backwards = [], self._backwards, 0
        self.extra_steps = 0
        return stats

    def _after_step(self, *_: object) -> None:
        # In the optimizer's step and not before it, so that this step keeps the present learning rate.
        self.extra_steps = self.run.follow(self._batches, self._accelerator.step)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; `accelerator.save_state` asks for them."""
        return self.run.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; called by `accelerator.load_state`."""
        self.run.load_state_dict(state)
        if self.run.follower is not None:
            self.run.follower.settle(self._accelerator.step)

    def close(self) -> None:
        """Give the trackers the last row, and leave model and optimizer as they were.

        Call it before `accelerator.end_training()`. What was measured can still be read.
        """
        self.run.log.flush()
        self._hook.remove()
        self.run.close()


def _accumulation(accelerator: Any, schedule: Schedule) -> Accumulation:
    def set_steps(number: int) -> None:
        accelerator.gradient_accumulation_steps = number

    size = micro_batch_size(schedule, None, "the accelerator")
    steps, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    return Accumulation(steps, size, processes, set_steps)
