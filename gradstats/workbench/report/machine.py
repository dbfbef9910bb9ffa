"""Sections on the machine: memory, what measuring costs, kernels, and where results were made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradstats.loggers.reading import number
from gradstats.words import beyond_memory, readable
from gradstats.workbench.report.figures import Axis, Bar, Bars, Figure, Line, Mark, Section, Table
from gradstats.workbench.report.inputs import Input, numbers, objects

__all__ = ["bench", "environment", "memory", "overhead", "step_time"]

TORCH = "torch"  # the backend of what operations are compared with
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def memory(given: Input) -> Section:
    content, points = given.content, given.content["points"]
    size, peak = (
        numbers([p.get(key) for p in points]) for key in ("micro_batch_size", "peak_bytes")
    )
    ok = np.array([bool(point.get("ok")) for point in points], np.bool_)
    budget, fixed, each = (
        number(content.get(key)) for key in ("budget_bytes", "fixed_bytes", "bytes_per_sample")
    )
    largest = max([n for n in (budget, *peak) if math.isfinite(n)], default=1.0)
    scale, unit = next((s, u) for s, u in UNITS if largest >= s or s == 1)
    lines = [Line("fits", size[ok], peak[ok] / scale, style="points", colour=2)]
    if (~ok).any():  # a size that failed has no peak of its own: it is shown at the limit
        height = np.where(np.isfinite(peak[~ok]), peak[~ok], budget) / scale
        lines.append(Line("does not fit", size[~ok], height, style="crosses", colour=1))
    if math.isfinite(fixed) and math.isfinite(each) and np.isfinite(size).any():
        ends = np.array([0.0, float(np.nanmax(size))])
        lines.append(
            Line(
                "fixed + per sample", ends, (fixed + each * ends) / scale, style="dashed", colour=0
            )
        )
    marks = []
    if budget > 0:
        marks.append(
            Mark("y", budget / scale, f"memory there is: {readable(budget / scale)} {unit}", 1)
        )
    chosen = number(content.get("recommended"))
    if chosen >= 1:
        marks.append(Mark("x", chosen, f"recommended: {chosen:,.0f}", 2))
    section = Section(
        "memory",
        "Memory",
        "The most memory of a whole step (forward, backward, optimizer) by micro-batch size.",
    )
    section.add(
        Figure(
            "Memory by micro-batch size",
            "Points are real steps. The line predicts; only sizes that ran are recommended, with a margin.",
            Axis("micro-batch size (samples)", zero=True),
            Axis(f"peak memory ({unit})", zero=True),
            lines,
            marks,
        )
    )
    beyond = number(content.get("beyond"))
    open_ended = beyond_memory(int(beyond)) if math.isfinite(beyond) else None
    rows = [
        ["device", str(content.get("device") or "–")],
        ["memory there is", _bytes(budget)],
        ["fixed (model, optimizer, buffers)", _bytes(fixed)],
        ["each sample", _bytes(each)],
        [
            "largest by the line, not confirmed",
            open_ended or _whole(number(content.get("largest"))),
        ],
        ["recommended", _whole(chosen)],
    ]
    formula = content.get("formula")
    if isinstance(formula, Mapping):
        largest, allowed = (_whole(number(formula.get(key))) for key in ("largest", "chosen"))
        said = open_ended or f"{largest}, of which {allowed}"
        rows.append(["textbook: (total − model)/(per sample)", said])
    section.add(Table(["", "value"], [row for row in rows if row[1] != "–"]))
    return section


def overhead(given: Input) -> list[Bars | Figure | None]:
    """What measuring costs, and how long a step takes, of a measurement."""
    seconds = given.content.get("step_seconds")
    bars = None
    if isinstance(seconds, Mapping):
        plain, measured, ratio, low, high = (
            number(seconds.get(key)) for key in ("plain", "measured", "ratio", "low", "high")
        )
        if plain > 0 and measured > 0:
            top = max(plain, measured)
            rows = [
                Bar("plain step", plain / top, _time(plain)),
                Bar("measured step", measured / top, _time(measured)),
            ]
            interval = (
                f" (quartiles {readable(low)} to {readable(high)})" if high >= low > 0 else ""
            )
            caption = (
                f"A measured step takes {readable(ratio)} × as long as the plain one beside it{interval}; "
                "bars are medians."
            )
            bars = Bars("Overhead of measuring", caption, "step", "time", rows)
    return [bars, step_time(given.content.get("timing"))]


def step_time(timing: Any, of: str = "") -> Figure | None:
    """Seconds of a step by micro-batch size, of StepTime.to_dict(); `of` is added to the title."""
    points = timing.get("points") if isinstance(timing, Mapping) else None
    points = [p for p in points or [] if isinstance(p, dict)]
    if not points:
        return None
    lines = []
    counts = sorted(c for c in {number(p.get("accumulation_steps")) for p in points} if c >= 1)
    for i, pieces in enumerate(counts):
        chosen = [p for p in points if number(p.get("accumulation_steps")) == pieces]
        x, y, low, high = (
            numbers([p.get(key) for p in chosen])
            for key in ("micro_batch_size", "seconds", "low", "high")
        )
        name = f"{pieces:g} micro-batch{'' if pieces == 1 else 'es'} a step"
        lines.append(Line(name, x, 1e3 * y, 1e3 * low, 1e3 * high, style="points", colour=i))
        parts = [number(timing.get(key)) for key in ("update", "launch", "per_sample")]
        if all(map(math.isfinite, parts)):
            ends = np.array([x.min(), x.max()])
            fitted = 1e3 * (parts[0] + pieces * (parts[1] + parts[2] * ends))
            lines.append(
                Line(f"{name}, fitted", ends, fitted, style="dashed", colour=i, in_legend=False)
            )
    return Figure(
        f"Time of a step by micro-batch size{of}",
        "Medians with quartiles, and the fitted line. Where it is flat, larger micro-batches are nearly "
        "free in time.",
        Axis("micro-batch size (samples)", zero=True),
        Axis("milliseconds a step", zero=True),
        lines,
    )


def bench(given: Input) -> Section:
    content = given.content
    section = Section("bench", "Kernels and steps", "Timed on this machine, in turns.")
    steps = objects(content["steps"])
    for model in dict.fromkeys(str(step.get("model", "–")) for step in steps):
        section.add(_steps(model, [step for step in steps if str(step.get("model", "–")) == model]))
    rows = [
        [
            str(op.get("name", "–")),
            str(op.get("backend", "–")),
            _time(number(op.get("seconds"))),
            _ratio(op) or "–",
            _percent(op.get("of_ceiling")),
            str(op.get("limit") or "–"),
        ]
        for op in objects(content["ops"])
        if number(op.get("seconds")) > 0 and op.get("backend") != TORCH
    ]
    section.add(
        Table(
            ["operation", "backend", "time", "against torch", "of the ceiling", "limit"],
            rows,
            title="Operations",
            caption="Against torch: the time over that of the kernels replaced, with quartiles. Of the "
            "ceiling: the least time that the gradients' own work could take at this machine's measured "
            "bandwidth and matrix rate, over the time taken.",
        )
    )
    return section


def _steps(model: str, steps: Sequence[Mapping[str, Any]]) -> Bars:
    """Times of one model's whole steps, by what is done in them."""
    timed = [step for step in steps if number(step.get("seconds")) > 0]
    longest = max((number(step["seconds"]) for step in timed), default=1.0)
    bars = [
        Bar(
            str(step.get("variant", "–")),
            number(step["seconds"]) / longest,
            _time(number(step["seconds"])),
            _ratio(step),
        )
        for step in timed
    ]
    caption = "Forward, backward and optimizer; quartiles of the ratios within a turn."
    left_out = [
        f"{s.get('variant')} ({s.get('note') or s.get('status')})" for s in steps if s not in timed
    ]
    if left_out:
        caption += f" Not timed: {', '.join(left_out)}."
    return Bars(f"A step of {model}", caption, "variant", "time", bars, "against the plain step")


def environment(inputs: Sequence[Input]) -> Section:
    """Where each result was made; logs do not say."""
    made = [g for g in inputs if isinstance(g.content.get("environment"), dict)]
    section = Section("environment", "Environment")
    tables = [dict(_plain_rows(given.content["environment"])) for given in made]
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = [[name, *(table.get(name, "–") for table in tables)] for name in names]
    targets = [str(given.content.get("target") or "–") for given in made]
    if any(target != "–" for target in targets):
        rows.insert(0, ["target", *targets])
    section.add(Table(["", *(given.name for given in made)], rows))
    return section


def _plain_rows(value: Any, before: str = "") -> list[tuple[str, str]]:
    """A nest of objects as names and texts."""
    rows: list[tuple[str, str]] = []
    for name, part in value.items() if isinstance(value, Mapping) else ():
        name = f"{before}{name}".replace("_", " ")
        if isinstance(part, Mapping):
            rows += _plain_rows(part, "" if name == "versions" else f"{name}, ")
        elif isinstance(part, float):
            rows.append((name, readable(part)))
        else:
            rows.append((name, "–" if part is None else str(part)))
    return rows


def _bytes(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    scale, unit = next((s, u) for s, u in UNITS if abs(value) >= s or s == 1)
    return f"{value / scale:.3g} {unit}"


def _whole(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def _time(seconds: float) -> str:
    scale, unit = next(
        pair for pair in ((1.0, "s"), (1e-3, "ms"), (0.0, "µs")) if seconds >= pair[0]
    )
    return f"{seconds / (scale or 1e-6):.3g} {unit}"


def _percent(value: Any) -> str:
    value = number(value)
    return f"{100 * value:.0f}%" if math.isfinite(value) else "–"


def _ratio(row: Mapping[str, Any]) -> str:
    """A ratio with its quartiles; empty where it is not known."""
    value, low, high = (number(row.get(f"ratio{end}")) for end in ("", "_low", "_high"))
    if not math.isfinite(value):
        return ""
    return f"{readable(value)} ×" + (
        f" ({readable(low)} to {readable(high)})" if high > low else ""
    )
