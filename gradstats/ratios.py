"""Ratios of two noisy averages: unbiased, and with an interval. Numbers only, no torch.

The ratio of two unbiased averages is as often above the true one as below it, but in the mean too large by a
share of about Var(b)/b² − Cov(a, b)/(ab), for the mean of 1/b is above 1/(mean of b). For b normal with
standard deviation s and a mean above zero there are functions of b that are unbiased for the mean's
inverse powers (Voinov and Nikulin, Unbiased Estimators and Their Applications 1, 1993; from
E exp(−tb/s) = exp(t²/2 − t·E b/s)):

    M(b/s)/s                        for 1/E b      M(x) = ∫ exp(−xt − t²/2) dt, t > 0: Mills' ratio
    (1 − (b/s)·M(b/s))/s²           for 1/(E b)²

What a numerator has in common with the denominator is taken out first: a − βb, β = Cov(a, b)/Var(b), is
independent of b, and the ratio is β more than its ratio to b.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["fieller", "ratio", "unbiased_ratio"]

NEGLIGIBLE = 1e-10  # a squared relative error that corrects nothing
LARGE = 50.0  # standard deviations from zero, from which on an asymptotic series is more exact

Array = NDArray[np.float64]


def ratio(top: float, bottom: float) -> float:
    """``top/bottom`` for both ≥ 0; over zero ``inf``, or ``nan`` for 0/0."""
    if bottom > 0:
        return top / bottom
    return math.inf if top > 0 else math.nan


def unbiased_ratio(top: float, bottom: float, covariance: Array, squared: bool = False) -> float:
    """Of the means of two averages, `top` ≥ 0 and `bottom` > 0, with their (2, 2) `covariance`.

    `squared`: the ratio's square. Below zero the nearest possible one, 0, stands in.
    """
    a, b = np.float64(top), np.float64(bottom)
    with np.errstate(all="ignore"):  # far from ordinary sizes the plain ratio has to do
        plain = a / b * (a / b if squared else 1)
        var = covariance[1, 1]
        if var <= NEGLIGIBLE * b**2:
            return float(plain)
        slope = covariance[0, 1] / var
        rest = a - slope * b
        once, twice = _inverse_powers(b, var)
        found = slope + rest * once
        if squared:
            rest_var = covariance[0, 0] - slope * covariance[0, 1]
            found = slope**2 + 2 * slope * rest * once + (rest**2 - rest_var) * twice
    return max(float(found), 0.0) if np.isfinite(found) else float(plain)


def _inverse_powers(bottom: np.float64, var: np.float64) -> tuple[np.float64, np.float64]:
    """Unbiased for 1/E b and 1/(E b)²."""
    from scipy.special import erfcx

    x = bottom / np.sqrt(var)
    if x > LARGE:
        e = x**-2
        once, twice = 1 - e + 3 * e**2 - 15 * e**3, 1 - 3 * e + 15 * e**2 - 105 * e**3
        return once / bottom, twice / bottom**2
    mills = math.sqrt(math.pi / 2) * erfcx(x / math.sqrt(2))
    return mills / np.sqrt(var), (1 - x * mills) / var


def fieller(top: float, bottom: float, covariance: Array, t: float) -> tuple[float, float]:
    """Ends of ``{ρ ≥ 0 : (top − ρ·bottom)² ≤ t²·Var(top − ρ·bottom)}``, for top, bottom ≥ 0.

    Fieller (J. R. Stat. Soc. B 16, 1954).
    """
    a = bottom**2 - t**2 * float(covariance[1, 1])
    b = top * bottom - t**2 * float(covariance[0, 1])
    c = top**2 - t**2 * float(covariance[0, 0])
    root = math.sqrt(max(b**2 - a * c, 0.0))
    # a ≤ 0: the denominator may be zero, no ratio is too large. c ≤ 0: the numerator may be zero.
    low = ratio(c, b + root) if c > 0 else 0.0
    high = (b + root) / a if a > 0 else math.inf
    return (low if math.isfinite(low) else 0.0), high
