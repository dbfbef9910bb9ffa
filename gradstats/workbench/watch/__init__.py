"""A training's log, read while it is being written."""

from __future__ import annotations

from gradstats.workbench.watch.chart import Band, Line, chart
from gradstats.workbench.watch.follow import Follower
from gradstats.workbench.watch.state import State, state_of

__all__ = ["Band", "Follower", "Line", "State", "chart", "state_of"]
