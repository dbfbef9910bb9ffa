"""Ranks of unlike memory agree on the largest micro-batch, and none waits for one that failed."""

from __future__ import annotations

import torch.distributed as dist
from rank_tools import case
from simulated_memory import Machine

from gradstats.errors import GradStatsError
from gradstats.workbench.vram import largest_micro_batch, search


def found(machine, **options):
    kept, search.try_sizes = search.try_sizes, machine
    try:
        return largest_micro_batch("somewhere:training", **options)
    finally:
        search.try_sizes = kept


@case(0)
def the_smallest_rank_decides_the_micro_batch(rank: int, world: int) -> None:
    # Rank 0's samples are the smallest; the last rank's fresh processes take more than its line says.
    last = rank == world - 1
    machine = Machine(lambda m, fresh: 100 + (1 + rank) * m + 300 * last * fresh, budget=1000)
    result = found(machine, multiple_of=10)
    every: list[object] = [None] * world
    dist.all_gather_object(every, (result.recommended, [m for m, fresh in machine.tried if fresh]))
    assert every == [every[0]] * world
    size = result.recommended
    assert 400 + world * size <= 900 < 400 + world * (size + 20)
    assert result.world_size == world


@case(2)
def a_rank_that_fails_stops_all(rank: int, world: int) -> None:
    def fails(*args, **options):
        raise GradStatsError("its own")

    machine = Machine(lambda m, fresh: 100 + m, budget=1000)
    text = ""
    try:
        found(fails if rank else machine)
    except GradStatsError as error:
        text = str(error)
    assert ("its own" if rank else "another rank") in text
