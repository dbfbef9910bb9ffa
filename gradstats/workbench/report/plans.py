"""Sections on sweeps: batch a for b steps against batch c for d steps, over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstats.loggers.reading import number
from gradstats.words import readable
from gradstats.workbench.report.figures import Axis, Cell, Figure, Line, Section, Table
from gradstats.workbench.report.inputs import Input, numbers, objects
from gradstats.workbench.report.runs import SAMPLES, hours
from gradstats.workbench.report.thinning import POINTS

__all__ = ["sweep"]

FINAL = {"validation_loss": "validation loss", "final_loss": "final loss"}
CURVE = 41  # points of a fitted curve
# Columns of the summary: keys, headings.
COLUMNS = {
    "validation_loss": "validation loss",
    "final_loss": "training loss",
    "gap": "generalisation gap",
    "seconds": "seconds",
    "sharpness_full": "sharpness",
    "sharpness_subspace": "sharpness, subspace",
    "top_eigenvalue": "top eigenvalue",
}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """The trials of one plan."""

    name: str
    batch_size: float
    learning_rate: float
    trials: Sequence[Mapping[str, Any]]


def sweep(given: Input) -> Section:
    section = Section(
        "sweep",
        "Sweep",
        "Plans of batch size × steps, each trained from the same weights over several seeds.",
    )
    plans = _plans(given.content["trials"])
    section.add(_map(plans), _summary(given))
    divisor, unit = hours([_column(t, "seconds") for plan in plans for t in plan.trials])
    held_out = any(
        np.isfinite(_column(t, "validation_loss")).any() for p in plans for t in p.trials
    )
    key, name = ("validation_loss", "validation loss") if held_out else ("loss", "loss")
    for by, axis, scale in (
        ("samples", SAMPLES, 1.0),
        ("seconds", Axis(f"time ({unit})"), divisor),
        ("step", Axis("optimizer steps", log=True), 1.0),
    ):
        lines = [_mean_curve(plan, by, key, scale, i) for i, plan in enumerate(plans)]
        what = {"samples": "samples", "seconds": "time", "step": "steps"}[by]
        caption = (
            f"The {name} by {what}: means over seeds, with the range of the seeds as a band. The line that "
            "is lowest at your budget is the plan to take."
        )
        title = f"{name.capitalize()} by {what}"
        section.add(Figure(title, caption, axis, Axis(name, log=True), lines))
    section.add(_to_target(given.content.get("steps_to_target")))
    section.add(_variance(given.content.get("variance")))
    return section


def _plans(trials: Sequence[Mapping[str, Any]]) -> list[Plan]:
    """By batch size, and then by learning rate."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for trial in trials:
        name = trial.get("plan") or f"{trial.get('batch_size')}x{trial.get('steps')}"
        groups.setdefault(str(name), []).append(trial)
    plans = [
        Plan(name, number(group[0].get("batch_size")), number(group[0].get("learning_rate")), group)
        for name, group in groups.items()
    ]
    return sorted(plans, key=lambda plan: (plan.batch_size, plan.learning_rate))


def _map(plans: Sequence[Plan]) -> Table:
    """The final loss of every trial: plans down, seeds across."""
    trials = [trial for plan in plans for trial in plan.trials]
    done = [trial for trial in trials if trial.get("ok", True)]
    key = next((k for k in FINAL if done and all(_known(t, k) for t in done)), "final_loss")
    values = [number(trial.get(key)) for trial in trials if _known(trial, key)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = (high - low) or 1.0
    seeds = list(dict.fromkeys(str(trial.get("seed")) for trial in trials))

    def cell(plan: Plan, seed: str) -> str | Cell:
        same = [trial for trial in plan.trials if str(trial.get("seed")) == seed]
        if not same:
            return "–"
        value = number(same[0].get(key))
        if math.isnan(value):
            return "failed"
        return Cell(readable(value), (value - low) / span, value == low)

    rows: list[list[str | Cell]] = [
        [
            plan.name,
            readable(plan.learning_rate) if math.isfinite(plan.learning_rate) else "–",
            *(cell(plan, seed) for seed in seeds),
        ]
        for plan in plans
    ]
    return Table(
        ["batch size x steps", "learning rate", *(f"seed {seed}" for seed in seeds)],
        rows,
        title=f"Map: {FINAL[key]} of every trial",
        caption="The deeper the colour, the lower the loss; the lowest is bold. Where the colour changes as "
        "much within rows as between them, the plans cannot be told apart.",
    )


def _summary(given: Input) -> Table:
    """Means and intervals by plan, as the sweep has them."""
    rows = objects(given.content.get("summary"))
    keys = [key for key in COLUMNS if any(_mean(row.get(key)) for row in rows)]
    table = [
        [str(row.get("plan", "–")), *(_mean(row.get(key)) or "–" for key in keys)] for row in rows
    ]
    said = " ".join(str(v.get("sentence", "")) for v in objects(given.content.get("verdicts")))
    return Table(
        ["plan", *(COLUMNS[key] for key in keys)],
        table if keys else [],
        title="Means over seeds, with 90% intervals",
        caption=said,
    )


def _mean(value: Any) -> str:
    """A mean with its interval; empty where it is not known."""
    value = value if isinstance(value, Mapping) else {}
    mean, low, high = (number(value.get(key)) for key in ("mean", "low", "high"))
    if not math.isfinite(mean):
        return ""
    return readable(mean) + (f" ({readable(low)} to {readable(high)})" if high >= low else "")


def _mean_curve(plan: Plan, by: str, key: str, scale: float, colour: int) -> Line:
    """The mean over trials on common points, with their lowest and highest."""
    curves = []
    for trial in plan.trials:
        x, y = _column(trial, by) / scale, _column(trial, key)
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


def _to_target(found: Any) -> Figure | None:
    """Steps to a loss by batch size, and S = S_min (1 + B_crit/B) through them."""
    points = objects(found.get("points")) if isinstance(found, Mapping) else []
    size, steps = (numbers([point.get(key) for point in points]) for key in ("batch_size", "steps"))
    if not len(size):
        return None
    lines = [Line("measured", size, steps, style="points")]
    least, critical, worst, target = (
        number(found.get(k)) for k in ("steps_min", "critical_batch", "worst_relative", "target")
    )
    said = ""
    if least > 0 and critical > 0:
        at = np.geomspace(size.min(), size.max(), CURVE)
        fitted = least * (1 + critical / at)
        lines.append(Line("S_min (1 + B_crit/B)", at, fitted, style="dashed", colour=5))
        said = f" Fitted: S_min {readable(least)}, B_crit {readable(critical)}"
        said += f"; the farthest point is {readable(100 * worst)}% off." if worst >= 0 else "."
    return Figure(
        f"Steps to a loss of {readable(target)}",
        "Where it falls steeply, larger batches still save steps; where it is flat they do not (McCandlish "
        f"et al. 2018).{said}",
        Axis("batch size (samples)", log=True),
        Axis("optimizer steps", log=True),
        lines,
    )


def _variance(found: Any) -> Figure | None:
    """Of the mean gradient, directly and by the monitor, against 1/batch size."""
    points = objects(found.get("points")) if isinstance(found, Mapping) else []
    keys = ("batch_size", "direct", "low", "high", "by_monitor")
    size, direct, low, high, monitor = (numbers([p.get(key) for p in points]) for key in keys)
    if not len(size):
        return None
    lines = [
        Line("between independent batches", size, direct, low, high, style="points"),
        Line("tr Σ/B of the monitor", size, monitor, style="crosses", colour=1),
    ]
    constant, exponent = (number(found.get(key)) for key in ("constant", "exponent"))
    if constant > 0:
        ends = np.array([size.min(), size.max()])
        lines.append(Line("∝ 1/B", ends, constant / ends, style="dashed", colour=5))
    said = ""
    if math.isfinite(exponent):
        least, most = number(found.get("low")), number(found.get("high"))
        interval = f" (90% interval {readable(least)} to {readable(most)})" if most >= least else ""
        said = f" Fitted exponent: {readable(exponent)}{interval}."
    return Figure(
        "Variance of the mean gradient",
        f"Independent samples make it fall as 1/batch size, a straight line here.{said}",
        Axis("batch size (samples)", log=True),
        Axis("variance", log=True),
        lines,
    )


def _column(trial: Mapping[str, Any], key: str) -> Array:
    return numbers([point.get(key) for point in objects(trial.get("curve"))])


def _known(trial: Mapping[str, Any], key: str) -> bool:
    return math.isfinite(number(trial.get(key)))
