"""Interleaved timing: variants run in turns, so that a slow spell hits all of them alike.

In every round each variant has one turn, in shuffled order. A variant's ratio to the base is the
median of its per-round ratios, with the quartiles as its spread.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Spread", "Step", "interleave", "once", "ratios", "steps_per_turn", "table"]

Step = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def once(step: Step, steps: int = 1, device: str = "cpu") -> float:
    """Seconds of one call, averaged over `steps` calls in a row."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / steps
    begin_s = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begin_s) / steps


def steps_per_turn(step: Step, seconds: float, device: str = "cpu") -> int:
    """Calls that fill a turn of about `seconds`, most of them with the variant's caches warm."""
    if seconds <= 0:
        return 1
    typical = statistics.median(once(step, 1, device) for _ in range(3))
    return max(1, min(1000, math.ceil(seconds / max(typical, 1e-9))))


def interleave(
    variants: Mapping[str, Step], *, rounds: int, warmup: int = 2, turn_seconds: float = 0.1,
    seed: int = 0, device: str = "cpu",
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds per call of every variant, one number per round.

    With `turn_seconds` a turn is one untimed call, which settles what the variant before it left in
    caches and allocator, then as many calls as fill that time; else it is a single call.
    """
    steps: dict[str, int] = {}
    for name, step in variants.items():
        for _ in range(warmup):
            step()
        steps[name] = steps_per_turn(step, turn_seconds, device)
    order = list(variants)
    shuffle = random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if turn_seconds > 0:
                variants[name]()
            seconds[name].append(once(variants[name], steps[name], device))
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, Spread]:
    """Each variant over the base, round by round."""
    return {
        name: Spread.of([t / b for t, b in zip(times, seconds[base], strict=True)])
        for name, times in seconds.items()
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain columns, as wide as they need to be."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip
