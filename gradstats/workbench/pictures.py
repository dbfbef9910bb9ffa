"""What the pictures of results have in common. They are drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradstats.errors import GradStatsError, InvalidArgumentError

__all__ = ["COLOURS", "GREY", "empty_figure", "require_drawable", "save"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#555555"


def require_drawable(path: Path) -> None:
    """Raise where no picture can be written as `path`: to be told before long work.

    GradStatsError where matplotlib is not installed, InvalidArgumentError where the name's ending is none
    that it writes.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise GradStatsError(
            f"pictures need matplotlib ({error}); run `pip install 'gradstats[demo]'`, or ask for none"
        ) from error
    if path.suffix.lstrip(".").lower() not in FigureCanvasAgg.get_supported_filetypes():
        raise InvalidArgumentError(
            f"no picture can be written as {path.name!r}; its name must end in .png, .svg or .pdf"
        )


def empty_figure(width: float, height: float) -> Any:
    """A figure of so many inches, for files, whatever backend the user has set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path, *, grid: str = "y") -> None:
    """Give its axes the looks of all, and write it. Raises InvalidArgumentError where it cannot be."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InvalidArgumentError(
            f"the picture {path} cannot be written ({error.strerror}); name another file, or make room"
        ) from error
