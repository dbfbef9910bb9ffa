"""What a report shows, before it is drawn: figures of lines, tables, bars and sections of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Axis", "Bar", "Bars", "Cell", "Figure", "Line", "Mark", "Section", "Table"]

Array = NDArray[np.float64]
Style = Literal["line", "faint", "dashed", "points", "crosses", "steps"]


@dataclass(frozen=True)
class Axis:
    """`label` holds the unit."""

    label: str
    log: bool = False
    zero: bool = False  # starts at zero


@dataclass(frozen=True)
class Line:
    """(n,) numbers `y` over `x`, with a band or bars from `low` to `high` where these are given.

    NaN leaves a gap; an infinite end of a band goes as far as the picture.
    """

    name: str
    x: Array
    y: Array
    low: Array | None = None
    high: Array | None = None
    style: Style = "line"
    colour: int = 0
    in_legend: bool = True


@dataclass(frozen=True)
class Mark:
    """A value on one axis, with a word for it: a straight line across the picture.

    One that does not `stretch` the picture is only named where it lies outside of it.
    """

    axis: Literal["x", "y"]
    value: float
    name: str
    colour: int | None = None
    stretch: bool = True


@dataclass(frozen=True)
class Figure:
    """Lines in one picture. `caption` says how to read it."""

    title: str
    caption: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()

    @property
    def shown(self) -> bool:
        """Whether there is a point to draw."""
        return any((np.isfinite(line.x) & np.isfinite(line.y)).any() for line in self.lines)


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `shade` from 0 (best) to 1 (worst) colours it; `strong` sets it off."""

    text: str
    shade: float | None = None
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text or cells; the first of each row names it. A folded one shows its title alone."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    title: str = ""
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Bar:
    """A fraction from 0 to 1, with what stands beside it."""

    name: str
    fraction: float
    text: str
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Bars of one scale: a table with a picture in it."""

    title: str
    caption: str
    heading: str
    unit: str
    bars: Sequence[Bar]
    note_heading: str = ""


@dataclass
class Section:
    """A part of the report; it is left out where it holds nothing."""

    id: str
    title: str
    intro: str = ""
    parts: list[Figure | Table | Bars] = field(default_factory=list)

    def add(self, *parts: Figure | Table | Bars | None) -> None:
        """Add what there is something to see in."""
        for part in parts:
            shown: Any = part
            if isinstance(part, Figure):
                shown = part.shown
            elif isinstance(part, Bars):
                shown = part.bars
            elif isinstance(part, Table):
                shown = part.rows
            if part is not None and shown:
                self.parts.append(part)
