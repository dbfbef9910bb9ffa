"""What the noise scale of a part of a model is to that of the whole: a factor with an interval.

Numbers only. Both are measured in the same steps, so what their estimates have in common cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gradstats.estimators import NoiseScale, critical_value, mean_covariance, readable
from gradstats.ratios import fieller, unbiased_ratio

__all__ = ["Calibration", "calibrate"]

CERTAIN = 1.5  # a factor less certain than this, either way, says too little to be used


@dataclass(frozen=True)
class Calibration:
    """`value` times the noise scale of the part is that of the model, in samples over samples.

    `low` and `high` hold it with the probability that `calibrate` was given; `steps` is how many it was
    measured in, 0 for a factor that was given. `unbiased`: right in the mean, None where it is not known.
    """

    value: float
    low: float
    high: float
    steps: int = 0
    unbiased: float | None = None

    @property
    def usable(self) -> bool:
        """Whether it is known to within a factor of 1.5."""
        return self.high <= CERTAIN * self.value <= CERTAIN**2 * self.low

    def __str__(self) -> str:
        if not self.steps:
            return f"calibration {readable(self.value)}, as given"
        if not math.isfinite(self.value):
            return f"no calibration could be had from {self.steps} steps"
        range_ = f"{readable(self.low)} to {readable(self.high)}"
        return f"calibration {readable(self.value)} ({range_}), measured in {self.steps} steps"

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Calibration:
        """From `to_dict()`."""
        return cls(**state)

    def apply(self, noise: NoiseScale) -> NoiseScale:
        """The model's noise scale from the part's. Both intervals widen it, as independent errors do."""
        low, high = (
            noise.value * self.value * math.exp(sign * math.hypot(_log(a), _log(b)))
            for sign, a, b in (
                (-1, _over(noise.value, noise.low), _over(self.value, self.low)),
                (1, _over(noise.high, noise.value), _over(self.high, self.value)),
            )
        )
        if not 0 < noise.value < math.inf:
            low = noise.low * self.low
            high = math.inf if math.isinf(self.high) else noise.high * self.high
        unbiased = None
        if (
            noise.unbiased is not None and self.unbiased is not None
        ):  # of other steps, and independent
            unbiased = noise.unbiased * self.unbiased
        return replace(
            noise,
            value=noise.value * self.value,
            unbiased=unbiased,
            low=low,
            high=high,
            tr_sigma=noise.tr_sigma * self.value,
            calibration=self.value,
            calibration_usable=self.usable,
        )


def calibrate(whole: ArrayLike, part: ArrayLike, confidence: float = 0.9) -> Calibration:
    """The factor from K steps: `whole` and `part` (K, 2) of tr_sigma and true_grad_sq_norm.

    ``tr_w·|G|²_p/(|G|²_w·tr_p)`` of the means over steps; the interval is Fieller's, with both products
    linearised in the means' relative errors. NaN where a mean is not above zero, and without an
    interval for fewer than 12 steps.
    """
    rows = np.concatenate([np.asarray(whole, float), np.asarray(part, float)], axis=1)
    rows = rows[np.isfinite(rows).all(axis=1)]
    steps = len(rows)
    means = rows.mean(axis=0) if steps else np.full(4, math.nan)
    if not (means > 0).all():
        return Calibration(math.nan, 0.0, math.inf, steps)
    value = float(means[0] / means[1] / (means[2] / means[3]))
    errors = rows / means - 1
    top, bottom = errors[:, [0, 3]], errors[:, [1, 2]]
    weights = np.full(steps, 1 / steps)
    covariance, freedom = mean_covariance(np.stack([top.sum(1), bottom.sum(1)], axis=1), weights)
    if not freedom:
        return Calibration(value, 0.0, math.inf, steps)
    low, high = fieller(1.0, 1.0, covariance, critical_value(freedom, confidence))
    # In the mean a product of two averages is above that of their expectations by their covariance.
    above, below = (1 - mean_covariance(pair, weights)[0][0, 1] for pair in (top, bottom))
    factor = unbiased_ratio(above, below, covariance) if min(above, below) > 0 else 1.0
    unbiased = value * min(max(factor, low), high)
    return Calibration(value, value * low, value * high, steps, unbiased)


def _over(top: float, bottom: float) -> float:
    return top / bottom if bottom > 0 else math.inf


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 0 else 0.0
