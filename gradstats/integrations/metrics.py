"""A row of `gradstats.Log` under the names that it has among other metrics."""

from __future__ import annotations

import math

from gradstats.loggers import Row

__all__ = ["PREFIX", "metrics"]

PREFIX = "gradstats/"


def metrics(row: Row, prefix: str, *, finite: bool = False) -> Row:
    """The numbers of `row` by their names with `prefix` before them, without `step`, which is the axis.

    `finite`: leave out infinite numbers and NaN (noise scales before they are known).
    """
    return {
        prefix + name: value
        for name, value in row.items()
        if name != "step" and (not finite or math.isfinite(value))
    }
