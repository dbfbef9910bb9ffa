"""What a learning-rate range test finds. Numbers only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gradstats.estimators import readable
from gradstats.workbench.lr_range.curve import Curve
from gradstats.workbench.lr_range.scaling import Scaling

__all__ = ["LrRange"]


@dataclass(frozen=True)
class LrRange:
    """Curves by batch size, the rule over batch sizes where it was asked for, and the proof of no trace.

    `steps`: of each run. `steps_taken`: of all. `present_rate`: the optimizer's own. `before` and `after`:
    fingerprints by part (see `lr_range.fingerprint`), equal.
    """

    curves: tuple[Curve, ...]
    scaling: Scaling | None
    optimizer: str
    present_rate: float
    steps: int
    repeats: int
    steps_taken: int
    before: dict[str, str]
    after: dict[str, str]
    interrupted: bool = False
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [_sentence(curve) for curve in self.curves]
        if self.scaling is not None:
            lines.append(f"{str(self.scaling)[0].upper()}{str(self.scaling)[1:]}.")
        return "\n".join([*lines, *self.remarks])


def _sentence(curve: Curve) -> str:
    if curve.low is None or curve.suggested is None:
        return (
            f"Batch {curve.batch_size:,}: the loss falls by more than its noise at no rate tried."
        )
    if curve.high is None:
        ends = f"from {readable(curve.low)} up; none of the rates tried makes the loss rise"
    else:
        ends = f"{readable(curve.low)} to {readable(curve.high)}"
        if curve.high_spread is not None and curve.high_spread[0] < curve.high_spread[1]:
            first, last = map(readable, curve.high_spread)
            ends += f" (upper end by repeat: {first} to {last})"
    return (
        f"Batch {curve.batch_size:,}: learning rates {ends}; the loss falls most at "
        f"{readable(curve.best or 0.0)}, suggested {readable(curve.suggested)}."
    )
