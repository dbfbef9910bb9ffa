"""Which batch size training calls for. Pure functions of numbers: what was `Seen` → samples per step.

Settings are keyword arguments: ``functools.partial(noise_scale, hysteresis=2)``. A function of your own
will do as well. What it returns is rounded to whole micro-batches within the scheduler's bounds;
``seen.batch_size``, and NaN, mean to stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gradstats.advice import Rule
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale, require
from gradstats.rates import warm_up

__all__ = [
    "Policy",
    "Seen",
    "batch_for_momentum",
    "instead_of_decay",
    "milestones",
    "noise_scale",
    "norm_test",
    "ramp",
    "soonest",
]


@dataclass(frozen=True)
class Seen:
    """What a decision may rest on. Batch sizes are in samples per optimizer step, over all ranks.

    `base_batch_size`: the size that the learning rate and its schedule suit. `step`, `samples`: optimizer
    steps taken and samples handed out so far. `noise`: the monitor's noise scale, None without a monitor.
    `decay`: the schedule's present learning rate over the largest so far, from 0 to 1, and `rule`: how it
    is scaled with the batch; None where nothing scales it.
    """

    batch_size: int
    base_batch_size: int
    step: int = 0
    samples: int = 0
    noise: NoiseScale | None = None
    decay: float | None = None
    rule: Rule | None = None


Policy = Callable[[Seen], float]


def noise_scale(seen: Seen, *, factor: float = 1.0, hysteresis: float = 1.5) -> float:
    """`factor` times the measured noise scale, once it is sure that the present size is another.

    It stays while the interval is too wide to act on or holds the present size, and while the size would
    change by less than a factor of `hysteresis` (at least 1).
    McCandlish et al., arXiv:1812.06162, section 2.
    """
    require(0 < factor < math.inf, "factor", factor, "pass a number above 0")
    noise = _measured(seen, "noise_scale")
    return _sure(seen.batch_size, noise, lambda n: factor * n, hysteresis)


def soonest(seen: Seen, *, fixed: float, hysteresis: float = 1.5) -> float:
    """The batch with which a target is reached soonest, ``√(N·fixed)`` at a noise scale N.

    `fixed`: samples that take as long as a step does besides its samples, a/b where a step of B samples
    takes a + b·B seconds; `StepTime.fixed_samples` says it of a machine. A target takes steps ∝ 1 + N/B
    (McCandlish et al., arXiv:1812.06162, section 2.3), so its time ∝ (1 + N/B)(a + b·B) is shortest there.
    When it stays is as for `noise_scale`.
    """
    require(0 < fixed < math.inf, "fixed", fixed, "pass a number of samples above 0")
    noise = _measured(seen, "soonest")
    return _sure(seen.batch_size, noise, lambda n: math.sqrt(fixed * n), hysteresis)


def norm_test(seen: Seen, *, theta: float = 0.5) -> float:
    """The batch whose mean gradient is off by at most `theta` of its own norm; never a smaller one.

    Stays where ``tr Σ/B ≤ θ²‖ḡ‖²``, else asks for ``tr Σ/(θ²‖ḡ‖²)`` samples (Byrd, Chin, Nocedal and Wu,
    Math. Program. 134, 2012; Bollapragada, Byrd and Nocedal, arXiv:1710.11258). Here ‖ḡ‖² = |G|² + tr Σ/B
    of the monitor's smoothed estimates, not of one batch. With `theta` of 1 or more it asks for nothing.
    """
    require(0 < theta < math.inf, "theta", theta, "pass a number above 0")
    noise, now = _measured(seen, "norm_test"), seen.batch_size
    grad_sq_norm = max(noise.true_grad_sq_norm, 0.0) + noise.tr_sigma / now
    if noise.uncalibrated or not 0 < grad_sq_norm < math.inf:  # also where it is not a number
        return now
    return max(now, noise.tr_sigma / (theta**2 * grad_sq_norm))


def instead_of_decay(seen: Seen) -> float:
    """The batch at which the scaled learning rate stays what it was, while its schedule decays.

    B ∝ 1/decay under the linear rule (Smith et al., arXiv:1711.00489), 1/decay² under the square root
    (from that rule, Malladi et al., arXiv:2205.10287). Any learning-rate schedule will do. At the
    scheduler's largest batch size the rate takes over: what the batch no longer makes up for, it decays.
    """
    if seen.decay is None or seen.rule is None:
        raise InvalidArgumentError(
            "instead_of_decay follows the learning rate that a schedule sets, and needs it scaled with "
            'the batch; pass scaling=BatchScaling(optimizer, batch_size=..., rule="linear")'
        )
    decay, base = seen.decay, seen.base_batch_size
    if decay <= 0:
        return math.inf
    if seen.rule == "linear":
        return base / decay
    if seen.rule == "sqrt":
        return base / decay**2
    noise = _measured(seen, 'instead_of_decay with rule "noise"').value
    if math.isnan(noise):
        return seen.batch_size
    if math.isinf(noise):
        return base / decay
    rest = (1 + noise / base) * decay - 1  # from (1 + N/base)/(1 + N/B) = 1/decay
    return noise / rest if rest > 0 else math.inf


def ramp(seen: Seen, *, start: float, end: float, over: float) -> float:
    """From `start` to `end` samples per step on a straight line, over the first `over` samples."""
    require(start > 0, "start", start, "pass a batch size above 0")
    require(end > 0, "end", end, "pass a batch size above 0")
    return warm_up(seen.samples, over, start, end)


def milestones(seen: Seen, *, sizes: Mapping[int, float]) -> float:
    """A fixed size from each of the given numbers of samples on: ``{0: 64, 1_000_000: 256}``."""
    valid = len(sizes) > 0 and all(at >= 0 and size > 0 for at, size in sizes.items())
    require(valid, "sizes", sizes, "pass batch sizes above 0 by the samples they begin at")
    begun = [at for at in sizes if at <= seen.samples]
    return sizes[max(begun)] if begun else seen.batch_size


def batch_for_momentum(batch_size: float, momentum: float, new_momentum: float) -> float:
    """The batch that keeps SGD's noise when momentum changes, ``B ∝ 1/(1 − m)``, at the same rate.

    Smith et al., arXiv:1711.00489, section 4: the noise is ∝ ε/(B(1 − m)). A run with more momentum
    starts at this size, and its schedule then suits it.
    """
    require(0 < batch_size < math.inf, "batch_size", batch_size, "pass a number of samples above 0")
    require(0 <= momentum < 1, "momentum", momentum, "pass a number from 0 to below 1")
    require(0 <= new_momentum < 1, "new_momentum", new_momentum, "pass a number from 0 to below 1")
    return batch_size * (1 - momentum) / (1 - new_momentum)


def _sure(
    now: int, noise: NoiseScale, wanted: Callable[[float], float], hysteresis: float
) -> float:
    """What is `wanted` at a noise scale, where its interval excludes `now`, by `hysteresis` or more."""
    require(hysteresis >= 1, "hysteresis", hysteresis, "pass a factor of at least 1")
    if not noise.actionable or wanted(noise.low) <= now <= wanted(noise.high):
        return now
    size = max(wanted(noise.value), 1.0)
    return size if max(size, now) >= hysteresis * min(size, now) else now


def _measured(seen: Seen, who: str) -> NoiseScale:
    if seen.noise is None:
        raise InvalidArgumentError(
            f"{who} decides by the measured noise scale; pass monitor=gradstats.attach(model) to the "
            "scheduler"
        )
    return seen.noise
