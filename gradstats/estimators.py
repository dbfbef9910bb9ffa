"""The gradient noise scale, with an interval, from per-step statistics. Numbers only, no torch.

``B_noise = tr(Σ)/|G|²`` (McCandlish et al., arXiv:1812.06162, section 2.2) is a ratio of two
expectations. Each step gives an unbiased estimate of both, and those are smoothed first and divided
last: a mean of per-step ratios, or clamping a negative ``|G|²`` before smoothing, is biased. What the ratio
of averages still exceeds the true one by in the mean, their scatter tells: see `ratios`.
"""

from __future__ import annotations

import math
import numbers

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradstats.errors import InvalidArgumentError
from gradstats.noise import NoiseScale
from gradstats.ratios import fieller, ratio, unbiased_ratio
from gradstats.words import readable

__all__ = ["NoiseScale", "noise_scale", "readable", "samples_ratio", "steps_ratio"]

DEFAULT_HALF_LIFE = 500.0
MOST_COSINES = 40  # Student's t with so many degrees of freedom is within 3% of the normal
FEWEST_STEPS = 12  # with fewer, the drift at the start of a training passes for a mean

Array = NDArray[np.float64]


def noise_scale(
    num_samples: ArrayLike,
    tr_sigma: ArrayLike,
    true_grad_sq_norm: ArrayLike,
    *,
    half_life: float = DEFAULT_HALF_LIFE,
    confidence: float = 0.9,
    coverage: float = 1.0,
    decay: float = 0.0,
    overlap: int = 1,
    squared: bool = False,
) -> NoiseScale:
    """Noise scale of a run from K optimizer steps in time order.

    Args:
        num_samples: (K,) samples of each step. Steps of fewer than two are left out.
        tr_sigma, true_grad_sq_norm: (K,) unbiased estimates of tr Σ and of ``|G|²``, negative ones
            included. Steps where one is not finite are left out.
        half_life: used steps after which a step counts half; ``inf`` gives the plain mean.
            The default is long beside what an estimate needs and short beside a training run.
        confidence: probability that the interval holds the true value, in (0, 1).
        coverage: fraction of the trainable parameters behind the numbers, in [0, 1].
        decay: where each ``|G|²`` is of a momentum buffer, how much of it the next step's buffer keeps,
            in [0, 1).
        overlap: where each step's numbers are of so many batches, the batches of which the next one shares
            all but one.
        squared: the noise scale is the square of the ratio: both are of roots.

    Input from which nothing can be had gives the value ``nan``, no error; shapes that differ, or an
    option outside its range, raise ``InvalidArgumentError``.

    Both averages are bias-corrected exponential moving averages; the interval for their ratio is
    Fieller's, restricted to ratios of at least zero. Where steps stay correlated for longer than about a
    fifth of the half-life, it is too narrow.
    """
    inputs = (num_samples, tr_sigma, true_grad_sq_norm)
    samples, tr, sq = (np.asarray(x, np.float64) for x in inputs)
    if samples.ndim != 1 or not samples.shape == tr.shape == sq.shape:
        raise InvalidArgumentError(
            "num_samples, tr_sigma and true_grad_sq_norm must be sequences of one length, got "
            f"shapes {samples.shape}, {tr.shape} and {sq.shape}; pass one entry per step"
        )
    require(half_life > 0, "half_life", half_life, "pass a number of steps above 0")
    require(0 < confidence < 1, "confidence", confidence, "pass a probability between 0 and 1")
    require(0 <= coverage <= 1, "coverage", coverage, "pass a fraction from 0 to 1")
    require(overlap >= 1, "overlap", overlap, "pass a number of batches of at least 1")
    require(0 <= decay < 1, "decay", decay, "pass what a buffer keeps, from 0 to below 1")

    rows = np.array((samples, tr, sq))
    if rows.size and not (np.isfinite(rows).all() and samples.min() >= 2):
        rows = rows[:, np.isfinite(rows).all(axis=0) & (samples >= 2)]
    steps = rows.shape[1]
    value = mean_tr = mean_sq = math.nan
    low, high, unbiased = 0.0, math.inf, None
    if steps:
        series = rows[1:].T
        weights = np.exp2(np.arange(1.0 - steps, 1.0) / half_life)
        weights /= weights.sum()  # an exponential moving average, bias-corrected
        # Relative to the largest entry, which keeps squares of tiny and huge gradients in range.
        scale = np.maximum(np.abs(series).max(axis=0), np.finfo(np.float64).tiny)
        series = series / scale
        mean = weights @ series
        mean_tr, mean_sq = (float(m) for m in mean * scale)
        # Neither expectation can be negative. Where an average is, the nearest possible one stands
        # in for it, here and in the interval, which only widens by that.
        top, bottom = (max(float(m), 0.0) for m in mean)
        numerator, denominator = (float(s) for s in scale)
        value = ratio(top, bottom)
        value *= value if squared else 1
        covariance, freedom = mean_covariance(series, weights, (0.0, decay), overlap)
        if freedom:
            low, high = fieller(top, bottom, covariance, critical_value(freedom, confidence))
            low, high = (low * low, high * high) if squared else (low, high)
            low, high = min(low, value), max(high, value)  # whatever rounding does
            if value < math.inf:
                unbiased = min(max(unbiased_ratio(top, bottom, covariance, squared), low), high)
        for _ in range(2 if squared else 1):
            value, low, high = (v * numerator / denominator for v in (value, low, high))
            unbiased = None if unbiased is None else unbiased * numerator / denominator
    return NoiseScale(
        value=value,
        low=low,
        high=high,
        confidence=float(confidence),
        num_samples=int(rows[0].sum()),
        num_steps=steps,
        num_skipped=len(samples) - steps,
        tr_sigma=mean_tr,
        true_grad_sq_norm=mean_sq,
        coverage=float(coverage),
        unbiased=unbiased,
    )


def steps_ratio(batch_size: float, noise: float) -> float:
    """Steps to a target over the fewest possible, ``S/S_min = 1 + B_noise/B``, for B > 0 samples.

    McCandlish et al., arXiv:1812.06162, section 2.3.
    """
    return 1.0 + noise / batch_size


def samples_ratio(batch_size: float, noise: float) -> float:
    """Samples to a target over the fewest possible, ``E/E_min = 1 + B/B_noise``, ``inf`` at zero.

    McCandlish et al., arXiv:1812.06162, section 2.3: (S/S_min − 1)(E/E_min − 1) = 1.
    """
    return 1.0 + ratio(batch_size, noise)


def mean_covariance(
    series: Array, weights: Array, decays: tuple[float, float] = (0.0, 0.0), overlap: int = 1
) -> tuple[Array, int]:
    """(2, 2) covariance of the weighted mean of a (K, 2) series, and its degrees of freedom.

    `decays`: what each column is known to keep from step to step. Over a run that is not many times that
    memory the scatter of slow cosines would fall short; what is new in a step is nearly independent, and its
    scatter over ``1 - decay`` is that of the mean (prewhitening: Andrews and Monahan, Econometrica 60, 1992).
    `overlap`: of how many batches each step is a moving sum, of which a cosine of frequency ω sees less than
    the mean, by Dirichlet's kernel sin(mω/2)/(m sin(ω/2)) at most.

    Robust to autocorrelation: the equal-weighted cosine estimator of Lazarus, Lewis, Stock and
    Watson (J. Bus. Econ. Stat. 36, 2018). Only slow cosines carry the scatter that a long mean
    sees; being few and nearly independent, they make the mean over its standard error follow
    Student's t, where kernel estimates are overconfident. Their rule sets how many cosines, on the
    number of independent steps that would tell as much as these do. For unequal weights the cosines
    run in variance time, orthogonal to the weights and to a constant, which keeps the covariance
    free of the mean and of its error.
    """
    recent = weights > 1e-12 * weights[-1]
    if not recent.all():
        series, weights = series[recent], weights[recent]
    square = weights @ weights
    steps = 1 / float(square) + 1e-9  # as many equal weights give this variance
    if steps < FEWEST_STEPS:
        return np.zeros((2, 2)), 0
    residual = series - weights @ series
    new = 1 - np.array(decays)
    if any(decays):
        residual, weights = residual[1:] - decays * residual[:-1], weights[1:] / weights[1:].sum()
        square = weights @ weights
    correlation = max(_lag_one(column * np.sqrt(weights)) for column in residual.T)
    independent = steps * (1 - correlation) / (1 + correlation)
    rule = max(2, round(0.4 * independent ** (2 / 3)))
    cosines = min(rule + 1, MOST_COSINES, int(steps) - 1)
    squares = weights * weights
    time = (np.cumsum(squares) - squares / 2) / square
    # Gram and Schmidt by Cholesky: on so few and nearly orthogonal waves (the condition number of their Gram
    # matrix is below 3) as exact as by reflections. The first wave is the weights themselves. Below the
    # waves' own rows, the factor holds what the residuals and a constant are along each of them; what is
    # left of those three is not asked for, and its place on the diagonal only has to be large enough.
    rows = np.ones((cosines + 4, len(weights)))
    rows[:-3] = weights * np.cos(np.multiply.outer(np.arange(cosines + 1) * np.pi, time))
    rows[-3:-1] = residual.T
    gram = rows @ rows.T
    gram[-3:, -3:] = np.diag(2 * gram.diagonal()[-3:] + 1)
    factor = np.linalg.cholesky(gram)[-3:, 1:-3].T
    scatter, constant = factor[:, :2] / new, factor[:, 2]
    if overlap > 1:
        half = np.pi / 2 * np.arange(1, cosines + 1)[:, None] / steps
        scatter = scatter * (overlap * np.sin(half) / np.sin(overlap * half))
    size = constant @ constant
    if size > 1e-12 * len(weights):  # zero for equal weights, where nothing is left to remove
        scatter = scatter - np.outer(constant, constant @ scatter) / size
        cosines -= 1
    return square / cosines * (scatter.T @ scatter), cosines


def critical_value(freedom: int, confidence: float) -> float:
    """Half the width of Student's interval, in standard errors."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + confidence) / 2))


def _lag_one(residual: Array) -> float:
    """The lag-one autocorrelation of a column, from 0 to 0.97."""
    power = max(float(residual @ residual), float(np.finfo(np.float64).tiny))
    return min(max(float(residual[1:] @ residual[:-1]) / power, 0.0), 0.97)


def require(holds: bool, name: str, seen: object, remedy: str) -> None:
    """Raise ``InvalidArgumentError`` that names the argument, unless the condition holds."""
    if not holds:
        raise InvalidArgumentError(f"{name}={seen!r} cannot be used; {remedy}")


def whole(name: str, seen: object, default: int = 0) -> int:
    """``seen`` (``default`` for ``None``), which must be a whole number of at least 1, as an int."""
    number = default if seen is None else seen
    valid = isinstance(number, numbers.Integral) and int(number) >= 1
    require(valid, name, seen, "pass a whole number of at least 1")
    return int(number)  # type: ignore[call-overload, no-any-return]
