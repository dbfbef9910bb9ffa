"""The picture of a critical batch size: the branches' losses, and how they differ by batch size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gradstats.workbench.critical.result import Critical, smoothed
from gradstats.workbench.pictures import BLUE, GREEN, GREY, ORANGE, empty_figure, save

__all__ = ["draw"]


def draw(found: Critical, path: Path) -> None:
    """Raises InvalidArgumentError where the file cannot be written."""
    from matplotlib import colormaps

    figure = empty_figure(10, 4.4)
    left, right = figure.subplots(1, 2)
    shades = colormaps["viridis"]
    for i, branch in enumerate(found.branches):
        samples = [at for at, _ in branch.curve]
        losses = smoothed([loss for _, loss in branch.curve], found.smoothing)
        colour = shades(0.9 * i / max(len(found.branches) - 1, 1))
        left.plot(samples, losses, color=colour, linewidth=1.8, label=f"{branch.batch_size:,}")
    left.set_xlabel("samples since the checkpoint")
    left.set_ylabel("loss, smoothed")
    left.legend(frameon=False, title="batch size", ncols=2)
    _differences(right, found)
    save(figure, path)


def _differences(axes: Any, found: Critical) -> None:
    known = [b for b in found.branches if math.isfinite(b.difference)]
    sizes = [b.batch_size for b in known]
    middle = [b.difference for b in known]
    if found.seeds > 1:
        ends = [[b.difference - b.low for b in known], [b.high - b.difference for b in known]]
        axes.errorbar(sizes, middle, ends, color=BLUE, marker="o", capsize=3, linewidth=1.8)
    else:
        axes.plot(sizes, middle, color=BLUE, marker="o", linewidth=1.8)
    label = f"tolerance {found.tolerance:.3g}"
    axes.axhline(found.tolerance, color=GREY, linestyle=(0, (5, 3)), linewidth=1.5, label=label)
    high = found.branches[-1].batch_size if found.high is None else found.high
    label = (
        f"its {found.confidence:.0%} interval{'' if found.high is not None else ', no upper end'}"
    )
    axes.axvspan(found.low, high, color=ORANGE, alpha=0.15, linewidth=0, label=label)
    least = "" if found.reached else "at least "
    label = f"critical batch size, {least}{found.critical_batch_size:,.4g}"
    axes.axvline(found.critical_batch_size, color=ORANGE, linewidth=2, label=label)
    noise = found.noise_scale
    if noise is not None and 0 < noise.value < math.inf:
        label = f"noise scale {noise.value:,.4g}"
        axes.axvline(noise.value, color=GREEN, linewidth=1.8, linestyle=":", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlabel("batch size")
    axes.set_ylabel("smoothed loss above the unbranched run's")
    axes.legend(loc="upper left", framealpha=0.9, edgecolor="none")
