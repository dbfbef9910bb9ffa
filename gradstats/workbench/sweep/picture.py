"""A sweep in one picture: loss by samples, steps and time; final losses; variance; steps to a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradstats.errors import InvalidArgumentError
from gradstats.workbench.pictures import COLOURS, GREY, empty_figure, save
from gradstats.workbench.sweep.summary import by_plan, measure_of

__all__ = ["draw"]

POINTS = 200  # of a mean curve


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw the content of a result file of kind "sweep".

    Raises InvalidArgumentError where the file cannot be written, or no trial ended.
    """
    done = by_plan([t for t in found["trials"] if t["ok"]])
    if not done:
        raise InvalidArgumentError("no trial of the sweep ended, so there is nothing to draw")
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(done)}
    figure = empty_figure(12, 7)
    above, below = figure.subplots(2, 3)
    measure = measure_of([t for runs in done.values() for t in runs])
    for axes, (by, label) in zip(above, BY.items(), strict=True):
        _curves(axes, done, colours, by, measure)
        axes.set_xlabel(label)
    above[0].set_ylabel(measure.replace("_", " "))
    above[0].legend(frameon=False, title="batch x steps")
    _finals(below[0], found["summary"], colours)
    _variance(below[1], found["variance"])
    _steps(below[2], found["steps_to_target"])
    save(figure, path)


BY = {"samples": "samples", "step": "steps", "seconds": "seconds"}


def _curves(
    axes: Any,
    done: Mapping[str, Sequence[Mapping[str, Any]]],
    colours: Mapping[str, str],
    by: str,
    measure: str,
) -> None:
    """The mean over seeds, and the lowest and highest of them behind it."""
    values: list[float] = []
    for name, runs in done.items():
        points = [
            [(p[by], p[measure]) for p in run["curve"] if p[measure] is not None] for run in runs
        ]
        end = min(curve[-1][0] for curve in points)
        grid = np.linspace(0, end, POINTS)
        lines = np.array([np.interp(grid, *np.array(curve).T) for curve in points])
        axes.fill_between(
            grid, lines.min(0), lines.max(0), color=colours[name], alpha=0.15, linewidth=0
        )
        axes.plot(grid, lines.mean(0), color=colours[name], linewidth=1.8, label=name)
        values += lines.mean(0).tolist()
    low, high = min(values), float(np.quantile(values, 0.98))
    if low > 0 and high > 5 * low:
        axes.set_yscale("log")
        _plain_numbers(axes)
        axes.set_ylim(low / 1.15, high * 1.15)
    else:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_xlim(left=0)


def _finals(axes: Any, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Final training and validation losses with their intervals."""
    shown = [row for row in rows if row["plan"] in colours]
    for key, marker, offset in (("final_loss", "o", -0.12), ("validation_loss", "s", 0.12)):
        for x, row in enumerate(shown):
            value = row[key]
            if value["mean"] is None:
                continue
            ends = None
            if value["high"] is not None:
                ends = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
            filled = colours[row["plan"]] if key == "final_loss" else "white"
            label = key.replace("_", " ") if x == 0 else None
            axes.errorbar(
                x + offset, value["mean"], ends, fmt=marker, color=colours[row["plan"]],
                markerfacecolor=filled, capsize=3, label=label,
            )  # fmt: skip
    axes.set_xticks(range(len(shown)), [row["plan"] for row in shown])
    axes.set_xlim(-0.6, len(shown) - 0.4)
    axes.set_title("final losses, 90% intervals", fontsize=10)
    axes.legend(frameon=False)


def _variance(axes: Any, found: Mapping[str, Any] | None) -> None:
    axes.set_title("variance of the mean gradient", fontsize=10)
    if found is None:
        _nothing(axes)
        return
    points = found["points"]
    sizes = np.array([p["batch_size"] for p in points], float)
    direct = np.array([p["direct"] for p in points])
    ends = [[p["direct"] - p["low"] for p in points], [p["high"] - p["direct"] for p in points]]
    line = np.array([sizes[0] / 1.3, sizes[-1] * 1.3])
    axes.plot(line, found["constant"] / line, color=GREY, linewidth=1, label="c/B")
    axes.errorbar(
        sizes, direct, ends, fmt="o", color=COLOURS[0], capsize=3, label="between batches"
    )
    known = [(p["batch_size"], p["by_monitor"]) for p in points if p["by_monitor"] is not None]
    if known:
        axes.plot(*zip(*known, strict=True), "x", color=COLOURS[1], label="monitor's tr Σ/B")
    _log_sizes(axes, sizes)
    axes.set_yscale("log")
    axes.legend(frameon=False)


def _steps(axes: Any, found: Mapping[str, Any] | None) -> None:
    if found is None:
        axes.set_title("steps to a target", fontsize=10)
        _nothing(axes)
        return
    name = found["measure"].replace("_", " ")
    axes.set_title(f"steps to a {name} of {found['target']:.3g}", fontsize=10)
    sizes = np.array([p["batch_size"] for p in found["points"]], float)
    line = np.geomspace(sizes[0] / 1.3, sizes[-1] * 1.3, 100)
    fitted = found["steps_min"] * (1 + found["critical_batch"] / line)
    axes.plot(line, fitted, color=GREY, linewidth=1, label="S_min (1 + B_crit/B)")
    axes.plot(sizes, [p["steps"] for p in found["points"]], "o", color=COLOURS[0], label="measured")
    _log_sizes(axes, sizes)
    axes.set_yscale("log")
    _plain_numbers(axes)
    axes.legend(frameon=False)


def _log_sizes(axes: Any, sizes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axes.set_xlabel("batch size")


def _plain_numbers(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.3g}"))
    axes.yaxis.set_minor_formatter("")


def _nothing(axes: Any) -> None:
    axes.text(
        0.5, 0.5, "not measured", ha="center", va="center", color=GREY, transform=axes.transAxes
    )
    axes.set_xticks([])
    axes.set_yticks([])
