"""The parts of a measurement: training with a monitor, plain against measured steps, times of sizes."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gradstats.errors import GradStatsError, InvalidArgumentError, first_line
from gradstats.fallback import FallbackWarning
from gradstats.loggers import Log, Row, Sink
from gradstats.machine import available_bytes
from gradstats.monitor import Monitor
from gradstats.stats import Coverage, GradStats
from gradstats.step_time import StepTime
from gradstats.timing import measure_step
from gradstats.workbench.measure.overhead import Overhead, compare_steps
from gradstats.workbench.measure.result import LayerNoise, Measurement, Settings, Stopped
from gradstats.workbench.workload import Workload

__all__ = ["Progress", "Report", "Run"]

FEWEST_STEPS = 30  # before an interval is believed to be as narrow as asked for
ROUNDS = 5  # turns of each kind of step that is timed


@dataclass(frozen=True)
class Progress:
    """How far a measurement is: `step` of at most `steps` of a `stage`, and the last row of its log.

    The last two stages, comparing plain with measured steps and timing batch sizes, have one step.
    """

    stage: str
    step: int
    steps: int
    row: Row | None = None


Report = Callable[[Progress], object]


class Run:
    """The parts of a measurement, one after the other, and what they found."""

    def __init__(self, workload: Workload, settings: Settings, report: Report) -> None:
        self.workload, self.settings, self.report = workload, settings, report
        self.optimizer = cast(torch.optim.Optimizer, workload.optimizer)
        self.parts = settings.batch_size // settings.micro_batch_size
        self.rows: list[Row] = []
        self.log: Log | None = None
        self.steps = 0
        self.counted = 0  # samples, or tokens, that the monitor saw
        self.seconds = 0.0
        self.stopped: Stopped = "steps"
        self.coverage: Coverage | None = None
        self.fallbacks: dict[str, tuple[int, str]] = {}
        self.overhead: Overhead | None = None
        self.timing: StepTime | None = None
        self.notes: list[str] = []

    @contextmanager
    def monitored(self, monitor: Monitor) -> Iterator[Monitor]:
        """Ctrl-C ends the block and nothing more; the model is detached in the end."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)  # they are in the result
                yield monitor
        except KeyboardInterrupt:
            self.stopped = "interrupted"
        finally:
            monitor.detach()

    def train(
        self, monitor: Monitor, steps: int, precision: float | None, row_every: int,
        sinks: Sequence[Sink],
    ) -> None:  # fmt: skip
        """Take the steps, with a row of the log every so many."""
        self.log = log = Log(monitor, lambda row, _: self.rows.append(row), *sinks, every=row_every)
        batches = self._batches(self.settings.micro_batch_size)
        began = time.perf_counter()
        try:
            for step in range(1, steps + 1):
                try:
                    stats, loss = self._step([next(batches) for _ in range(self.parts)], monitor)
                except GradStatsError:
                    raise
                except Exception as error:  # of the user's own code, most likely
                    raise GradStatsError(self._failed(step, error)) from error
                self.steps = step
                if stats is not None:
                    self.coverage = stats.coverage
                row = log.step(stats, loss=loss)
                if row is not None:
                    self.report(Progress("measuring", step, steps, row))
                    if precision is not None and step >= FEWEST_STEPS and _narrow(row, precision):
                        self.stopped = "precision"
                        break
        finally:
            self.seconds = time.perf_counter() - began
            log.flush()
            self.counted = int(log.state_dict()["samples"])
            self.fallbacks = monitor.fallbacks()
            monitor.detach()

    def compare(self, monitor: Monitor) -> None:
        """Plain against measured steps, of one batch that is there already."""
        parts = [next(self._batches(self.settings.micro_batch_size))] * self.parts
        self.report(Progress("comparing plain and measured steps", 0, 1))
        with monitor:
            self.overhead = compare_steps(lambda: self._step(parts, monitor), self.workload.device)
        self.report(Progress("comparing plain and measured steps", 1, 1))

    def time(self, *, whole_batches: bool) -> None:
        """Steps of several sizes, each with a batch that is there already."""
        size = self.settings.micro_batch_size
        most = (1, 2, 4, 8, 16) if whole_batches else (1, 2, 4)
        sizes = sorted({size * n // 4 for n in most if size * n >= 4})
        if len(sizes) < 2:
            self.notes.append(f"step times need two sizes of micro-batches, and {size} is too few")
            return
        cuda = self.workload.device.type == "cuda"
        batches = {m: next(self._batches(m)) for m in sizes}
        self.report(Progress("timing batch sizes", 0, 1))

        def step(micro_batch_size: int, accumulation_steps: int) -> None:
            self._step([batches[micro_batch_size]] * accumulation_steps, None)

        try:
            self.timing = measure_step(
                step,
                sizes,
                restore=(self.workload.model, self.workload.optimizer),
                rounds=ROUNDS,
                warmup=1,
                memory_bytes=None if cuda else available_bytes(),
            )
            if self.log is not None:
                self.log.timed(self.timing, tokens_per_sample=self._tokens())
        except (
            RuntimeError,
            InvalidArgumentError,
        ) as error:  # one of the sizes did not fit, most likely
            self.notes.append(f"steps at sizes {sizes} could not be timed ({first_line(error)})")
        self.report(Progress("timing batch sizes", 1, 1))

    def _batches(self, size: int) -> Iterator[Any]:
        return self.workload.batches(size, seed=self.settings.seed)

    def _step(
        self, parts: Sequence[Any], monitor: Monitor | None
    ) -> tuple[GradStats | None, Tensor]:
        """One optimizer step over micro-batches of one size; the record, and the mean loss."""
        loss = torch.zeros((), device=self.workload.device)
        for batch in parts:
            own = self.workload.loss(batch) / len(parts)
            own.backward()
            loss = loss + own.detach()
        stats = None if monitor is None else monitor.step()
        if not self.settings.frozen:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.workload.model.zero_grad()
        return stats, loss

    def _failed(self, step: int, error: Exception) -> str:
        size = self.settings.micro_batch_size
        text = (
            f"step {step} of the workload, with {size} samples at once, failed: {first_line(error)}"
        )
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            text += ". It does not fit the memory; pass a smaller micro_batch_size"
        return text

    def _tokens(self) -> float | None:
        """Of a sample, on average; None where tokens are not counted."""
        if self.settings.sample != "token" or not self.steps:
            return None
        return self.counted / (self.steps * self.settings.batch_size)

    def result(self, monitor: Monitor, geometry: Sequence[str]) -> Measurement:
        """What was found so far."""
        tokens, advice = self._tokens(), None
        if self.coverage is not None:
            now = self.settings.batch_size
            advice = monitor.recommend(
                batch_size=now if tokens is None else max(1, round(now * tokens)),
                step_seconds=self.timing,
                tokens_per_sample=tokens,
            )
        return Measurement(
            settings=self.settings,
            noise=monitor.noise_scale(),
            steps=self.steps,
            seconds=self.seconds,
            stopped=self.stopped,
            tokens_per_sample=tokens,
            layers=layers_of(monitor),
            coverage=0.0 if self.coverage is None else self.coverage.fraction,
            missing={} if self.coverage is None else self.coverage.missing,
            fallbacks=self.fallbacks,
            rows=tuple(self.rows),
            geometries={kind: monitor.noise_scale(kind) for kind in geometry if kind != "plain"},
            overhead=self.overhead,
            timing=self.timing,
            advice=advice,
            notes=tuple(self.notes),
        )


def layers_of(monitor: Monitor) -> tuple[LayerNoise, ...]:
    """Each measured parameter's noise scale, the largest share of tr Σ first."""
    found = monitor.layer_noise_scales()
    known = {name: noise for name, noise in found.items() if noise.num_steps}
    total = math.fsum(max(noise.tr_sigma, 0.0) for noise in known.values())
    layers = [
        LayerNoise(name, max(noise.tr_sigma, 0.0) / total if total > 0 else None, noise)
        for name, noise in known.items()
    ]
    return tuple(sorted(layers, key=lambda layer: -(layer.share or 0.0)))


def _narrow(row: Row, precision: float) -> bool:
    """Whether the interval's ends differ by no more than this factor."""
    return 0 < row["noise_scale_high"] <= precision * row["noise_scale_low"]
