"""What each batch size would cost: steps, samples and time to the same target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradstats.estimators import samples_ratio, steps_ratio
from gradstats.loggers.reading import number
from gradstats.words import readable
from gradstats.workbench.report.advice_of import Basis
from gradstats.workbench.report.figures import Axis, Figure, Line, Mark, Section, Table
from gradstats.workbench.report.inputs import numbers, objects

__all__ = ["trade_off"]

SIZES = 61  # of a curve by the model alone
REACH = 8.0  # it goes so many times beyond the present size and the noise scale


def trade_off(bases: Sequence[Basis], cap: int | None) -> Section:
    section = Section(
        "trade",
        "Trade-off",
        "What reaching the same loss would cost at other batch sizes, as multiples of the present cost, by "
        "S/S_min = 1 + B_noise/B and E/E_min = 1 + B/B_noise (McCandlish et al. 2018), each size at "
        "its own best learning rate.",
    )
    tables = []
    known = [b for b in bases if math.isfinite(b.noise.value) and b.noise.value > 0]
    for basis in known:
        of = f", {basis.name}" if len(known) > 1 else ""
        points = objects(basis.advice.get("curve"))
        section.add(_figure(basis, points, cap, of))
        tables.append(_table(basis, points, of))
    section.add(*tables)
    return section


def _marks(basis: Basis, cap: int | None) -> list[Mark]:
    marks = [Mark("x", basis.present, f"now: {basis.present:,}")]
    if basis.size != basis.present:
        marks.append(Mark("x", basis.size, f"advised: {basis.size:,}", 2))
    if cap is not None:
        marks.append(Mark("x", cap, f"micro-batch that fits: {cap:,}", stretch=False))
    return marks


def _figure(basis: Basis, points: list[dict[str, Any]], cap: int | None, of: str) -> Figure:
    now, noise = basis.present, basis.noise
    first, last = min(now, noise.value) / REACH, max(now, noise.value) * REACH
    sizes = np.geomspace(max(1.0, first), max(last, 2.0), SIZES)

    def steps(of: float) -> np.ndarray:
        return np.array([steps_ratio(b, of) / steps_ratio(now, of) for b in sizes])

    def samples(of: float) -> np.ndarray:
        return np.array([samples_ratio(b, of) / samples_ratio(now, of) for b in sizes])

    lines = []
    for colour, (name, ratio) in enumerate((("steps", steps), ("samples", samples))):
        low = high = None
        if noise.low > 0 and math.isfinite(noise.high):
            ends = np.stack([ratio(noise.low), ratio(noise.high)])
            low, high = ends.min(axis=0), ends.max(axis=0)
        lines.append(Line(name, sizes, ratio(noise.value), low, high, colour=colour))
    timed = numbers([point.get("seconds") for point in points])
    caption = (
        "Going right saves steps and costs samples; the two lines cross at the present size. "
        "Bands: over the noise scale's interval."
    )
    if np.isfinite(timed).any():
        # Several layouts may make one batch size: the soonest of them.
        best: dict[float, float] = {}
        for size, seconds in zip(
            numbers([p.get("batch_size") for p in points]), timed, strict=True
        ):
            if size > 0:
                best[size] = min(seconds, best.get(size, math.inf))
        x = np.array(sorted(best))
        lines.append(Line("time, as measured here", x, np.array([best[b] for b in x]), colour=2))
        caption += " Time weighs the steps with the seconds that each size takes on this machine."
    axis = Axis("batch size (samples per step)", log=True)
    return Figure(
        f"What the same loss costs{of}",
        caption,
        axis,
        Axis("cost, × the present", log=True),
        lines,
        _marks(basis, cap),
    )


def _table(basis: Basis, points: list[dict[str, Any]], of: str) -> Table:
    headings = [
        *("batch size", "micro-batch", "accumulation", "ranks", "steps", "samples", "time"),
        *("device time", "hours", "price"),
    ]
    keys = [
        *("batch_size", "micro_batch_size", "accumulation_steps", "world_size", "steps", "samples"),
        *("seconds", "cost", "hours", "price"),
    ]
    rows = []
    marked = {float(basis.present): " (now)", float(basis.size): " (advised)"}
    for point in points:
        values = [number(point.get(key)) for key in keys]
        row = [f"{v:,.0f}" if math.isfinite(v) else "–" for v in values[:4]]
        row += [f"{readable(v)} ×" if math.isfinite(v) else "–" for v in values[4:8]]
        row += [readable(v) if math.isfinite(v) else "–" for v in values[8:]]
        row[0] += marked.get(values[0], "")
        rows.append(row)
    kept = [i for i in range(len(headings)) if any(row[i] != "–" for row in rows)]
    return Table(
        [headings[i] for i in kept],
        [[row[i] for i in kept] for row in rows],
        title=f"The sizes that were weighed{of}",
        folded=True,
    )
