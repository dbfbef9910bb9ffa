"""What the search for the largest micro-batch finds. Numbers only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from gradstats.workbench.vram.sizes import Formula, show_bytes

__all__ = ["Point", "Vram"]


@dataclass(frozen=True)
class Point:
    """Training steps at one micro-batch size.

    `peak_bytes`: on the CPU the process's peak resident memory, on CUDA the most that torch's allocator
    had reserved; of which `allocated_bytes` were in tensors (CUDA). `seconds`: the fastest step's.
    `ok`: the steps were taken and stayed within the limit; `why` says what happened where not. `fresh`:
    the process had done nothing else before, so that this confirms the size. None where the process
    did not live to say.
    """

    micro_batch_size: int
    peak_bytes: int | None
    seconds: float | None
    ok: bool
    why: str = ""
    fresh: bool = False
    allocated_bytes: int | None = None


@dataclass(frozen=True)
class Vram:
    """The largest micro-batch that fits, and how it was found.

    `recommended`: the largest allowed size whose steps were taken in a fresh process held to
    ``(1 − margin)·budget_bytes``; None where no size was, never a size that was not tried.
    `largest`: the size at which the line ``fixed_bytes + bytes_per_sample·m`` reaches the whole budget,
    of any size: a prediction, not confirmed, None without a line. `limited_by`: "memory", "max_size" (the
    largest size that was allowed), "seconds" (a step took longer than allowed) or "interrupted".
    `beyond`: the largest size that ran, where something else than memory ended the search and the line
    goes on to more than twice that: `largest` and `formula` are then no figures to go by. Else None.
    `formula` is the textbook's: the budget, less parameters, buffers, gradients and optimizer state
    (`model_bytes`), over `bytes_per_sample`. `with_monitor`: whether gradstats measured in these steps.
    On several ranks everything is this rank's own but `recommended` and `limited_by`, which all share.
    """

    device: str
    budget_bytes: int
    margin: float
    points: tuple[Point, ...]
    fixed_bytes: float | None
    bytes_per_sample: float | None
    model_bytes: int | None
    largest: int | None
    recommended: int | None
    limited_by: Literal["memory", "max_size", "seconds", "interrupted"]
    formula: Formula | None
    multiple_of: int | None
    with_monitor: bool
    world_size: int = 1
    remarks: tuple[str, ...] = ()
    beyond: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)

    def __str__(self) -> str:
        budget = f"{show_bytes(self.budget_bytes)} on {self.device}"
        if self.recommended is None:
            if self.limited_by == "interrupted":
                return f"Interrupted before a size was confirmed within {budget}."
            return f"No micro-batch fits into {budget} with a margin of {self.margin:.0%}."
        whose = " on every rank" if self.world_size > 1 else ""
        why = {
            "memory": "confirmed in a fresh process",
            "max_size": "the largest size that was allowed to be tried, confirmed in a fresh process",
            "seconds": "larger ones were not tried: their steps take too long; confirmed in a fresh process",
            "interrupted": "confirmed in a fresh process; interrupted before larger ones were tried",
        }[self.limited_by]
        return (
            f"Micro-batch {self.recommended:,}{whose}: fits into {budget} with a margin of "
            f"{self.margin:.0%} ({why})."
        )
