"""The variance of a mean gradient against 1/B, at common weights and seen in two ways.

Of a batch of B samples drawn independently, the mean gradient ḡ scatters with tr Cov(ḡ) = tr Σ/B. Here
it is measured directly, as the scatter of ḡ between independent batches, and beside it as tr Σ/B from
the scatter of the samples' gradients within each batch (the monitor's). The two share no formula: that
they agree, and that the first falls as 1/B, tests both.

Samples are drawn with replacement, so that batches are independent and no finite data set shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gradstats
from gradstats.estimators import critical_value
from gradstats.workbench.workload import Workload

__all__ = ["GradientVariance", "VariancePoint", "gradient_variance", "mean_tr_sigma"]

GROUP = 8  # batches that share a mean
FEWEST, MOST = 12, 1000  # groups
CONFIDENCE = 0.9


@dataclass(frozen=True)
class VariancePoint:
    """At one batch size: `direct`, the scatter of ḡ between `batches` batches, with its 90% interval, and
    `by_monitor`, tr Σ/B from within them (None where the model cannot be measured).
    """

    batch_size: int
    direct: float
    low: float
    high: float
    batches: int
    by_monitor: float | None

    @property
    def ratio(self) -> float | None:
        """The direct one over the monitor's."""
        return self.direct / self.by_monitor if self.by_monitor else None


@dataclass(frozen=True)
class GradientVariance:
    """variance ∝ B^exponent, fitted to the direct measurements, with the exponent's 90% interval.

    `constant`: of c/B fitted to them, so it stands for tr Σ; `worst`: the largest relative distance of a
    point from c/B. The exponent is None with fewer than two batch sizes.
    """

    points: tuple[VariancePoint, ...]
    exponent: float | None
    low: float | None
    high: float | None
    constant: float
    worst: float

    def to_dict(self) -> dict[str, Any]:
        points = [{**asdict(p), "ratio": p.ratio} for p in self.points]
        return {**asdict(self), "points": points}


def gradient_variance(
    workload: Workload,
    batch_sizes: Sequence[int],
    *,
    seed: int = 0,
    precision: float = 0.02,
    micro_batch_size: int | None = None,
    measured: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> GradientVariance | None:
    """Measure where the model is, until each is known to a standard error of `precision`, or long enough.

    Leaves the parameters as they are; gradients, and the state of BatchNorm, are not kept. None where
    `stop` ended it early.
    """
    points = []
    for index, size in enumerate(sorted(set(batch_sizes))):
        generator = np.random.default_rng((seed, index))
        torch.manual_seed(seed)
        point = _point(
            workload, size, micro_batch_size or size, generator, precision, measured, stop
        )
        if point is None:
            return None
        points.append(point)
    return fitted(points)


def fitted(points: Sequence[VariancePoint]) -> GradientVariance:
    """The exponent and c/B, each point weighing by its precision."""
    x = np.log([p.batch_size for p in points])
    y = np.log([p.direct for p in points])
    z = critical_value(GROUP, CONFIDENCE)
    error = np.array([max(p.high - p.low, 1e-12 * p.direct) / 2 / z / p.direct for p in points])
    weight = error**-2
    constant = math.exp(float((weight * (x + y)).sum() / weight.sum()))
    worst = max(abs(p.direct * p.batch_size / constant - 1) for p in points)
    exponent = low = high = None
    if len(points) > 1:
        centred = x - (weight * x).sum() / weight.sum()
        square = float((weight * centred**2).sum())
        exponent = float((weight * centred * y).sum()) / square
        half = critical_value(GROUP * len(points), CONFIDENCE) / math.sqrt(square)
        low, high = exponent - half, exponent + half
    return GradientVariance(tuple(points), exponent, low, high, constant, worst)


def mean_tr_sigma(workload: Workload, size: int, samples: int, seed: int) -> float:
    """The monitor's tr Σ where the model is, from independent batches of `size` (two at least)."""
    generator = np.random.default_rng((seed, 1))
    size = max(size, 2)
    with gradstats.attach(workload.model) as monitor:
        found = [
            float(_gradient(workload, size, size, generator, monitor)[1])
            for _ in range(max(1, math.ceil(samples / size)))
        ]
    return math.fsum(found) / len(found)


def _point(
    workload: Workload,
    size: int,
    micro: int,
    generator: np.random.Generator,
    precision: float,
    measured: bool,
    stop: Callable[[], bool],
) -> VariancePoint | None:
    within: list[float] = []
    between: list[float] = []
    monitor = gradstats.attach(workload.model) if measured and size > 1 else None

    def gradients() -> Iterator[Tensor]:
        for _ in range(GROUP):
            gradient, tr_sigma = _gradient(workload, size, min(micro, size), generator, monitor)
            within.append(tr_sigma / size)
            yield gradient

    # The first groups say how many there must be; going on until the error looks small would end too
    # early where it looks too small.
    wanted = FEWEST
    try:
        while len(between) < wanted:
            if stop():
                return None
            between.append(_scatter(gradients()))
            if len(between) == FEWEST:
                wanted = min(MOST, math.ceil(FEWEST * (_error(between) / precision) ** 2))
    finally:
        if monitor is not None:
            monitor.detach()
    direct = math.fsum(between) / len(between)
    half = critical_value(len(between) - 1, CONFIDENCE) * _error(between) * direct
    by_monitor = None if monitor is None else math.fsum(within) / len(within)
    return VariancePoint(
        size, direct, direct - half, direct + half, len(between) * GROUP, by_monitor
    )


def _gradient(
    workload: Workload,
    size: int,
    micro: int,
    generator: np.random.Generator,
    monitor: gradstats.Monitor | None,
) -> tuple[Tensor, float]:
    """A mean gradient, (parameters,) float64, of samples drawn with replacement, and the monitor's tr Σ."""
    workload.model.zero_grad()
    for _ in range(size // micro):
        batch = workload.take(generator.integers(workload.num_samples, size=micro).tolist())
        (workload.loss(batch) * (micro / size)).backward()
    stats = None if monitor is None else monitor.step()
    grads = [
        p.grad.detach().flatten().double()
        for p in workload.model.parameters()
        if p.grad is not None
    ]
    workload.model.zero_grad()
    return torch.cat(grads), math.nan if stats is None else float(stats.tr_sigma)


def _scatter(vectors: Iterator[Tensor]) -> float:
    """The trace of their unbiased covariance, in one pass (Welford)."""
    mean = next(vectors)
    total, count = 0.0, 1
    for vector in vectors:
        count += 1
        off = vector - mean
        mean += off / count
        total += float(off @ (vector - mean))
    return total / (count - 1)


def _error(values: Sequence[float]) -> float:
    """The relative standard error of their mean."""
    mean = math.fsum(values) / len(values)
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) / mean if mean > 0 else 0.0
