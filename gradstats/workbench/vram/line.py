"""What measured points say: the line of memory over samples, and where a driver lent memory. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradstats.workbench.vram.result import Point

__all__ = ["OVER", "crossing", "fit", "spilled"]

OVER = "took more memory than the limit"  # why a point that was measured does not fit
SPILL = 3.0  # times the seconds per sample of smaller sizes


def fit(points: Sequence[Point]) -> tuple[float, float] | None:
    """(fixed, per sample) bytes of measured points; None where no two of them differ.

    The last two sizes give the slope, or the last three where that is steeper: a process's peak also
    holds what loading took, under which small sizes hide. The line goes through the last size. Fresh
    processes come first, as one that has run other sizes before may hold what these left: the line goes
    through the last of them, and from two on they give the slope as well.
    """
    measured = [p for p in points if p.why in ("", OVER)]
    fresh = {p.micro_batch_size: p.peak_bytes for p in measured if p.fresh and p.peak_bytes}
    shared = {p.micro_batch_size: p.peak_bytes for p in measured if not p.fresh and p.peak_bytes}
    known = fresh if len(fresh) > 1 else shared
    sizes = sorted(known)
    slopes = [
        float(np.polyfit(last, [known[m] for m in last], 1)[0])
        for last in (sizes[-2:], sizes[-3:])
        if len(last) > 1
    ]
    each = max(slopes, default=0.0)
    if each <= 0:
        return None
    size, peak = max((fresh or shared).items())
    return peak - each * size, each


def crossing(line: tuple[float, float], limit: float) -> int:
    """The largest size at which the line is within the limit."""
    return max(0, math.floor((limit - line[0]) / line[1]))


def spilled(points: Sequence[Point]) -> float:
    """How many times the seconds per sample of the best smaller size the last point took; 0 below `SPILL`.

    Instead of failing, Windows' driver gives a card memory of the host, and steps take many times as
    long. Steps of more samples are otherwise no slower per sample, but for what scatters.
    """
    *before, last = points
    if last.seconds is None:
        return 0.0
    rates = [
        p.seconds / p.micro_batch_size
        for p in before
        if p.ok and p.seconds is not None and p.micro_batch_size < last.micro_batch_size
    ]
    times = last.seconds / last.micro_batch_size / min(rates, default=math.inf)
    return times if times > SPILL else 0.0
