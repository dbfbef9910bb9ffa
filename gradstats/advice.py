"""From the noise scale to a batch size, its learning rate and what they cost. Numbers only.

At noise scale ``N`` a target takes steps ∝ ``1 + N/B`` and samples ∝ ``1 + B/N`` (McCandlish et
al., arXiv:1812.06162, section 2.3). At ``t(B)`` seconds per step it takes ``∝ (1 + N/B)·t(B)``.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from gradstats.estimators import NoiseScale, readable, require, steps_ratio

__all__ = ["BatchSizeAdvice", "CurvePoint", "recommend", "scale_learning_rate"]

FLAT = 1.05  # times to a target this close count as equal: step times are not known better
LARGEST = 2**62

Rule = Literal["linear", "sqrt", "noise"]
ADAPTIVE = ("adam", "adamw", "adamax", "nadam", "radam", "sparseadam", "rmsprop", "lamb")
RULES: dict[str, Rule] = {"sgd": "noise", **dict.fromkeys(ADAPTIVE, "sqrt")}


class _StepTime(NamedTuple):
    fixed: float  # seconds
    slope: float  # seconds per sample
    timed: tuple[int, ...]  # the batch sizes behind the fit, ascending

    def __call__(self, size: int) -> float:
        return self.fixed + self.slope * size


@dataclass(frozen=True)
class CurvePoint:
    """Expected cost of a target at one batch size, as ratios to the present batch size."""

    batch_size: int
    steps: float
    samples: float
    seconds: float | None


@dataclass(frozen=True)
class BatchSizeAdvice(CurvePoint):
    """The point of the curve to go to, how to get there and why; sizes are global batch sizes.

    ``batch_size = micro_batch_size × accumulation_steps × world_size``. ``low`` and ``high`` are
    the sizes that the ends of the noise scale's interval would give, within the same limits
    (``high`` is ``None`` where there is no upper end). ``curve`` is empty where the noise scale is
    too uncertain; ``learning_rate`` and ``seconds`` are ``None`` where not known.
    """

    low: int
    high: int | None
    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    learning_rate: float | None
    reason: str
    curve: tuple[CurvePoint, ...]
    present_batch_size: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, each point of the curve a dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        now, end = self.present_batch_size, "up" if self.high is None else f"to {self.high:,}"
        verb = "keep batch size" if self.batch_size == now else f"change batch size {now:,} to"
        rate = "" if self.learning_rate is None else f"; learning rate {self.learning_rate:.4g}"
        time = "" if self.seconds is None else f", {readable(self.seconds)} × the time"
        return (
            f"{verb} {self.batch_size:,} (the interval gives {self.low:,} {end}) as micro_batch_size "
            f"{self.micro_batch_size:,} × accumulation_steps {self.accumulation_steps:,} × "
            f"world_size {self.world_size:,}{rate}; expected against now: {readable(self.steps)} × "
            f"the steps, {readable(self.samples)} × the samples{time}. Why: {self.reason}."
        )


def scale_learning_rate(
    learning_rate: float, from_batch: int, to_batch: int, *, rule: Rule, noise: float | None = None
) -> float:
    """Learning rate for ``to_batch`` samples, given one that suits ``from_batch`` samples.

    What is out of range raises ``InvalidArgumentError``. Rules:
    - ``"linear"``: ∝ B (Goyal et al., arXiv:1706.02677; Smith et al., arXiv:1711.00489).
    - ``"noise"``: ∝ ``1/(1 + noise/B)``, ``noise`` being the noise scale (McCandlish et al.,
      arXiv:1812.06162, section 2.2; AdaScale's gain, arXiv:2007.05105). Linear at small B.
    - ``"sqrt"``: ∝ √B, for Adam and RMSProp (Malladi et al. 2022, arXiv:2205.10287).
    """
    valid = 0 <= learning_rate < math.inf
    require(valid, "learning_rate", learning_rate, "pass a finite number of at least 0")
    start, end = _whole("from_batch", from_batch), _whole("to_batch", to_batch)
    require(rule in get_args(Rule), "rule", rule, f"pass one of {get_args(Rule)}")
    if rule == "noise":
        known = math.nan if noise is None else noise
        require(known >= 0, "noise", noise, "pass the noise scale, at least 0")
        return learning_rate / _point(end, start, known, None).steps
    return learning_rate * math.pow(end / start, 1.0 if rule == "linear" else 0.5)


def recommend(
    noise: NoiseScale,
    *,
    batch_size: int,
    learning_rate: float | None = None,
    optimizer: str | None = None,
    step_seconds: Mapping[int, float] | None = None,
    max_micro_batch_size: int | None = None,
    max_batch_size: int | None = None,
    world_size: int = 1,
) -> BatchSizeAdvice:
    """Advise on the global batch size. Bad arguments raise ``InvalidArgumentError``.

    Args:
        noise: the measurement. Where its interval is too wide to act on, the advice is to stay.
        batch_size: the present global batch size, over all ranks and micro-batches.
        learning_rate: the present one, which the advice scales by the rule for the optimizer.
        optimizer: its class name. SGD takes rule ``"noise"`` of ``scale_learning_rate``, the Adam
            family and RMSProp ``"sqrt"``; for others no learning rate is given.
        step_seconds: measured seconds per optimizer step by global batch size, at least two sizes.
            With it the advice takes the least time to a target, within 5% the fewest samples, and
            no size outside the timed ones. Without it the advice is the noise scale itself.
        max_micro_batch_size: most samples that fit one rank's memory at once.
        max_batch_size: largest global batch size allowed.
        world_size: data-parallel ranks; every size is a multiple of it.
    """
    now, world = _whole("batch_size", batch_size), _whole("world_size", world_size)
    require(now % world == 0, "batch_size", now, f"pass a multiple of world_size={world}")
    most = _whole("max_batch_size", max_batch_size, LARGEST)
    require(most >= now, "max_batch_size", most, f"it must not be below batch_size={now}")
    room = _whole("max_micro_batch_size", max_micro_batch_size, LARGEST)
    if learning_rate is not None:
        scale_learning_rate(learning_rate, now, now, rule="linear")  # refuses what is out of range
    timing = None if step_seconds is None else _fit_step_time(step_seconds)
    sizes = _sizes(world, most, now, timing)
    low, high = (_best(end, sizes, timing) for end in (noise.low, noise.high))
    best, curve, reasons = now, [], [str(noise)]
    if noise.actionable:
        best = _best(noise.value, sizes, timing)
        low, high = min(low, best), max(high, best)
        first, last = min(low, now) / 4, max(high, now) * 4
        curve = [_point(b, now, noise.value, timing) for b in sizes if first <= b <= last]
        reasons += _why(noise.value, best, sizes, timing)
    elif not low <= now <= high:
        end, side = ("low", "larger") if low > now else ("high", "smaller")
        reasons.append(f"yet even its {end} end calls for a {side} batch")
    rate, notes = _rate(learning_rate, optimizer, now, best, noise.value)
    per_rank = best // world
    micro = next(m for m in range(min(room, per_rank), 0, -1) if per_rank % m == 0)
    return BatchSizeAdvice(
        **asdict(_point(best, now, noise.value, timing)),
        low=low,
        high=high if math.isfinite(noise.high) else None,
        micro_batch_size=micro,
        accumulation_steps=per_rank // micro,
        world_size=world,
        learning_rate=rate,
        reason="; ".join(reasons + notes),
        curve=tuple(curve),
        present_batch_size=now,
    )


def _fit_step_time(step_seconds: Mapping[int, float]) -> _StepTime:
    """Least squares of relative errors, both terms at least zero."""
    from scipy.optimize import nnls

    sizes = tuple(sorted(_whole("step_seconds", b) for b in step_seconds))
    seconds = np.array([step_seconds[b] for b in sizes], np.float64)
    valid = len(sizes) > 1 and bool(np.all(np.isfinite(seconds) & (seconds > 0)))
    require(valid, "step_seconds", step_seconds, "pass seconds above 0 for two or more batch sizes")
    # In units of the largest size, for columns of like scale.
    columns = np.stack([1 / seconds, np.array(sizes) / sizes[-1] / seconds], axis=1)
    fixed, slope = (float(c) for c in nnls(columns, np.ones(len(sizes)))[0])
    return _StepTime(fixed, slope / sizes[-1], sizes)


def _sizes(world: int, most: int, now: int, timing: _StepTime | None) -> list[int]:
    """Multiples of ``world`` up to ``most``, ascending: round ones, the present one, those timed.

    Round per rank is a power of two, and from 24 on 1.5 times one, which keeps it a multiple of 8
    for the matrix units. Beyond the sizes timed the fit is not to be trusted: none is offered.
    """
    powers = [2**k for k in range(LARGEST.bit_length())]
    sizes = {world * n for n in powers + [3 * n for n in powers if n >= 8]}
    if timing:
        sizes = {b for b in sizes if timing.timed[0] <= b <= timing.timed[-1]}
        sizes.update(timing.timed)
    return sorted(b for b in sizes | {now} if b <= most and b % world == 0)


def _best(noise: float, sizes: list[int], timing: _StepTime | None) -> int:
    """The size nearest to the noise scale, or the smallest that reaches a target soonest."""
    noise = min(noise, float(LARGEST))
    if timing is None:
        return min(sizes, key=lambda b: abs(math.log(b / noise))) if noise > 0 else sizes[0]
    times = [steps_ratio(b, noise) * timing(b) for b in sizes]
    return next(b for b, t in zip(sizes, times, strict=True) if t <= FLAT * min(times))


def _why(noise: float, best: int, sizes: list[int], timing: _StepTime | None) -> list[str]:
    wanted, reasons = noise, ["at that size a target takes twice the fewest steps and samples"]
    if timing:
        wanted = math.sqrt(noise * timing.fixed / timing.slope) if timing.slope else math.inf
        fastest = min(sizes, key=lambda b: steps_ratio(b, noise) * timing(b))
        cost = f"a step takes {timing.fixed:.3g} s plus {timing.slope:.3g} s per sample"
        reasons = [f"{cost}, so a target is reached soonest at {fastest:,}"]
        if best < fastest:
            reasons.append(f"{best:,} takes at most 5% longer and fewer samples")
    if not sizes[0] <= wanted <= sizes[-1]:
        side = "larger" if wanted > sizes[-1] else "smaller"
        reasons.append(f"a {side} size may do better, but was not allowed or not timed")
    return reasons


def _rate(
    rate: float | None, optimizer: str | None, now: int, best: int, noise: float
) -> tuple[float | None, list[str]]:
    """The learning rate for the new size, and what to say about it."""
    if rate is None or best == now:
        return rate, []
    rule = RULES.get(str(optimizer).lower())
    if rule is None:
        return None, [f"no learning rate is given: no rule is known for optimizer={optimizer!r}"]
    scaled = scale_learning_rate(rate, now, best, rule=rule, noise=noise)
    note = "reach it by a gradual warm-up" if scaled > rate else "lower it with the batch size"
    if rule == "sqrt":  # Merrill et al. 2025 measured how much more
        note = "adaptive optimizers often make use of more samples than the noise scale"
    return scaled, [f'learning rate by rule "{rule}" of scale_learning_rate; {note}']


def _point(size: int, now: int, noise: float, timing: _StepTime | None) -> CurvePoint:
    # (1 + noise/size) / (1 + noise/now), also for an infinite noise scale.
    steps = now / size * ((size + noise) / (now + noise) if math.isfinite(noise) else 1.0)
    seconds = None if timing is None else steps * timing(size) / timing(now)
    return CurvePoint(size, steps, steps * size / now, seconds)


def _whole(name: str, seen: Any, default: int = 0) -> int:
    number = default if seen is None else seen
    whole = isinstance(number, numbers.Integral) and int(number) >= 1
    require(whole, name, seen, "pass a whole number of at least 1")
    return int(number)
