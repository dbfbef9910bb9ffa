"""What each result says: a sentence, how sure it is, and the numbers to take away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gradstats.estimators import NoiseScale
from gradstats.loggers.reading import number
from gradstats.words import readable, sizes
from gradstats.workbench.report.advice_of import Basis
from gradstats.workbench.report.inputs import Input, objects

__all__ = [
    "Fact",
    "Verdict",
    "advised",
    "by_noise",
    "critical",
    "memory",
    "rates",
    "speed",
    "swept",
]

Level = Literal["good", "fair", "poor"]
NARROW = 3.0  # ratio of an interval's ends up to which a noise scale is called well known
EXACT = "gradstats norms"  # the variant of a benchmark that a monitor is by default


@dataclass(frozen=True)
class Fact:
    """A number to take away, with a few words on it."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """`level`: "good" where it can be relied on, "fair" where roughly, "poor" where nothing is decided."""

    headline: str
    sure: str
    level: Level
    facts: Sequence[Fact] = ()
    reasons: Sequence[str] = ()


def by_noise(basis: Basis, several: bool) -> Verdict:
    noise, advice = basis.noise, basis.advice
    now, then = basis.present, basis.size
    by = f"By {basis.name}: " if several else ""
    rate = advice.get("learning_rate")
    if not noise.actionable:
        headline = (
            f"{by}keep the batch size of {now:,} for now: the noise scale is not known well enough"
        )
        level: Level = "poor"
    elif now == then:
        headline, level = f"{by}keep the batch size of {now:,}", _level(noise)
    else:
        headline = f"{by}change the batch size from {now:,} to {then:,}"
        if rate is not None:
            headline += f" and the learning rate to {readable(rate)}"
        costs = [
            _change(advice["steps"], "steps", "fewer"),
            _change(advice["samples"], "samples", "fewer"),
        ]
        if advice.get("seconds") is not None:
            costs.append(_change(advice["seconds"], "time", "less"))
        headline += f": {', '.join(costs)} to the same loss"
        level = _level(noise)
    interval = sizes(advice["low"], advice["high"])
    facts = [
        Fact(
            "Batch size",
            f"{now:,}" if now == then else f"{now:,} → {then:,}",
            f"its interval gives {interval}",
        ),
        _noise_fact(noise),
    ]
    if rate is not None:
        facts.append(Fact("Learning rate", readable(rate), "for the advised batch size"))
    elif now != then and basis.factors:
        sgd, adam = (readable(basis.factors[kind]) for kind in ("SGD", "Adam"))
        facts.append(Fact("Learning rate", f"× {sgd}", f"for SGD; × {adam} for Adam and its kin"))
    if now != then:
        facts.append(Fact("Steps to the target", _times(advice["steps"]), f"of {now:,} a step"))
    if advice["accumulation_steps"] > 1 or advice["world_size"] > 1:
        parts = f"{advice['micro_batch_size']:,} × {advice['accumulation_steps']:,}"
        ranks = f" × {advice['world_size']:,}" if advice["world_size"] > 1 else ""
        facts.append(Fact("Micro-batches", parts + ranks, "micro-batch × accumulation × ranks"))
    reasons = [_capital(part) for part in str(advice["reason"]).split("; ")]
    return Verdict(_sentence(headline), _sure(noise), level, facts, reasons)


def _noise_fact(noise: NoiseScale) -> Fact:
    if not math.isfinite(noise.value):
        return Fact("Noise scale", "not bounded" if math.isinf(noise.value) else "unknown")
    end = "up" if math.isinf(noise.high) else f"to {readable(noise.high)}"
    interval = f"{100 * noise.confidence:.3g}% interval {readable(noise.low)} {end}"
    return Fact("Noise scale", readable(noise.value), interval)


def _level(noise: NoiseScale) -> Level:
    return "good" if noise.high <= NARROW * noise.low else "fair"


def _sure(noise: NoiseScale) -> str:
    if not noise.actionable:
        return "Not sure enough to act on: log more steps, or larger batches, until the interval is narrower."
    ratio = readable(noise.high / noise.low)
    known = "Well known" if _level(noise) == "good" else "Known to its order of size"
    return (
        f"{known}: the ends of the noise scale's {100 * noise.confidence:.3g}% interval are a factor of "
        f"{ratio} apart. Costs by the noise-scale model, at the learning rate that suits each size."
    )


def advised(given: Input) -> Verdict | None:
    plan = given.content.get("plan")
    if not isinstance(plan, dict):
        return None
    size, micro, pieces, ranks = (
        number(plan.get(key))
        for key in ("batch_size", "micro_batch_size", "accumulation_steps", "world_size")
    )
    rate, steps = number(plan.get("learning_rate")), number(plan.get("steps"))
    said, facts = [], []
    if size >= 1:
        now = _present(given)
        change = "" if not now >= 1 else ", as now" if now == size else f" instead of {now:,.0f}"
        said.append(f"batches of {size:,.0f}{change}")
        detail = " × ".join(f"{n:,.0f}" for n in (micro, pieces, ranks) if n >= 1)
        facts.append(Fact("Batch size", f"{size:,.0f}", f"as {detail}" if detail else ""))
    if rate > 0:
        warm = number(plan.get("warmup_steps"))
        said.append(f"a learning rate of {readable(rate)}")
        detail = f"after {warm:,.0f} steps of warm-up" if warm >= 1 else ""
        facts.append(Fact("Learning rate", readable(rate), detail))
    if steps >= 1:
        said.append(f"{steps:,.0f} steps")
        facts.append(Fact("Steps", f"{steps:,.0f}"))
    if not said:
        return None
    reasons = [_capital(str(reason)) for reason in _list(given.content.get("reasons"))]
    measured = number(plan.get("measured")) if "measured" in plan else math.nan
    level: Level = "fair" if measured == 0 else "good"
    sure = "Planned by gradstats advise from what was measured."
    if level == "fair":
        sure = "A published starting point: nothing of this training was measured."
    return Verdict(_sentence("Train with " + _and(said)), sure, level, facts, reasons)


def _present(given: Input) -> float:
    """The batch size that a plan is compared with; NaN where none is named."""
    advice = given.content.get("advice")
    present = advice.get("present") if isinstance(advice, dict) else None
    return number(present.get("batch_size")) if isinstance(present, dict) else math.nan


def swept(given: Input) -> Verdict | None:
    """Which plan got furthest by samples, steps and time, as the sweep found."""
    found = {str(v.get("by")): v for v in objects(given.content.get("verdicts")) if v.get("best")}
    if not found:
        return None
    parts, tied = [], False
    for by, word in (("samples", "by samples"), ("steps", "by steps"), ("seconds", "by time")):
        if by in found:
            best = [str(found[by]["best"]), *map(str, found[by].get("tied") or ())]
            tied |= len(best) > 1
            parts.append(f"{' or '.join(best)} {word}")
    first = found.get("samples") or next(iter(found.values()))
    loss = number((first.get("means") or {}).get(first["best"]))
    detail = f"{str(first.get('measure', 'loss')).replace('_', ' ')} {readable(loss)}"
    fact = Fact("Best plan by samples", str(first["best"]), detail if math.isfinite(loss) else "")
    sure = "Where several plans are named, their trials cannot be told apart."
    if not tied:
        sure = "Each is ahead of the others by more than its trials scatter (90% intervals)."
    sentences = [str(verdict["sentence"]) for verdict in found.values() if verdict.get("sentence")]
    headline = f"Of the plans tried, the best is {_and(parts)}"
    return Verdict(_sentence(headline), sure, "fair" if tied else "good", [fact], sentences)


def critical(given: Input) -> Verdict | None:
    size, low, high = (number(given.content.get(k)) for k in ("critical_batch_size", "low", "high"))
    if not size >= 1:
        return None
    end = "up" if not math.isfinite(high) else f"to {readable(high)}"
    percent = 100 * number(given.content.get("confidence", 0.9))
    interval = f"{percent:.3g}% interval {readable(low)} {end}" if low >= 0 else "no interval"
    headline = (
        f"Batches of up to {readable(size)} lose nothing over equal samples (critical batch size)"
    )
    fact = Fact("Critical batch size", readable(size), interval)
    sure = f"By branched runs from one checkpoint; {interval}."
    doubted = bool(given.content.get("remarks")) or not math.isfinite(high)
    return Verdict(_sentence(headline), sure, "fair" if doubted else "good", [fact])


def rates(given: Input) -> Verdict | None:
    """The suggested rates, by batch size where several were tried."""
    found = [
        {key: number(curve.get(key)) for key in ("batch_size", "suggested", "low", "high")}
        for curve in given.content["curves"]
    ]
    found = [curve for curve in found if curve["suggested"] > 0]
    if not found:
        return None
    parts = []
    for curve in found:
        at = f" at a batch size of {curve['batch_size']:,.0f}" if curve["batch_size"] >= 1 else ""
        parts.append(f"{readable(curve['suggested'])}{at}")
    ends = [readable(end([c["suggested"] for c in found])) for end in (min, max)]
    detail = ""
    if len(found) > 1:
        sizes = [c["batch_size"] for c in found]
        detail = f"for batch sizes {min(sizes):,.0f} to {max(sizes):,.0f}"
    elif found[0]["high"] >= found[0]["low"] > 0:
        detail = f"{readable(found[0]['low'])} to {readable(found[0]['high'])} work"
    fact = Fact("Learning rate, range test", " – ".join(dict.fromkeys(ends)), detail)
    return Verdict(
        _sentence(f"Use a learning rate of about {_and(parts)}"),
        "By range tests of a few steps: the edge in a long training may lie lower.",
        "fair",
        [fact],
    )


def memory(given: Input) -> Verdict | None:
    size = number(given.content.get("recommended"))
    if not size >= 1:
        return None
    device = str(given.content.get("device") or "this device").replace("cpu", "the CPU")
    headline = f"Micro-batches of {size:,.0f} fit the memory of {device}"
    return Verdict(
        _sentence(headline),
        "Confirmed by real steps in a fresh process.",
        "good",
        [Fact("Largest micro-batch", f"{size:,.0f}", f"fits {device}")],
    )


def speed(given: Input) -> Verdict | None:
    """What exact norms cost in whole steps, by model."""
    ratios = {
        str(step.get("model")): number(step.get("ratio"))
        for step in given.content["steps"]
        if step.get("variant") == EXACT and number(step.get("ratio")) > 0
    }
    if not ratios:
        return None
    parts = [f"{readable(ratio)} × ({model})" for model, ratio in ratios.items()]
    headline = f"A step measured exactly takes {_and(parts)} the plain step's time on this machine"
    ends = dict.fromkeys(readable(end(ratios.values())) for end in (min, max))
    fact = Fact("Measured step", f"× {' – '.join(ends)}", "of the plain one's time")
    return Verdict(_sentence(headline), "Timed on this machine, in turns.", "good", [fact])


def _change(ratio: float, what: str, smaller: str) -> str:
    """``25% fewer steps``, ``13% more samples``, ``3.2 × the time``."""
    if ratio >= 2:
        return f"{_times(ratio)} the {what}"
    percent = readable(
        abs(100 * (ratio - 1)) if abs(ratio - 1) < 0.01 else round(abs(100 * (ratio - 1)))
    )
    return f"{percent}% {'more' if ratio > 1 else smaller} {what}"


def _times(ratio: float) -> str:
    return f"{readable(ratio)} ×"


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(text: str) -> str:
    return _capital(text) + "."


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
