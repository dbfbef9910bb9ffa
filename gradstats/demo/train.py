"""The demo's training loop: it measures as it trains, and times the batch sizes to choose from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import gradstats
from gradstats.demo.tasks import Task, loss_of
from gradstats.estimators import NoiseScale

READ_EVERY = 10  # steps between readings of the noise scale, each of which waits for the device
HALF_LIFE = 50.0  # steps; short, since the noise scale grows quickly early in training
SHARE = "layer_share/"  # of a parameter, in a row
TIMED_STEPS = 5  # turns of each batch size, after a step to warm up


@dataclass(frozen=True)
class Progress:
    """What there is to show after some steps."""

    step: int
    loss: float
    noise: NoiseScale
    samples_per_second: float
    seconds_left: float


@dataclass
class Run:
    """A training run and what was measured of it, whole or cut short. `rows`: those of steps.jsonl."""

    task: Task
    batch_size: int
    monitor: gradstats.Monitor
    rows: list[gradstats.loggers.Row] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    timing: gradstats.StepTime | None = None
    interrupted: bool = False

    def recommend(self) -> gradstats.BatchSizeAdvice | None:
        """None where not one step was measured."""
        if not self.rows:
            return None
        return self.monitor.recommend(batch_size=self.batch_size, step_seconds=self.timing)

    @property
    def step_seconds(self) -> dict[int, float]:
        """Median seconds of a plain step by batch size."""
        points = () if self.timing is None else self.timing.points
        return {point.micro_batch_size: point.seconds for point in points}

    def shares(self) -> dict[str, float]:
        """Each module's share of tr Σ, the largest first; empty where it is not known."""
        shares: dict[str, float] = {}
        for key, share in (self.rows[-1] if self.rows else {}).items():
            if key.startswith(SHARE) and math.isfinite(share):
                module = key.removeprefix(SHARE).rpartition(".")[0]
                shares[module] = shares.get(module, 0.0) + share
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def summary(self) -> dict[str, Any]:
        """The run as JSON can hold it: the contents of summary.json."""
        noise, advice = self.monitor.noise_scale(), self.recommend()
        return {
            "task": self.task.name,
            "sample": self.task.unit,
            "interrupted": self.interrupted,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "samples": self.steps * self.batch_size,
            "seconds": self.seconds,
            "first_loss": _loss(self.rows[:1]),
            "last_loss": _loss(self.rows[-1:]),
            "noise_scale": noise.to_dict(),
            "noise_scale_sentence": str(noise),
            "tr_sigma_shares": self.shares(),
            "step_seconds": {str(size): s for size, s in self.step_seconds.items()},
            "recommendation": advice and advice.to_dict(),
            "recommendation_sentence": advice and str(advice),
        }


def train(
    task: Task,
    *,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    lines: gradstats.loggers.Sink,
    report: Callable[[Progress], None],
) -> Run:
    """Train for `steps`, giving `lines` a row every so many as it goes, then time batch sizes.

    Ctrl-C ends it early, at any point; the run then holds what was measured until then.
    """
    monitor = gradstats.attach(task.model, optimizer=task.optimizer, half_life=HALF_LIFE)
    run = Run(task, batch_size, monitor)
    log = gradstats.Log(monitor, lambda row, _: run.rows.append(row), lines, every=READ_EVERY)
    start = time.perf_counter()
    try:
        for step in range(1, steps + 1):
            loss = loss_of(task.model, task.draw(batch_size, generator))
            loss.backward()
            stats = monitor.step()
            task.optimizer.step()
            task.optimizer.zero_grad()
            row = log.step(stats, loss=loss)
            run.steps = step
            if step == steps:
                row = log.flush() or row
            if row is not None:
                run.seconds = time.perf_counter() - start
                rate = step / run.seconds
                left = (steps - step) / rate
                report(Progress(step, row["loss"], monitor.noise_scale(), rate * batch_size, left))
        monitor.detach()
        run.timing = time_steps(task, batch_size)
        log.timed(run.timing)
    except KeyboardInterrupt:
        run.interrupted = True
        if log.flush() is not None:
            run.seconds = time.perf_counter() - start
    finally:
        monitor.detach()
    return run


def time_steps(task: Task, batch_size: int) -> gradstats.StepTime:
    """Time plain steps at sizes from a quarter to four times the present, taking turns.

    The steps are real ones, and everything is as before when they are done.
    """
    generator = torch.Generator().manual_seed(0)

    def step(size: int, _: int) -> None:
        loss_of(task.model, task.draw(size, generator)).backward()
        task.optimizer.step()
        task.optimizer.zero_grad()

    return gradstats.measure_step(
        step,
        [batch_size * n // 4 for n in (1, 2, 4, 8, 16) if batch_size * n >= 4],
        restore=(task.model, task.optimizer),
        accumulation_steps=(1,),
        warmup=1,
        rounds=TIMED_STEPS,
        memory=False,
    )


def _loss(rows: list[gradstats.loggers.Row]) -> float | None:
    """The mean of the steps of a row, where there is one and it is a number."""
    return rows[0]["loss"] if rows and math.isfinite(rows[0]["loss"]) else None
