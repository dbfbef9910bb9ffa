"""Batch-size schedulers: policies as pure functions, and the class that carries them out."""

from gradstats.agreement import decide_on_first_rank
from gradstats.schedulers.policies import (
    Policy,
    Seen,
    batch_for_momentum,
    instead_of_decay,
    milestones,
    noise_scale,
    norm_test,
    ramp,
    soonest,
)
from gradstats.schedulers.scheduler import BatchSizeChange, BatchSizeScheduler

__all__ = [
    "BatchSizeChange",
    "BatchSizeScheduler",
    "Policy",
    "Seen",
    "batch_for_momentum",
    "decide_on_first_rank",
    "instead_of_decay",
    "milestones",
    "noise_scale",
    "norm_test",
    "ramp",
    "soonest",
]
