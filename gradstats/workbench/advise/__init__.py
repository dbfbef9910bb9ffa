"""From measurements to a plan: batch size, micro-batches, ranks, learning rate, warm-up, steps."""

from __future__ import annotations

from gradstats.workbench.advise.evidence import Evidence, RatePoint, gather, of_target, with_present
from gradstats.workbench.advise.overfitting import Curve, Trend, overfitting
from gradstats.workbench.advise.plan import Advised, Plan, advise
from gradstats.workbench.advise.remark import Remark
from gradstats.workbench.advise.starting_points import STARTING_POINTS, StartingPoint

__all__ = [
    "STARTING_POINTS",
    "Advised",
    "Curve",
    "Evidence",
    "Plan",
    "RatePoint",
    "Remark",
    "StartingPoint",
    "Trend",
    "advise",
    "gather",
    "of_target",
    "overfitting",
    "with_present",
]
