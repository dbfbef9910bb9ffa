"""From the losses of branches to a critical batch size with its interval. Numbers only.

Merrill et al. 2025, arXiv:2505.23971: the critical batch size is the largest one whose loss, after as
many samples, is within a tolerance of that of the batch trained with so far.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from gradstats.calibration import Calibration
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale, critical_value, readable
from gradstats.workbench.critical.result import Branch, Critical, Run, Tolerance

__all__ = ["decide"]

LARGE = 0.25  # a tolerance above this share of what the loss fell tells little


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
    # Where no larger batch is within, the present one may be beyond the critical size already.
    least = 0.0 if outside == 1 < len(branches) else low_end
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
        calibration=_calibration(value, least, high_end, noise) if fall > 0 else None,
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
    below = above = math.inf
    if low > 0 and noise.high < math.inf:
        below = reach(max(value / low, 1.0), noise.high / noise.value)
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
