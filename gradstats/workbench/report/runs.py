"""Sections on trainings: what their logs say of loss, rates and speed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradstats.words import readable
from gradstats.workbench.report.figures import Axis, Figure, Line, Section, Table
from gradstats.workbench.report.inputs import Run
from gradstats.workbench.report.thinning import POINTS, envelope, kept_indices, smoothed

__all__ = ["duration", "loss", "loss_at", "of", "other_numbers", "schedule", "speed", "summary"]

SHARE = "layer_share/"
SMOOTHING = 40  # a loss is the mean over so small a part of the run, to either side
MOST_OTHERS = 6
VALIDATION = ("validation_loss", "val_loss", "valid_loss", "eval_loss")
SAMPLES = Axis("samples seen")
# Keys of rows that sections of their own show.
KNOWN = {
    *("step", "samples", "seconds", "batch_size", "loss", "learning_rate", "tr_sigma"),
    *("noise_scale", "noise_scale_low", "noise_scale_high", "noise_scale_unbiased"),
    "true_grad_sq_norm",
    *("num_samples", "num_steps", "num_skipped", "coverage", *VALIDATION),
}

Array = NDArray[np.float64]


def hours(seconds: Sequence[Array]) -> tuple[float, str]:
    """What seconds are divided by to be read, and the unit's name, for the longest of these times."""
    most = max((float(s[np.isfinite(s)].max()) for s in seconds if np.isfinite(s).any()), default=0)
    if most >= 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if most >= 300 else (1.0, "seconds")


def summary(runs: Sequence[Run]) -> Section:
    """The runs side by side, and what they reached at equal samples and equal time."""
    section = Section("runs", "Runs compared" if len(runs) > 1 else "The run")
    rows: list[list[str]] = []
    for name, text in (
        ("steps", lambda r: _count(r.last("step"))),
        ("samples", lambda r: _count(r.last("samples"))),
        ("time", lambda r: duration(r.last("seconds"))),
        ("samples per second", lambda r: _number(_throughput(r))),
        ("batch size", lambda r: _count(r.last("batch_size"))),
        ("learning rate, last and highest", _rates),
        ("loss, smoothed, at the end", lambda r: _number(_end(r))),
        ("noise scale at the end", lambda r: _number(r.last("noise_scale"))),
        ("90% interval", _interval),
        ("rows in the log", lambda r: _count(len(r.rows))),
    ):
        cells = [text(run) for run in runs]
        if any(cell != "–" for cell in cells):
            rows.append([name, *cells])
    section.add(Table(["", *(run.name for run in runs)], rows))
    if len(runs) > 1:
        section.add(_at_equal(runs))
    return section


def _at_equal(runs: Sequence[Run]) -> Table:
    """Each run's smoothed loss where the first of them ends, by samples and by time."""
    rows = []
    for key, what in (
        ("samples", "at {} samples"),
        ("seconds", "after {}"),
        ("step", "at {} steps"),
    ):
        ends = [run.last(key) for run in runs]
        if not all(map(math.isfinite, ends)):
            continue
        end = min(ends)
        shown = duration(end) if key == "seconds" else _count(end)
        rows.append([what.format(shown), *(_number(loss_at(run, key, end)) for run in runs)])
    return Table(
        ["smoothed loss", *(run.name for run in runs)],
        rows,
        title="At equal cost",
        caption="Read where the shortest run ends. One run each: a small gap may be chance.",
    )


def loss_at(run: Run, key: str, end: float) -> float:
    """The smoothed loss of the last row whose `key` is at most `end`."""
    at, smooth = run.column(key), smooth_loss(run)
    known = np.isfinite(at) & np.isfinite(smooth) & (at <= end)
    return float(smooth[known][-1]) if known.any() else math.nan


def smooth_loss(run: Run) -> Array:
    return smoothed(run.column("loss"), round(len(run.rows) / SMOOTHING))


def loss(runs: Sequence[Run]) -> Section:
    section = Section("loss", "Loss")
    divisor, unit = hours([run.column("seconds") for run in runs])
    views = [("samples", SAMPLES, 1.0, "Loss by samples", "what the data buys")]
    views.append(("seconds", Axis(f"time ({unit})"), divisor, "Loss by time", "what waiting buys"))
    counted = any(np.isfinite(run.column("samples")).any() for run in runs)
    if len(runs) > 1 or not counted:
        views.append(("step", Axis("optimizer steps"), 1.0, "Loss by steps", "what a step buys"))
    for key, axis, scale, title, buys in views:
        lines = [line for i, run in enumerate(runs) for line in _loss_lines(run, key, scale, i)]
        caption = (
            f"Lower is better, and further left is cheaper: {buys}. Strong lines are smoothed over a "
            f"{SMOOTHING}th of the run to either side; the pale ones behind are "
            + (
                "the rows themselves."
                if all(len(run.rows) <= POINTS for run in runs)
                else "the range of the rows."
            )
        )
        if any(line.style == "dashed" for line in lines):
            caption += (
                " Dashed: on samples held out; a growing gap to the training loss is overfitting."
            )
        section.add(Figure(title, caption, axis, Axis("loss"), lines))
    return section


def _loss_lines(run: Run, key: str, scale: float, colour: int) -> list[Line]:
    x, y = run.column(key) / scale, run.column("loss")
    smooth = smooth_loss(run)
    lines = []
    if len(x) <= POINTS:
        lines.append(Line(run.name, x, y, style="faint", colour=colour, in_legend=False))
        lines.append(Line(run.name, x, smooth, colour=colour))
    else:
        middle, low, high = envelope(x, y)
        both = np.isfinite(x) & np.isfinite(smooth)
        if both.any():
            at = np.interp(middle, x[both], smooth[both])
            lines.append(Line(run.name, middle, at, low, high, colour=colour))
    for name in VALIDATION:
        held = run.column(name)
        known = np.flatnonzero(np.isfinite(held))
        if len(known):
            known = known[kept_indices(len(known))]
            title = f"{run.name}, {name.replace('_', ' ')}"
            lines.append(Line(title, x[known], held[known], style="dashed", colour=colour))
    return lines


def schedule(runs: Sequence[Run]) -> Section:
    """Learning rate and batch size by samples."""
    section = Section("schedule", "Learning rate and batch size")
    for key, title, label, caption in (
        ("learning_rate", "Learning rate", "learning rate", "Of the optimizer's first group."),
        (
            "batch_size",
            "Batch size",
            "samples per step",
            "Samples of each optimizer step, over all micro-batches and ranks.",
        ),
    ):
        lines = []
        for i, run in enumerate(runs):
            kept = kept_indices(len(run.rows))
            y = run.column(key)[kept]
            lines.append(Line(run.name, run.column("samples")[kept], y, style="steps", colour=i))
        changes = any(len(np.unique(line.y[np.isfinite(line.y)])) > 1 for line in lines)
        if changes:  # what stands still is in the table of the run
            section.add(Figure(title, caption, SAMPLES, Axis(label, zero=True), lines))
    return section


def speed(runs: Sequence[Run]) -> Figure:
    lines = []
    for i, run in enumerate(runs):
        kept = kept_indices(len(run.rows), 100)
        samples, seconds = run.column("samples")[kept], run.column("seconds")[kept]
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.diff(samples) / np.diff(seconds)
        rate = np.where(rate > 0, rate, np.nan)
        lines.append(Line(run.name, samples[1:], rate, colour=i))
    return Figure(
        "Samples per second",
        "Between rows of the log, all that the loop does included (loading, evaluation, checkpoints). "
        "Dips are pauses.",
        SAMPLES,
        Axis("samples per second", zero=True),
        lines,
    )


def other_numbers(runs: Sequence[Run]) -> Section:
    """What else the training logged, a figure each."""
    section = Section("others", "Other numbers")
    names = dict.fromkeys(
        key for run in runs for key in run.keys if key not in KNOWN and not key.startswith(SHARE)
    )
    for name in list(names)[:MOST_OTHERS]:
        lines = []
        for i, run in enumerate(runs):
            y = run.column(name)
            known = np.flatnonzero(np.isfinite(y))
            known = known[kept_indices(len(known))]
            lines.append(Line(run.name, run.column("samples")[known], y[known], colour=i))
        section.add(Figure(name, f"As the training logged it: {name}.", SAMPLES, Axis(name), lines))
    return section


def of(run: Run, runs: Sequence[Run]) -> str:
    """What is added to a title where there are several runs."""
    return f", {run.name}" if len(runs) > 1 else ""


def _end(run: Run) -> float:
    smooth = smooth_loss(run)
    known = smooth[np.isfinite(smooth)]
    return float(known[-1]) if len(known) else math.nan


def _throughput(run: Run) -> float:
    samples, seconds = run.column("samples"), run.column("seconds")
    known = np.isfinite(samples) & np.isfinite(seconds)
    if known.sum() < 2:
        return math.nan
    spent = seconds[known][-1] - seconds[known][0]
    return float((samples[known][-1] - samples[known][0]) / spent) if spent > 0 else math.nan


def _rates(run: Run) -> str:
    rates = run.column("learning_rate")
    rates = rates[np.isfinite(rates)]
    return f"{readable(rates[-1])} and {readable(rates.max())}" if len(rates) else "–"


def _interval(run: Run) -> str:
    if not math.isfinite(run.last("noise_scale")):
        return "–"
    low, high = (_last_exact(run, key) for key in ("noise_scale_low", "noise_scale_high"))
    return f"{_number(low)} {'up' if not math.isfinite(high) else f'to {readable(high)}'}"


def _last_exact(run: Run, key: str) -> float:
    """The last row's number, also where it is not finite."""
    return float(run.column(key)[-1])


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def _number(value: float) -> str:
    return readable(value) if math.isfinite(value) else "–"


def duration(seconds: float) -> str:
    """Seconds as a person reads them: ``2.86 s``, ``14 min 3 s``, ``7 h 12 min``."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
