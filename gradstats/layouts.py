"""Ways to make up a batch of ranks and micro-batches, and how long a step of each takes. Numbers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from gradstats.estimators import require, whole
from gradstats.step_time import StepTime, fit_step_time

__all__ = ["Layout", "StepSeconds", "offered", "split", "step_clock"]

LARGEST = 2**62

StepSeconds = Mapping[int, float] | StepTime  # as measured: by global batch size, or measure_step's


class Layout(NamedTuple):
    """How a global batch is made up."""

    micro_batch_size: int
    accumulation_steps: int
    world_size: int

    @property
    def batch_size(self) -> int:
        """Samples of a step, over all ranks and micro-batches."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size


Clock = Callable[[Layout], float]


def split(batch_size: int, world_size: int, room: int) -> Layout:
    """The fewest micro-batches of one size, at most `room` samples, that make up a batch."""
    each = batch_size // world_size
    micro = next(m for m in range(min(room, each), 0, -1) if each % m == 0)
    return Layout(micro, each // micro, world_size)


def offered(
    worlds: Mapping[int, float], most: int, now: Layout, room: int, timed: StepSeconds | None
) -> list[Layout]:
    """Layouts of at most `most` samples, fewest ranks first, then by size: round ones, `now`, those timed.

    Round per rank is a power of two, and from 24 on 1.5 times one, which keeps it a multiple of 8
    for the matrix units. Beyond the sizes timed (of a batch, or of a micro-batch) the fit is not to be
    trusted: none is offered.
    """
    powers = [2**k for k in range(LARGEST.bit_length())]
    found = {now}
    for world in worlds:
        sizes = {world * n for n in powers + [3 * n for n in powers if n >= 8]}
        if isinstance(timed, StepTime):
            sizes.update(world * p.micro_batch_size for p in timed.points)
        elif timed is not None:
            sizes = {b for b in sizes if min(timed) <= b <= max(timed)}
            sizes.update(b for b in timed if b % world == 0)
        sizes.discard(now.batch_size if world == now.world_size else 0)
        layouts = [split(b, world, room) for b in sizes if b <= most]
        least = min(timed.min_micro_batch_size, room) if isinstance(timed, StepTime) else 1
        found.update(lay for lay in layouts if lay.micro_batch_size >= least)
    return sorted(found, key=lambda lay: (lay.world_size, lay.batch_size))


def step_clock(
    timed: StepSeconds, worlds: Mapping[int, float], world_size: int
) -> tuple[Clock, str]:
    """Seconds of a step of a layout, and what they are made of, in words.

    `worlds`: seconds of a step's collectives by number of ranks. What was timed held those of its own
    number; times at another one hold that one's instead.
    """
    if isinstance(timed, StepTime):
        fit, unit = timed, "sample of a rank"
        require(
            timed.world_size in worlds,
            "step_seconds",
            f"measured with {timed.world_size} ranks",
            f"pass times measured with one of the world sizes {sorted(worlds)}",
        )
        own = worlds[timed.world_size]
        shortest = min(p.seconds for p in timed.points)
        require(own < shortest, "world_sizes", worlds, f"whole steps took {shortest:.3g} s")
    else:
        for size in timed:
            whole("step_seconds", size)
        remedy = "pass seconds above 0 for two or more batch sizes"
        valid = len(timed) > 1 and all(0 < t < float("inf") for t in timed.values())
        require(valid, "step_seconds", timed, remedy)
        fit, unit = fit_step_time({(b, 1): [t] for b, t in timed.items()}), "sample"
        own = worlds[world_size]

    def seconds(layout: Layout) -> float:
        micro, count, world = layout
        if not isinstance(timed, StepTime):  # times of whole batches, however made up
            return fit.seconds(layout.batch_size) - own + worlds[world]
        if micro < timed.min_micro_batch_size:  # a size without such a divisor: nearly equal parts
            each = micro * count
            count = -(-each // timed.max_micro_batch_size)
            return fit.seconds(each / count, count) - own + worlds[world]
        return fit.seconds(micro, count) - own + worlds[world]

    fixed = f"{fit.launch:.3g} s"
    if isinstance(timed, StepTime) and fit.update:
        fixed = f"{fit.update:.3g} s plus {fit.launch:.3g} s per micro-batch"
    return seconds, f"a step takes {fixed} plus {fit.per_sample:.3g} s per {unit}"
