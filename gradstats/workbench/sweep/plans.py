"""What is compared: so many optimizer steps of so many samples, at a learning rate. Numbers only."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gradstats.advice import scale_learning_rate
from gradstats.errors import InvalidArgumentError

__all__ = ["Decay", "Plan", "Rule", "parse", "rate_factor", "scaled_rate"]

Rule = Literal["same", "linear", "sqrt", "noise"]
Decay = Literal["none", "cosine", "linear"]
FORM = re.compile(r"(\d+)[xX×](\d+)(?:@([0-9.eE+-]+))?")


@dataclass(frozen=True)
class Plan:
    """`steps` optimizer steps of `batch_size` samples; `learning_rate` where the plan names its own."""

    batch_size: int
    steps: int
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        rate = self.learning_rate
        if self.batch_size < 1 or self.steps < 1:
            raise InvalidArgumentError(f"plan {self.name} needs at least one sample and one step")
        if rate is not None and not 0 < rate < math.inf:
            raise InvalidArgumentError(f"plan {self.name} needs a learning rate above 0")

    @property
    def samples(self) -> int:
        return self.batch_size * self.steps

    @property
    def name(self) -> str:
        """As it is written: ``64x500``, or ``64x500@0.1``."""
        rate = "" if self.learning_rate is None else f"@{self.learning_rate:g}"
        return f"{self.batch_size}x{self.steps}{rate}"


def parse(text: str) -> tuple[Plan, ...]:
    """Plans of a line ``16x2000,64x500,256x125@0.1``: batch size × steps, and @ a learning rate.

    Raises InvalidArgumentError where it is of another form, or names a plan twice.
    """
    plans = []
    for part in text.split(","):
        found = FORM.fullmatch(part.strip())
        try:
            rate = float(found[3]) if found and found[3] else None
        except ValueError:
            found = None
        if not found:
            raise InvalidArgumentError(
                f"{part.strip()!r} is no plan; write batch size x steps, as in 16x2000,64x500, "
                "or 64x500@0.1 for a learning rate of its own"
            )
        plans.append(Plan(int(found[1]), int(found[2]), rate))
    return distinct(plans)


def distinct(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """The plans, of which no two may be the same, and there must be one at least."""
    names = [plan.name for plan in plans]
    if not plans or len(set(names)) < len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        seen = f"{', '.join(twice)} twice" if twice else "none"
        raise InvalidArgumentError(f"plans={seen}; give different plans, at least one")
    return tuple(plans)


def scaled_rate(
    rate: float, base: Plan, plan: Plan, rule: Rule, noise_scale: float | None = None
) -> float:
    """`plan`'s learning rate, from the one that suits `base`; its own where it names one.

    "same" gives all plans one rate; the others are the rules of `gradstats.advice.scale_learning_rate`.
    """
    if rule not in get_args(Rule):
        raise InvalidArgumentError(f"rule={rule!r} must be one of {', '.join(get_args(Rule))}")
    if plan.learning_rate is not None:
        return plan.learning_rate
    if rule == "same":
        return rate
    return scale_learning_rate(rate, base.batch_size, plan.batch_size, rule=rule, noise=noise_scale)


def rate_factor(progress: float, warm_up: float, decay: Decay) -> float:
    """The learning rate over the plan's, after a share `progress` (0 to 1) of the plan's samples.

    It rises on a straight line over the share `warm_up`, then stays, or falls to 0 on a straight line
    or half a cosine.
    """
    if progress < warm_up:
        return progress / warm_up
    rest = (progress - warm_up) / (1 - warm_up)
    if decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    return 1 - rest if decay == "linear" else 1.0
