"""Exact per-sample gradient statistics and the gradient noise scale, in the ordinary backward."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradstats.errors import (
    AttachError,
    BackendError,
    BatchDimError,
    CaptureError,
    GradStatsError,
    InvalidArgumentError,
    NoStatisticsError,
    OrderError,
    UnsupportedLayerError,
)

if TYPE_CHECKING:
    from gradstats import backends, collective_cost, loggers, optim, schedulers
    from gradstats.advice import recommend
    from gradstats.attaching import attach
    from gradstats.batch_advice import BatchSizeAdvice
    from gradstats.cadence import Budget
    from gradstats.checking import check
    from gradstats.comparison import Comparison, compare
    from gradstats.grouped_loader import GroupedLoader
    from gradstats.hessian import Curvature, curvature
    from gradstats.loader import StepLoader
    from gradstats.loggers import Log
    from gradstats.monitor import Monitor
    from gradstats.noise import NoiseScale
    from gradstats.report import CheckReport
    from gradstats.rules import rule
    from gradstats.scaling import BatchScaling
    from gradstats.schedulers import BatchSizeScheduler
    from gradstats.stats import GradStats
    from gradstats.step_time import StepTime
    from gradstats.timing import measure_step
    from gradstats.workbench.workload import Workload

__version__ = "0.1.0"

_LAZY = {
    "attach": "attaching",
    "Monitor": "monitor",
    "GradStats": "stats",
    "NoiseScale": "noise",
    "BatchSizeAdvice": "batch_advice",
    "recommend": "advice",
    "Budget": "cadence",
    "Curvature": "hessian",
    "check": "checking",
    "curvature": "hessian",
    "Comparison": "comparison",
    "compare": "comparison",
    "CheckReport": "report",
    "rule": "rules",
    "BatchScaling": "scaling",
    "BatchSizeScheduler": "schedulers",
    "GroupedLoader": "grouped_loader",
    "StepLoader": "loader",
    "Log": "loggers",
    "Workload": "workbench.workload",
    "StepTime": "step_time",
    "measure_step": "timing",
}

__all__ = [
    "AttachError",
    "BackendError",
    "BatchDimError",
    "BatchScaling",
    "BatchSizeAdvice",
    "BatchSizeScheduler",
    "Budget",
    "CaptureError",
    "CheckReport",
    "Comparison",
    "Curvature",
    "GradStats",
    "GradStatsError",
    "GroupedLoader",
    "InvalidArgumentError",
    "Log",
    "Monitor",
    "NoStatisticsError",
    "NoiseScale",
    "OrderError",
    "StepLoader",
    "StepTime",
    "UnsupportedLayerError",
    "Workload",
    "attach",
    "backends",
    "check",
    "collective_cost",
    "compare",
    "curvature",
    "loggers",
    "measure_step",
    "optim",
    "recommend",
    "rule",
    "schedulers",
]


def __getattr__(name: str) -> Any:
    """Load a part when it is first used, so that importing the package costs next to nothing."""
    if name in ("backends", "collective_cost", "loggers", "optim", "schedulers"):
        return importlib.import_module(f"gradstats.{name}")
    if name in _LAZY:
        value = getattr(importlib.import_module(f"gradstats.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'gradstats' has no attribute {name!r}")
