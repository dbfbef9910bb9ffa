"""The noise scale of a workload, what measuring it costs, and the batch size that follows."""

from __future__ import annotations

from gradstats.workbench.measure.overhead import Overhead
from gradstats.workbench.measure.result import LayerNoise, Measurement
from gradstats.workbench.measure.run import Progress, measure

__all__ = ["LayerNoise", "Measurement", "Overhead", "Progress", "measure"]
