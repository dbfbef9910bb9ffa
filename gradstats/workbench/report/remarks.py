"""What a reader should be aware of before relying on the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradstats.loggers.reading import number
from gradstats.words import readable
from gradstats.workbench.report.advice_of import Basis
from gradstats.workbench.report.inputs import Input, Run
from gradstats.workbench.report.thinning import POINTS

__all__ = ["Remark", "remarks"]

SKIPPED = 0.01  # of the steps, from which on it is worth a word


@dataclass(frozen=True)
class Remark:
    """`where`: the file or run."""

    where: str
    text: str


def remarks(inputs: Sequence[Input], runs: Sequence[Run], bases: Sequence[Basis]) -> list[Remark]:
    found = [Remark(given.name, text) for given in inputs for text in _of_file(given)]
    found += [Remark(run.name, text) for run in runs for text in _of_run(run)]
    found += [Remark(basis.name, text) for basis in bases for text in _of_noise(basis)]
    return found


def _of_file(given: Input) -> list[str]:
    said = []
    if given.spoilt:
        what = "line holds" if given.spoilt == 1 else "lines hold"
        said.append(f"{given.spoilt:,} {what} no row (cut short, or no JSON) and were passed over.")
    if given.replaced:
        said.append(
            f"{given.replaced:,} rows are of steps that a resumed training did again; the later ones count."
        )
    if given.content.get("interrupted"):
        said.append("it was interrupted: it holds what was measured until then.")
    coverage, missing = number(given.content.get("coverage")), given.content.get("missing")
    if coverage < 1 or missing:
        said.append(_uncovered(coverage, missing))
    for key in ("notes", "remarks"):
        said += [str(remark) for remark in _list(given.content.get(key))]
    return said


def _uncovered(fraction: float, missing: Any) -> str:
    items = missing.items() if isinstance(missing, dict) else enumerate(_list(missing))
    names = [str(value) if isinstance(key, int) else f"{key} ({value})" for key, value in items]
    part = f"{100 * fraction:.3g}% of" if fraction < 1 else "not all of"
    listed = (
        f" Not measured: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}." if names else ""
    )
    return f"{part} the trainable parameters were measured.{listed}"


def _of_run(run: Run) -> list[str]:
    said = []
    steps, skipped, coverage = (run.last(key) for key in ("step", "num_skipped", "coverage"))
    if skipped >= 1 and skipped >= SKIPPED * steps:
        said.append(
            f"{skipped:,.0f} of {steps:,.0f} steps were left out of the noise scale (not finite, or too few "
            "samples)."
        )
    if coverage < 1:
        said.append(_uncovered(coverage, None))
    lost = sum(1 for row in run.rows if "loss" in row and not math.isfinite(number(row["loss"])))
    if lost:
        said.append(f"the loss is not finite in {lost:,} of {len(run.rows):,} rows.")
    if not any("noise_scale" in row for row in run.rows):
        said.append("its rows hold no noise scale; was it written by gradstats.Log?")
    if len(run.rows) > POINTS:
        said.append(
            f"{len(run.rows):,} rows: figures show about {POINTS} points of a line, and this page "
            "keeps rows at even distances; the log itself has them all."
        )
    return said


def _of_noise(basis: Basis) -> list[str]:
    noise = basis.noise
    said = [noise.note] if noise.note else []
    if noise.uncalibrated:
        said.append(
            "its noise scale is that of the normalisation layers, a proxy without usable calibration."
        )
    if not noise.actionable and math.isfinite(noise.value):
        end = "has no upper end" if math.isinf(noise.high) else f"ends at {readable(noise.high)}"
        said.append(
            f"the interval of its noise scale is too wide to act on: it begins at {readable(noise.low)} and "
            f"{end}."
        )
    return said


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
