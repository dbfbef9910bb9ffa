"""Which steps are measured."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from gradstats.errors import InvalidArgumentError

__all__ = ["Budget", "Every", "Fixed", "Paid", "measures", "sparse"]

DENSE = 32  # steps measured one by one, and then in each doubling of their number
SPARSEST = 64
FIRST = 16  # steps measured one by one, for an interval needs twelve
THEN = 8  # in each e-fold of the steps, while a budget would pay for fewer
PAIRS = 4  # costs that are known before any is gone by
RECENT = 9  # costs of which the median counts: a pause of the training or a compilation does not


@dataclass(frozen=True)
class Budget:
    """For ``attach(every=Budget(share))``: measure as often as a `share` of the training's time pays for.

    What a measured step takes longer than the plain one after it is timed as training goes on, on a GPU by
    events that nobody waits for. Where its median is r times a plain step, one step in ``r/share`` is
    measured, at most every other one, for the plain ones between tell the cost. A noise scale moves with the
    logarithm of the steps, so there are more at first: the first 16, and then, until ``r/share`` is less, one
    step in n/8 after n. Which steps are measured depends on times alone, and on no gradient. Where several
    processes train together the first one's times decide, and a measured step waits for its word.

    Raises InvalidArgumentError for a share that is not above 0 and at most 1.
    """

    share: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InvalidArgumentError(
                f"Budget(share={self.share!r}) cannot be kept; pass a share of the time above 0, at most 1"
            )


Every = int | Literal["sparse"] | Budget


def measures(step: int, every: int | Literal["sparse"]) -> bool:
    """Whether a step, counted from 0, is measured.

    One out of `every`; or, as the noise scale moves with the logarithm of the steps, ever fewer of them:
    the first 32, and then 32 in each doubling of the number of steps, down to one out of 64.
    """
    return sparse(step, DENSE) if every == "sparse" else step % every == 0


def sparse(step: int, dense: int) -> bool:
    """Each of the first `dense` steps, then so many in each doubling of their number, or one out of 64."""
    return step % min(SPARSEST, 1 << max(0, (step // dense).bit_length() - 1)) == 0


class Fixed:
    """The steps of `measures`."""

    def __init__(self, every: int | Literal["sparse"]) -> None:
        self._every = every

    def after(self, step: int, measured: bool) -> bool:
        """Whether the step after `step` is to be measured."""
        return measures(step + 1, self._every)

    def state_dict(self) -> None:
        """Nothing: the number of the step says it all."""

    def load_state_dict(self, steps: int, state: Mapping[str, Any] | None) -> bool:
        """Go on after `steps` steps. Returns whether the next one is to be measured."""
        return measures(steps, self._every)


class Stopwatch(NamedTuple):
    """`mark()` takes the time; `seconds(a, b)` between two marks, None while it is not known."""

    mark: Callable[[], Any]
    seconds: Callable[[Any, Any], float | None]


def stopwatch(device: torch.device) -> Stopwatch:
    """The device's own time where it runs behind the host."""
    if device.type != "cuda":
        return Stopwatch(time.perf_counter, lambda a, b: b - a)

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return Stopwatch(mark, lambda a, b: a.elapsed_time(b) / 1e3 if b.query() else None)


class Paid:
    """The steps that a budget pays for; where there are several processes, `agree` gives the first one's."""

    def __init__(
        self, budget: Budget, watch: Stopwatch, agree: Callable[[Callable[[], int]], int] | None
    ) -> None:
        self._share, self._watch, self._agree = budget.share, watch, agree
        self._due = 0  # the step to measure next
        self._costs: deque[float] = deque(maxlen=RECENT)  # over a plain step
        self._begun: Any = None  # when a measured step began
        self._over: tuple[Any, Any] | None = None  # when it began and ended, while a plain one runs
        self._open: deque[tuple[Any, Any, Any]] = deque(maxlen=RECENT)  # and the plain one's end

    def after(self, step: int, measured: bool) -> bool:
        """Whether the step after `step` is to be measured."""
        if measured:
            wait = partial(self._wait, step + 1)
            self._due = step + (wait() if self._agree is None else self._agree(wait))
        due = step + 1 >= self._due
        begun, over = self._begun, self._over
        self._begun = self._over = None
        if measured or due or over:
            now = self._watch.mark()
            if over is not None:
                self._open.append((*over, now))
            if due:
                self._begun = now
            elif measured and begun is not None:
                self._over = begun, now
        return due

    def _wait(self, steps: int) -> int:
        """Steps from a measured one to the next, after so many in all."""
        if steps < FIRST:
            return 1
        self._read()
        early = steps // THEN
        if len(self._costs) < PAIRS:
            return max(2, early)
        return max(2, min(early, math.ceil(statistics.median(self._costs) / self._share)))

    def _read(self) -> None:
        while self._open:
            before, between, after = self._open[0]
            plain = self._watch.seconds(between, after)
            if plain is None:
                return
            self._open.popleft()
            took = self._watch.seconds(before, between)
            if took is not None and plain > 0:
                self._costs.append((took - plain) / plain)

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers, what is timed so far with them."""
        self._read()
        return {"due": self._due, "costs": list(self._costs)}

    def load_state_dict(self, steps: int, state: Mapping[str, Any] | None) -> bool:
        """Go on after `steps` steps, from nothing where another cadence left no state.

        Returns whether the next step is to be measured.
        """
        state = state or {"due": steps, "costs": []}
        self._due = state["due"]
        self._costs = deque(state["costs"], maxlen=RECENT)
        self._begun = self._over = None
        self._open.clear()
        return steps >= self._due


def cadence_of(
    every: Every, device: torch.device, agree: Callable[[Callable[[], int]], int] | None
) -> Fixed | Paid:
    """What `attach(every=...)` asks for."""
    return Paid(every, stopwatch(device), agree) if isinstance(every, Budget) else Fixed(every)
