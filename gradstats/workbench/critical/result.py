"""What branches give, and what is concluded from them: plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradstats.calibration import Calibration
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale, readable
from gradstats.noise import WIDEST_USEFUL

__all__ = ["Branch", "Critical", "Run", "Tolerance", "smoothed"]


@dataclass(frozen=True)
class Tolerance:
    """How much higher a branch's loss may be: `value` in the loss's units, or a share of its fall.

    The fall is what the unbranched run's smoothed loss fell by over the window.
    """

    value: float
    relative: bool = False

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """From "0.01", or "5%" of the fall. Raises InvalidArgumentError for anything else."""
        number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
        try:
            value = float(number) / (100 if percent else 1)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise InvalidArgumentError(
                f"tolerance {text!r} cannot be used; pass a loss above 0 such as 0.01, or a share of what "
                "the loss falls by, such as 5%"
            )
        return cls(value, percent)

    def of(self, fall: float) -> float:
        """In the loss's units."""
        return self.value * max(fall, 0.0) if self.relative else self.value


@dataclass(frozen=True)
class Run:
    """One branch with one order of the data: (samples since the checkpoint, evaluated loss) in order.

    `ok` is False where the loss was no longer finite; the curve ends there.
    """

    multiplier: int
    seed: int
    curve: tuple[tuple[int, float], ...]
    ok: bool = True

    def final(self, weight: float) -> float:
        return smoothed([loss for _, loss in self.curve], weight)[-1] if self.ok else math.inf

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "curve": _points(self.curve)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Run:
        curve = tuple((point["samples"], point["loss"]) for point in state["curve"])
        return cls(state["multiplier"], state["seed"], curve, state["ok"])


@dataclass(frozen=True)
class Branch:
    """A multiplier's runs together: mean curve, and how its loss differs from the unbranched one's.

    `difference` is the mean over seeds of the smoothed final losses' differences, seed by seed; `low` and
    `high` its interval (infinite with one seed). All three are infinite where a run diverged. `ok` is
    whether the difference is within the tolerance.
    """

    multiplier: int
    batch_size: int
    learning_rate: float
    curve: tuple[tuple[int, float], ...]
    final: float
    difference: float
    low: float
    high: float
    ok: bool

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "curve": _points(self.curve)}


@dataclass(frozen=True)
class Critical:
    """What the branches say. Sizes are in samples per optimizer step.

    `critical_batch_size`: where the mean difference first exceeds the tolerance, interpolated between the
    tested sizes; where none exceeds it, the largest tested size, and `reached` is False. `low` and `high`
    are the same for the ends of the differences' intervals, so they hold the size with `confidence`
    (as far as the differences grow with the batch); `high` is None where no size is surely outside.
    `largest_within`: the largest tested size up to which all are within. `calibration`: the critical size
    over the noise scale at the same checkpoint, None where that is not known, or the loss did not fall;
    without a lower end where no tested batch above the unbranched run's is within.
    """

    batch_size: int
    branches: tuple[Branch, ...]
    critical_batch_size: float
    low: float
    high: float | None
    confidence: float
    reached: bool
    largest_within: int
    tolerance: float
    fall: float
    smoothing: float
    seeds: int
    noise_scale: NoiseScale | None
    calibration: Calibration | None
    remarks: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether the factor is known well enough to choose batch sizes by."""
        factor = self.calibration
        return factor is not None and factor.high <= WIDEST_USEFUL * factor.low

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers, lists and dictionaries."""
        noise, factor = self.noise_scale, self.calibration
        return {
            **{k: v for k, v in vars(self).items() if k not in ("noise_scale", "calibration")},
            "branches": [branch.to_dict() for branch in self.branches],
            "noise_scale": None if noise is None else noise.to_dict(),
            "calibration": None if factor is None else factor.to_dict(),
            "remarks": list(self.remarks),
        }

    def __str__(self) -> str:
        end = "with no upper end" if self.high is None else f"to {readable(self.high)}"
        size = readable(self.critical_batch_size)
        text = (
            f"critical batch size {size} samples"
            if self.reached
            else f"critical batch size at least {size} samples, the largest tested"
        )
        moved = f"{'fell' if self.fall >= 0 else 'rose'} by {readable(abs(self.fall))}"
        text += (
            f" ({readable(self.low)} {end}): up to it the loss stays within {readable(self.tolerance)} of "
            f"that at {self.batch_size:,}, which {moved} meanwhile"
        )
        if self.noise_scale is not None and self.calibration is not None:
            factor = self.calibration
            least = "" if self.reached else "at least "
            text += (
                f"; the noise scale there is {readable(self.noise_scale.value)}, so the factor between "
                f"them is {least}{readable(factor.value)} ({readable(factor.low)} to "
                f"{readable(factor.high)})"
            )
        return text + "."


def smoothed(losses: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average; `weight` is that of the newest loss, from 0 (excluded) to 1."""
    found = [losses[0]]
    for loss in losses[1:]:
        found.append(found[-1] + weight * (loss - found[-1]))
    return found


def _points(curve: Sequence[tuple[int, float]]) -> list[dict[str, float]]:
    return [{"samples": samples, "loss": loss} for samples, loss in curve]
