"""Steps to a target loss against the batch size: S = S_min (1 + B_crit/B). Numbers only.

Then samples are E = E_min (1 + B/B_crit), and (S/S_min − 1)(E/E_min − 1) = 1
(McCandlish et al., arXiv:1812.06162, section 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gradstats.errors import InvalidArgumentError

__all__ = ["StepsToTarget", "crossing", "fit_steps"]

BEYOND = 10.0  # times the sizes measured: a critical batch further out is not known from them


@dataclass(frozen=True)
class StepsToTarget:
    """The curve through measured steps to a target.

    `worst_relative`: the largest relative distance of measured steps from it. `product_median`: of
    (S/S_min − 1)(E/E_min − 1), which is 1 on the curve. `determined`: whether the sizes show where the
    curve bends; else the critical batch lies outside of what they can tell, and so does one of the minima.
    """

    steps_min: float
    samples_min: float
    critical_batch: float
    product_median: float
    worst_relative: float
    determined: bool

    def steps(self, batch_size: float) -> float:
        return self.steps_min * (1 + self.critical_batch / batch_size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit_steps(steps: Mapping[int, float]) -> StepsToTarget:
    """Fit to log S of each batch size, least squares; sizes that did not arrive (infinite) are left out.

    Raises InvalidArgumentError with fewer than two sizes.
    """
    points = sorted((b, s) for b, s in steps.items() if math.isfinite(s))
    if len(points) < 2:
        raise InvalidArgumentError(
            f"the steps of {len(points)} batch size(s) determine no curve; two or more must arrive"
        )
    sizes, taken = (np.array(v, float) for v in zip(*points, strict=True))
    grid = np.geomspace(sizes[0] / BEYOND, sizes[-1] * BEYOND, 2000)
    logs = np.log(taken) - np.log1p(grid[:, None] / sizes)
    errors = logs - logs.mean(1, keepdims=True)
    best = int((errors**2).sum(1).argmin())
    least, critical = float(np.exp(logs[best].mean())), float(grid[best])
    product = (taken / least - 1) * (taken * sizes / (least * critical) - 1)
    return StepsToTarget(
        steps_min=least,
        samples_min=least * critical,
        critical_batch=critical,
        product_median=float(np.median(product)),
        worst_relative=float(np.abs(np.expm1(errors[best])).max()),
        determined=0 < best < len(grid) - 1,
    )


def crossing(curve: Sequence[tuple[float, float]], target: float) -> float:
    """Where a curve of (steps, loss) first falls to `target`, on straight lines; ``inf`` where never."""
    before = None
    for at, loss in curve:
        if loss <= target:
            if before is None:
                return at
            part = (before[1] - target) / (before[1] - loss)
            return before[0] + part * (at - before[0])
        before = at, loss
    return math.inf
