"""The noise scale of a workload, what measuring it costs, and the batch size that follows."""

from __future__ import annotations

from gradstats.workbench.measure.overhead import Overhead
from gradstats.workbench.measure.parts import Progress
from gradstats.workbench.measure.result import LayerNoise, Measurement, Settings
from gradstats.workbench.measure.run import measure

__all__ = ["LayerNoise", "Measurement", "Overhead", "Progress", "Settings", "measure"]
