"""Small charts of characters: lines of dots, bands, a logarithmic axis. Text in, text out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gradstats.words import readable

__all__ = ["Band", "Cell", "Line", "chart"]

BRAILLE = 0x2800
BITS = (
    (0x01, 0x08),
    (0x02, 0x10),
    (0x04, 0x20),
    (0x40, 0x80),
)  # of the dots of a cell, 4 rows of 2
ROOM = 0.06  # above and below the lines, of their height

Cell = tuple[str, str]  # a character, and its style


@dataclass(frozen=True)
class Line:
    """Points (x, y) in the order of x, joined; `letter` stands for it where there are no dots to draw."""

    points: Sequence[tuple[float, float]]
    style: str = ""
    letter: str = "*"


@dataclass(frozen=True)
class Band:
    """From low to high, (x, low, high) in the order of x, each until the next; cut off at the range."""

    points: Sequence[tuple[float, float, float]]
    style: str = ""


def chart(
    lines: Sequence[Line],
    bands: Sequence[Band] = (),
    *,
    width: int,
    height: int,
    log: bool = False,
    plain: bool = False,
) -> list[list[Cell]]:
    """`height` rows of at most `width` cells, with the y axis on the left.

    The range is that of the lines, the first of which lies on top. With `log`, what is not above 0 is
    left out. `plain`: ASCII alone. Without a point to draw, no rows.
    """
    scale = math.log if log else float

    def known(y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not log)

    drawn = [[(x, scale(y)) for x, y in line.points if known(y)] for line in lines]
    flat = [point for points in drawn for point in points]
    if not flat:
        return []
    floor, top = _range([y for _, y in flat])
    left, right = min(x for x, _ in flat), max(x for x, _ in flat)
    back = math.exp if log else float
    labels = {0: readable(back(top)), height - 1: readable(back(floor))}
    if height > 4:
        labels[height // 2] = readable(back(top - (top - floor) * (height // 2) / (height - 1)))
    margin = max(len(text) for text in labels.values())
    columns = max(width - margin - 2, 1)
    canvas = _Canvas(columns, height, (left, right), (floor, top), plain)
    for band in bands:
        until = [x for x, _, _ in band.points[1:]] + [right]
        for (x, low, high), end in zip(band.points, until, strict=True):
            floor_of = scale(low) if known(low) else -math.inf
            top_of = scale(high) if known(high) else math.inf
            canvas.fill((x, end), (floor_of, top_of), band.style)
    for line, points in reversed(list(zip(lines, drawn, strict=True))):
        canvas.draw(points, line)
    axis = "|" if plain else "│"
    return [
        [(f"{labels.get(i, ''):>{margin}} {axis}", "dim"), *canvas.row(i)] for i in range(height)
    ]


class _Canvas:
    """Cells of 2 × 4 dots."""

    def __init__(
        self, columns: int, rows: int, xs: tuple[float, float], ys: tuple[float, float], plain: bool
    ) -> None:
        self.columns, self.rows, self.plain = columns, rows, plain
        self._xs, self._ys = xs, ys
        self._dots = [[0] * columns for _ in range(rows)]
        self._looks: list[list[Cell]] = [[(" ", "")] * columns for _ in range(rows)]

    def _place(self, x: float, y: float) -> tuple[float, float]:
        """In dots from the upper left."""
        (left, right), (floor, top) = self._xs, self._ys
        across = (x - left) / (right - left) if right > left else 0.5
        down = (top - y) / (top - floor)
        return across * (2 * self.columns - 1), down * (4 * self.rows - 1)

    def draw(self, points: Sequence[tuple[float, float]], line: Line) -> None:
        places = [self._place(*point) for point in points]
        for column, row in _joined(places):
            if 0 <= row < 4 * self.rows:
                cell = self._dots[row // 4]
                cell[column // 2] |= BITS[row % 4][column % 2]
                self._looks[row // 4][column // 2] = (line.letter, line.style)

    def fill(self, xs: tuple[float, float], ys: tuple[float, float], style: str) -> None:
        """The cells of some columns whose middle lies between two heights."""
        floor, top = self._ys
        first, last = (int(self._place(x, floor)[0]) // 2 for x in xs)
        for row in range(self.rows):
            middle = top - (top - floor) * (row + 0.5) / self.rows
            if ys[0] <= middle <= ys[1]:
                for column in range(max(first, 0), min(last, self.columns - 1) + 1):
                    self._looks[row][column] = ("." if self.plain else "░", style)

    def row(self, number: int) -> Iterable[Cell]:
        for dots, (letter, style) in zip(self._dots[number], self._looks[number], strict=True):
            yield (chr(BRAILLE + dots) if dots and not self.plain else letter), style


def _joined(places: Sequence[tuple[float, float]]) -> Iterable[tuple[int, int]]:
    """Dots on the straight lines between places, each place among them."""
    if len(places) == 1:
        yield round(places[0][0]), round(places[0][1])
    for (x, y), (u, v) in pairwise(places):
        count = max(1, math.ceil(max(abs(u - x), abs(v - y))))
        for i in range(count + 1):
            yield round(x + (u - x) * i / count), round(y + (v - y) * i / count)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = ROOM * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room
