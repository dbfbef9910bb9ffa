"""Signs of overfitting in curves of training and validation loss. Numbers only.

A validation loss that has risen for certain: the mean of its last stretch is above that of an earlier one
by more than a margin, beyond what its scatter explains. Which stretch comes out lowest is not chosen after
the fact for free: all are compared, at a confidence that allows for that (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gradstats.estimators import critical_value, readable, require

__all__ = ["FEWEST", "Curve", "Trend", "overfitting"]

FEWEST = 16  # evaluations of one training
MANY = 48  # from which on there are eight stretches, not four
STEADY = 0.9  # the largest autocorrelation that is believed
# Standard errors (1/√n, roughly) that an autocorrelation is taken to be above its estimate.
CAUTION = 1.5
BENT = 12  # evaluations of a stretch from which on its slope may change within it
REPLICAS = 3  # trainings of one kind that are compared with each other, not within themselves

Array = NDArray[np.float64]
Kind = Literal["overfitting", "diverging", "none", "unknown"]


@dataclass(frozen=True)
class Curve:
    """Evaluations of one training in time order: when, and the losses there (train may be NaN)."""

    name: str
    at: Sequence[float]
    train: Sequence[float]
    validation: Sequence[float]


@dataclass(frozen=True)
class Trend:
    """What a test found.

    `kind`: "overfitting" where the validation loss has risen and the training loss has not, "diverging"
    where both have, "none" where no rise beyond `margin` is certain, "unknown" where there is too little to
    tell. `rise`: of the mean validation loss from the stretch that ends at `since` to the last; `low`: what
    it is at least, with `confidence`; None where unknown.
    """

    name: str
    kind: Kind
    rise: float | None
    low: float | None
    since: float | None
    margin: float
    confidence: float
    evaluations: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.kind == "unknown":
            return (
                f"{self.name}: {self.evaluations} evaluations are too few to tell overfitting from scatter; "
                f"it takes {FEWEST}, or {REPLICAS} trainings of one kind"
            )
        if self.kind == "none":
            return f"{self.name}: no rise of the validation loss by more than {self.margin:.3g} is certain"
        assert self.rise is not None
        assert self.low is not None
        sure = f"{100 * self.confidence:.3g}% sure: by {readable(self.low)} at least"
        text = f"{self.name}: the validation loss has risen by {readable(self.rise)}"
        text += f" since {self.since:,.6g} ({sure})"
        if self.kind == "diverging":
            return f"{text}, and so has the training loss: it diverges, and does not overfit"
        return f"{text}, while the training loss has not: it overfits"


def overfitting(
    curves: Sequence[Curve], *, margin: float = 0.01, confidence: float = 0.95
) -> Trend:
    """Test one training, or several of one kind (other seeds) together.

    `margin`: how much the validation loss must have risen, as a fraction of it. With three or more curves
    of one length, each is a replicate, and rises are compared over them by Student's t. With fewer, each
    evaluation's difference from the ones before gives the standard errors, with the autocorrelation of
    neighbours in them. Of two curves, the first is tested.

    Raises InvalidArgumentError where there is no curve, or an option is out of range.
    """
    require(len(curves) > 0, "curves", curves, "pass one curve or more")
    require(0 <= margin < math.inf, "margin", margin, "pass a fraction of at least 0")
    require(0 < confidence < 1, "confidence", confidence, "pass a probability between 0 and 1")
    name = curves[0].name
    together = len(curves) >= REPLICAS and len({len(c.validation) for c in curves}) == 1
    used = curves if together else curves[:1]
    held = np.array([c.validation for c in used], np.float64)
    known = np.isfinite(held).all(axis=0)
    train = np.array([c.train for c in used], np.float64)[:, known]
    held, at = held[:, known], np.asarray(used[0].at, np.float64)[known]
    count = held.shape[1]
    unknown = Trend(name, "unknown", None, None, None, margin, confidence, count)
    if count < (4 if together else FEWEST):
        return unknown
    stretches = np.array_split(np.arange(count), 8 if count >= MANY else 4)
    compare = _over_replicas if together else _within
    rises, errors, freedom = compare(held, stretches)
    t = critical_value(freedom, 1 - 2 * (1 - confidence) / len(rises))
    levels = np.array([held[:, part].mean() for part in stretches[:-1]])
    lows = rises - t * errors - margin * np.abs(levels)
    best = int(np.argmax(lows))
    if lows[best] <= 0:
        return Trend(name, "none", float(rises[best]), None, None, margin, confidence, count)
    kind: Kind = "overfitting"
    if np.isfinite(train).all():
        climbs, doubts, _ = compare(train, stretches)
        if climbs[best] - t * doubts[best] > 0:
            kind = "diverging"
    low, since = float(rises[best] - t * errors[best]), float(at[stretches[best][-1]])
    return Trend(name, kind, float(rises[best]), low, since, margin, confidence, count)


def _over_replicas(held: Array, stretches: Sequence[Any]) -> tuple[Array, Array, int]:
    """Rises of the last stretch over each earlier one, their standard errors, degrees of freedom."""
    means = np.array([held[:, part].mean(axis=1) for part in stretches])
    rises = means[-1] - means[:-1]  # (stretches − 1, curves)
    many = held.shape[0]
    return rises.mean(axis=1), rises.std(axis=1, ddof=1) / math.sqrt(many), many - 1


def _within(held: Array, stretches: Sequence[Any]) -> tuple[Array, Array, int]:
    """The same, from one curve's differences over one and over two evaluations.

    For an autocorrelation ρ that falls off as ρ^k, they have variances 2σ²(1 − ρ) and 2σ²(1 − ρ²): what
    the curve does slowly has no part in them. The first stretch, where losses fall, is left out.
    """
    values = held[0]
    one, two = (
        sum(float(d @ d) for d, _ in parts) / max(sum(free for _, free in parts), 1)
        for parts in ([_steps(values[p], lag) for p in stretches[1:]] for lag in (1, 2))
    )
    count = sum(len(part) - 1 for part in stretches[1:])
    lag = (two / one - 1 if one > 0 else 0.0) + CAUTION / math.sqrt(count)
    lag = min(max(lag, 0.0), STEADY)
    spread = (1 + lag) / (1 - lag)
    variance = one / 2 / (1 - lag)
    means = np.array([values[part].mean() for part in stretches])
    sizes = np.array([len(part) for part in stretches])
    errors = np.sqrt(variance * spread * (1 / sizes[:-1] + 1 / sizes[-1]))
    return means[-1] - means[:-1], errors, max(3, int(count / spread))


def _steps(values: Array, lag: int) -> tuple[Array, int]:
    """Differences over `lag` evaluations, less what of them is slow, and their degrees of freedom."""
    found: Array = values[lag:] - values[:-lag]
    if len(values) < BENT:
        return found - found.mean(), len(found) - 1
    x = np.arange(len(found)) - (len(found) - 1) / 2
    return found - found.mean() - x * float(x @ found) / float(x @ x), len(found) - 2
