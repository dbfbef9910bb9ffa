"""Chooses the rates to run at one batch size: a bracket, a grid in it, and finer where it matters."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gradstats.workbench.lr_range.curve import SHARE, Curve, read_curve, rises
from gradstats.workbench.lr_range.runs import Runs

__all__ = ["read", "scan"]

COARSE = math.sqrt(10)  # between rates of the bracket
FARTHEST = 16  # rates of the bracket to each side: eight decades
GRID = 4  # rates per decade
SHARP = 1.1  # ratio of `diverged_at` to `high` at which they are close enough

Report = Callable[[str, float], object]


def scan(
    runs: Runs,
    batch_size: int,
    repeats: int,
    *,
    start: float,
    window: tuple[float, float] | None,
    report: Report,
) -> Curve:
    """Run around `start`, or within `window`, until the range is known to a tenth.

    `report` is called with a text and the part done.
    """
    low, high = window or _bracket(runs, batch_size, start, report)
    count = max(5, math.ceil(GRID * math.log10(high / low)) + 1)
    grid = [float(rate) for rate in np.geomspace(low, high, count)]
    for k, rate in enumerate(grid):
        _run(runs, batch_size, repeats, rate)
        report(f"batch {batch_size:,}, rate {rate:.3g}", 0.2 + 0.5 * (k + 1) / count)
    for turn in range(2):  # around the best one, which moves
        curve = read(runs, batch_size, repeats)
        for rate in _neighbours(curve):
            _run(runs, batch_size, repeats, rate)
        report(f"batch {batch_size:,}, around the best rate", 0.75 + 0.1 * turn)
    for find in (_edge_above, _edge_below):
        while (edge := find(read(runs, batch_size, repeats))) is not None:
            _run(runs, batch_size, repeats, edge)
            report(f"batch {batch_size:,}, rate {edge:.3g}", 0.9)
    return read(runs, batch_size, repeats)


def read(runs: Runs, batch_size: int, repeats: int) -> Curve:
    """The curve of the runs that are there."""
    rates = runs.known_rates(batch_size, repeats)
    losses = [[runs.loss(rate, batch_size, s) for rate in rates] for s in range(repeats)]
    return read_curve(batch_size, runs.start_loss, rates, np.array(losses, np.float64))


def _run(runs: Runs, batch_size: int, repeats: int, rate: float) -> None:
    for repeat in range(repeats):
        runs.loss(rate, batch_size, repeat)


def _bracket(runs: Runs, batch_size: int, start: float, report: Report) -> tuple[float, float]:
    """Rates between which the loss falls, by one repeat: below hardly any more, above it rises."""

    def fall(rate: float) -> float:
        report(f"batch {batch_size:,}, rate {rate:.3g}", 0.1)
        return runs.start_loss - runs.loss(rate, batch_size, 0)

    high = start
    falls = {high: fall(high)}
    for _ in range(FARTHEST):
        if rises(runs.start_loss, np.array([runs.start_loss - falls[high]])):
            break
        high *= COARSE
        falls[high] = fall(high)
    low = start
    for _ in range(FARTHEST):
        best = max(falls.values())
        if (
            best > 0
            and falls[low] < SHARE / COARSE * best
            and low < max(falls, key=falls.__getitem__)
        ):
            break
        low /= COARSE
        falls[low] = fall(low)
    return low, high


def _neighbours(curve: Curve) -> list[float]:
    """Halfway, in the logarithm, from the best rate that was tried to those beside it."""
    rates = curve.learning_rates
    if curve.best is None:
        return []
    i = int(np.argmin(curve.losses))
    return [math.sqrt(rates[i] * rates[j]) for j in (i - 1, i + 1) if 0 <= j < len(rates)]


def _edge_above(curve: Curve) -> float | None:
    if curve.high is None or curve.diverged_at is None or curve.diverged_at <= SHARP * curve.high:
        return None
    return math.sqrt(curve.high * curve.diverged_at)


def _edge_below(curve: Curve) -> float | None:
    if curve.low is None:
        return None
    i = curve.learning_rates.index(curve.low)
    if i == 0 or curve.low <= 1.25 * curve.learning_rates[i - 1]:
        return None
    return math.sqrt(curve.low * curve.learning_rates[i - 1])
