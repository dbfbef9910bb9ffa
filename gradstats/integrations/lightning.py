"""A callback for Lightning (`lightning` or `pytorch_lightning`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.integrations.extra import library
from gradstats.integrations.metrics import PREFIX, metrics
from gradstats.integrations.run import Run, Settings
from gradstats.integrations.schedule import Accumulation, Schedule, micro_batch_size
from gradstats.loggers import Row, Sink
from gradstats.monitor import Monitor

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    Callback = library("pytorch_lightning", "lightning").Callback

__all__ = ["GradStatsCallback"]


class GradStatsCallback(Callback):  # type: ignore[misc]
    """Measures while a `Trainer` fits; rows go to its loggers, and into its checkpoints what they need.

    ```python
    callback = GradStatsCallback()
    Trainer(callbacks=[callback], accumulate_grad_batches=2, gradient_clip_val=1.0).fit(module)
    print(callback.monitor.recommend())
    ```
    It steps the monitor after the backward that completes an optimizer step: before the gradients are
    unscaled (16-bit mixed precision) or clipped, with any `accumulate_grad_batches`. A resumed run goes on
    with the same estimate. Only automatic optimization: a loop of your own calls `monitor.step()` itself.

    Args:
        log_every: optimizer steps between rows (default: the trainer's `log_every_n_steps`).
        layers: also each layer's share of tr Σ.
        prefix: of the names among the loggers' metrics. Infinite numbers and NaN are left out there.
        sinks: more functions sink(row, step), as of `gradstats.loggers`, called on the first process; they
            are not closed.
        schedule: sets the trainer's `accumulate_grad_batches` by a policy.
        options: of `gradstats.attach`.
    """

    def __init__(
        self,
        *,
        log_every: int | None = None,
        layers: bool = False,
        prefix: str = PREFIX,
        sinks: Sequence[Sink] = (),
        schedule: Schedule | None = None,
        **options: Any,
    ) -> None:
        self._settings = Settings(log_every, layers, prefix, sinks, schedule, options)
        self._run: Run | None = None
        self._kept: dict[str, Any] | None = None
        self._open = 0  # backwards since the last step
        self._losses: list[Tensor] = []  # of those
        self._measured = False  # this step
        self._last = self._closes = False  # whether this batch ends the epoch; ends a step

    @property
    def run(self) -> Run:
        """Monitor, log and schedule of the training. Raises GradStatsError before there is one."""
        if self._run is None:
            raise GradStatsError("nothing was measured yet: the callback attaches in Trainer.fit()")
        return self._run

    @property
    def monitor(self) -> Monitor:
        """The monitor, also when the training is over."""
        return self.run.monitor

    # ---- the loop --------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        _require_automatic(trainer, pl_module)
        self._run = Run(
            trainer.strategy.model,
            trainer.optimizers[0],
            self._settings,
            grad_scaler=getattr(trainer.precision_plugin, "scaler", None),
            log_every=trainer.log_every_n_steps or 10,
            first=trainer.is_global_zero,
            tracker=lambda row, _: self._track(trainer, row),
            accumulation=lambda schedule: _accumulation(trainer, schedule),
        )
        if self._kept is not None:
            self._run.load_state_dict(self._kept)
        self._begin_step()

    def _begin_step(self) -> None:
        self._open, self._losses, self._measured = 0, [], False

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        follower = self.run.follower
        if follower is not None and not self._open:
            follower.settle(batch_idx)
        number = batch_idx + 1
        self._last = trainer.is_last_batch or number == trainer.num_training_batches
        self._closes = self._last or number % trainer.accumulate_grad_batches == 0

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._open += 1
        if self._closes:
            self._measure()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._open and not self._measured:  # the step's last training_step returned None
            self._measure()

    def _measure(self) -> None:
        self.run.measure()
        self._measured = True

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):  # divided by accumulate_grad_batches
            self._losses.append(loss.detach() * trainer.accumulate_grad_batches)
        if not self._measured:
            return
        numbers = {"loss": torch.stack(self._losses).mean()} if self._losses else {}
        self.run.row(**numbers)
        extra = self.run.follow(self._open, 0 if self._last else batch_idx + 1)
        self._begin_step()
        for config in trainer.lr_scheduler_configs if extra else ():
            if config.interval == "step" and not config.reduce_on_plateau:
                for _ in range(extra):
                    pl_module.lr_scheduler_step(config.scheduler, None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.run.log.flush()
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._run is not None:
            self._kept = self._run.state_dict()
            self._run.close()

    def _track(self, trainer: Any, row: Row) -> None:
        named = metrics(row, self._settings.prefix, finite=True)
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in named.items()})
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return (self._kept or {}) if self._run is None else self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = state_dict or None


def _require_automatic(trainer: Any, pl_module: Any) -> None:
    if not pl_module.automatic_optimization:
        raise InvalidArgumentError(
            f"{type(pl_module).__name__} has automatic_optimization=False, so where its steps end is not "
            "known. Leave the callback out, and call monitor.step() of gradstats.attach(...) before "
            "clipping and optimizer.step()."
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise InvalidArgumentError(
            f"{type(trainer.strategy).__name__} accumulates gradients by itself, where they cannot be "
            'seen. Use strategy="ddp" or FSDP2.'
        )


def _accumulation(trainer: Any, schedule: Schedule) -> Accumulation:
    loader = trainer.train_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    found = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)

    def set_steps(number: int) -> None:
        trainer.accumulate_grad_batches = number

    size = micro_batch_size(schedule, found, "the trainer's train_dataloader")
    return Accumulation(trainer.accumulate_grad_batches, size, trainer.world_size, set_steps)
