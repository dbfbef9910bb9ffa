"""What the losses after short runs say: from which rate to which a training gets ahead. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Curve", "best_rate", "falls_by_more_than_noise", "read_curve", "rises"]

SHARE = 0.1  # of the best fall, from which on a rate is worth its steps
ALIKE = 1e-3  # of the best fall: rates whose falls differ by less are not told apart
SAFETY = 2.0  # of the suggestion, below the rate at which the loss rises

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Losses after short runs at one batch size, and the range of learning rates they give.

    `losses`: the mean over the repeats at each of `learning_rates`; `spread` their standard deviation,
    both infinite where a run was not finite. `smoothed`: for the eye, weights 1, 2, 1 over neighbouring
    rates; nothing is read from it. `low`, `high`: see `read_curve`; `high` is None where no rate that was
    tried made the loss rise, and `diverged_at` then too. `low_spread`, `high_spread`: lowest and highest
    of what each repeat by itself gives. `best`: where the loss falls most, between the rates tried, with
    the standard error of its logarithm. `suggested`: `best`, but at most half the rate at which the loss
    rises. All None where the loss falls nowhere by more than its noise.
    """

    batch_size: int
    start_loss: float
    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    spread: tuple[float, ...]
    smoothed: tuple[float, ...]
    low: float | None
    high: float | None
    suggested: float | None
    diverged_at: float | None
    best: float | None
    best_log_error: float | None
    low_spread: tuple[float, float] | None
    high_spread: tuple[float, float] | None
    repeats: int


def read_curve(batch_size: int, start_loss: float, rates: Sequence[float], losses: Array) -> Curve:
    """The range that the losses of runs give.

    Args:
        rates: (K,) ascending.
        losses: (R, K) of each repeat after its run at each rate, infinite where it was not finite; two
            repeats or more.

    `high` is the largest rate, from the best one upwards, after which no repeat's loss is above
    `start_loss`; `diverged_at` the next one that was tried. `low` is the smallest rate, from the best one
    downwards, at which the loss falls by more than its noise (a one-sided t-test over the repeats at 5%)
    and by at least a tenth of the best fall: a rate below takes over ten times as many steps.
    """
    repeats = len(losses)
    at = _best_index(start_loss - losses)
    means = losses.mean(axis=0)
    with np.errstate(invalid="ignore"):
        spread = np.where(np.isfinite(means), losses.std(axis=0, ddof=1), math.inf)
    low = high = suggested = diverged = best = error = None
    low_spread = high_spread = None
    if at is not None:
        low, high, diverged = _range(start_loss, rates, losses, at)
        alone = [_range(start_loss, rates, losses[[s]], at) for s in range(repeats)]
        low_spread = min(a[0] for a in alone), max(a[0] for a in alone)
        if all(a[2] is not None for a in alone):
            high_spread = min(a[1] for a in alone), max(a[1] for a in alone)
        best, error = best_rate(rates, start_loss - losses)
        suggested = best if diverged is None else min(best, diverged / SAFETY)
    return Curve(
        batch_size=batch_size,
        start_loss=start_loss,
        learning_rates=tuple(map(float, rates)),
        losses=tuple(map(float, means)),
        spread=tuple(map(float, spread)),
        smoothed=tuple(map(float, _smooth(means))),
        low=low,
        high=None if diverged is None else high,
        suggested=suggested,
        diverged_at=diverged,
        best=best,
        best_log_error=error,
        low_spread=low_spread,
        high_spread=high_spread,
        repeats=repeats,
    )


def rises(start_loss: float, losses: Array) -> bool:
    """Whether any repeat's loss (R,) after its run is above that at the start, or not finite."""
    return not bool(np.all(losses <= start_loss))


def falls_by_more_than_noise(falls: Array) -> bool:
    """Whether the mean of the falls (R,) is above zero: a one-sided t-test at 5%; of one, its sign."""
    from scipy.special import stdtrit

    count = len(falls)
    if not np.all(np.isfinite(falls)) or falls.mean() <= 0:
        return False
    if count == 1:
        return True
    error = falls.std(ddof=1) / math.sqrt(count)
    return bool(falls.mean() > stdtrit(count - 1, 0.95) * error)


def best_rate(rates: Sequence[float], falls: Array) -> tuple[float, float]:
    """(rate, standard error of its logarithm) at which the mean fall (R, K) is largest.

    Between rates it is the vertex of the parabola through the largest and its two neighbours, which for
    one step on a quadratic is exact. The error joins the jackknife's over the repeats, a tenth of the
    distance between the rates there, and half the width of where the fall is the same to 0.1%.
    """
    x = np.asarray(rates)
    means = falls.mean(axis=0)
    whole = _vertex(x, means)
    repeats = len(falls)
    alone = np.log([_vertex(x, np.delete(falls, s, 0).mean(axis=0)) for s in range(repeats)])
    error = math.sqrt((repeats - 1) / repeats * float(np.sum((alone - alone.mean()) ** 2)))
    i = int(np.searchsorted(x, whole).clip(1, len(x) - 1))
    alike = x[means >= (1 - ALIKE) * means.max()]
    flat = math.log(alike.max() / alike.min()) / 2
    return whole, math.hypot(error, 0.1 * math.log(x[i] / x[i - 1]), flat)


def _best_index(falls: Array) -> int | None:
    """Of the rate with the largest mean fall among those where it is more than noise; None without one."""
    means = falls.mean(axis=0)
    sure = [k for k in range(falls.shape[1]) if falls_by_more_than_noise(falls[:, k])]
    return max(sure, key=lambda k: means[k], default=None)


def _range(
    start_loss: float, rates: Sequence[float], losses: Array, at: int
) -> tuple[float, float, float | None]:
    """(low, high, diverged_at) around the best rate's index."""
    falls = start_loss - losses
    enough = SHARE * falls[:, at].mean()
    low = high = at
    while low > 0:
        column = falls[:, low - 1]
        if not falls_by_more_than_noise(column) or column.mean() < enough:
            break
        low -= 1
    while high + 1 < len(rates) and not rises(start_loss, losses[:, high + 1]):
        high += 1
    diverged = float(rates[high + 1]) if high + 1 < len(rates) else None
    return float(rates[low]), float(rates[high]), diverged


def _vertex(rates: Array, falls: Array) -> float:
    falls = np.where(np.isfinite(falls), falls, -np.inf)
    i = int(np.argmax(falls))
    if i in (0, len(rates) - 1) or not np.all(np.isfinite(falls[i - 1 : i + 2])):
        return float(rates[i])
    x, y = rates[i - 1 : i + 2], falls[i - 1 : i + 2]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (right - left) / (x[2] - x[0])
    if bend >= 0:
        return float(x[1])
    top = (x[0] + x[1]) / 2 - left / (2 * bend)
    return float(np.clip(top, x[0], x[2]))


def _smooth(means: Array) -> Array:
    smoothed: Array = means.copy()
    for k in range(1, len(means) - 1):
        if np.all(np.isfinite(means[k - 1 : k + 2])):
            smoothed[k] = (means[k - 1] + 2 * means[k] + means[k + 1]) / 4
    return smoothed
