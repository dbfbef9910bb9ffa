"""What a recommendation says: a point of the trade-off, the whole of it, and the sentence for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gradstats.words import readable, sizes

__all__ = ["BatchSizeAdvice", "CurvePoint"]


@dataclass(frozen=True)
class CurvePoint:
    """Expected cost of a target at one batch size.

    ``batch_size = micro_batch_size × accumulation_steps × world_size``. ``steps``, ``samples``,
    ``seconds`` and ``cost`` (device time) are ratios to the present batch size, ``hours`` and ``price``
    are for the rest of the training; ``None`` where not known.
    """

    batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    steps: float
    samples: float
    seconds: float | None
    cost: float | None
    hours: float | None
    price: float | None


@dataclass(frozen=True)
class BatchSizeAdvice(CurvePoint):
    """The point of the curve to go to, how to get there and why; sizes are global batch sizes.

    ``low`` and ``high`` are the sizes that the ends of the noise scale's interval would give, within
    the same limits (``high`` is ``None`` where there is no upper end). ``curve`` is empty where the
    noise scale is too uncertain; ``learning_rate`` is ``None`` where not known. ``present`` is the
    present batch size's point, ``steps_left`` the steps that the target would take with it.
    """

    low: int
    high: int | None
    learning_rate: float | None
    reason: str
    curve: tuple[CurvePoint, ...]
    present: CurvePoint
    steps_left: int | None

    @property
    def present_batch_size(self) -> int:
        """Samples of a step at present, over all ranks."""
        return self.present.batch_size

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, each point of the curve a dictionary."""
        return {**asdict(self), "present_batch_size": self.present_batch_size}

    def __str__(self) -> str:
        present = self.present
        now = present.batch_size
        verb = "keep batch size" if self.batch_size == now else f"change batch size {now:,} to"
        rate = "" if self.learning_rate is None else f"; learning rate {self.learning_rate:.4g}"
        time = "" if self.seconds is None else f", {readable(self.seconds)} × the time"
        return (
            f"{verb} {self.batch_size:,} (the interval gives {sizes(self.low, self.high)}) as "
            f"micro_batch_size {self.micro_batch_size:,} × accumulation_steps {self.accumulation_steps:,} × "
            f"world_size {self.world_size:,}{rate}; expected against now: {readable(self.steps)} × "
            f"the steps, {readable(self.samples)} × the samples{time}{self._left()}. Why: {self.reason}."
        )

    def _left(self) -> str:
        """The rest of the training in steps, hours and money."""
        if self.steps_left is None:
            return ""

        def parts(point: CurvePoint) -> str:
            steps = f"{readable(self.steps_left * point.steps)} steps"  # type: ignore[operator]
            hours = "" if point.hours is None else f", {readable(point.hours)} hours"
            return (
                steps + hours + ("" if point.price is None else f", price {readable(point.price)}")
            )

        return f"; {parts(self)} to go instead of {parts(self.present)}"
