"""Figures of the report: where points are drawn, ticks, thinning, smoothing."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from gradstats.workbench.report.drawing import draw
from gradstats.workbench.report.figures import Axis, Figure, Line, Mark
from gradstats.workbench.report.thinning import envelope, kept_indices, smoothed, thinned
from gradstats.workbench.report.ticks import linear_ticks, log_ticks, short


def test_points_are_where_they_belong() -> None:
    """A linear and a logarithmic axis, by hand: 4% of the range is left on each side."""
    line = Line("a", np.array([0.0, 5.0, 10.0]), np.array([1.0, 10.0, 100.0]))
    figure = Figure("t", "c", Axis("x"), Axis("y", log=True), [line], [Mark("y", 10.0, "ten")])
    drawing = draw(figure)
    left, right = 0.4 / 10.8 * 1000, 10.4 / 10.8 * 1000
    (shape,) = drawing.shapes
    numbers = [float(n) for n in re.findall(r"[\d.]+", shape.path)]
    bottom, top = (1 - 0.08 / 2.16) * 1000, 0.08 / 2.16 * 1000
    np.testing.assert_allclose(numbers, [left, bottom, 500, 500, right, top], atol=0.06)
    assert drawing.marks == [(figure.marks[0], 50.0)]
    assert [tick.text for tick in drawing.y_ticks] == ["1", "2", "5", "10", "20", "50", "100"] or (
        [tick.text for tick in drawing.y_ticks] == ["1", "3", "10", "30", "100"]
    )
    assert "from 1 at 0 to 100 at 10" in drawing.alternative


def test_a_limit_far_away_does_not_squeeze_the_picture() -> None:
    line = Line("a", np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    far = [Mark("y", 9e9, "memory", stretch=False), Mark("y", 4.0, "budget")]
    drawing = draw(Figure("t", "c", Axis("x"), Axis("y"), [line], far))
    assert [at for _, at in drawing.marks] == [None, pytest.approx(100 * 0.04 / 1.08, abs=0.01)]


def test_gaps_and_ends_of_bands() -> None:
    x = np.arange(5.0)
    y = np.array([1.0, 2.0, np.nan, 2.0, 3.0])
    band = np.array([np.inf, 4.0, 4.0, np.inf, np.inf])
    drawing = draw(Figure("t", "c", Axis("x"), Axis("y"), [Line("a", x, y, y - 1, band)]))
    area, line = drawing.shapes
    assert line.path.count("M") == 2
    assert "nan" not in area.path + line.path
    assert "inf" not in area.path + line.path
    data = json.dumps(drawing.data, allow_nan=False)
    assert "null" in data


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[3.0], [1e-12, 1e12], [5.0, 5.0], [0.0, 7.0], [-2.0, 2.0], [2e7, 2.1e7]]
)
def test_any_range_can_be_drawn(values, log) -> None:
    line = Line("a", np.array(values), np.array(values))
    drawing = draw(Figure("t", "c", Axis("x", log), Axis("y", log), [line]))
    for ticks in (drawing.x_ticks, drawing.y_ticks):
        assert 2 <= len(ticks) <= 7
        assert all(0 <= tick.at <= 100 for tick in ticks)
        assert len({tick.text for tick in ticks}) == len(ticks)


def test_ticks_are_round() -> None:
    assert linear_ticks(0, 38_400, 6) == [0, 10_000, 20_000, 30_000]
    assert linear_ticks(0.29, 2.31, 6) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert log_ticks(8, 900, 6) == [10, 30, 100, 300] or log_ticks(8, 900, 6) == [
        10,
        20,
        50,
        100,
        200,
        500,
    ]
    assert [short(v) for v in (0.05, 250, 2000, 20_000, 1.5e6, 3e-5, 0)] == [
        *("0.05", "250", "2,000", "20k", "1.5M", "3e-5", "0"),
    ]


def test_thinning_keeps_the_ends_and_the_extremes() -> None:
    kept = kept_indices(100_000, 300)
    assert (kept[0], kept[-1], len(kept)) == (0, 99_999, 300)
    y = np.zeros(100_000)
    y[61_803] = 7.0
    _, low, high = envelope(np.arange(100_000.0), y)
    assert (low.min(), high.max(), len(high)) == (0, 7, 300)
    assert thinned({"a": list(range(100)), "b": 1}, 10)[1] == 90


def test_smoothing_is_a_mean_over_neighbours() -> None:
    y = np.array([4.0, np.nan, 1.0, 5.0, 9.0])
    np.testing.assert_allclose(smoothed(y, 1), [4.0, np.nan, 3.0, 5.0, 7.0])
    np.testing.assert_allclose(smoothed(y, 0), y)
    line = np.linspace(3, 1, 50)
    np.testing.assert_allclose(smoothed(line, 4)[4:-4], line[4:-4])  # it does not lag
