"""The plan: batch, micro-batches, ranks, learning rate, warm-up, steps. Numbers and words only.

The batch size is that of `gradstats.recommend`; what is added is what surrounds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradstats.advice import Goal, recommend
from gradstats.batch_advice import BatchSizeAdvice
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import readable, require, whole
from gradstats.layouts import LARGEST, split
from gradstats.workbench.advise.evidence import Evidence
from gradstats.workbench.advise.evidence_remarks import so_far, unmeasured
from gradstats.workbench.advise.large_batches import above_noise, large_batch_remarks, why_large
from gradstats.workbench.advise.normalisation import batch_norm_remarks
from gradstats.workbench.advise.overfitting import Trend, overfitting
from gradstats.workbench.advise.remark import Remark
from gradstats.workbench.advise.schedule import learning_rate_for, warm_up_for
from gradstats.workbench.advise.starting_points import StartingPoint, starting_point

__all__ = ["Advised", "Plan", "advise"]


@dataclass(frozen=True)
class Plan:
    """What to train with; None where it cannot be said.

    ``batch_size = micro_batch_size × accumulation_steps × world_size``, in `unit`. `learning_rate` lies
    between `learning_rate_low` and `learning_rate_high` where a range was measured, and is reached after
    `warmup_steps`. `steps`, `samples`, `epochs`, `hours` and `price` are of the training to come.
    `measured`: 1 where it rests on a measurement, 0 for a published starting point.
    """

    batch_size: int
    micro_batch_size: int | None
    accumulation_steps: int | None
    world_size: int
    optimizer: str | None
    learning_rate: float | None
    learning_rate_low: float | None = None
    learning_rate_high: float | None = None
    warmup_steps: int | None = None
    steps: int | None = None
    samples: int | None = None
    epochs: float | None = None
    hours: float | None = None
    price: float | None = None
    unit: str = "samples"
    measured: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Advised:
    """A plan, why it is so, what else to do, and the numbers behind it.

    `advice`: that of `gradstats.recommend`, None for a starting point. `trends`: what the curves of
    training and validation loss show. `sources`: the files, and what each said.
    """

    plan: Plan
    reasons: tuple[str, ...]
    remarks: tuple[Remark, ...]
    advice: BatchSizeAdvice | None
    trends: tuple[Trend, ...]
    sources: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: the content of a result file of kind "advise"."""
        return {
            "plan": self.plan.to_dict(),
            "reasons": list(self.reasons),
            "remarks": [str(remark) for remark in self.remarks],
            "remark_parts": [remark.to_dict() for remark in self.remarks],
            "advice": None if self.advice is None else self.advice.to_dict(),
            "overfitting": [trend.to_dict() for trend in self.trends],
            "sources": list(self.sources),
        }


def advise(
    evidence: Evidence,
    *,
    task: str | None = None,
    ranks: int | None = None,
    collective_seconds: float = 0.0,
    max_batch_size: int | None = None,
    epochs: float | None = None,
    steps_left: int | None = None,
    goal: Goal = "time",
    device_hour_price: float | None = None,
    batch_norm: bool | None = None,
) -> Advised:
    """The plan that follows from what is known; see `gradstats.workbench.advise.gather` for files.

    Args:
        evidence: measurements; `dataclasses.replace` puts other present settings into it.
        task: a key of STARTING_POINTS, for where nothing was measured.
        ranks: devices to train on (default: as many as the training that was measured). Where step times
            were measured, fewer are chosen if that is as quick, at `collective_seconds` a step for the
            collectives of all of them.
        max_batch_size, goal, device_hour_price: as for `gradstats.recommend`; a price needs step times.
        epochs, steps_left: of the training to come at the present batch size, either one; the plan's steps
            follow. `epochs` needs the number of samples in the data.
        batch_norm: whether the model has BatchNorm layers, where the evidence does not say.

    Raises InvalidArgumentError where there is nothing to go by, or an argument is out of range.
    """
    ranks = whole("ranks", ranks, evidence.world_size or 1)
    require(epochs is None or 0 < epochs < math.inf, "epochs", epochs, "pass a number above 0")
    both = epochs is not None and steps_left is not None
    require(not both, "epochs, steps_left", (epochs, steps_left), "pass one of them")
    if batch_norm is not None:
        names = (evidence.batch_norm or ()) if batch_norm else None
    else:
        names = evidence.batch_norm
    trends = tuple(overfitting(group) for group in evidence.curves)
    if evidence.noise is None or evidence.batch_size is None:
        point = starting_point(_needed(task, evidence))
        return _started(point, evidence, ranks, names, epochs, trends)
    now = evidence.batch_size
    if epochs is not None:
        if evidence.data_samples is None:
            raise InvalidArgumentError(
                f"epochs={epochs} cannot be used: it is not known how many samples the data holds"
            )
        steps_left = math.ceil(epochs * evidence.data_samples / now)
    worlds = None
    if evidence.timing is not None and ranks != evidence.timing.world_size:
        worlds = {evidence.timing.world_size: 0.0, ranks: collective_seconds}
    advice = recommend(
        evidence.noise,
        batch_size=now,
        learning_rate=None if evidence.rates else evidence.learning_rate,  # see learning_rate_for
        optimizer=evidence.optimizer,
        step_seconds=evidence.timing,
        max_micro_batch_size=evidence.largest,
        max_batch_size=max_batch_size,
        world_size=ranks if evidence.timing is None else evidence.timing.world_size,
        world_sizes=worlds,
        goal=goal,
        steps_left=steps_left,
        device_hour_price=device_hour_price,
        critical=evidence.critical,
    )
    reasons = advice.reason.split("; ")
    if not evidence.noise.num_samples:  # not measured itself: see `gather`
        reasons[:1] = []
    rate, why = learning_rate_for(evidence, advice)
    steps = None if steps_left is None else max(1, math.ceil(steps_left * advice.steps))
    suggested, lowest, highest = (
        (None, None, None) if rate is None else (rate.suggested, rate.low, rate.high)
    )
    warmup, why_warm = warm_up_for(evidence, advice.batch_size, suggested, steps)
    samples = None if steps is None else steps * advice.batch_size
    plan = Plan(
        batch_size=advice.batch_size,
        micro_batch_size=advice.micro_batch_size,
        accumulation_steps=advice.accumulation_steps,
        world_size=advice.world_size,
        optimizer=evidence.optimizer,
        learning_rate=suggested,
        learning_rate_low=lowest,
        learning_rate_high=highest,
        warmup_steps=warmup,
        steps=steps,
        samples=samples,
        epochs=samples / evidence.data_samples if samples and evidence.data_samples else None,
        hours=advice.hours,
        price=advice.price,
    )
    reasons += why + why_warm + _lengths(advice, steps_left)
    remarks = batch_norm_remarks(names, advice.micro_batch_size, advice.world_size)
    large = why_large(advice.batch_size, evidence.data_samples)
    remarks += large_batch_remarks(large, evidence.optimizer)
    remarks += above_noise(advice.batch_size, evidence.noise.high * (evidence.critical or 1.0))
    remarks += unmeasured(evidence, ranks, collective_seconds, worlds is not None)
    remarks += so_far(evidence, trends)
    return Advised(plan, tuple(reasons), tuple(remarks), advice, trends, evidence.sources)


def _needed(task: str | None, evidence: Evidence) -> str:
    if task is not None:
        return task
    if evidence.noise is not None:
        raise InvalidArgumentError(
            "the present batch size is not known: pass it, or a file of `gradstats measure`"
        )
    raise InvalidArgumentError(
        "there is no noise scale to go by: pass a file of `gradstats measure` or `gradstats critical`, "
        "or a log, or a task for a published starting point"
    )


def _started(
    point: StartingPoint,
    evidence: Evidence,
    ranks: int,
    names: Sequence[str] | None,
    epochs: float | None,
    trends: tuple[Trend, ...],
) -> Advised:
    """A plan by what others trained with."""
    size = max(ranks, point.batch_size // ranks * ranks)
    in_samples = point.unit != "tokens"
    layout = split(size, ranks, evidence.largest or LARGEST) if in_samples else None
    data, epochs = evidence.data_samples, epochs if epochs is not None else point.epochs
    steps = point.steps
    if in_samples and epochs is not None:
        steps = math.ceil(epochs * data / size) if data else None
    warmup: int | None = point.warmup
    if point.warmup_epochs:
        warmup = math.ceil(point.warmup * data / size) if data else None
    plan = Plan(
        batch_size=size,
        micro_batch_size=layout.micro_batch_size if layout else None,
        accumulation_steps=layout.accumulation_steps if layout else None,
        world_size=ranks,
        optimizer=point.optimizer,
        learning_rate=point.learning_rate,
        warmup_steps=warmup,
        steps=steps,
        samples=None if steps is None else steps * size,
        epochs=epochs,
        unit=point.unit,
        measured=0,
    )
    sizes = f"{point.low:,}" + (f" to {point.high:,}" if point.high > point.low else "")
    reasons = [
        "a published starting point, not a measurement: `gradstats measure` finds your own noise scale",
        f"sizes of {sizes} {point.unit} are used there",
        point.note,
        f"source: {point.source}",
    ]
    remarks = []
    if point.tiny and names is None:
        names = ()  # models for these tasks nearly always have it
    if layout is not None:
        remarks += batch_norm_remarks(names, layout.micro_batch_size, ranks)
    if in_samples:
        remarks += large_batch_remarks(why_large(size, data), point.optimizer)
    remarks += so_far(evidence, trends)
    return Advised(plan, tuple(reasons), tuple(remarks), None, trends, evidence.sources)


def _lengths(advice: BatchSizeAdvice, steps_left: int | None) -> list[str]:
    if steps_left is not None:
        return [f"{steps_left:,} steps at the present batch size would get as far"]
    return [
        f"a target takes {readable(advice.steps)} × the steps and {readable(advice.samples)} × the "
        "samples of now; with the number of epochs or steps planned, the plan says how many"
    ]
