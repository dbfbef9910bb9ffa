"""The demo's training loop: it measures as it trains, and times the batch sizes to choose from."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch import Tensor

import gradstats
from gradstats.demo.tasks import Task, loss_of
from gradstats.estimators import NoiseScale

READ_EVERY = 10  # steps between readings of the noise scale, each of which waits for the device
HALF_LIFE = 50.0  # steps; short, since the noise scale grows quickly early in training
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
    """A training run and what was measured of it, whole or cut short."""

    task: Task
    batch_size: int
    monitor: gradstats.Monitor
    rows: list[dict[str, Any]] = field(default_factory=list)  # the lines of steps.jsonl
    seconds: float = 0.0
    layer_tr_sigma: dict[str, float] = field(default_factory=dict)
    step_seconds: dict[int, float] = field(default_factory=dict)
    interrupted: bool = False

    def recommend(self) -> gradstats.BatchSizeAdvice | None:
        """None where not one step was measured."""
        if not self.rows:
            return None
        timed = self.step_seconds if len(self.step_seconds) > 1 else None
        return self.monitor.recommend(batch_size=self.batch_size, step_seconds=timed)

    def shares(self) -> dict[str, float]:
        """Each layer's share of tr Σ, the largest first; empty where it is not known."""
        total = sum(self.layer_tr_sigma.values())
        if not (math.isfinite(total) and total > 0):
            return {}
        ordered = sorted(self.layer_tr_sigma.items(), key=lambda item: -item[1])
        return {name: value / total for name, value in ordered}

    def summary(self) -> dict[str, Any]:
        """The run as JSON can hold it: the contents of summary.json."""
        noise, advice = self.monitor.noise_scale(), self.recommend()
        return {
            "task": self.task.name,
            "sample": self.task.unit,
            "interrupted": self.interrupted,
            "steps": len(self.rows),
            "batch_size": self.batch_size,
            "samples": len(self.rows) * self.batch_size,
            "seconds": self.seconds,
            "first_loss": _mean_loss(self.rows[:READ_EVERY]),
            "last_loss": _mean_loss(self.rows[-READ_EVERY:]),
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
    lines: TextIO,
    report: Callable[[Progress], None],
) -> Run:
    """Train for `steps`, writing one line of JSON per step as it goes, then time batch sizes.

    Ctrl-C ends it early, at any point; the run then holds what was measured until then.
    """
    monitor = gradstats.attach(task.model, optimizer=task.optimizer, half_life=HALF_LIFE)
    run = Run(task, batch_size, monitor)
    unread: list[tuple[Tensor, gradstats.GradStats]] = []  # on the device until they are read
    start = time.perf_counter()
    try:
        for step in range(1, steps + 1):
            loss = loss_of(task.model, task.draw(batch_size, generator))
            loss.backward()  # type: ignore[no-untyped-call]
            stats = monitor.step()
            assert stats is not None  # it measures every step
            task.optimizer.step()
            task.optimizer.zero_grad()
            unread.append((loss.detach(), stats))
            if step % READ_EVERY == 0 or step in (1, steps):
                noise = _read(run, unread, lines)
                run.seconds = time.perf_counter() - start
                rate = step / run.seconds
                loss_now = run.rows[-1]["loss"] or math.nan
                left = (steps - step) / rate
                report(Progress(step, loss_now, noise, rate * batch_size, left))
        monitor.detach()
        time_steps(task, batch_size, run.step_seconds)
    except KeyboardInterrupt:
        run.interrupted = True
        if unread:
            _read(run, unread, lines)
            run.seconds = time.perf_counter() - start
    finally:
        monitor.detach()
    return run


def _read(run: Run, unread: list[tuple[Tensor, gradstats.GradStats]], lines: TextIO) -> NoiseScale:
    """Bring steps over from the device, and the noise scale with the last of them."""
    noise = run.monitor.noise_scale()
    numbers = torch.stack([torch.stack((x, s.tr_sigma, s.true_grad_sq_norm)) for x, s in unread])
    reading = {"noise_scale": noise.value, "low": noise.low, "high": noise.high}
    for i, (loss, tr_sigma, true_grad_sq_norm) in enumerate(numbers.tolist(), 1):
        row = {
            "step": len(run.rows) + 1,
            "samples": (len(run.rows) + 1) * run.batch_size,
            "loss": loss,
            "num_samples": run.batch_size,
            "tr_sigma": tr_sigma,
            "true_grad_sq_norm": true_grad_sq_norm,
            **(reading if i == len(unread) else dict.fromkeys(reading)),
        }
        run.rows.append({k: v if v is None or math.isfinite(v) else None for k, v in row.items()})
        lines.write(json.dumps(run.rows[-1]) + "\n")
    lines.flush()
    _add_layers(run.layer_tr_sigma, unread[-1][1])
    unread.clear()
    return noise


def _add_layers(totals: dict[str, float], stats: gradstats.GradStats) -> None:
    """Add a step's tr Σ per module to a sum in which earlier readings count less and less."""
    for name in totals:
        totals[name] *= 0.9
    names = list(stats.layers)
    values = torch.stack([stats.layers[name].tr_sigma for name in names]).tolist()
    for name, value in zip(names, values, strict=True):
        module = name.rpartition(".")[0]
        totals[module] = totals.get(module, 0.0) + value


def time_steps(task: Task, batch_size: int, seconds: dict[int, float]) -> None:
    """Fill in the median seconds of a plain step at sizes from a quarter to four times the present.

    The steps are real ones, and everything is as before when they are done.
    """
    generator = torch.Generator().manual_seed(0)

    def step(size: int, _: int) -> None:
        loss_of(task.model, task.draw(size, generator)).backward()  # type: ignore[no-untyped-call]
        task.optimizer.step()
        task.optimizer.zero_grad()

    timing = gradstats.measure_step(
        step,
        [batch_size * n // 4 for n in (1, 2, 4, 8, 16) if batch_size * n >= 4],
        restore=(task.model, task.optimizer),
        accumulation_steps=(1,),
        warmup=1,
        rounds=TIMED_STEPS,
        memory=False,
    )
    seconds.update({point.micro_batch_size: point.seconds for point in timing.points})


def _mean_loss(rows: list[dict[str, Any]]) -> float | None:
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    return statistics.fmean(losses) if losses else None
