"""Measures how long the user's own step takes and what memory it needs, and leaves no trace of it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradstats.estimators import require, whole
from gradstats.kept import kept
from gradstats.step_time import StepTime, fit_step_time, peak_at

__all__ = ["measure_step"]

Step = Callable[[int, int], Any]
TURN = 0.02  # seconds that short steps are repeated for: one interruption is then no whole turn


def measure_step(
    step: Step,
    micro_batch_sizes: Sequence[int],
    *,
    restore: Sequence[Any],
    accumulation_steps: Sequence[int] = (1, 2),
    warmup: int = 2,
    rounds: int = 7,
    memory: bool = True,
    memory_bytes: float | None = None,
    process_group: Any = None,
) -> StepTime:
    """Time whole optimizer steps at several batch sizes: ``monitor.recommend(step_seconds=...)`` takes it.

    ```python
    def step(micro_batch_size, accumulation_steps):
        for _ in range(accumulation_steps):
            loss_fn(model(x[:micro_batch_size]), y[:micro_batch_size]).backward()
        optimizer.step()
        optimizer.zero_grad()

    timing = gradstats.measure_step(step, (8, 16, 32, 64), restore=(model, optimizer))
    ```
    Args:
        step: trains one step of `accumulation_steps` micro-batches of `micro_batch_size` samples each on
            this rank, as your loop does (with `monitor.step()`, clipping, a scheduler, if it has them).
        micro_batch_sizes: at least two different ones. The advice tries none outside of them.
        restore: everything that a step changes: the model, the optimizer, schedulers, the monitor,
            a loader, generators. All of it is as before when this returns or raises, and so are torch's,
            numpy's and Python's random numbers (see `gradstats.kept`).
        accumulation_steps: numbers of micro-batches to time; two tell apart what a micro-batch costs and
            what the optimizer and the collectives do. Pass ``(1,)`` for a step that cannot accumulate.
        warmup: untimed steps of each kind, for compilers and caches.
        rounds: turns of each kind, in shuffled order; steps that are short are repeated in each.
        memory: whether to measure peak memory too (one more step for each size).
        memory_bytes: memory that a rank has for a step, beyond what it holds between steps. Default: what
            is free on a CUDA device, no limit elsewhere. From the third size on, a size that the two
            before it say would not fit is not tried, nor is any larger one.
        process_group: the ranks that train together (default: all).

    Memory is that of torch's allocator, at the largest of `accumulation_steps`: on CUDA its own
    statistics; on the CPU every allocation and release that the profiler records, which sees buffers
    inside operators and not what libraries or Python allocate by other means; elsewhere not measured.
    Where several processes train together, all call it alike. A step counts with the slowest rank's
    seconds and the largest rank's memory, the smallest `memory_bytes` holds for all, and every rank gets
    the same result, to the bit.

    Raises InvalidArgumentError for sizes that are too few or out of range, or do not fit the memory. An
    error of `step`, running out of memory included, is passed on.
    """
    sizes = sorted({whole("micro_batch_sizes", m) for m in micro_batch_sizes})
    counts = sorted({whole("accumulation_steps", k) for k in accumulation_steps})
    require(len(sizes) > 1, "micro_batch_sizes", micro_batch_sizes, "pass two or more sizes")
    require(len(counts) > 0, "accumulation_steps", accumulation_steps, "pass one number or more")
    whole("rounds", rounds)
    require(warmup >= 0, "warmup", warmup, "pass a number of steps of at least 0")
    require(
        memory_bytes is None or memory_bytes > 0,
        "memory_bytes",
        memory_bytes,
        "pass a size above 0",
    )
    device = _device(restore)
    put_back = kept(restore)
    ranks = _Ranks(process_group)
    try:
        if memory_bytes is None:
            memory_bytes = _free_bytes(device)
        limit = -ranks.largest([-memory_bytes])[0]  # the rank with the least decides for all
        peaks: dict[int, int] = {}
        for m in list(sizes):
            expected = peak_at(peaks, m)
            if expected is not None and expected > limit:
                sizes = [size for size in sizes if size < m]
                break
            for k in counts:
                for _ in range(warmup):
                    step(m, k)
            peak = _peak_bytes(lambda m=m: step(m, counts[-1]), device) if memory else None  # type: ignore[misc]
            if peak is not None:
                peaks[m] = int(ranks.largest([peak])[0])
        fitting = [m for m in sizes if peaks.get(m, 0) <= limit]
        needs = f"of these only {fitting} fit memory_bytes={limit:.0f}; pass smaller sizes"
        require(len(fitting) > 1, "micro_batch_sizes", micro_batch_sizes, needs)
        kinds = [(m, k) for m in fitting for k in counts]
        once = [_seconds(step, kind, 1, device) for kind in kinds]
        repeats = [max(1, math.ceil(TURN / t)) for t in ranks.largest(once)]
        times = _turns(step, dict(zip(kinds, repeats, strict=True)), rounds, device)
    finally:
        put_back()
    flat = ranks.largest([t for kind in kinds for t in times[kind]])
    return fit_step_time(
        {kind: flat[i * rounds : (i + 1) * rounds] for i, kind in enumerate(kinds)},
        peak_bytes={(m, counts[-1]): peak for m, peak in peaks.items()},
        world_size=ranks.size,
        memory_bytes=None if math.isinf(limit) else int(limit),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def _turns(
    step: Step, kinds: dict[tuple[int, int], int], rounds: int, device: torch.device
) -> dict[tuple[int, int], list[float]]:
    """Seconds of each kind of step in each round; `kinds`: its repeats. The same order on every rank."""
    times: dict[tuple[int, int], list[float]] = {kind: [] for kind in kinds}
    shuffle = random.Random(0).shuffle
    order = list(kinds)
    for _ in range(rounds):
        shuffle(order)
        for kind in order:
            times[kind].append(_seconds(step, kind, kinds[kind], device))
    return times


def _seconds(step: Step, kind: tuple[int, int], repeats: int, device: torch.device) -> float:
    """Of one step, averaged over some in a row."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step(*kind)
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ---- memory --------------------------------------------------------------------------------------


def _free_bytes(device: torch.device) -> float:
    """What a CUDA device has left, with what torch's allocator holds unused; elsewhere no limit is known."""
    if device.type != "cuda":
        return math.inf
    free = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(free + unused)


def _peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory held at once in a step, beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    live = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    return peak


# ---- ranks ---------------------------------------------------------------------------------------


class _Ranks:
    """The processes that measure together, or this one alone."""

    def __init__(self, group: Any) -> None:
        dist = torch.distributed
        self._group = group
        joined = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(group) if joined else 1

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest over the ranks of each value."""
        if self.size == 1:
            return list(values)
        every: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(every, list(values), group=self._group)
        return [max(column) for column in zip(*every, strict=True)]


def _device(things: Sequence[Any]) -> torch.device:
    """Where the first parameter of what is trained is."""
    for thing in things:
        params: list[Tensor] = []
        if isinstance(thing, nn.Module):
            params = list(thing.parameters())
        elif isinstance(thing, torch.optim.Optimizer):
            params = [p for group in thing.param_groups for p in group["params"]]
        if params:
            return params[0].device
    require(False, "restore", things, "pass the model and the optimizer that the step changes")
    raise AssertionError
