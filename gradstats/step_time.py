"""How long an optimizer step takes, from measured times: a line with its spread. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstats.estimators import readable, require

__all__ = ["StepTime", "TimedStep", "fit_step_time", "peak_at"]

RESAMPLES = 200  # enough for a variance to 10%
STRAIGHT = 0.1  # a median farther from the line than this, as a fraction of it, is told

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TimedStep:
    """One kind of step that was timed: `accumulation_steps` micro-batches on every rank.

    `seconds`, `low`, `high`: median and quartiles. `peak_bytes`: most memory that a rank held at once
    beyond what it holds between steps, None where that was not measured.
    """

    micro_batch_size: int
    accumulation_steps: int
    seconds: float
    low: float
    high: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of k micro-batches of m samples per rank: ``update + k·(launch + per_sample·m)``.

    With one micro-batch that is t(B) = a + b·B. `update` is what comes once per step (optimizer,
    collectives), `launch` once per micro-batch; where only one number of micro-batches was timed they
    cannot be told apart, and all of it is in `launch`. `covariance` is that of the three, from the
    scatter of the rounds. `misfit` is how far the farthest median lies from the line, as a fraction.
    `memory_bytes` is what a rank has for a step, None where not known; `device` is what was timed.
    """

    update: float
    launch: float
    per_sample: float
    covariance: tuple[tuple[float, ...], ...]
    misfit: float
    points: tuple[TimedStep, ...]
    world_size: int = 1
    memory_bytes: int | None = None
    device: str = "cpu"

    def seconds(self, micro_batch_size: float, accumulation_steps: float = 1) -> float:
        """Expected seconds of a step."""
        each = self.launch + self.per_sample * micro_batch_size
        return self.update + accumulation_steps * each

    def interval(
        self, micro_batch_size: float, accumulation_steps: float = 1, confidence: float = 0.9
    ) -> tuple[float, float]:
        """Where the expected seconds lie with probability `confidence`, as the rounds scatter.

        It holds no error of the line itself: see `misfit`.
        """
        from scipy.special import ndtri

        require(0 < confidence < 1, "confidence", confidence, "pass a probability between 0 and 1")
        m, k = micro_batch_size, accumulation_steps
        terms = np.array([1.0, k, k * m])
        error = math.sqrt(max(float(terms @ np.array(self.covariance) @ terms), 0.0))
        middle, width = self.seconds(m, k), float(ndtri((1 + confidence) / 2)) * error
        return max(middle - width, 0.0), middle + width

    def fixed_samples(self, micro_batch_size: float | None = None) -> float:
        """Samples, over all ranks, that take as long as a step does besides its samples.

        a/b, where a step of B samples takes a + b·B seconds: of batches that grow by more micro-batches of
        `micro_batch_size`, or (None) of one micro-batch that grows. ``inf`` where samples take no time.

        Raises InvalidArgumentError where what comes once per step cannot be told from what each micro-batch
        takes.
        """
        fixed, each = self.update + self.launch, self.per_sample
        if micro_batch_size is not None:
            told_apart = len({p.accumulation_steps for p in self.points}) > 1
            remedy = "time steps of two or more numbers of micro-batches, accumulation_steps=(1, 2)"
            require(told_apart, "micro_batch_size", micro_batch_size, remedy)
            fixed, each = self.update, self.per_sample + self.launch / micro_batch_size
        return self.world_size * fixed / each if each else math.inf

    def bytes(self, micro_batch_size: float) -> float | None:
        """Expected peak memory of a step on a rank, beyond what it holds between steps.

        Between the sizes measured on straight lines, beyond them on the nearest; None where memory was
        not measured.
        """
        return peak_at(self._peaks(), micro_batch_size)

    @property
    def bytes_per_sample(self) -> float | None:
        """How a rank's peak memory grows with a sample of its micro-batch, at the largest sizes measured."""
        largest = self.max_micro_batch_size
        at = [peak_at(self._peaks(), largest + more) for more in (0, 1)]
        return None if at[0] is None or at[1] is None else at[1] - at[0]

    def _peaks(self) -> dict[int, int]:
        return {p.micro_batch_size: p.peak_bytes for p in self.points if p.peak_bytes is not None}

    @property
    def max_micro_batch_size(self) -> int:
        """The largest micro-batch that was timed, hence fitted: beyond it nothing is known."""
        return max(p.micro_batch_size for p in self.points)

    @property
    def min_micro_batch_size(self) -> int:
        """The smallest micro-batch that was timed."""
        return min(p.micro_batch_size for p in self.points)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> StepTime:
        """From `to_dict()`."""
        points = tuple(TimedStep(**point) for point in state["points"])
        return cls(
            **{**state, "points": points, "covariance": tuple(map(tuple, state["covariance"]))}
        )

    def __str__(self) -> str:
        low, high = self.interval(self.max_micro_batch_size)
        middle = self.seconds(self.max_micro_batch_size)
        spread = f"±{readable(100 * (high - low) / 2 / middle)}%"
        parts = [
            f"a step takes {readable(self.update)} s, plus {readable(self.launch)} s per micro-batch "
            f"and {readable(self.per_sample)} s per sample of a rank ({spread} at "
            f"{self.max_micro_batch_size:,}), timed at {_sizes(self.points)} samples per micro-batch"
        ]
        if self.misfit > STRAIGHT:
            parts.append(
                f"times are up to {100 * self.misfit:.0f}% off that line: trust those of sizes near the "
                "timed ones only"
            )
        if (each := self.bytes_per_sample) is not None:
            parts.append(f"a sample takes {readable(each / 1e6)} MB of a rank's memory")
        return "; ".join(parts)


def fit_step_time(
    times: Mapping[tuple[int, int], Sequence[float]],
    *,
    peak_bytes: Mapping[tuple[int, int], int] | None = None,
    world_size: int = 1,
    memory_bytes: int | None = None,
    device: str = "cpu",
) -> StepTime:
    """The line through measured steps.

    Args:
        times: seconds by (micro_batch_size, accumulation_steps), one for each round of measurements,
            as many for each; of at least two micro-batch sizes.
        peak_bytes: see `TimedStep`.

    Each kind of step counts with the median of its rounds, so that a slow spell does no harm. The line
    has the least sum of squares of relative errors, no term below zero. The covariance is that of the
    same fit to rounds drawn again with replacement (a fixed seed; zero with one round).

    Raises InvalidArgumentError for times that are not above 0, or too few.
    """
    kinds = sorted(times)
    seconds = np.array([times[kind] for kind in kinds], np.float64)
    valid = len({m for m, _ in kinds}) > 1 and seconds.ndim == 2 and seconds.shape[1] > 0
    require(valid, "times", times, "pass a list of seconds for two or more micro-batch sizes")
    valid = bool(np.all(np.isfinite(seconds) & (seconds > 0)))
    require(valid, "times", times, "pass seconds above 0")
    m, k = np.array(kinds, np.float64).T
    terms = np.stack([np.ones_like(k), k, k * m], axis=1)
    if len(set(k)) == 1:
        terms[:, 0] = 0.0  # not to be told from the second
    middle = np.median(seconds, axis=1)
    found = _nonnegative(terms, middle)
    rounds = seconds.shape[1]
    draw = np.random.default_rng(0)
    again = [
        _nonnegative(terms, np.median(seconds[:, draw.integers(rounds, size=rounds)], axis=1))
        for _ in range(RESAMPLES if rounds > 1 else 0)
    ]
    covariance = np.cov(np.array(again).T) if again else np.zeros((3, 3))
    low, high = np.quantile(seconds, (0.25, 0.75), axis=1)
    peaks = peak_bytes or {}
    return StepTime(
        update=float(found[0]),
        launch=float(found[1]),
        per_sample=float(found[2]),
        covariance=tuple(tuple(float(c) for c in row) for row in covariance),
        misfit=float(np.abs(middle / (terms @ found) - 1).max()),
        points=tuple(
            TimedStep(*kind, float(middle[i]), float(low[i]), float(high[i]), peaks.get(kind))
            for i, kind in enumerate(kinds)
        ),
        world_size=world_size,
        memory_bytes=memory_bytes,
        device=device,
    )


def peak_at(peaks: Mapping[int, int], size: float) -> float | None:
    """Peak memory at a size, from two or more measured ones (else None): see `StepTime.bytes`."""
    sizes = sorted(peaks)
    if len(sizes) < 2:
        return None
    after = min(max(int(np.searchsorted(sizes, size)), 1), len(sizes) - 1)
    m, n = sizes[after - 1], sizes[after]
    return peaks[m] + (peaks[n] - peaks[m]) * (size - m) / (n - m)


def _nonnegative(terms: Array, seconds: Array) -> Array:
    """Coefficients of at least zero with the least sum of squares of relative errors."""
    from scipy.optimize import nnls

    scale = np.maximum(terms.max(axis=0), np.finfo(np.float64).tiny)  # columns of like size
    found: Array = nnls(terms / scale / seconds[:, None], np.ones(len(seconds)))[0] / scale
    return found


def _sizes(points: Sequence[TimedStep]) -> str:
    sizes = sorted({p.micro_batch_size for p in points})
    return f"{', '.join(f'{m:,}' for m in sizes[:-1])} and {sizes[-1]:,}"
