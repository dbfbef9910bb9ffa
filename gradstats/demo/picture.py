"""The demo's one picture: the loss above, the noise scale and the batch size below."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from gradstats.demo.train import READ_EVERY
from gradstats.loggers import Row
from gradstats.workbench.pictures import BLUE, GREY, ORANGE, empty_figure, save


def draw(rows: list[Row], batch_size: int, title: str, unit: str, path: Path) -> None:
    """Draw the rows of steps.jsonl. `unit` says what one sample is, in the plural."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    figure = empty_figure(8, 6.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.15))
    figure.suptitle(title, fontsize=12)
    _loss(above, rows)
    _noise(below, rows, batch_size)
    below.set_xlabel(f"samples seen ({unit})")
    below.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    below.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    below.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    below.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.3g}"))
    below.yaxis.set_minor_formatter("")
    above.set_xlim(0, rows[-1]["samples"] if rows else 1)
    save(figure, path)


def _loss(axes: Any, rows: list[Row]) -> None:
    known = [row for row in rows if math.isfinite(row["loss"])]
    samples, losses = [row["samples"] for row in known], [row["loss"] for row in known]
    axes.plot(samples, losses, color=BLUE, linewidth=2, label=f"mean of {READ_EVERY} steps")
    axes.set_ylabel("loss (nats)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper right")


def _noise(axes: Any, rows: list[Row], batch_size: int) -> None:
    read = [row for row in rows if 0 < row["noise_scale"] < math.inf]
    samples = [row["samples"] for row in read]
    values = [row["noise_scale"] for row in read]
    axes.set_yscale("log")
    shown = np.array([*values[len(values) // 10 :], batch_size])
    floor, top = shown.min() / 2.5, shown.max() * 2.5
    axes.set_ylim(floor, top)
    # A band without a lower or an upper end leaves the picture there.
    low = [max(row["noise_scale_low"], floor / 10) for row in read]
    high = [min(row["noise_scale_high"], top * 10) for row in read]
    axes.fill_between(
        samples, low, high, color=ORANGE, alpha=0.2, linewidth=0, label="90% interval"
    )
    axes.plot(samples, values, color=ORANGE, linewidth=2, label="noise scale, smoothed")
    label = f"batch size used: {batch_size:,}"
    axes.axhline(batch_size, color=GREY, linewidth=1.5, linestyle=(0, (5, 3)), label=label)
    axes.set_ylabel("noise scale (samples)")
    axes.legend(frameon=False, loc="lower right")
