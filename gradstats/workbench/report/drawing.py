"""A figure as SVG paths, tick labels and a text that says what it shows.

The paths fill a square of 1000 × 1000 units that the page stretches to the room there is; lines keep
their width (`vector-effect: non-scaling-stroke`), and all words are HTML outside of it, of one size at
every width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstats.words import readable
from gradstats.workbench.report.figures import Axis, Figure, Line, Mark
from gradstats.workbench.report.ticks import linear_ticks, log_ticks, short

__all__ = ["Drawing", "Tick", "draw"]

SIDE = 1000
TICKS = {"x": 6, "y": 6}
PAD = 0.04  # of the range, above and below the data
DIGITS = 5  # significant, of the numbers that can be read off

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Tick:
    """A label at a percentage of the axis; `minor` ones go first where room is short."""

    at: float
    text: str
    minor: bool = False


@dataclass(frozen=True)
class Shape:
    """An SVG path with the classes that style it."""

    path: str
    classes: str


@dataclass(frozen=True)
class Drawing:
    """All that the page needs of a figure."""

    figure: Figure
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    grid: list[float]  # heights of the horizontal lines, in units
    shapes: list[Shape]
    marks: list[tuple[Mark, float | None]]  # percentage from the left or the top; None: outside
    legend: list[Line]
    alternative: str
    data: dict[str, Any]  # for reading off points


class _Scale:
    """From values to 0 … 1."""

    def __init__(self, axis: Axis, values: Array) -> None:
        self.log = axis.log
        values = values[np.isfinite(values)]
        values = values[values > 0] if axis.log else values
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.1, 1.0)
        if axis.log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: room on both sides of it
            room = 0.5 if axis.log else abs(high) / 2 or 0.5
            low, high = low - room, high + room
        room = (high - low) * PAD
        self.low = 0.0 if axis.zero and not axis.log and low >= 0 else low - room
        self.high = high + room

    def __call__(self, values: Array) -> Array:
        """Fractions of the range; NaN for what has no place (a logarithm of zero)."""
        values = np.asarray(values, np.float64)
        if self.log:
            values = np.log10(np.where(values > 0, values, np.nan))
        fractions: Array = (values - self.low) / (self.high - self.low)
        return fractions

    @property
    def ends(self) -> tuple[float, float]:
        return (10**self.low, 10**self.high) if self.log else (self.low, self.high)

    def ticks(self, most: int) -> list[Tick]:
        found = (log_ticks if self.log else linear_ticks)(*self.ends, most)
        at = 100 * self(np.array(found))
        # Where the page is narrow, every other label is hidden.
        return [
            Tick(float(round(a, 2)), short(t), i % 2 == 1)
            for i, (a, t) in enumerate(zip(at, found, strict=True))
        ]


def draw(figure: Figure) -> Drawing:
    """Place a figure that has something to show."""
    x = _Scale(figure.x, _all(figure, "x"))
    y = _Scale(figure.y, _all(figure, "y"))
    shapes = [shape for line in figure.lines for shape in _shapes(line, x, y)]
    marks: list[tuple[Mark, float | None]] = []
    for mark in figure.marks:
        at = float((x if mark.axis == "x" else y)(np.array([mark.value]))[0])
        percent = round(100 * (at if mark.axis == "x" else 1 - at), 2)
        marks.append((mark, percent if 0 <= at <= 1 else None))
    y_ticks = [Tick(100 - t.at, t.text) for t in y.ticks(TICKS["y"])]
    return Drawing(
        figure=figure,
        x_ticks=x.ticks(TICKS["x"]),
        y_ticks=y_ticks,
        grid=[round(t.at * SIDE / 100, 1) for t in y_ticks],
        shapes=shapes,
        marks=marks,
        legend=[line for line in figure.lines if line.in_legend],
        alternative=_alternative(figure),
        data=_data(figure, x, y),
    )


def _all(figure: Figure, axis: str) -> Array:
    """Every value that must have room on an axis, marks included; ends of bands only as far as is sane."""
    parts = [np.array([m.value for m in figure.marks if m.axis == axis and m.stretch], np.float64)]
    for line in figure.lines:
        parts.append(getattr(line, axis))
    known = np.concatenate(parts)
    if axis == "x":
        return known
    finite = known[np.isfinite(known)]
    if figure.y.log:
        finite = finite[finite > 0]
    if not len(finite):
        return known
    # A band may be far wider than its line: it is followed for a fifth of the range, and cut there.
    low, high = finite.min(), finite.max()
    if figure.y.log:
        least, most = low / 4, high * 4
    else:
        room = (high - low) or abs(high)
        least, most = low - room / 2, high + room / 2
    bands = [end for line in figure.lines for end in (line.low, line.high) if end is not None]
    ends = np.concatenate([known, *bands])
    return np.where(np.isfinite(ends), np.clip(ends, least, most), np.nan)


def _shapes(line: Line, x: _Scale, y: _Scale) -> list[Shape]:
    across, up = x(line.x), y(line.y)
    colour = f"c{line.colour % 6}"
    dash = f" dash{line.colour // 6 % 3}" if line.colour >= 6 else ""
    made = []
    if line.low is not None or line.high is not None:
        low, high = _ends(line, y)
        if line.style in ("points", "crosses"):
            made.append(Shape(_bars(across, low, high), f"bar {colour}"))
        else:
            made.append(Shape(_band(across, low, high), f"band {colour}"))
    kind = {"line": "line", "steps": "line", "faint": "line faint", "dashed": "line dashed"}
    if line.style in ("points", "crosses"):
        path = "".join(f"M{_n(a)} {_n(1 - b)}h0" for a, b in _known(across, up))
        made.append(Shape(path, f"dots {line.style} {colour}"))
    else:
        if line.style == "steps":
            across, up = np.repeat(across, 2)[1:], np.repeat(up, 2)[:-1]
        made.append(Shape(_path(across, up), f"{kind[line.style]} {colour}{dash}"))
    return [shape for shape in made if shape.path]


def _ends(line: Line, y: _Scale) -> tuple[Array, Array]:
    """Heights of a band's ends; what has no end goes a little beyond the picture."""
    low = line.y if line.low is None else line.low
    high = line.y if line.high is None else line.high
    known = np.isfinite(line.y)
    down, up = y(low), y(high)
    down = np.where(known & ~(down >= -0.05), -0.05, down)
    up = np.where(known & ~(up <= 1.05), 1.05, up)
    return np.where(known, down, np.nan), np.where(known, up, np.nan)


def _known(*columns: Array) -> list[tuple[float, ...]]:
    kept = np.isfinite(np.stack(columns)).all(axis=0)
    return [tuple(map(float, row)) for row in np.stack(columns, axis=1)[kept]]


def _path(across: Array, up: Array) -> str:
    """A line, broken where a point is not known; a point alone is a dot."""
    parts, open_ = [], False
    for a, b in zip(across, up, strict=True):
        if math.isfinite(a) and math.isfinite(b):
            parts.append(f"{'L' if open_ else 'M'}{_n(a)} {_n(1 - b)}")
            open_ = True
        else:
            open_ = False
    lone = len(parts) == 1
    return "".join(parts) + ("h0" if lone else "")


def _band(across: Array, low: Array, high: Array) -> str:
    known = _known(across, low, high)
    if not known:
        return ""
    there = [f"{_n(a)} {_n(1 - top)}" for a, _, top in known]
    back = [f"{_n(a)} {_n(1 - bottom)}" for a, bottom, _ in reversed(known)]
    return f"M{'L'.join([*there, *back])}Z"


def _bars(across: Array, low: Array, high: Array) -> str:
    return "".join(f"M{_n(a)} {_n(1 - b)}V{_n(1 - t)}" for a, b, t in _known(across, low, high))


def _n(fraction: float) -> str:
    return f"{fraction * SIDE:.1f}".removesuffix(".0")


def _data(figure: Figure, x: _Scale, y: _Scale) -> dict[str, Any]:
    """The points as the page's script reads them: rounded, null where not known."""

    def plain(values: Array | None) -> list[float | None] | None:
        if values is None:
            return None
        return [float(f"{v:.{DIGITS}g}") if math.isfinite(v) else None for v in values]

    lines = []
    for line in figure.lines:
        if line.style == "faint":
            continue
        ends = {"low": plain(line.low), "high": plain(line.high)}
        known = {key: end for key, end in ends.items() if end is not None}
        points = {"x": plain(line.x), "y": plain(line.y), **known}
        lines.append({"name": line.name, "c": line.colour % 6, **points})

    def scale(of: _Scale) -> list[float | bool]:
        return [of.low, of.high, of.log]

    labels = {"x": figure.x.label, "y": figure.y.label}
    return {"x": scale(x), "y": scale(y), "labels": labels, "lines": lines}


def _alternative(figure: Figure) -> str:
    """What a reader who does not see the picture is told."""
    text = [f"{figure.title}. {figure.y.label} over {figure.x.label}."]
    for line in figure.lines:
        known = _known(line.x, line.y)
        if line.style == "faint" or not known:
            continue
        (first_x, first_y), (last_x, last_y) = known[0], known[-1]
        text.append(
            f"{line.name}: from {readable(first_y)} at {readable(first_x)} to {readable(last_y)} at "
            f"{readable(last_x)}, between {readable(min(y for _, y in known))} and "
            f"{readable(max(y for _, y in known))}."
        )
    text += [f"{mark.name}: {readable(mark.value)}." for mark in figure.marks]
    return " ".join(text)
