"""Learning rates, momentum and their memory at another batch size. Pure functions of numbers.

The rules ∝ B, ∝ √B and AdaScale's gain are `gradstats.advice.scale_learning_rate`.
"""

from __future__ import annotations

import math

from gradstats.estimators import require, steps_ratio

__all__ = ["half_life", "noise_learning_rate", "scale_decay", "warm_up"]


def noise_learning_rate(max_learning_rate: float, batch_size: float, noise: float) -> float:
    """``ε(B) = ε_max/(1 + B_noise/B)``, the best rate of SGD at a batch of B samples.

    McCandlish et al., arXiv:1812.06162, equation 2.6. `max_learning_rate` is the best rate without
    noise, `noise` the noise scale in samples; an infinite one gives 0. What is out of range raises
    InvalidArgumentError.
    """
    valid = 0 <= max_learning_rate < math.inf
    require(valid, "max_learning_rate", max_learning_rate, "pass a finite number of at least 0")
    require(0 < batch_size < math.inf, "batch_size", batch_size, "pass a number above 0")
    require(noise >= 0, "noise", noise, "pass the noise scale, at least 0")
    return max_learning_rate / steps_ratio(batch_size, noise)


def warm_up(samples: float, over: float, start: float, end: float) -> float:
    """From `start` to `end` on a straight line, reached after `over` samples; at once where that is 0.

    Goyal et al., arXiv:1706.02677, section 2.2, for a rate that was raised with the batch.
    """
    require(over >= 0, "over", over, "pass a number of samples, at least 0")
    return end if samples >= over else start + (end - start) * max(samples, 0) / over


def half_life(decay: float, batch_size: float) -> float:
    """Samples after which an average that keeps `decay` of itself per step counts half.

    0 for a decay of 0, ``inf`` for 1.
    """
    _require_decay(decay)
    require(batch_size > 0, "batch_size", batch_size, "pass a number above 0")
    if decay in (0.0, 1.0):
        return math.inf if decay else 0.0
    return -batch_size * math.log(2) / math.log(decay)


def scale_decay(decay: float, from_batch: float, to_batch: float) -> float:
    """Momentum, β₁ or β₂ that keeps its half-life in samples: ``decay^(to_batch/from_batch)``.

    Marek et al. 2025, arXiv:2507.07101, for β₂; Malladi et al. 2022, arXiv:2205.10287, have the same
    to first order (1 − β ∝ B).
    """
    _require_decay(decay)
    valid = from_batch > 0 and 0 < to_batch < math.inf
    require(valid, "from_batch, to_batch", (from_batch, to_batch), "pass numbers above 0")
    return math.pow(decay, to_batch / from_batch)


def _require_decay(decay: float) -> None:
    require(0 <= decay <= 1, "decay", decay, "pass what an average keeps per step, from 0 to 1")
