"""One trial of a sweep: what is trained, how it is looked at, and what it has to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gradstats.workbench.sweep.plans import Decay, Plan
from gradstats.workbench.sweep.sharpness import Sharpness

__all__ = ["Event", "Trial"]


@dataclass(frozen=True)
class Trial:
    """What is trained, and how it is looked at. Everything that the result's bits depend on.

    Args:
        target: `module:factory`.
        plan, learning_rate, seed: of the model, of the order of the samples, of dropout.
        looks: points of the curve, spread evenly over the steps.
        evaluation: samples that losses at a point are taken on, at most, of each set.
        warm_up, decay: of the learning rate, see `rate_factor`.
        micro_batch_size: samples of one backward at most; a larger batch is accumulated.
        threads: of torch.
        measured: whether the model's per-sample gradients can be measured.
        sharpness: what is to be known of the weights reached.
        keep_half: hand out the weights half-way, for the gradient variance at common weights.
    """

    target: str
    plan: Plan
    learning_rate: float
    seed: int
    looks: int = 40
    evaluation: int = 2048
    warm_up: float = 0.0
    decay: Decay = "none"
    micro_batch_size: int | None = None
    threads: int = 1
    measured: bool = True
    sharpness: Sharpness | None = None
    keep_half: bool = False

    @property
    def name(self) -> str:
        return f"{self.plan.name}-seed{self.seed}"


@dataclass(frozen=True)
class Event:
    """What a trial has to say. `content`: a point of the curve, bytes to keep, or the result."""

    kind: Literal["point", "checkpoint", "half", "result"]
    content: Any
