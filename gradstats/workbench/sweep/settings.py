"""What a sweep is asked to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

from gradstats.errors import InvalidArgumentError
from gradstats.workbench.sweep.plans import Decay, Plan, Rule, distinct
from gradstats.workbench.sweep.sharpness import Sharpness

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Plans to compare, and how.

    Args:
        target: `module:factory` of a `gradstats.Workload`.
        plans: equal in samples, or it is remarked upon.
        seeds: trials of each plan, from the seeds 0 to seeds − 1.
        learning_rate: of the `base` plan. Default: that of the workload's optimizer.
        rule: how the other plans' rates follow from it: "same" for all, or "linear", "sqrt" or "noise" of
            `gradstats.advice.scale_learning_rate`. A plan's own rate comes before.
        base: name of the plan that the rate suits. Default: the one with the workload's own batch
            size, else the first.
        noise_scale: for rule "noise". Default: measured in the base plan's first trial, the median of
            its second half, before the others begin.
        warm_up, decay: of every trial's rate, over its own samples; see `plans.rate_factor`.
        looks: points of each trial's curve.
        evaluation: samples that losses at a point are taken on, at most, of each set.
        micro_batch_size: samples of one backward at most; larger batches are accumulated.
        sharpness: what to measure of the minima reached.
        variance: whether to measure the gradient's variance against 1/B, at the weights that the first
            plan has half-way; `precision`: to what relative standard error.
        target_loss: for the steps to it. Default: the lowest that all trials reach.
        threads: of each trial. Default: the machine's cores over the trials that run at a time.
    """

    target: str
    plans: tuple[Plan, ...]
    seeds: int = 5
    learning_rate: float | None = None
    rule: Rule = "same"
    base: str | None = None
    noise_scale: float | None = None
    warm_up: float = 0.0
    decay: Decay = "none"
    looks: int = 40
    evaluation: int = 2048
    micro_batch_size: int | None = None
    sharpness: Sharpness | None = None
    variance: bool = True
    precision: float = 0.02
    target_loss: float | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        distinct(self.plans)
        for name in ("seeds", "looks", "evaluation", "micro_batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgumentError(f"{name}={value} must be at least 1")
        for name, kind in (("rule", Rule), ("decay", Decay)):
            if getattr(self, name) not in get_args(kind):
                raise InvalidArgumentError(
                    f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(kind))}"
                )
        for name in ("learning_rate", "noise_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidArgumentError(f"{name}={value} must be above 0")
        if not 0 <= self.warm_up < 1:
            raise InvalidArgumentError(
                f"warm_up={self.warm_up} must be a share of the samples, from 0 to below 1"
            )
        if not 0.001 <= self.precision < 1:
            raise InvalidArgumentError(
                f"precision={self.precision} must be a relative error from 0.001 to below 1"
            )
        if self.base is not None and self.base not in [p.name for p in self.plans]:
            names = ", ".join(p.name for p in self.plans)
            raise InvalidArgumentError(f"base={self.base} is not one of the plans {names}")
        size = self.micro_batch_size
        odd = [p.name for p in self.plans if size and p.batch_size > size and p.batch_size % size]
        if odd:
            raise InvalidArgumentError(
                f"micro_batch_size={size} does not divide the batches of {', '.join(odd)}; pass a divisor"
            )

    def base_plan(self, batch_size: int | None, before: str | None) -> Plan:
        """The plan that the learning rate suits: as it is told here, or was told `before`; else the one
        with the workload's batch size, or the first.
        """
        named = [plan for plan in self.plans if plan.name == (self.base or before)]
        fitting = [plan for plan in self.plans if plan.batch_size == batch_size]
        return (*named, *fitting, *self.plans)[0]

    def fixed(self) -> dict[str, Any]:
        """What may not change while a sweep is stopped; plans and seeds may be added."""
        free = ("plans", "seeds", "variance", "precision", "target_loss", "threads")
        return {name: value for name, value in asdict(self).items() if name not in free}
