"""Sections on the noise of trainings: the noise scale, what it is made of, and the layers it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradstats.loggers.reading import number
from gradstats.words import readable
from gradstats.workbench.report.figures import Axis, Bar, Bars, Figure, Line, Mark, Section
from gradstats.workbench.report.inputs import Run, objects
from gradstats.workbench.report.runs import SAMPLES, SHARE, of
from gradstats.workbench.report.thinning import kept_indices

__all__ = ["noise", "notes_of_layers", "share_bars", "shares"]

TOP_LAYERS = 12
FOLLOWED_LAYERS = 5


def noise(runs: Sequence[Run], marks: Sequence[Mark]) -> Section:
    """The noise scale over training; `marks` are the limits of memory, and what was advised."""
    section = Section(
        "noise",
        "Noise scale",
        "The batch size beyond which more samples per step stop paying: at it, a target takes twice the "
        "fewest steps, and twice the fewest samples. Batches far below it are cheap in samples and slow; "
        "far above, they waste samples.",
    )
    lines = []
    for i, run in enumerate(runs):
        kept = kept_indices(len(run.rows))
        x, value = run.column("samples")[kept], run.column("noise_scale")[kept]
        low, high = run.column("noise_scale_low")[kept], run.column("noise_scale_high")[kept]
        high = np.where(np.isfinite(value) & np.isnan(high), np.inf, high)
        low = np.where(low > 0, low, 0.0)
        lines.append(Line(f"noise scale{of(run, runs)}", x, value, low, high, colour=i))
        used = run.column("batch_size")[kept]
        title = f"batch size used{of(run, runs)}"
        lines.append(Line(title, x, used, style="dashed", colour=i if len(runs) > 1 else 5))
    if not any(np.isfinite(line.y).any() for line in lines[::2]):
        return section
    caption = (
        "Where the dashed line lies below the band, a larger batch saves steps at little cost in samples; "
        "above it, a smaller one saves samples. The band is the 90% interval, cut off where it is very wide. "
        "The vertical axis is logarithmic."
    )
    size = Axis("samples per step", log=True)
    section.add(Figure("Noise scale over training", caption, SAMPLES, size, lines, marks))
    section.add(_parts(runs))
    return section


def _parts(runs: Sequence[Run]) -> Figure:
    lines = []
    for i, run in enumerate(runs):
        kept = kept_indices(len(run.rows))
        x = run.column("samples")[kept]
        for offset, key, name in (
            (0, "tr_sigma", "tr Σ"),
            (len(runs), "true_grad_sq_norm", "|G|²"),
        ):
            y = run.column(key)[kept]
            colour = i + offset
            lines.append(Line(f"{name}{of(run, runs)}", x, y, colour=colour))
    return Figure(
        "What it is made of",
        "The noise scale is tr Σ (the scatter of the samples' gradients) over |G|² (the squared length of "
        "the mean gradient). It grows when |G|² falls faster than tr Σ. Gaps: where the estimate of |G|² "
        "is not above zero.",
        SAMPLES,
        Axis("squared gradient", log=True),
        lines,
    )


def shares(runs: Sequence[Run]) -> Section:
    section = Section(
        "layers",
        "Layers",
        "Which parameters the gradient noise comes from. Shares of tr Σ add up to one.",
    )
    for run in runs:
        names = [key.removeprefix(SHARE) for key in run.keys if key.startswith(SHARE)]
        last = {name: run.last(SHARE + name) for name in names}
        last = {name: share for name, share in last.items() if share >= 0}
        order = sorted(last, key=lambda name: -last[name])
        section.add(share_bars(f"Share of tr Σ at the end{of(run, runs)}", last))
        kept = kept_indices(len(run.rows))
        x = run.column("samples")[kept]
        lines = [
            Line(name, x, 100 * run.column(SHARE + name)[kept], colour=i)
            for i, name in enumerate(order[:FOLLOWED_LAYERS])
        ]
        section.add(
            Figure(
                f"The largest shares over training{of(run, runs)}",
                "A share that moves says that another part of the network has begun to dominate the noise.",
                SAMPLES,
                Axis("share of tr Σ (%)", zero=True),
                lines,
            )
        )
    return section


def share_bars(title: str, share: dict[str, float], notes: dict[str, str] | None = None) -> Bars:
    """The largest shares as bars, the rest in one."""
    order = sorted(share, key=lambda name: -share[name])
    first, rest = order[:TOP_LAYERS], order[TOP_LAYERS:]
    top = max(share.values(), default=1.0) or 1.0
    notes = notes or {}
    bars = [
        Bar(name, share[name] / top, f"{100 * share[name]:.1f}%", notes.get(name, ""))
        for name in first
    ]
    caption = "Bars are to scale with the largest. Weights with large shares set the noise scale."
    if rest:
        caption += (
            f" {len(rest)} smaller ones hold {100 * sum(share[n] for n in rest):.1f}% together."
        )
    heading = "noise scale" if notes else ""
    return Bars(title, caption, "parameter", "share of tr Σ", bars, heading)


def notes_of_layers(layers: Any) -> tuple[dict[str, float], dict[str, str]]:
    """Shares and noise scales by name, of a measurement's `layers`."""
    share: dict[str, float] = {}
    notes: dict[str, str] = {}
    for layer in objects(layers):
        name, part = str(layer.get("name")), layer.get("share")
        if isinstance(part, (int, float)) and part >= 0:
            share[name] = float(part)
            value, low, high = (
                number(layer.get(f"noise_scale{end}")) for end in ("", "_low", "_high")
            )
            if math.isfinite(value):
                ends = f" ({readable(low)} to {readable(high)})" if high >= low > 0 else ""
                notes[name] = readable(value) + ends
    return share, notes
