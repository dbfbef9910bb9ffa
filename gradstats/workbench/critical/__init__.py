"""The critical batch size, measured by training on from a checkpoint at several batch sizes."""

from __future__ import annotations

from gradstats.workbench.critical.decision import decide
from gradstats.workbench.critical.measuring import measure_critical
from gradstats.workbench.critical.plan import Settings
from gradstats.workbench.critical.result import Critical, Tolerance

__all__ = ["Critical", "Settings", "Tolerance", "decide", "measure_critical"]
