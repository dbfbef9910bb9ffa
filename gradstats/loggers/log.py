"""`Log`: reads a monitor every so many optimizer steps and gives what it finds to sinks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from gradstats.advice import require_one_unit
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale, require
from gradstats.loggers.about import About
from gradstats.stats import GradStats
from gradstats.step_time import StepTime

__all__ = ["Log", "Row", "Sink"]

FADING = 0.98  # of a step's share of tr Σ with each later one

Row = dict[str, float]
Sink = Callable[[Row, int], object]  # called sink(row, step)


class Log:
    """What a monitor knows, as rows of plain numbers, to any number of sinks.

    ```python
    log = gradstats.Log(monitor, gradstats.loggers.JsonLines("run.jsonl"), every=10)
    for x, y in loader:
        loss = loss_fn(model(x), y)
        loss.backward()
        stats = monitor.step()
        optimizer.step()
        optimizer.zero_grad()
        log.step(stats, loss=loss)
    ```
    Args:
        monitor: of `gradstats.attach`.
        sinks: functions sink(row, step): `JsonLines`, `CsvFile`, those of `gradstats.integrations`, or
            yours. One that raises an Exception loses that row and is warned of, once by its name: what is
            noted of a training does not end it. Where it has a method ``about``, that is called with what
            the rows do not hold (`gradstats.loggers.About`) and the step, whenever that changes.
        every: optimizer steps between rows. Making a row waits for the device; other steps do not.
        layers: also each layer's share of tr Σ (`layer_share/<parameter>`), where the monitor keeps them.

    A row holds `step` (optimizer steps, from 1), `samples` seen, `seconds` since the first step,
    `batch_size` (the largest of the row's steps), `loss` and whatever else `step` was given (means over the
    steps since the row before), `noise_scale`, `noise_scale_low`, `noise_scale_high`, `tr_sigma`,
    `true_grad_sq_norm`, `num_samples` and `num_steps` behind them, `num_skipped`, `coverage`,
    `noise_scale_unbiased` where it is known, and `learning_rate` where the optimizer is. Numbers may be
    infinite or NaN.
    """

    def __init__(self, monitor: Any, *sinks: Sink, every: int = 10, layers: bool = True) -> None:
        if every < 1:
            raise InvalidArgumentError(f"every={every} must be at least 1")
        self.monitor, self.sinks, self.every, self.layers = monitor, list(sinks), every, layers
        self.steps = self._written = 0
        self._samples: int | Tensor = 0
        self._batch: int | Tensor = 0
        self._batches: list[int | Tensor] = []  # of the steps since the row before
        self._began: float | None = None
        self._earlier = 0.0  # seconds of the run that this one goes on from
        self._sums: dict[str, list[float | Tensor]] = {}
        self._shares: Tensor | None = None
        self._names: tuple[str, ...] = ()
        self._timing: StepTime | None = None
        self._tokens: float | None = None  # of a sample that was timed
        self._said: About | None = None
        self._failed: set[int] = set()  # sinks, by their place

    def timed(self, timing: StepTime, *, tokens_per_sample: float | None = None) -> None:
        """Note what `gradstats.measure_step` found, so that advice from the log weighs time.

        At any time until `close`, before the training or after it. `tokens_per_sample`: where the monitor
        counts tokens. Raises InvalidArgumentError where that is missing, or out of place, and for times of
        another number of processes than train here.
        """
        require_one_unit(self.monitor.sample, timing, tokens_per_sample)
        ranks = self.monitor.world_size
        remedy = f"pass what measure_step finds on the {ranks:,} that train here"
        require(timing.world_size == ranks, "timing.world_size", timing.world_size, remedy)
        self._timing, self._tokens = timing, tokens_per_sample
        self._say(self.monitor.noise_scale())

    def step(self, stats: GradStats | None = None, **more: float | Tensor) -> Row | None:
        """Count an optimizer step; returns the row where one was made.

        `stats`: what `monitor.step()` returned. `more`: numbers of this step, `loss` among them.
        """
        if self._began is None:
            self._began = time.perf_counter()
        self.steps += 1
        if stats is not None:
            self._samples = self._samples + stats.samples
            self._batch = stats.samples
            self._batches.append(stats.samples)
            self._add_layers(stats)
        else:  # a step that `every` of the monitor leaves out
            self._samples = self._samples + self._batch
        for name, value in more.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self._sums.setdefault(name, []).append(value)
        if self.steps % self.every and self.steps != 1:
            return None
        return self.flush()

    def flush(self) -> Row | None:
        """Make the row of the steps since the last one now; None where there are none."""
        if self.steps == self._written:
            return None
        self._written = self.steps
        noise = self.monitor.noise_scale()
        self._say(noise)
        row = self._row(noise)
        self._tell(lambda sink: sink(row, self.steps))
        return row

    def close(self) -> None:
        """Make the row of the last steps, where one is due, and close the sinks that can be closed."""
        self.flush()
        self._tell(lambda sink: getattr(sink, "close", lambda: None)())

    def _say(self, noise: NoiseScale) -> None:
        """What the rows do not hold, where it is not what was said before."""
        optimizer = self.monitor.optimizer
        about = About(
            optimizer=None if optimizer is None else type(optimizer).__name__,
            confidence=noise.confidence,
            method=noise.method,
            calibration=noise.calibration,
            calibration_usable=noise.calibration_usable,
            note=noise.note,
            sample=self.monitor.sample,
            world_size=self.monitor.world_size,
            tokens_per_sample=self._tokens,
            timing=self._timing,
        )
        if about != self._said:
            self._said = about
            self._tell(lambda sink: getattr(sink, "about", lambda *_: None)(about, self.steps))

    def _tell(self, call: Callable[[Any], object]) -> None:
        """Call each sink. The training is worth more than what is noted of it."""
        for place, sink in enumerate(self.sinks):
            try:
                call(sink)
            except Exception as error:
                if place in self._failed:
                    continue
                self._failed.add(place)
                warnings.warn(
                    f"the sink {_name(sink, place)} failed at step {self.steps} "
                    f"({type(error).__name__}: {error}), and its row is lost. The training goes on; later "
                    "rows are offered to it without another warning",
                    stacklevel=4,
                )

    def state_dict(self) -> dict[str, Any]:
        """Where the rows stand, for a run that is resumed."""
        return {"steps": self.steps, "samples": int(self._samples), "seconds": self._seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = self._written = state["steps"]
        self._samples = state["samples"]
        self._earlier, self._began = state["seconds"], None

    def _seconds(self) -> float:
        running = 0.0 if self._began is None else time.perf_counter() - self._began
        return self._earlier + running

    def _row(self, noise: NoiseScale) -> Row:
        row: Row = {
            "step": self.steps,
            "samples": int(self._samples),
            "seconds": self._seconds(),
            "batch_size": max((int(b) for b in self._batches), default=int(self._batch)),
            "noise_scale": noise.value,
            "noise_scale_low": noise.low,
            "noise_scale_high": noise.high,
            "tr_sigma": noise.tr_sigma,
            "true_grad_sq_norm": noise.true_grad_sq_norm,
            "num_samples": noise.num_samples,
            "num_steps": noise.num_steps,
            "num_skipped": noise.num_skipped,
            "coverage": noise.coverage,
        }
        if noise.unbiased is not None:
            row["noise_scale_unbiased"] = noise.unbiased
        if self.monitor.optimizer is not None:
            row["learning_rate"] = float(self.monitor.optimizer.param_groups[0]["lr"])
        for name, values in self._sums.items():
            row[name] = sum(float(v) for v in values) / len(values)
        self._sums.clear()
        # A row of several steps never stands for an epoch's short last one alone.
        self._batches = self._batches[-1:] if self.every > 1 else []
        if self._shares is not None:
            shares = self._shares.clamp_min(0)
            of_all = (shares / shares.sum()).tolist()
            row |= {f"layer_share/{name}": s for name, s in zip(self._names, of_all, strict=True)}
        return row

    def _add_layers(self, stats: GradStats) -> None:
        """Sums of tr Σ per parameter in which earlier steps count less; nothing waits for the device."""
        if not self.layers or stats.layer_tr_sigma is None:
            return
        now = stats.layer_tr_sigma.nan_to_num(0.0, 0.0, 0.0)
        self._names = stats.coverage.names
        self._shares = now if self._shares is None else self._shares * FADING + now


def _name(sink: Sink, place: int) -> str:
    """What a sink is called in the code; one without a name of its own by its place."""
    name = str(getattr(sink, "__qualname__", type(sink).__qualname__))
    nameless = name.endswith("<lambda>") or isinstance(sink, partial)
    return f"log.sinks[{place}]" if nameless else name
