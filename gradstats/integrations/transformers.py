"""A callback for the Trainer of transformers."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.integrations.extra import library
from gradstats.integrations.metrics import PREFIX, metrics
from gradstats.integrations.run import Run, Settings
from gradstats.integrations.schedule import Accumulation, Schedule
from gradstats.loggers import Row, Sink
from gradstats.monitor import Monitor

library("accelerate", "transformers")  # the Trainer needs it
try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
    from transformers.trainer_utils import has_length
except ImportError:
    library("transformers", "transformers")  # says what installs it
    raise

__all__ = ["GradStatsCallback"]


class GradStatsCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Measures while a `Trainer` trains; rows go to its reporters, and into its checkpoints what they need.

    ```python
    trainer = Trainer(model, args, train_dataset=dataset)
    callback = GradStatsCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    print(callback.monitor.recommend())
    ```
    None of the Trainer's events comes between backward and clipping (`on_pre_optimizer_step` comes after),
    so the callback wraps `trainer.training_step` while it trains, and steps the monitor after the one
    that completes an optimizer step. Gradient accumulation, losses by token count (`num_items_in_batch`),
    bf16 and fp16, and DistributedDataParallel are measured as they are. With `resume_from_checkpoint` the
    estimate goes on, whether or not `restore_callback_states_from_checkpoint` is set.

    A `schedule` sets `args.gradient_accumulation_steps`, never below those the training started with: the
    Trainer fixes the number of steps in an epoch at the start, and would leave data out. It cannot change
    `per_device_train_batch_size`. Where a run is resumed after a change, the Trainer finds its place in the
    data by the number of steps, and repeats some samples; that is warned of.

    Args:
        trainer: the Trainer that it is added to.
        log_every: optimizer steps between rows (default: `args.logging_steps`, else 10).
        layers: also each layer's share of tr Σ.
        prefix: of the names in the reporters. Infinite numbers and NaN are left out there.
        sinks: more functions sink(row, step), as of `gradstats.loggers`, called on the first process; they
            are not closed.
        schedule: sets `args.gradient_accumulation_steps` by a policy.
        options: of `gradstats.attach`.
    """

    _asked: ClassVar[weakref.ref[GradStatsCallback] | None] = None

    def __new__(cls, trainer: Any = None, **_: Any) -> GradStatsCallback:
        # With restore_callback_states_from_checkpoint the Trainer makes callbacks anew from what a file
        # can hold, right after it asked for their states; a model or a sink is not of that kind.
        asked = cls._asked() if cls._asked is not None and trainer is None else None
        return super().__new__(cls) if asked is None else asked

    def __init__(
        self,
        trainer: Any = None,
        *,
        log_every: int | None = None,
        layers: bool = False,
        prefix: str = PREFIX,
        sinks: Sequence[Sink] = (),
        schedule: Schedule | None = None,
        **options: Any,
    ) -> None:
        if trainer is None:
            if not hasattr(self, "_trainer"):
                raise InvalidArgumentError(
                    "GradStatsCallback needs the Trainer that it is added to: "
                    "trainer.add_callback(GradStatsCallback(trainer))"
                )
            return
        self._trainer = trainer
        self._settings = Settings(log_every, layers, prefix, sinks, schedule, options)
        self._run: Run | None = None
        self._loss: float | Tensor = 0.0
        self._backwards = 0
        self._start = 1  # accumulation steps that the training started with
        self._wrapped, self._own_step = False, None

    @property
    def run(self) -> Run:
        """Monitor, log and schedule of the training. Raises GradStatsError before there is one."""
        if self._run is None:
            raise GradStatsError(
                "nothing was measured yet: the callback attaches in Trainer.train()"
            )
        return self._run

    @property
    def monitor(self) -> Monitor:
        """The monitor, also when the training is over."""
        return self.run.monitor

    # ---- the loop --------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave()  # what an interrupted training left
        type(self)._asked = None
        trainer, optimizer = self._trainer, kwargs["optimizer"]
        self._start = args.gradient_accumulation_steps
        self._run = Run(
            trainer.model_wrapped,
            getattr(optimizer, "optimizer", optimizer),  # inside of accelerate's
            self._fitting(state.train_batch_size * args.world_size),
            grad_scaler=trainer.accelerator.scaler,
            log_every=state.logging_steps or 10,
            first=state.is_world_process_zero,
            tracker=self._track,
            accumulation=lambda schedule: _accumulation(args, state, schedule),
        )
        # The Trainer saves the states of the callbacks that this dictionary knows.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, {})
        known = saved.get("attributes", {}).get("kept") if isinstance(saved, dict) else None
        if state.global_step and known is not None:
            self._run.load_state_dict(known)
            self._after_resuming(args, state, kwargs["train_dataloader"])
        self._loss, self._backwards = 0.0, 0
        self._wrap()

    def _wrap(self) -> None:
        trainer = self._trainer
        step, self._own_step = trainer.training_step, trainer.__dict__.get("training_step")

        def training_step(*inputs: Any, **named: Any) -> Tensor:
            loss: Tensor = step(*inputs, **named)
            self._loss = self._loss + loss
            self._backwards += 1
            if trainer.accelerator.sync_gradients:
                self.run.measure()
            return loss

        trainer.training_step = training_step
        self._wrapped = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        in_epoch = _batches_in_epoch(state, kwargs["train_dataloader"], self._start)
        self.run.row(loss=self._loss)
        extra = self.run.follow(self._backwards, round(state.epoch % 1 * in_epoch))
        self._loss, self._backwards = 0.0, 0
        schedule = kwargs["lr_scheduler"]
        if not isinstance(schedule, ReduceLROnPlateau):
            for _ in range(extra):
                schedule.step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop or state.epoch >= state.num_train_epochs:
            self.run.log.flush()  # now, for reporters close before on_train_end is called here

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        type(self)._asked = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave()
        args.gradient_accumulation_steps = self._start

    def _leave(self) -> None:
        if self._wrapped:
            self._wrapped = False
            del self._trainer.training_step
            if self._own_step is not None:
                self._trainer.training_step = self._own_step
            self.run.close()

    def _track(self, row: Row, _: int) -> None:
        trainer = self._trainer
        due = trainer.control.should_log  # of the Trainer's own numbers; log() takes it for done
        try:
            trainer.log(metrics(row, self._settings.prefix, finite=True))
        finally:  # where a reporter fails, too
            trainer.control.should_log = due

    def _fitting(self, unit: int) -> Settings:
        """The settings with a schedule that the Trainer can follow."""
        schedule, least = self._settings.schedule, self._start * unit
        if schedule is None:
            return self._settings
        if schedule.min_batch_size is not None and schedule.min_batch_size < least:
            raise InvalidArgumentError(
                f"min_batch_size={schedule.min_batch_size} is below the {least} samples that the training "
                "starts with. The Trainer fixes the number of steps in an epoch at the start, and smaller "
                "ones would leave data out; start with the smallest size."
            )
        bounded = replace(schedule, min_batch_size=schedule.min_batch_size or least)
        return replace(self._settings, schedule=bounded)

    def _after_resuming(self, args: Any, state: Any, loader: Any) -> None:
        follower = self.run.follower
        if follower is None:
            return
        in_epoch = _batches_in_epoch(state, loader, self._start)
        skipped = state.global_step % max(1, -(-in_epoch // self._start)) * self._start
        follower.settle(0 if args.ignore_data_skip else skipped)
        seen, held = follower.accumulation.samples, follower.accumulation
        assumed = state.global_step * self._start * held.micro_batch_size * held.world_size
        if assumed < seen:
            warnings.warn(
                f"the batch size changed before step {state.global_step}, from which this training goes "
                f"on: {seen:,} samples were seen, and the Trainer, which finds its place in the data by "
                f"the number of steps, goes on after {assumed:,}. Those between are seen again.",
                stacklevel=2,
            )

    # ---- checkpoints -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        type(self)._asked = weakref.ref(self)
        kept = None if self._run is None else self._run.state_dict()
        return {"args": {}, "attributes": {"kept": kept}}


def _batches_in_epoch(state: Any, loader: Any, steps: int) -> int:
    """As the Trainer counts them; `steps`: accumulation steps at the start."""
    return len(loader) if has_length(loader) else state.max_steps * steps


def _accumulation(args: Any, state: Any, schedule: Schedule) -> Accumulation:
    def set_steps(number: int) -> None:
        args.gradient_accumulation_steps = number

    size = schedule.micro_batch_size or state.train_batch_size
    return Accumulation(args.gradient_accumulation_steps, size, args.world_size, set_steps)
