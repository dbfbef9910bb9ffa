"""Sections on learning-rate ranges and on the critical batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradstats.loggers.reading import number
from gradstats.words import readable
from gradstats.workbench.report.figures import Axis, Figure, Line, Mark, Section, Table
from gradstats.workbench.report.inputs import Input, numbers
from gradstats.workbench.report.runs import SAMPLES
from gradstats.workbench.report.thinning import kept_indices

__all__ = ["critical", "lr_range"]

MOST_BRANCHES = 12  # drawn in one picture


def lr_range(given: Input) -> Section:
    section = Section(
        "lr-range",
        "Learning-rate range",
        "The loss after a few steps at each learning rate, from the same weights.",
    )
    curves = given.content["curves"]
    marks = []
    lines = []
    for i, curve in enumerate(curves):
        x, y = numbers(curve.get("learning_rates")), numbers(curve.get("losses"))
        smooth = numbers(curve.get("smoothed"))
        size = number(curve.get("batch_size"))
        name = f"batch size {size:,.0f}" if size >= 1 else "loss"
        length = min(len(x), len(y)) if len(y) else len(x)
        kept = kept_indices(length)
        if len(y):
            lines.append(Line(name, x[kept], y[kept], style="faint", colour=i, in_legend=False))
        if len(smooth) >= length:
            lines.append(Line(name, x[kept], smooth[kept], colour=i))
        if len(curves) == 1:
            for key, word, colour in (
                ("low", "low end", None),
                ("suggested", "suggested", 2),
                ("high", "high end", None),
            ):
                value = number(curve.get(key))
                if value > 0:
                    marks.append(Mark("x", value, f"{word}: {readable(value)}", colour))
    section.add(
        Figure(
            "Loss against learning rate",
            "Useful rates lie between where the line begins to fall and where it turns up; a long training "
            "stands less than a short one. Pale: as measured; strong: smoothed.",
            Axis("learning rate", log=True),
            Axis("loss"),
            lines,
            marks,
        )
    )
    section.add(_scaling(given), _range_table(curves))
    return section


def _scaling(given: Input) -> Figure | None:
    """Suggested rates over batch sizes, with the rule that was fitted."""
    curves = given.content["curves"]
    size, rate, low, high = (
        numbers([curve.get(key) for curve in curves])
        for key in ("batch_size", "suggested", "low", "high")
    )
    known = (size > 0) & (rate > 0)
    if known.sum() < 2:
        return None
    size, rate, low, high = (column[known] for column in (size, rate, low, high))
    lines = [Line("suggested, with its range", size, rate, low, high, style="points")]
    scaling = given.content.get("scaling")
    scaling = scaling if isinstance(scaling, Mapping) else {}
    exponent = number(scaling.get("exponent"))
    said = ""
    ends = np.array([size.min(), size.max()])
    middle = float(np.exp(np.log(size).mean())), float(np.exp(np.log(rate).mean()))
    for power, name, colour in ((1.0, "linear", 5), (0.5, "square root", 4)):
        lines.append(
            Line(name, ends, middle[1] * (ends / middle[0]) ** power, style="dashed", colour=colour)
        )
    if math.isfinite(exponent):
        a, b = number(scaling.get("low")), number(scaling.get("high"))
        interval = f" ({readable(a)} to {readable(b)})" if b >= a else ""
        said = f" Fitted: rate ∝ batch size to the power {readable(exponent)}{interval}"
        rule = scaling.get("rule")
        said += (
            f"; the rule that holds: {rule}." if rule else "; no rule can be told from the others."
        )
    return Figure(
        "How the learning rate follows the batch size",
        "Dashed: what the linear and the square-root rule would give through the middle of the "
        f"points.{said}",
        Axis("batch size (samples)", log=True),
        Axis("learning rate", log=True),
        lines,
    )


def _range_table(curves: list[dict[str, Any]]) -> Table:
    rows = [
        [
            f"{number(curve.get('batch_size')):,.0f}"
            if number(curve.get("batch_size")) >= 1
            else "–",
            *(
                readable(number(curve.get(key))) if number(curve.get(key)) > 0 else "–"
                for key in ("low", "suggested", "high", "diverged_at")
            ),
        ]
        for curve in curves
    ]
    return Table(["batch size", "low end", "suggested", "high end", "diverged at"], rows)


def critical(given: Input) -> Section:
    section = Section(
        "critical",
        "Critical batch size",
        "Branches from one checkpoint at growing batch sizes, over the same samples. The critical batch "
        "size is the largest whose loss keeps up with the branch that was left as it was.",
    )
    content, branches = given.content, given.content["branches"]
    lines = []
    for i, branch in enumerate(branches[:MOST_BRANCHES]):
        curve = branch.get("curve")
        points = [p for p in (curve if isinstance(curve, list) else []) if isinstance(p, dict)]
        kept = kept_indices(len(points))
        x, y = (numbers([points[j].get(key) for j in kept]) for key in ("samples", "loss"))
        size, times = number(branch.get("batch_size")), number(branch.get("multiplier"))
        name = f"batch size {size:,.0f} (× {times:g})"
        lines.append(Line(name, x, y, style="line" if branch.get("ok") else "dashed", colour=i))
    section.add(
        Figure(
            "Loss of the branches",
            "Smoothed. Dashed branches fell behind by more than the tolerance.",
            SAMPLES,
            Axis("loss"),
            lines,
        )
    )
    sizes, final = (
        numbers([branch.get(key) for branch in branches]) for key in ("batch_size", "final")
    )
    ok = np.array([bool(branch.get("ok")) for branch in branches], np.bool_)
    found, low, high = (number(content.get(k)) for k in ("critical_batch_size", "low", "high"))
    noise = content.get("noise_scale")
    noise = number(noise.get("value") if isinstance(noise, dict) else noise)
    marks = []
    if found > 0:
        end = f" ({readable(low)} to {readable(high)})" if high >= low > 0 else ""
        marks.append(Mark("x", found, f"critical batch size: {readable(found)}{end}", 2))
    if noise > 0:
        marks.append(Mark("x", noise, f"noise scale there: {readable(noise)}"))
    section.add(
        Figure(
            "Where the branches end",
            "Means over the seeds. Left of the green line, larger batches cost no more samples.",
            Axis("batch size (samples)", log=True),
            Axis("loss at the end"),
            [
                Line("kept up", sizes[ok], final[ok], style="points", colour=2),
                Line("fell behind", sizes[~ok], final[~ok], style="crosses", colour=1),
            ],
            marks,
        )
    )
    section.add(_facts(content, found, noise))
    return section


def _facts(content: Mapping[str, Any], found: float, noise: float) -> Table:
    factor = content.get("calibration")
    factor = number(factor.get("value") if isinstance(factor, dict) else factor)
    rows: list[tuple[str, float]] = [
        ("checkpoint at step", number(content.get("step"))),
        ("critical batch size", found),
        ("noise scale at the checkpoint", noise),
        ("critical batch size over noise scale", factor),
    ]
    return Table(["", "value"], [[name, readable(v)] for name, v in rows if math.isfinite(v)])
