"""The picture of a critical batch size: the branches' losses, and how they differ by batch size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.workbench.critical.result import Critical, smoothed

__all__ = ["draw", "drawable"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"


def drawable(path: Path) -> None:
    """Raise where no picture can be written to `path`: before the measuring, not after it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise GradStatsError(
            f"pictures need matplotlib ({error}); run `pip install 'gradstats[demo]'`"
        ) from error
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise InvalidArgumentError(
            f"no picture can be written as {path.name!r}; its name must end in .png, .svg or .pdf"
        )


def draw(found: Critical, path: Path) -> None:
    """Raises InvalidArgumentError where the file cannot be written."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)  # draws to a file, whatever backend the user has set
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
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be written ({error.strerror})") from error


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
