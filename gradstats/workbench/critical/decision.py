"""From the losses of branches to a critical batch size with its interval. Numbers only.

Merrill et al. 2025, arXiv:2505.23971: the critical batch size is the largest one whose loss, after as
many samples, is within a tolerance of that of the batch trained with so far.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradstats.calibration import Calibration
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import WIDEST_USEFUL, NoiseScale, critical_value, readable

__all__ = ["Branch", "Critical", "Run", "Tolerance", "decide", "smoothed"]

LARGE = 0.25  # a tolerance above this share of what the loss fell tells little


@dataclass(frozen=True)
class Tolerance:
    """How much higher a branch's loss may be: `value` in the loss's units, or a share of its fall.

    The fall is what the unbranched run's smoothed loss fell by over the window.
    """

    value: float
    relative: bool = False

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """From "0.01", or "5%" of the fall. Raises InvalidArgumentError for anything else."""
        number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
        try:
            value = float(number) / (100 if percent else 1)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise InvalidArgumentError(
                f"tolerance {text!r} cannot be used; pass a loss above 0 such as 0.01, or a share of what "
                "the loss falls by, such as 5%"
            )
        return cls(value, percent)

    def of(self, fall: float) -> float:
        """In the loss's units."""
        return self.value * max(fall, 0.0) if self.relative else self.value


@dataclass(frozen=True)
class Run:
    """One branch with one order of the data: (samples since the checkpoint, evaluated loss) in order.

    `ok` is False where the loss was no longer finite; the curve ends there.
    """

    multiplier: int
    seed: int
    curve: tuple[tuple[int, float], ...]
    ok: bool = True

    def final(self, weight: float) -> float:
        return smoothed([loss for _, loss in self.curve], weight)[-1] if self.ok else math.inf

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "curve": _points(self.curve)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Run:
        curve = tuple((point["samples"], point["loss"]) for point in state["curve"])
        return cls(state["multiplier"], state["seed"], curve, state["ok"])


@dataclass(frozen=True)
class Branch:
    """A multiplier's runs together: mean curve, and how its loss differs from the unbranched one's.

    `difference` is the mean over seeds of the smoothed final losses' differences, seed by seed; `low` and
    `high` its interval (infinite with one seed). All three are infinite where a run diverged. `ok` is
    whether the difference is within the tolerance.
    """

    multiplier: int
    batch_size: int
    learning_rate: float
    curve: tuple[tuple[int, float], ...]
    final: float
    difference: float
    low: float
    high: float
    ok: bool

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "curve": _points(self.curve)}


@dataclass(frozen=True)
class Critical:
    """What the branches say. Sizes are in samples per optimizer step.

    `critical_batch_size`: where the mean difference first exceeds the tolerance, interpolated between the
    tested sizes; where none exceeds it, the largest tested size, and `reached` is False. `low` and `high`
    are the same for the ends of the differences' intervals, so they hold the size with `confidence`
    (as far as the differences grow with the batch); `high` is None where no size is surely outside.
    `largest_within`: the largest tested size up to which all are within. `calibration`: the critical size
    over the noise scale at the same checkpoint, None where that is not known, or the loss did not fall.
    """

    batch_size: int
    branches: tuple[Branch, ...]
    critical_batch_size: float
    low: float
    high: float | None
    confidence: float
    reached: bool
    largest_within: int
    tolerance: float
    fall: float
    smoothing: float
    seeds: int
    noise_scale: NoiseScale | None
    calibration: Calibration | None
    remarks: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether the factor is known well enough to choose batch sizes by."""
        factor = self.calibration
        return factor is not None and factor.high <= WIDEST_USEFUL * factor.low

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers, lists and dictionaries."""
        noise, factor = self.noise_scale, self.calibration
        return {
            **{k: v for k, v in vars(self).items() if k not in ("noise_scale", "calibration")},
            "branches": [branch.to_dict() for branch in self.branches],
            "noise_scale": None if noise is None else noise.to_dict(),
            "calibration": None if factor is None else factor.to_dict(),
            "remarks": list(self.remarks),
        }

    def __str__(self) -> str:
        end = "with no upper end" if self.high is None else f"to {readable(self.high)}"
        size = readable(self.critical_batch_size)
        text = (
            f"critical batch size {size} samples"
            if self.reached
            else f"critical batch size at least {size} samples, the largest tested"
        )
        moved = f"{'fell' if self.fall >= 0 else 'rose'} by {readable(abs(self.fall))}"
        text += (
            f" ({readable(self.low)} {end}): up to it the loss stays within {readable(self.tolerance)} of "
            f"that at {self.batch_size:,}, which {moved} meanwhile"
        )
        if self.noise_scale is not None and self.calibration is not None:
            factor = self.calibration
            least = "" if self.reached else "at least "
            text += (
                f"; the noise scale there is {readable(self.noise_scale.value)}, so the factor between "
                f"them is {least}{readable(factor.value)} ({readable(factor.low)} to "
                f"{readable(factor.high)})"
            )
        return text + "."


def smoothed(losses: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average; `weight` is that of the newest loss, from 0 (excluded) to 1."""
    found = [losses[0]]
    for loss in losses[1:]:
        found.append(found[-1] + weight * (loss - found[-1]))
    return found


def decide(
    runs: Sequence[Run],
    *,
    batch_size: int,
    learning_rates: Mapping[int, float],
    tolerance: Tolerance,
    smoothing: float = 0.5,
    confidence: float = 0.9,
    noise: NoiseScale | None = None,
) -> Critical:
    """The critical batch size from runs of several multipliers, 1 among them, each with the same seeds.

    The runs of a seed see the same samples in the same order and are evaluated on the same ones after as
    many samples, so what chance does to both is gone from their difference. The intervals are Student's
    over the seeds.

    Raises InvalidArgumentError where the unbranched run is missing or diverged.
    """
    base = {run.seed: run for run in runs if run.multiplier == 1}
    if not base or not all(run.ok for run in base.values()):
        seen = "is missing" if not base else "diverged"
        raise InvalidArgumentError(
            f"the unbranched run {seen}, so there is nothing to compare with; lower the learning rate, or "
            "start from another checkpoint"
        )
    start = statistics.fmean(run.curve[0][1] for run in base.values())
    fall = start - statistics.fmean(run.final(smoothing) for run in base.values())
    allowed = tolerance.of(fall)
    branches = []
    for multiplier in sorted({run.multiplier for run in runs}):
        own = [run for run in runs if run.multiplier == multiplier and run.seed in base]
        pairs = [run.final(smoothing) - base[run.seed].final(smoothing) for run in own]
        mean, low, high = _interval(pairs, confidence) if multiplier > 1 else (0.0, 0.0, 0.0)
        branches.append(
            Branch(
                multiplier,
                multiplier * batch_size,
                learning_rates[multiplier],
                _mean_curve(own),
                statistics.fmean(run.final(smoothing) for run in own),
                mean,
                low,
                high,
                mean <= allowed,
            )
        )
    sizes = [float(branch.batch_size) for branch in branches]
    size = _crossing(sizes, [branch.difference for branch in branches], allowed)
    low_end = _crossing(sizes, [branch.high for branch in branches], allowed) or sizes[-1]
    high_end = _crossing(sizes, [branch.low for branch in branches], allowed)
    outside = next((i for i, branch in enumerate(branches) if not branch.ok), len(branches))
    value = sizes[-1] if size is None else size
    return Critical(
        batch_size=batch_size,
        branches=tuple(branches),
        critical_batch_size=value,
        low=min(low_end, value),
        high=high_end,
        confidence=confidence,
        reached=size is not None,
        largest_within=branches[max(outside - 1, 0)].batch_size,
        tolerance=allowed,
        fall=fall,
        smoothing=smoothing,
        seeds=len(base),
        noise_scale=noise,
        calibration=_calibration(value, low_end, high_end, noise) if fall > 0 else None,
        remarks=tuple(_remarks(branches, size is not None, len(base), fall, allowed, runs)),
    )


def _interval(values: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Mean and the ends of Student's interval; infinite ends for one value."""
    if not all(math.isfinite(value) for value in values):
        return math.inf, math.inf, math.inf
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = critical_value(len(values) - 1, confidence) * error
    return mean, mean - reach, mean + reach


def _crossing(sizes: Sequence[float], values: Sequence[float], limit: float) -> float | None:
    """The size at which the values, which begin at 0, first exceed the limit; None where they do not.

    Between two sizes on a straight line over their logarithms; the smaller one where the next is infinite.
    """
    for i, value in enumerate(values):
        if value <= limit:
            continue
        if i == 0:
            return sizes[0]
        before = values[i - 1]
        part = 0.0
        if math.isfinite(before) and math.isfinite(value):
            part = (limit - before) / (value - before)
        return float(sizes[i - 1] * (sizes[i] / sizes[i - 1]) ** part)
    return None


def _calibration(
    value: float, low: float, high: float | None, noise: NoiseScale | None
) -> Calibration | None:
    """Critical size over noise scale; both intervals widen it, as independent errors do."""
    if noise is None or not 0 < noise.value < math.inf:
        return None

    def reach(*ratios: float) -> float:
        return math.exp(math.hypot(*(math.log(ratio) for ratio in ratios)))

    factor = value / noise.value
    below = reach(value / low, noise.high / noise.value) if noise.high < math.inf else math.inf
    above = math.inf
    if high is not None and noise.low > 0:
        above = reach(max(high / value, 1.0), noise.value / noise.low)
    return Calibration(factor, factor / below, factor * above)


def _remarks(
    branches: Sequence[Branch],
    reached: bool,
    seeds: int,
    fall: float,
    allowed: float,
    runs: Sequence[Run],
) -> list[str]:
    said = []
    if fall <= 0:
        said.append(
            "the unbranched run's loss did not fall, so no batch can be told to be too large; train for more "
            "samples, from an earlier checkpoint, or at a lower learning rate"
        )
    elif allowed > LARGE * fall:
        said.append(
            f"the tolerance {readable(allowed)} is {allowed / fall:.0%} of what the loss fell by "
            f"({readable(fall)}), which says little; pass a smaller one, such as 5%, or more samples"
        )
    if seeds == 1:
        said.append("one seed gives no interval; run three or more")
    if not reached and len(branches) > 1:
        said.append(
            "no tested size was outside the tolerance: larger multipliers would find the end"
        )
    elif len(branches) > 1 and not branches[1].ok:
        said.append(
            f"{branches[1].batch_size:,}, the first size tested, is outside already: the critical batch is "
            f"near {branches[0].batch_size:,} or below it; branch from a run of smaller batches"
        )
    lost = sorted({run.multiplier for run in runs if not run.ok})
    if lost:
        said.append(f"diverged: {', '.join(f'×{m}' for m in lost)}")
    return said


def _mean_curve(runs: Sequence[Run]) -> tuple[tuple[int, float], ...]:
    """The mean over seeds where all runs have a loss."""
    shortest = min(len(run.curve) for run in runs)
    return tuple(
        (runs[0].curve[i][0], statistics.fmean(run.curve[i][1] for run in runs))
        for i in range(shortest)
    )


def _points(curve: Sequence[tuple[int, float]]) -> list[dict[str, float]]:
    return [{"samples": samples, "loss": loss} for samples, loss in curve]
