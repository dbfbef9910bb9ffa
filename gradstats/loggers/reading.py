"""A log read back: its rows, what it says beside them, and what follows from the last of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradstats.advice import recommend
from gradstats.batch_advice import BatchSizeAdvice
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale
from gradstats.layouts import LARGEST
from gradstats.loggers.about import About
from gradstats.step_time import StepTime

__all__ = ["Logged", "entry_of", "read_lines", "read_log"]

CONFIDENCE = 0.9  # of the intervals in logs that do not say


@dataclass(frozen=True)
class Logged:
    """`rows` in the order of the file; `spoilt` lines hold none (half-written, or no JSON)."""

    rows: Sequence[dict[str, Any]]
    about: About = field(default_factory=About)
    spoilt: int = 0

    @property
    def world_size(self) -> int | None:
        """Processes that trained together; None where the log does not say."""
        about = self.about
        if about.world_size is None and about.timing is not None:  # a log of an earlier version
            return about.timing.world_size
        return about.world_size

    @property
    def timing(self) -> StepTime | None:
        """Step times of as many processes as trained, of which alone advice can rest on them."""
        timing = self.about.timing
        return timing if timing is not None and timing.world_size == self.world_size else None

    @property
    def batch_size(self) -> int | None:
        """The last one, over all processes: of a step that is as large on each; None where not known."""
        size, ranks = self.present("batch_size"), self.world_size or 1
        return math.ceil(size / ranks) * ranks if size and 1 <= size <= LARGEST else None

    def noise_scale(self) -> NoiseScale | None:
        """That of the last row that has one, as the monitor had it; None where none has."""
        last = next((row for row in reversed(self.rows) if "noise_scale" in row), None)
        if last is None:
            return None
        about, skipped = self.about, _count(last.get("num_skipped"))
        ends = [number(last.get(f"noise_scale_{end}")) for end in ("low", "high")]
        coverage = number(last.get("coverage"))
        return NoiseScale.from_dict(
            {
                "value": _known(last.get("noise_scale")),
                "low": ends[0] if ends[0] >= 0 else 0.0,
                "high": _known(ends[1]),
                "confidence": about.confidence or CONFIDENCE,
                "num_samples": _count(last.get("num_samples", last.get("samples"))),
                "num_steps": _count(last.get("num_steps", number(last.get("step")) - skipped)),
                "num_skipped": skipped,
                "tr_sigma": _known(last.get("tr_sigma")),
                "true_grad_sq_norm": _known(last.get("true_grad_sq_norm")),
                "coverage": coverage if 0 <= coverage <= 1 else 1.0,
                "method": about.method or "per_sample",
                "unbiased": _known(last.get("noise_scale_unbiased")),
                "calibration": about.calibration,
                "calibration_usable": about.calibration_usable is not False,
                "note": about.note or "",
            }
        )

    def present(self, key: str) -> float | None:
        """The last finite number under `key`, None where there is none."""
        values = (number(row.get(key)) for row in reversed(self.rows))
        return next((value for value in values if math.isfinite(value)), None)

    def recommend(self, *, max_micro_batch_size: int | None = None) -> BatchSizeAdvice | None:
        """As `Monitor.recommend`, from the last rows; None without a noise scale and a batch size."""
        noise, size, about = self.noise_scale(), self.batch_size, self.about
        if noise is None or size is None:
            return None
        rate = self.present("learning_rate")
        known = about.optimizer is not None and rate is not None and rate >= 0
        return recommend(
            noise,
            batch_size=size,
            learning_rate=rate if known else None,
            optimizer=about.optimizer,
            step_seconds=self.timing,
            tokens_per_sample=about.tokens_per_sample,
            max_micro_batch_size=max_micro_batch_size,
            world_size=self.world_size or 1,
        )


def read_log(path: str | Path) -> Logged:
    """All that a file of JSON lines holds. Raises InvalidArgumentError where it cannot be read."""
    rows: list[dict[str, Any]] = []
    about, spoilt = About(), 0
    for line in _lines(Path(path)):
        entry = entry_of(line)
        if entry is None:
            spoilt += 1
        elif isinstance(entry, About):
            about = about.joined(entry)
        else:
            rows.append(entry)
    return Logged(rows, about, spoilt)


def read_lines(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file of JSON lines, and how many of its lines hold none (half-written, or no JSON).

    Raises InvalidArgumentError where the file cannot be read.
    """
    logged = read_log(path)
    return list(logged.rows), logged.spoilt


def entry_of(line: str) -> dict[str, Any] | About | None:
    """The row that a line holds, or what it says beside them; None where it was cut short, or is else."""
    try:
        entry = json.loads(line)
        if isinstance(entry, dict) and isinstance(entry.get("about"), dict):
            return About.from_dict(entry["about"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return entry if math.isfinite(number(step)) else None


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.strip():
                    yield line
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read ({error.strerror})") from error


def number(value: Any) -> float:
    """A float; NaN for what is no number (null, text, true) or too large for one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _known(value: Any) -> float | None:
    known = number(value)
    return None if math.isnan(known) else known


def _count(value: Any) -> int:
    """A whole number of at least 0; 0 where it is not known."""
    known = number(value)
    return round(max(0.0, known)) if math.isfinite(known) else 0
