"""Batch a for b steps against batch c for d steps: which gets further, and in what time. Numbers only.

By the noise-scale model a step of B samples is worth ``1/(1 + B_noise/B)`` steps without noise
(McCandlish et al., arXiv:1812.06162, section 2.3), so b steps get as far as ``b/(1 + B_noise/B)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradstats.estimators import NoiseScale, readable, require, steps_ratio, whole
from gradstats.layouts import LARGEST, StepSeconds, split, step_clock
from gradstats.step_time import StepTime

__all__ = ["Comparison", "Progress", "compare"]


@dataclass(frozen=True)
class Progress:
    """What a number of steps of one batch size comes to.

    `noiseless_steps`: steps without gradient noise that get as far; `low` and `high` at the ends of the
    noise scale's interval. `seconds` and `price` are None where not known.
    """

    batch_size: int
    steps: int
    noiseless_steps: float
    low: float
    high: float
    seconds: float | None
    price: float | None

    @property
    def samples(self) -> int:
        """Samples shown in all of its steps."""
        return self.batch_size * self.steps


@dataclass(frozen=True)
class Comparison:
    """`ratio`: how far the first gets over how far the second does, between `low` and `high` with the
    noise scale's confidence. `time_ratio`: the first's seconds over the second's, None where not known.
    """

    first: Progress
    second: Progress
    ratio: float
    low: float
    high: float
    time_ratio: float | None
    noise: NoiseScale

    @property
    def further(self) -> Progress | None:
        """The one that gets further; None where the interval holds both."""
        if self.low > 1:
            return self.first
        return self.second if self.high < 1 else None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them: what is not finite becomes None."""
        plain = {**asdict(self), "noise": self.noise.to_dict()}
        plain["ratio"] = self.ratio if math.isfinite(self.ratio) else None
        for key in ("first", "second"):
            values = plain[key].items()
            plain[key] = {k: v if v is None or math.isfinite(v) else None for k, v in values}
        return plain

    def __str__(self) -> str:
        one, other = (_words(p) for p in (self.first, self.second))
        ends = f"{readable(self.low)} to {readable(self.high)} ×"
        if math.isnan(self.ratio):
            return (
                f"{one} get {ends} as far as {other}, whatever the noise scale. Why: {self.noise}."
            )
        range_ = f"{100 * self.noise.confidence:.3g}% interval {ends}"
        text = f"{one} get {readable(self.ratio)} × as far as {other} ({range_})"
        if self.time_ratio is not None:
            rate = readable(self.ratio / self.time_ratio)
            text += f", in {readable(self.time_ratio)} × the time: {rate} × as far per second"
        if self.first.price is not None and self.second.price is not None:
            prices = f"{readable(self.first.price)} and {readable(self.second.price)}"
            text += f"; they cost {prices}"
        if self.further is None:
            text += "; the interval leaves open which gets further"
        return f"{text}. Why: {self.noise}."


def compare(
    noise: NoiseScale,
    first: tuple[int, int],
    second: tuple[int, int],
    *,
    step_seconds: StepSeconds | None = None,
    world_size: int = 1,
    max_micro_batch_size: int | None = None,
    device_hour_price: float | None = None,
) -> Comparison:
    """``compare(monitor.noise_scale(), (64, 1000), (256, 250))``: 1,000 steps of 64 against 250 of 256.

    Args:
        noise: the measurement. Its interval is carried through: both get further with less noise, and
            their ratio changes one way with it, so its ends are the interval's. Where nothing is known
            of the noise scale, they are what any noise scale would give.
        first: (global batch size, optimizer steps), at the learning rate that suits it.
        second: the same of the other plan.
        step_seconds: as for `gradstats.recommend`, like the rest; with it time is given.
        world_size: data-parallel ranks.
        max_micro_batch_size: most samples that fit one rank's memory at once.
        device_hour_price: of one rank's device; with it and `step_seconds` prices are given.

    Raises InvalidArgumentError for what is out of range, and for batches that were not timed.
    """
    world = whole("world_size", world_size)
    room = whole("max_micro_batch_size", max_micro_batch_size, LARGEST)
    priced = device_hour_price is None or (
        0 <= device_hour_price < math.inf and step_seconds is not None
    )
    remedy = "pass one of at least 0, and step_seconds"
    require(priced, "device_hour_price", device_hour_price, remedy)
    clock = None
    if step_seconds is not None:
        clock, _ = step_clock(step_seconds, {world: 0.0}, world)
        if isinstance(step_seconds, StepTime):
            room = min(room, step_seconds.max_micro_batch_size)

    def progress(name: str, given: tuple[int, int]) -> Progress:
        pair = isinstance(given, Sequence) and len(given) == 2
        require(pair, name, given, "pass (global batch size, optimizer steps)")
        size, steps = (whole(name, number) for number in given)
        require(size % world == 0, name, given, f"pass a multiple of world_size={world}")
        seconds = None
        if clock is not None:
            if not isinstance(step_seconds, StepTime):
                timed = sorted(step_seconds or ())
                inside = timed[0] <= size <= timed[-1]
                require(inside, name, given, f"batches from {timed[0]} to {timed[-1]} were timed")
            seconds = steps * clock(split(size, world, room))
        price = None
        if device_hour_price is not None and seconds is not None:
            price = seconds / 3600 * world * device_hour_price
        value, low, high = (
            steps / steps_ratio(size, n) for n in (noise.value, noise.high, noise.low)
        )
        return Progress(size, steps, value, low, high, seconds, price)

    one, other = progress("first", first), progress("second", second)
    value, *ends = (_ratio(one, other, n) for n in (noise.value, noise.low, noise.high))
    time_ratio = None
    if one.seconds is not None and other.seconds is not None:
        time_ratio = one.seconds / other.seconds
    return Comparison(one, other, value, min(ends), max(ends), time_ratio, noise)


def _ratio(one: Progress, other: Progress, noise: float) -> float:
    """Of their progress, also at an infinite noise scale, where samples are all that counts."""
    if math.isinf(noise):
        return one.samples / other.samples
    steps = steps_ratio(other.batch_size, noise) / steps_ratio(one.batch_size, noise)
    return one.steps / other.steps * steps


def _words(progress: Progress) -> str:
    return f"{progress.steps:,} steps of {progress.batch_size:,} ({progress.samples:,} samples)"
