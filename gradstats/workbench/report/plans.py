"""Sections on sweeps: batch a for b steps against batch c for d steps, over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstats.estimators import critical_value
from gradstats.words import readable
from gradstats.workbench.report.figures import Axis, Cell, Figure, Line, Section, Table
from gradstats.workbench.report.inputs import Input, number, numbers
from gradstats.workbench.report.runs import SAMPLES, hours
from gradstats.workbench.report.thinning import POINTS

__all__ = ["Plan", "better", "plans_of", "sweep"]

CONFIDENCE = 0.9
FINAL = {"validation_loss": "validation loss", "final_loss": "final loss"}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """Trials of one batch size, number of steps and learning rate. `values` by seed: what decides."""

    name: str
    batch_size: float
    steps: float
    learning_rate: float
    trials: Sequence[dict[str, Any]]
    measure: str
    values: dict[str, float]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values()))) if self.values else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return _interval(np.array(list(self.values.values())))


def plans_of(given: Input) -> list[Plan]:
    """The plans of a sweep, the lowest mean loss first; held out where every trial has that."""
    trials = given.content["trials"]
    key = next((k for k in FINAL if trials and all(_known(t, k) for t in trials)), "final_loss")
    groups: dict[tuple[float, ...], list[dict[str, Any]]] = {}
    for trial in trials:
        plan = tuple(number(trial.get(k)) for k in ("batch_size", "steps", "learning_rate"))
        groups.setdefault(plan, []).append(trial)
    sizes = [(size, steps) for size, steps, _ in groups]
    plans = []
    for (size, steps, rate), group in groups.items():
        name = f"{size:g} × {steps:,.0f}"
        if sizes.count((size, steps)) > 1:
            name += f", rate {readable(rate)}"
        values = {str(t.get("seed")): float(t[key]) for t in group if _known(t, key)}
        plans.append(Plan(name, size, steps, rate, group, FINAL[key], values))
    return sorted(plans, key=lambda plan: (math.isnan(plan.mean), plan.mean))


def better(one: Plan, other: Plan) -> tuple[float, float, float, bool]:
    """Mean of other − one with its 90% interval, and whether that lies above zero.

    Paired over the seeds that both have (Student's t); with fewer than two of them nothing is sure.
    """
    seeds = [seed for seed in one.values if seed in other.values]
    gaps = np.array([other.values[seed] - one.values[seed] for seed in seeds])
    low, high = _interval(gaps)
    return (float(gaps.mean()) if len(gaps) else math.nan), low, high, low > 0


def _interval(values: Array) -> tuple[float, float]:
    """Student's t interval of a mean; NaN with fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    half = critical_value(len(values) - 1, CONFIDENCE) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def sweep(given: Input) -> Section:
    plans = plans_of(given)
    section = Section(
        "sweep",
        "Sweep",
        "Plans of batch size × steps, each trained from the same start over several seeds.",
    )
    by_size = sorted(plans, key=lambda plan: (plan.batch_size, plan.learning_rate))
    section.add(_map(by_size), _table(plans))
    divisor, unit = hours([_column(t, "seconds") for plan in plans for t in plan.trials])
    for key, axis, scale, name in (
        ("samples", SAMPLES, 1.0, "samples"),
        ("seconds", Axis(f"time ({unit})"), divisor, "time"),
        ("step", Axis("optimizer steps", log=True), 1.0, "steps"),
    ):
        lines = [_mean_curve(plan, key, scale, i) for i, plan in enumerate(by_size)]
        caption = (
            f"Training loss by {name}, means over seeds with the range of the seeds as a band. The line "
            "that is lowest at your budget is the plan to take."
        )
        section.add(Figure(f"Loss by {name}", caption, axis, Axis("loss"), lines))
    section.add(_variance(given, by_size))
    return section


def _map(plans: Sequence[Plan]) -> Table:
    """The final loss of every trial, plans down and seeds (or rates and seeds) across."""
    seeds = list(dict.fromkeys(seed for plan in plans for seed in plan.values))
    values = [value for plan in plans for value in plan.values.values()]
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = (high - low) or 1.0

    def cell(plan: Plan, seed: str) -> Cell:
        value = plan.values.get(seed)
        if value is None:
            return Cell("failed" if any(str(t.get("seed")) == seed for t in plan.trials) else "–")
        return Cell(readable(value), (value - low) / span, value == low)

    rows: list[list[str | Cell]] = [
        [plan.name, readable(plan.learning_rate), *(cell(plan, seed) for seed in seeds)]
        for plan in plans
    ]
    measure = plans[0].measure if plans else "loss"
    return Table(
        ["batch size × steps", "learning rate", *(f"seed {seed}" for seed in seeds)],
        rows,
        title=f"Map: {measure} of every trial",
        caption="The deeper the colour, the lower the loss; the lowest is bold. Where the "
        "colour changes as much within rows as between them, the plans cannot be told apart.",
    )


def _table(plans: Sequence[Plan]) -> Table:
    rows = []
    for plan in plans:
        low, high = plan.interval
        mean = {
            key: _mean([number(t.get(key)) for t in plan.trials])
            for key in ("final_loss", "gap", "gradient_variance", "sharpness")
        }
        seconds = _mean([_last(t, "seconds") for t in plan.trials])
        rows.append(
            [
                plan.name,
                _text(plan.mean),
                "–" if math.isnan(low) else f"{readable(low)} to {readable(high)}",
                _text(mean["final_loss"]),
                _text(mean["gap"]),
                _text(seconds),
                _text(mean["gradient_variance"]),
                _text(mean["sharpness"]),
            ]
        )
    measure = plans[0].measure if plans else "loss"
    headings = [
        *("plan", f"{measure}, mean", "90% interval", "final loss", "generalisation gap"),
        *("seconds", "gradient variance", "sharpness"),
    ]
    kept = [i for i in range(len(headings)) if i == 0 or any(row[i] != "–" for row in rows)]
    return Table(
        [headings[i] for i in kept],
        [[row[i] for i in kept] for row in rows],
        title="Plans, best first",
        caption="Means over seeds; intervals by Student's t. Plans whose intervals overlap may be alike.",
    )


def _mean_curve(plan: Plan, key: str, scale: float, colour: int) -> Line:
    """The mean over trials on common points, with their lowest and highest."""
    curves = []
    for trial in plan.trials:
        x, y = _column(trial, key) / scale, _column(trial, "loss")
        known = np.isfinite(x) & np.isfinite(y)
        if known.any():
            curves.append((x[known], y[known]))
    if not curves:
        return Line(plan.name, np.empty(0), np.empty(0), colour=colour)
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    longest = max(len(x) for x, _ in curves)
    at = np.linspace(first, last, min(longest, POINTS)) if last > first else np.array([last])
    heights = np.stack([np.interp(at, x, y) for x, y in curves])
    low, high = (heights.min(axis=0), heights.max(axis=0)) if len(curves) > 1 else (None, None)
    return Line(plan.name, at, heights.mean(axis=0), low, high, colour=colour)


def _variance(given: Input, plans: Sequence[Plan]) -> Figure:
    sizes, values = [], []
    for plan in plans:
        for trial in plan.trials:
            sizes.append(plan.batch_size)
            values.append(number(trial.get("gradient_variance")))
    x, y = np.array(sizes), np.array(values)
    lines = [Line("measured", x, y, style="points")]
    known = (x > 0) & (y > 0)
    if known.any():
        level = float(np.exp(np.mean(np.log(x[known] * y[known]))))
        ends = np.array([x[known].min(), x[known].max()])
        lines.append(Line("∝ 1/batch size", ends, level / ends, style="dashed", colour=5))
    variance = given.content.get("variance")
    exponent = number(variance.get("exponent")) if isinstance(variance, dict) else math.nan
    fitted = f" Fitted exponent: {readable(exponent)}." if math.isfinite(exponent) else ""
    return Figure(
        "Variance of the gradient",
        f"Independent samples make it fall as 1/batch size, a straight line here.{fitted}",
        Axis("batch size (samples)", log=True),
        Axis("variance of the mean gradient", log=True),
        lines,
    )


def _column(trial: dict[str, Any], key: str) -> Array:
    curve = trial.get("curve")
    points = curve if isinstance(curve, list) else []
    return numbers([point.get(key) for point in points if isinstance(point, dict)])


def _last(trial: dict[str, Any], key: str) -> float:
    column = _column(trial, key)
    return float(column[-1]) if len(column) else math.nan


def _known(trial: dict[str, Any], key: str) -> bool:
    return math.isfinite(number(trial.get(key)))


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def _text(value: float) -> str:
    return readable(value) if math.isfinite(value) else "–"
