"""From the noise scale to a batch size, its learning rate and what they cost. Numbers only.

At noise scale ``N`` a target takes steps ∝ ``1 + N/B`` and samples ∝ ``1 + B/N`` (McCandlish et
al., arXiv:1812.06162, section 2.3). At ``t(B)`` seconds per step it takes ``∝ (1 + N/B)·t(B)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal, get_args

from gradstats.batch_advice import BatchSizeAdvice, CurvePoint
from gradstats.calibration import Calibration
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale, readable, require, steps_ratio, whole
from gradstats.layouts import LARGEST, Clock, Layout, StepSeconds, offered, split, step_clock
from gradstats.step_time import StepTime

__all__ = ["BatchSizeAdvice", "CurvePoint", "recommend", "scale_learning_rate"]

FLAT = 1.05  # times to a target this close count as equal: step times are not known better

Rule = Literal["linear", "sqrt", "noise"]
Goal = Literal["time", "cost"]
ADAPTIVE = ("adam", "adamw", "adamax", "nadam", "radam", "sparseadam", "rmsprop", "lamb")
RULES: dict[str, Rule] = {"sgd": "noise", **dict.fromkeys(ADAPTIVE, "sqrt")}


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
    start, end = whole("from_batch", from_batch), whole("to_batch", to_batch)
    require(rule in get_args(Rule), "rule", rule, f"pass one of {get_args(Rule)}")
    if rule == "noise":
        known = math.nan if noise is None else noise
        require(known >= 0, "noise", noise, "pass the noise scale, at least 0")
        return learning_rate / _steps(end, start, known)
    return learning_rate * math.pow(end / start, 1.0 if rule == "linear" else 0.5)


def recommend(
    noise: NoiseScale,
    *,
    batch_size: int,
    learning_rate: float | None = None,
    optimizer: str | None = None,
    step_seconds: StepSeconds | None = None,
    max_micro_batch_size: int | None = None,
    max_batch_size: int | None = None,
    world_size: int = 1,
    world_sizes: Mapping[int, float] | None = None,
    goal: Goal = "time",
    steps_left: int | None = None,
    device_hour_price: float | None = None,
    tokens_per_sample: float | None = None,
    critical: float | Mapping[str, float | None] | None = None,
) -> BatchSizeAdvice:
    """Advise on the global batch size. Bad arguments raise ``InvalidArgumentError``.

    Args:
        noise: the measurement. Where its interval is too wide to act on, the advice is to stay.
        batch_size: the present global batch size, over all ranks and micro-batches.
        learning_rate: the present one, which the advice scales by the rule for the optimizer.
        optimizer: its class name. SGD takes rule ``"noise"`` of ``scale_learning_rate``, the Adam
            family and RMSProp ``"sqrt"``; for others no learning rate is given.
        step_seconds: what ``gradstats.measure_step`` found, in samples of the noise scale's kind; or
            seconds per optimizer step by global batch size, at least two sizes.
            With it the advice takes the least time to a target, within 5% the fewest samples, and
            no size (of micro-batches, or batches) outside the timed ones. Without it the advice is the
            noise scale itself, brought to a power of two or, from 24 on, 1.5 times one.
        max_micro_batch_size: most samples that fit one rank's memory at once.
        max_batch_size: largest global batch size allowed.
        world_size: data-parallel ranks at present; a batch size is a multiple of its ranks.
        world_sizes: numbers of ranks to choose from, the present one among them, each with the seconds
            per step that collectives take (``gradstats.collective_cost`` has formulas). Needs what
            ``measure_step`` found. Default: the present one.
        goal: "time" for the soonest, within 5% with the fewest ranks; "cost" for the least device time,
            within 5% the soonest. They differ where there are several world sizes.
        steps_left: steps that the target would still take at the present batch size; hours and prices
            are then given too.
        device_hour_price: of one rank's device, in any currency.
        tokens_per_sample: where ``noise`` and ``batch_size`` are in tokens (``attach(sample="token")``),
            and all else, the advice included, is in samples of so many tokens each.
        critical: the critical batch size over the noise scale, where it was measured by branches: a number,
            or the ``calibration`` in the result of ``gradstats critical``, whose interval then widens that of
            the noise scale. The advice goes by that multiple of the noise scale; the learning rate's rule
            ``"noise"`` by the noise scale itself.
    """
    now, world = whole("batch_size", batch_size), whole("world_size", world_size)
    if tokens_per_sample is not None:
        valid = 0 < tokens_per_sample < math.inf
        require(valid, "tokens_per_sample", tokens_per_sample, "pass a number above 0")
        noise = noise.per(tokens_per_sample)
        now = max(1, round(now / tokens_per_sample / world)) * world
    measured, reasons = noise, [str(noise)]
    if critical is not None:
        factor = _factor(critical)
        noise = factor.apply(noise)
        known = factor.low < factor.high
        about = f" ({readable(factor.low)} to {readable(factor.high)})" if known else ""
        reasons.append(
            f"the critical batch size is {readable(factor.value)}{about} times that, as measured by branches"
        )
    require(now % world == 0, "batch_size", now, f"pass a multiple of world_size={world}")
    most = whole("max_batch_size", max_batch_size, LARGEST)
    require(most >= now, "max_batch_size", most, f"it must not be below batch_size={now}")
    room = whole("max_micro_batch_size", max_micro_batch_size, LARGEST)
    require(goal in get_args(Goal), "goal", goal, f"pass one of {get_args(Goal)}")
    if learning_rate is not None:
        scale_learning_rate(learning_rate, now, now, rule="linear")  # refuses what is out of range
    if steps_left is not None:
        whole("steps_left", steps_left)
    known = device_hour_price is None or (0 <= device_hour_price < math.inf and bool(steps_left))
    require(known, "device_hour_price", device_hour_price, "pass one of at least 0, and steps_left")
    worlds = {world: 0.0} if world_sizes is None else _worlds(world_sizes, world, step_seconds)
    if isinstance(step_seconds, StepTime):
        room = min(room, step_seconds.max_micro_batch_size)
    clock, takes = (None, "") if step_seconds is None else step_clock(step_seconds, worlds, world)
    start = split(now, world, room)
    layouts = offered(worlds, most, start, room, step_seconds)

    def point(layout: Layout) -> CurvePoint:
        size = layout.batch_size
        steps = _steps(size, now, noise.value)
        seconds = cost = hours = price = None
        if clock is not None:
            seconds = steps * clock(layout) / clock(start)
            cost = seconds * layout.world_size / world
            if steps_left is not None:
                hours = seconds * steps_left * clock(start) / 3600
                if device_hour_price is not None:
                    price = hours * layout.world_size * device_hour_price
        return CurvePoint(size, *layout, steps, steps * size / now, seconds, cost, hours, price)

    best, curve = start, []
    ends = [_best(end, layouts, clock, goal) for end in (noise.low, noise.high)]
    if noise.actionable:
        best = _best(noise.value, layouts, clock, goal)
        ends.append(best)
    low, high = (f(lay.batch_size for lay in ends) for f in (min, max))
    if noise.actionable:
        first, last = min(low, now) / 4, max(high, now) * 4
        curve = [point(lay) for lay in layouts if first <= lay.batch_size <= last]
        reasons += _why(noise.value, best, layouts, clock, takes, goal)
        if isinstance(step_seconds, StepTime) and best.micro_batch_size == room < best.batch_size:
            reasons.append(f"micro-batches are of {room:,}, the largest that was timed or allowed")
    elif not low <= now <= high:
        end, side = ("low", "larger") if low > now else ("high", "smaller")
        reasons.append(f"yet even its {end} end calls for a {side} batch")
    rate, notes = _rate(learning_rate, optimizer, now, best.batch_size, measured.value)
    return BatchSizeAdvice(
        **asdict(point(best)),
        low=low,
        high=high if math.isfinite(noise.high) else None,
        learning_rate=rate,
        reason="; ".join(reasons + notes),
        curve=tuple(curve),
        present=point(start),
        steps_left=steps_left,
    )


def _factor(critical: float | Mapping[str, float | None]) -> Calibration:
    """A number, or a file's: there what has no upper end is null."""
    given = critical if isinstance(critical, Mapping) else {"value": critical}
    value = given.get("value")
    valid = isinstance(value, (int, float)) and 0 < value < math.inf
    require(valid, "critical", critical, "pass a factor above 0, or the calibration of a result")
    assert value is not None
    low, high = given.get("low", value), given.get("high", value)
    return Calibration(value, low or 0.0, math.inf if high is None else high)


def require_one_unit(sample: str, timed: StepSeconds | None, tokens: float | None) -> None:
    """Raise where a monitor's counts and the times that it is given are not of the same kind."""
    if sample == "token" and isinstance(timed, StepTime) and tokens is None:
        raise InvalidArgumentError(
            "this monitor counts tokens, and measure_step timed micro-batches of whole samples; pass "
            "tokens_per_sample=, the (mean) number of tokens in a sample"
        )
    if sample != "token" and tokens is not None:
        raise InvalidArgumentError(
            f"tokens_per_sample={tokens} cannot be used; this monitor counts examples, so its batch "
            'sizes are in samples already. attach(..., sample="token") counts tokens'
        )


def _worlds(given: Mapping[int, float], now: int, timed: object) -> Mapping[int, float]:
    remedy = f"pass step_seconds= what measure_step found, and the present {now} among them"
    require(isinstance(timed, StepTime) and now in given, "world_sizes", given, remedy)
    valid = all(whole("world_sizes", w) and 0 <= s < math.inf for w, s in given.items())
    require(valid, "world_sizes", given, "pass seconds of at least 0")
    return given


def _best(noise: float, layouts: list[Layout], clock: Clock | None, goal: Goal) -> Layout:
    """The layout nearest to the noise scale, or the first that reaches a target soonest or cheapest."""
    noise = min(noise, float(LARGEST))
    if clock is None:
        size = {lay: lay.batch_size for lay in layouts}
        return min(
            layouts, key=lambda lay: abs(math.log(size[lay] / noise)) if noise else size[lay]
        )
    times = {lay: steps_ratio(lay.batch_size, noise) * clock(lay) for lay in layouts}
    if goal == "cost":
        costs = {lay: t * lay.world_size for lay, t in times.items()}
        times = {lay: t for lay, t in times.items() if costs[lay] <= FLAT * min(costs.values())}
    return next(lay for lay, t in times.items() if t <= FLAT * min(times.values()))


def _why(
    noise: float, best: Layout, layouts: list[Layout], clock: Clock | None, takes: str, goal: Goal
) -> list[str]:
    same = [lay for lay in layouts if lay.world_size == best.world_size]
    sizes, size, world = [lay.batch_size for lay in same], best.batch_size, best.world_size
    if clock is None:
        reasons = ["at that size a target takes twice the fewest steps and samples"]
        smaller, larger = noise < sizes[0], noise > sizes[-1]
    else:
        soonest = min(same, key=lambda lay: steps_ratio(lay.batch_size, noise) * clock(lay))
        fastest = soonest.batch_size
        reasons = [f"{takes}, so a target is reached soonest at {fastest:,}"]
        if size < fastest:
            reasons.append(f"{size:,} takes at most 5% longer and fewer samples")
        smaller, larger = fastest == sizes[0] > world, fastest == sizes[-1]
        worlds = sorted({lay.world_size for lay in layouts})
        if len(worlds) > 1:
            aim = "soonest" if goal == "time" else "with the least device time"
            reasons.append(f"of {worlds} ranks, {world} reach it {aim}, within 5%")
    if smaller or larger:
        side = "larger" if larger else "smaller"
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


def _steps(size: int, now: int, noise: float) -> float:
    """Steps to a target at one size over those at another, also for an infinite noise scale."""
    return now / size * ((size + noise) / (now + noise) if math.isfinite(noise) else 1.0)
