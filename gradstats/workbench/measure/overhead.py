"""What measuring adds to a training step: plain and measured steps in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Overhead", "compare_steps"]

SECONDS = 2.0  # that the comparison should take
FEWEST, MOST = 9, 60  # pairs of steps
RESAMPLES = 500


@dataclass(frozen=True)
class Overhead:
    """Median seconds of a plain step and of a measured one, and the median ratio of neighbours.

    `low` and `high`: where that ratio lies with 90% confidence, by drawing the `pairs` again with
    replacement.
    """

    plain: float
    measured: float
    ratio: float
    low: float
    high: float
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)


def compare_steps(step: Callable[[], object], device: torch.device) -> Overhead:
    """Time a step of a monitor that was attached with ``every=2``: it is measured every other time.

    Neighbours have the same conditions. The plain one of them still passes through the monitor's entries
    into the modules, about a microsecond each. The first two of each are not counted: what is found out
    or compiled once is done in them.
    """
    for _ in range(4):
        once = _seconds(step, device)
    pairs = min(max(round(SECONDS / 2 / once), FEWEST), MOST)
    seconds = [(_seconds(step, device), _seconds(step, device)) for _ in range(pairs)]
    measured, plain = zip(*seconds, strict=True)  # a monitor measures the first
    return overhead_of(plain, measured)


def overhead_of(plain: Sequence[float], measured: Sequence[float]) -> Overhead:
    """From seconds of neighbouring steps."""
    ratios = np.asarray(measured) / np.asarray(plain)
    draw = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draw], axis=1), (0.05, 0.95))
    middle = statistics.median(plain), statistics.median(measured), float(np.median(ratios))
    return Overhead(*middle, float(low), float(high), len(ratios))


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
