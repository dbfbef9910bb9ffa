"""What branches to train from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gradstats.advice import ADAPTIVE
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import require, whole
from gradstats.workbench.critical.branches import optimizer_of
from gradstats.workbench.workload import Workload

__all__ = ["Plan", "Settings"]

RULES: dict[str, Callable[[int], float]] = {
    "sqrt": math.sqrt,
    "linear": float,
    "none": lambda multiplier: 1.0,
}


@dataclass(frozen=True)
class Settings:
    """What decides the branches' losses: runs of other settings are not comparable.

    Args:
        batch_size: samples per step of the unbranched run. Default: the workload's.
        multipliers: of the batch size; 1 is added.
        rule: what a multiplier k does to the learning rate: "sqrt" √k, "linear" k, "none". Default: "sqrt"
            for Adam and its like (Merrill et al. 2025; Malladi et al. 2022), "linear" for SGD.
        warm_up: steps of the unbranched run before the checkpoint.
        samples: for which each branch is trained. Rounded up, so that every branch makes whole steps
            between evaluations. Default: 32 steps of the largest batch.
        evaluations: how often each branch is evaluated on its way, evenly over the samples.
        held_out: evaluate on the samples held out. Default: on training samples, whose loss is what the
            steps lower; the loss of held-out samples rises again where a model overfits.
        evaluation_samples: how many, at most.
        seeds: orders of the data (and random numbers of the model), each of which every branch takes.
        seed: the first of them.
    """

    batch_size: int | None = None
    multipliers: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    rule: str | None = None
    warm_up: int = 200
    samples: int | None = None
    evaluations: int = 8
    held_out: bool = False
    evaluation_samples: int = 2048
    seeds: int = 3
    seed: int = 0


class Plan:
    """The settings with nothing left open."""

    def __init__(self, workload: Workload, asked: Settings) -> None:
        """Raises InvalidArgumentError for what is out of range, or not known of the workload."""
        size = asked.batch_size or workload.batch_size
        if size is None:
            raise InvalidArgumentError(
                "the batch size trained with is not known; pass --batch-size (batch_size=), or a workload "
                "that has one"
            )
        self.batch_size = whole("batch_size", size)
        for name in ("warm_up", "seed"):
            value = getattr(asked, name)
            require(value >= 0, name, value, "pass a whole number of at least 0")
        for name in ("evaluations", "evaluation_samples", "seeds"):
            whole(name, getattr(asked, name))
        if asked.held_out and not workload.num_validation:
            raise InvalidArgumentError(
                "the workload has no samples held out; give gradstats.Workload(validation=...), or evaluate "
                "on its training samples"
            )
        given = asked.multipliers
        self.multipliers = sorted({1, *(whole("multipliers", m) for m in given)})
        require(len(self.multipliers) > 1, "multipliers", given, "pass at least one above 1")
        largest, unit = self.multipliers[-1], math.lcm(*self.multipliers)
        remedy = (
            "pass ones that divide each other, such as 2 4 8: all must meet after as many samples"
        )
        require(unit <= 4 * largest, "multipliers", given, remedy)
        samples = whole("samples", asked.samples, 32 * largest * self.batch_size)
        grid = unit * self.batch_size  # after which all branches made whole steps
        self.evaluations = min(asked.evaluations, max(1, samples // grid))
        self.every = math.ceil(samples / (self.evaluations * grid)) * grid
        self.samples = self.every * self.evaluations
        self.rule = asked.rule or _rule(optimizer_of(workload))
        require(self.rule in RULES, "rule", asked.rule, f"pass one of {', '.join(RULES)}")
        self.asked = asked
        self.seeds = [asked.seed + 1 + i for i in range(asked.seeds)]  # the warm-up has asked.seed

    def scale(self, multiplier: int) -> float:
        return RULES[self.rule](multiplier)

    def to_dict(self) -> dict[str, Any]:
        """What runs must have in common; more multipliers or seeds may be added to a file."""
        own = ("batch_size", "rule", "samples", "every", "evaluations")
        asked = ("warm_up", "held_out", "evaluation_samples", "seed")
        return {k: getattr(self, k) for k in own} | {k: getattr(self.asked, k) for k in asked}


def _rule(optimizer: torch.optim.Optimizer) -> str:
    name = type(optimizer).__name__
    if name.lower() in ADAPTIVE:
        return "sqrt"
    if name == "SGD":
        return "linear"
    raise InvalidArgumentError(
        f"no rule is known for how {name}'s learning rate goes with the batch; pass --rule (rule=) sqrt, "
        "linear or none"
    )
