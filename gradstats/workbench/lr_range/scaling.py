"""The rule that the best learning rate follows over batch sizes: models compared. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstats.errors import InvalidArgumentError

__all__ = ["Fit", "Scaling", "fit_scaling"]

REJECTED = 0.05  # a rule whose misfit would be rarer than this by chance does not hold
NAMES = {
    "constant": "the same rate",
    "sqrt": "rate ∝ √B",
    "linear": "rate ∝ B",
    "saturating": "rate = max/(1 + B_noise/B)",
}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """A rule against the best rates: `chi_squared` over the errors' variances, `p_value` of a misfit at
    least as large by chance, `aic` (chi² + 2·parameters), `holds` (not rejected at 5%)."""

    rule: str
    chi_squared: float
    p_value: float
    aic: float
    holds: bool


@dataclass(frozen=True)
class Scaling:
    """How the best rate grows with the batch size.

    `rule`: the one that holds, None where the data cannot tell. `exponent`: of rate ∝ B^exponent, between
    `low` and `high` with probability `confidence`. `possible`: the rules that the data allow; the
    saturating one is left out where a simpler one it contains (linear far below its B_noise, constant far
    above) does as well. `max_rate` and `noise_scale`: of the saturating rule, with intervals of their own.
    """

    rule: str | None
    possible: tuple[str, ...]
    exponent: float
    low: float
    high: float
    confidence: float
    fits: tuple[Fit, ...]
    max_rate: float
    noise_scale: float
    noise_scale_low: float
    noise_scale_high: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)

    def __str__(self) -> str:
        return self.reason


def fit_scaling(
    batch_sizes: Sequence[float],
    rates: Sequence[float],
    log_errors: Sequence[float],
    *,
    degrees: int,
    confidence: float = 0.9,
) -> Scaling:
    """Compare the rules on the best rates at three or more batch sizes.

    Args:
        batch_sizes: (K,) different sizes.
        rates: (K,) the best rate at each.
        log_errors: (K,) standard errors of their logarithms.
        degrees: of freedom behind each of these errors (repeats − 1): intervals are of Student's t and
            misfits judged by F, as few points decide and their errors are uncertain themselves.

    All is fitted to the logarithms by weighted least squares: linear, sqrt and constant by their one
    factor, ``max/(1 + B_noise/B)`` (McCandlish et al. 2018, arXiv:1812.06162, section 2.2, where it is the
    best rate of one step of SGD) by two. Where the best power law misses by more than the errors, these are
    taken to be larger by as much for the exponent's interval.

    Raises InvalidArgumentError for fewer than three sizes or numbers that are not above zero.
    """
    sizes, y, errors = (np.asarray(v, np.float64) for v in (batch_sizes, rates, log_errors))
    if len(set(sizes.tolist())) < 3 or not sizes.shape == y.shape == errors.shape:
        raise InvalidArgumentError(
            f"batch_sizes={list(batch_sizes)}: a rule needs a rate at three or more different sizes"
        )
    if not all(np.all(np.isfinite(v) & (v > 0)) for v in (sizes, y, errors)):
        raise InvalidArgumentError("batch sizes, rates and their errors must be above 0")
    if degrees < 1:
        raise InvalidArgumentError(f"degrees={degrees} must be at least 1")
    from scipy.special import stdtrit

    x, y, weights = np.log(sizes), np.log(y), errors**-2
    fits = {
        name: _compare(name, _offset(y - power * x, weights)[1], 1, len(x), degrees)
        for name, power in (("constant", 0.0), ("sqrt", 0.5), ("linear", 1.0))
    }
    quantile = float(stdtrit(degrees, (1 + confidence) / 2))
    noise, noise_low, noise_high, chi = _saturating(sizes, y, weights, quantile**2)
    top = float(np.exp(_offset(y + np.log1p(noise / sizes), weights)[0]))
    fits["saturating"] = _compare("saturating", chi, 2, len(x), degrees)
    middle = np.average(x, weights=weights)
    precision = float(np.sum(weights * (x - middle) ** 2))
    exponent = float(np.sum(weights * (x - middle) * y) / precision)
    misfit = _offset(y - exponent * x, weights)[1] / (len(x) - 2)
    width = quantile * math.sqrt(max(1.0, misfit) / precision)
    possible = [name for name, fit in fits.items() if fit.holds]
    simpler = [name for name in possible if name in ("constant", "linear")]
    if "saturating" in possible and any(fits[n].aic <= fits["saturating"].aic for n in simpler):
        possible.remove("saturating")
    rule = possible[0] if len(possible) == 1 else None
    found = Scaling(
        rule=rule,
        possible=tuple(possible),
        exponent=exponent,
        low=exponent - width,
        high=exponent + width,
        confidence=confidence,
        fits=tuple(fits.values()),
        max_rate=top,
        noise_scale=noise,
        noise_scale_low=noise_low,
        noise_scale_high=noise_high,
        reason="",
    )
    return replace(found, reason=_reason(found, sizes))


def _offset(residuals: Array, weights: Array) -> tuple[float, float]:
    """The weighted mean, and the weighted sum of squares around it."""
    mean = float(np.average(residuals, weights=weights))
    return mean, float(np.sum(weights * (residuals - mean) ** 2))


def _compare(name: str, chi: float, parameters: int, points: int, degrees: int) -> Fit:
    from scipy.special import fdtrc

    free = points - parameters
    p = float(fdtrc(free, degrees, chi / free))
    return Fit(name, chi, p, chi + 2 * parameters, p >= REJECTED)


def _saturating(
    sizes: Array, y: Array, weights: Array, rise: float
) -> tuple[float, float, float, float]:
    """(B_noise, low, high, chi²): the least, and where it is above that by `rise`; 0 and inf for none."""
    from scipy.optimize import brentq, minimize_scalar

    def chi(log_noise: float) -> float:
        return _offset(y + np.log1p(math.exp(log_noise) / sizes), weights)[1]

    ends = math.log(sizes.min() / 1e3), math.log(sizes.max() * 1e3)
    grid = np.linspace(*ends, 60)
    start = int(np.argmin([chi(g) for g in grid]))
    around = grid[max(start - 1, 0)], grid[min(start + 1, len(grid) - 1)]
    least = minimize_scalar(chi, bounds=around, method="bounded")
    best, bottom = float(least.x), float(least.fun)

    def above(log_noise: float) -> float:
        return chi(log_noise) - bottom - rise

    low = math.exp(brentq(above, ends[0], best)) if above(ends[0]) > 0 else 0.0
    high = math.exp(brentq(above, best, ends[1])) if above(ends[1]) > 0 else math.inf
    return math.exp(best), low, high, bottom


def _reason(found: Scaling, sizes: Array) -> str:
    over = f"over batch sizes {sizes.min():,.0f} to {sizes.max():,.0f}"
    power = f"the best rate grows as B^{found.exponent:.2f} ({found.low:.2f} to {found.high:.2f}) {over}"
    names = " or ".join(NAMES[rule] for rule in found.possible)
    if not found.possible:
        return f"{power}; none of the rules holds: take the rate measured at the size you use"
    if found.rule is None:
        return f"{power}; cannot tell between {names}: more repeats or sizes farther apart"
    text = f"{power}; what holds is {NAMES[found.rule]}"
    if found.rule == "saturating":
        high = "∞" if math.isinf(found.noise_scale_high) else f"{found.noise_scale_high:,.3g}"
        text += (
            f" with max {found.max_rate:.3g} and B_noise {found.noise_scale:,.3g} "
            f"({found.noise_scale_low:,.3g} to {high})"
        )
    return text
