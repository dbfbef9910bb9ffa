"""The search: sizes that double give a line, the line a size, and a fresh process confirms it or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.workbench.vram.line import crossing, fit
from gradstats.workbench.vram.process import Told, Trial, try_sizes
from gradstats.workbench.vram.result import Point, Vram
from gradstats.workbench.vram.sizes import allowed_below, formula, show_bytes

__all__ = ["largest_micro_batch"]

ENOUGH = 0.5  # of what the first size leaves: sizes double up to here, the line goes twice as far at most
FAR = 2  # times the largest size that ran: where a line that nothing has tested is told no more
PROBE_STEPS = 2  # the second holds the optimizer's state, which the first makes
LOOSE = 1.25  # reserved over allocated memory, from which on the allocator's fragments are told

Cause = Literal["memory", "max_size", "seconds", "interrupted"]


def largest_micro_batch(
    target: str,
    *,
    memory: float | None = None,
    margin: float = 0.1,
    multiple_of: int | None = None,
    max_size: int = 65536,
    plain: bool = False,
    steps: int = 3,
    seed: int = 0,
    most_seconds: float = 30.0,
    report: Callable[[str], object] = lambda text: None,
) -> Vram:
    """The largest micro-batch whose training steps fit into memory, each try in a process of its own.

    A step is forward, backward, `monitor.step()` and `optimizer.step()` on a batch of the workload. One
    process takes two each at 2, 4, 8, … samples until half of what is left is used; the line through the last
    peaks says which size should fit, and a fresh process then takes `steps` there. Where that fails, the
    search goes on halfway down to what worked; where the new peak leaves room, it tries the next size
    that the line allows. Every process is held to ``(1 − margin)·memory``: what is recommended has been
    run within that, and has the margin left.

    Args:
        target: `module:factory`, as of `gradstats.workbench.workload.load`. Every process calls it anew.
        memory: bytes. On a CPU for the whole process (default: what is available, control groups
            counted, shared by the ranks of this machine); on CUDA for torch's allocator (default: what
            is free once the context is there).
        margin: fraction of the memory to leave, in [0, 1).
        multiple_of: sizes to choose from, see `allowed_below`. Default: powers of two.
        max_size: the largest size to try.
        plain: without gradstats' monitor in the steps.
        steps: of a confirmation, at least 2.
        seed: of the model and the order of its data.
        most_seconds: a size whose step takes longer is the last that is tried.
        report: called with a line of text before each try.

    In an initialised process group all ranks call this alike, and confirm the same sizes at the same
    time: what does not fit on one fits nowhere, and all get the same recommendation.

    Raises InvalidArgumentError for arguments out of range or a target that cannot be used, GradStatsError
    where the steps fail of something else than memory. After Ctrl-C it returns what is known by then.
    """
    _check(memory, margin, multiple_of, max_size, steps, most_seconds)
    budget = None if memory is None else int(memory)
    trial = Trial(target, seed, budget, 1 - margin, plain, steps, most_seconds)
    search = _Search(trial, multiple_of, max_size, report)
    try:
        cause = search.run()
    except KeyboardInterrupt:
        cause = "interrupted"
    return search.result(margin, cause)


@dataclass
class _Search:
    trial: Trial
    multiple_of: int | None
    max_size: int
    report: Callable[[str], object]
    ranks: _Ranks = field(default_factory=lambda: _Ranks())
    told: Told = field(default_factory=Told)
    confirmed: int = 0

    def run(self) -> Cause:
        doubled = [2**k for k in range(1, self.max_size.bit_length())]
        last = self._try(doubled or [1], "trying", PROBE_STEPS, ENOUGH)
        self.trial = replace(self.trial, budget=self.told.budget)  # the same for all that follow
        slow = last.ok and (last.seconds or 0) > self.trial.most_seconds
        most = last.micro_batch_size if slow else self.max_size
        failed = self.ranks.least(most + 1 if last.ok else last.micro_batch_size)
        wrong = False  # whether the line was
        while (size := self.ranks.least(self._next(failed, wrong))) > self.confirmed:
            point = self._try([size], "confirming", self.trial.steps)
            if self.ranks.least(int(point.ok)):
                self.confirmed = size
            else:
                failed, wrong = size, True
        if self.confirmed == allowed_below(self.max_size, self.multiple_of):
            return "max_size"
        return (
            "seconds"
            if slow and self.confirmed == allowed_below(most, self.multiple_of)
            else "memory"
        )

    def _try(self, sizes: Sequence[int], what: str, steps: int, enough: float = math.inf) -> Point:
        """The last point of a process that tries these sizes."""

        def report(size: int) -> None:
            self.report(f"{what} a micro-batch of {size:,} …")

        try:
            try_sizes(replace(self.trial, steps=steps), sizes, self.told, enough, report)
        except GradStatsError:
            self.ranks.least(FAILED)
            raise
        return self.told.points[-1]

    def _next(self, failed: int, wrong: bool) -> int:
        """The allowed size below `failed` to confirm next; not above `confirmed` where there is none."""
        fitted = [p.micro_batch_size for p in self.told.points if p.ok]
        known = max((m for m in fitted if m < failed), default=0)
        if wrong:
            return allowed_below((known + failed) // 2, self.multiple_of)
        line = fit(self.told.points)
        if line is None:
            return allowed_below(failed - 1, self.multiple_of)
        most = max(crossing(line, self.told.budget * self.trial.share), known)
        return allowed_below(min(most, failed - 1), self.multiple_of)

    def result(self, margin: float, cause: Cause) -> Vram:
        told, line = self.told, fit(self.told.points)
        textbook = None
        if line is not None and told.model_bytes is not None:
            textbook = formula(told.budget, told.model_bytes, line[1], multiple_of=self.multiple_of)
        largest = None if line is None else crossing(line, told.budget)
        ran = max((p.micro_batch_size for p in told.points if p.ok), default=0)
        far = cause in ("max_size", "seconds") and (largest or 0) > FAR * ran
        return Vram(
            device=told.device,
            budget_bytes=told.budget,
            margin=margin,
            points=tuple(told.points),
            fixed_bytes=None if line is None else line[0],
            bytes_per_sample=None if line is None else line[1],
            model_bytes=told.model_bytes,
            largest=largest,
            recommended=self.confirmed or None,
            limited_by=cause,
            formula=textbook,
            multiple_of=self.multiple_of,
            with_monitor=not self.trial.plain,
            world_size=self.ranks.size,
            remarks=tuple(_remarks(told)),
            beyond=ran if far else None,
        )


def _remarks(told: Told) -> list[str]:
    found = []
    held = [(p.peak_bytes, p.allocated_bytes) for p in told.points if p.peak_bytes]
    reserved, allocated = held[-1] if held else (0, None)
    loose = bool(allocated) and reserved > LOOSE * (allocated or 0)
    if told.retries or loose:
        seen = f"reserved {show_bytes(reserved)} for tensors of {show_bytes(allocated or 0)}"
        seen = "had to return unused memory to go on" if told.retries else seen
        found.append(
            f"torch's allocator {seen}, so its memory is in fragments: the environment variable "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may make room for more"
        )
    return found


FAILED = -1


class _Ranks:
    """The processes that search together, or this one alone."""

    def __init__(self) -> None:
        dist = torch.distributed
        joined = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if joined else 1

    def least(self, value: int) -> int:
        """The least of all ranks' values.

        Raises GradStatsError where another rank says by `FAILED` that it has.
        """
        if self.size == 1:
            return value
        on_card = torch.distributed.get_backend() == "nccl"
        shared = torch.tensor([value], device="cuda" if on_card else "cpu")
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MIN)
        least = int(shared.item())
        if least == FAILED != value:
            raise GradStatsError("another rank could not take its steps; its own error says why")
        return least


def _check(
    memory: Any, margin: float, multiple_of: Any, max_size: int, steps: int, most_seconds: float
) -> None:
    allowed_below(1, multiple_of)
    for name, value, fine, wanted in (
        ("memory", memory, memory is None or 1 <= memory < math.inf, "at least one byte"),
        ("margin", margin, 0 <= margin < 1, "a fraction of at least 0 and below 1"),
        ("max_size", max_size, max_size >= 1, "at least 1"),
        ("steps", steps, steps >= 2, "at least 2: the second one holds the optimizer's state"),
        ("most_seconds", most_seconds, most_seconds > 0, "above 0"),
    ):
        if not fine:
            raise InvalidArgumentError(f"{name}={value} must be {wanted}")
