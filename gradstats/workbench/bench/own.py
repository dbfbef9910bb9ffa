"""What statistics cost in the user's own training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradstats.attaching import attach
from gradstats.errors import GradStatsError, InvalidArgumentError, first_line
from gradstats.estimators import whole
from gradstats.stats import GradStats
from gradstats.trial import joined
from gradstats.workbench.bench.steps import KINDS, PLAIN, Variant, timed
from gradstats.workbench.bench.timing import Spread

__all__ = ["StepBench", "bench_step"]


@dataclass(frozen=True)
class StepBench:
    """Seconds of the plain step and of the measured ones, in turns on this machine."""

    variants: tuple[Variant, ...]

    def ratio(self, kind: str = "norms") -> Spread:
        """The measured step's time over the plain one's: median and quartiles over the rounds.

        Raises GradStatsError where the model refused to be measured, InvalidArgumentError for a kind that
        was not timed.
        """
        found = next((row for row in self.variants if row.name == f"gradstats {kind}"), None)
        if found is None:
            kinds = ", ".join(
                repr(row.name.removeprefix("gradstats ")) for row in self.variants[1:]
            )
            raise InvalidArgumentError(f"kind={kind!r} was not timed; pass one of {kinds}")
        if found.ratio is None:
            raise GradStatsError(f"the step with {kind} could not be timed: {found.note}")
        return found.ratio

    def to_dict(self) -> dict[str, Any]:
        return {row.name: row.to_dict() for row in self.variants}

    def __str__(self) -> str:
        parts = []
        for row in self.variants:
            said = [row.remark] if row.remark else []
            if row.seconds is not None and row.name != PLAIN:
                said.insert(0, f"{row.ratio} of plain")
            took = "" if row.seconds is None else f" {row.seconds.median:.4g} s"
            parts.append(", ".join([row.name + took, *said]))
        return "; ".join(parts)


def bench_step(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    kinds: Sequence[str] = KINDS,
    rounds: int = 20,
    turn_seconds: float = 0.1,
    **options: Any,
) -> StepBench:
    """Time training steps on one batch: as they are, and with gradstats attached.

    ```python
    found = bench_step(model, nn.CrossEntropyLoss(), (x, y), optimizer=optimizer)
    print(found)  # plain 0.01056 s; gradstats norms 0.01101 s, 1.043 (1.038–1.051) of plain
    ```
    A step is forward, backward, `monitor.step()`, `optimizer.step()` and `zero_grad()`. Every variant
    trains a copy of the model and of the optimizer, so yours stay as they are.

    Args:
        loss_fn: called loss_fn(model, batch), or, where it is an nn.Module or a function of
            torch.nn.functional, loss_fn(model(x), y) with batch = (x, y).
        optimizer: over the model's parameters. Default: SGD at a rate of 0, whose step costs least.
        kinds: "norms", "norms+moments" or both.
        rounds: turns of each variant, in shuffled order.
        turn_seconds: that a turn is filled with; 0 for one step.
        options: of `gradstats.attach`.

    A model that cannot be measured so is a row with status "refused" and the reason.

    Raises InvalidArgumentError for arguments that cannot be used, and a model that cannot be copied.
    """
    whole("rounds", rounds)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InvalidArgumentError(f"kinds={unknown} cannot be used; pass {' or '.join(KINDS)}")
    loss = joined(loss_fn)
    rows = [Variant(PLAIN, _Step(model, loss, batch, optimizer))]
    for kind in kinds:
        row = Variant(f"gradstats {kind}")
        try:
            step = _Step(model, loss, batch, optimizer, moments=kind == KINDS[1], **options)
            step()
            row.step = step
            row.note = step.note()
        except GradStatsError as error:
            row.status, row.note = "refused", str(error)
        rows.append(row)
    device = next(model.parameters()).device.type
    return StepBench(tuple(timed(rows, rounds, turn_seconds, device)))


class _Step:
    """A training step of a copy; measured where `moments` is not None."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Any],
        batch: Any,
        optimizer: torch.optim.Optimizer | None,
        moments: bool | None = None,
        **options: Any,
    ) -> None:
        if optimizer is None:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        try:  # together, so that the optimizer's copy steps the model's
            self.model, self.optimizer = copy.deepcopy((model, optimizer))
        except Exception as error:
            raise InvalidArgumentError(
                f"steps are timed on copies, and {type(model).__name__} or its optimizer cannot be copied "
                f"({first_line(error)}). Pass the model as it is before any forward"
            ) from error
        self.loss, self.batch = loss, batch
        self.stats: GradStats | None = None
        self.monitor = None if moments is None else attach(self.model, moments=moments, **options)

    def __call__(self) -> None:
        self.loss(self.model, self.batch).backward()
        if self.monitor is not None:
            self.stats = self.monitor.step()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def note(self) -> str:
        """What it leaves out."""
        part = 1.0 if self.stats is None else self.stats.coverage.fraction
        return "" if part == 1 else f"{part:.0%} of the parameters measured"
