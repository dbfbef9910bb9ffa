"""The curve of a range test as text, and as a picture with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradstats.workbench.lr_range.curve import Curve
from gradstats.workbench.lr_range.scaling import Scaling
from gradstats.workbench.pictures import COLOURS, GREY, empty_figure, save

__all__ = ["draw", "text_chart"]

WIDTH, HEIGHT = 64, 12
ABOVE = 0.35  # of the largest fall that is shown above the loss at the start


def text_chart(curve: Curve, width: int = WIDTH, height: int = HEIGHT) -> str:
    """Loss over the logarithm of the rate: ● a mean, ▲ one above the picture, ┄ the loss at the start, and
    below it what of the axis is the range (━) and the suggestion (◆)."""
    rates = curve.learning_rates
    floor, top = _loss_range(curve)
    first, last = math.log(rates[0]), math.log(rates[-1])

    def column(rate: float) -> int:
        return round((math.log(rate) - first) / (last - first) * (width - 1))

    def row(loss: float) -> int:
        return round((top - loss) / (top - floor) * (height - 1))

    cells = [[" "] * width for _ in range(height)]
    cells[row(curve.start_loss)] = ["┄"] * width
    for rate, loss in zip(rates, curve.losses, strict=True):
        high = not loss <= top
        cells[0 if high else row(loss)][column(rate)] = "▲" if high else "●"
    axis = ["─"] * width
    if curve.low is not None:
        end = curve.high or rates[-1]
        axis[column(curve.low) : column(end) + 1] = "━" * (column(end) - column(curve.low) + 1)
        axis[column(curve.suggested or curve.low)] = "◆"
    labels = {0: f"{top:.4g}", row(curve.start_loss): f"{curve.start_loss:.4g}"}
    labels[height - 1] = f"{floor:.4g}"
    lines = [f"{labels.get(k, ''):>9} │{''.join(line)}" for k, line in enumerate(cells)]
    left, right = f"{rates[0]:.2g}", f"{rates[-1]:.2g}"
    lines.append(f"{'':>9} └{''.join(axis)}")
    lines.append(f"{'':>11}{left}{right:>{width - len(left)}}")
    return "\n".join(lines)


def draw(curves: Sequence[Curve], scaling: Scaling | None, title: str, path: Path) -> None:
    """Draw the curves, and where there are several the best rates over the batch sizes.

    Raises InvalidArgumentError where the file cannot be written.
    """
    several = len(curves) > 1
    figure = empty_figure(11 if several else 7.5, 4.6)
    panels = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    figure.suptitle(title, fontsize=12)
    _losses(panels[0], curves)
    if several:
        _best(panels[1], curves, scaling)
    save(figure, path, grid="both")


def _loss_range(curve: Curve) -> tuple[float, float]:
    """From a little below the least loss to a little above that at the start; never empty."""
    start = curve.start_loss
    floor = min([loss for loss in curve.losses if math.isfinite(loss)], default=start)
    fall = max(start - floor, 1e-3 * abs(start), 1e-12)
    return min(floor, start - fall), start + ABOVE * fall


def _losses(axes: Any, curves: Sequence[Curve]) -> None:
    ranges = [_loss_range(curve) for curve in curves]
    floor, top = min(r[0] for r in ranges), max(r[1] for r in ranges)
    axes.set_xscale("log")
    axes.set_ylim(floor - 0.05 * (top - floor), top)
    for k, curve in enumerate(curves):
        colour = COLOURS[k % len(COLOURS)]
        shown = [
            (rate, loss, spread, smooth)
            for rate, loss, spread, smooth in zip(
                curve.learning_rates, curve.losses, curve.spread, curve.smoothed, strict=True
            )
            if math.isfinite(loss)
        ]
        if not shown:
            continue
        rates, losses, spreads, smoothed = zip(*shown, strict=True)
        axes.plot(rates, smoothed, color=colour, linewidth=2, label=f"batch {curve.batch_size:,}")
        axes.errorbar(
            rates, losses, yerr=spreads, fmt="o", markersize=3, color=colour, alpha=0.5, linewidth=1
        )
        if curve.low is not None and len(curves) == 1:
            end = curve.high or curve.learning_rates[-1]
            axes.axvspan(curve.low, end, color=colour, alpha=0.1, label="range", linewidth=0)
        if curve.suggested is not None:
            axes.axvline(curve.suggested, color=colour, linewidth=1.2, linestyle=(0, (5, 3)))
    axes.axhline(curves[0].start_loss, color=GREY, linewidth=1, linestyle=":", label="at the start")
    axes.set_xlabel("learning rate (dashed: suggested)")
    axes.set_ylabel("loss after the run, ± spread of the repeats")
    axes.legend(frameon=False)


def _best(axes: Any, curves: Sequence[Curve], scaling: Scaling | None) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    known = [c for c in curves if c.best is not None]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for k, c in enumerate(curves):
        if c.best is not None and c.best_log_error is not None:
            factor = math.exp(1.645 * c.best_log_error)
            ends = [[c.best - c.best / factor], [c.best * factor - c.best]]
            colour = COLOURS[k % len(COLOURS)]
            axes.errorbar([c.batch_size], [c.best], yerr=ends, fmt="o", color=colour)
    if scaling is not None and "saturating" in scaling.possible:
        sizes = [known[0].batch_size * 2 ** (k / 8) for k in range(200)]
        sizes = [s for s in sizes if s <= known[-1].batch_size]
        rates = [scaling.max_rate / (1 + scaling.noise_scale / s) for s in sizes]
        axes.plot(sizes, rates, color=GREY, linewidth=1.5, label="max/(1 + B_noise/B)")
        axes.legend(frameon=False, loc="upper left")
    axes.set_xticks([c.batch_size for c in known], [f"{c.batch_size:,}" for c in known])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("batch size")
    axes.set_ylabel("best learning rate, ± 1.64 standard errors")
