"""Several processes with a batch-size scheduler: one decision, every sample once."""

from __future__ import annotations

import torch
import torch.distributed as dist
from rank_tools import case
from torch import nn
from torch.utils.data import TensorDataset

from gradstats import BatchScaling, BatchSizeScheduler, NoiseScale, StepLoader
from gradstats.schedulers import decide_on_first_rank, noise_scale


class Local:
    """A noise scale of this rank's own: it grows on the first rank and shrinks on the others."""

    def __init__(self, rank: int) -> None:
        self.rank, self.asked = rank, 0

    def noise_scale(self) -> NoiseScale:
        value = 2.0 ** (4 + self.asked) if self.rank == 0 else 2.0 ** (4 - self.asked)
        self.asked += 1
        return NoiseScale(value, value / 1.2, value * 1.2, 0.9, 100, 10, 0, value, 1.0)


def everywhere(found: object) -> list:
    every: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    return every


@case(0)
def decide_alike_though_they_see_different_things(rank: int, world: int) -> None:
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer, monitor = torch.optim.SGD([weight], 0.1), Local(rank)
    data = TensorDataset(torch.arange(333))
    loader = StepLoader(data, micro_batch_size=16 // world // 2, batch_size=16)
    scaling = BatchScaling(optimizer, batch_size=16, rule="noise")
    scheduler = BatchSizeScheduler(noise_scale, loader, monitor=monitor, scaling=scaling, every=2)
    sizes, factors, samples = [], [], []
    for step in loader:
        sizes.append(scheduler.batch_size)
        samples += [int(i) for (batch,), _ in step for i in batch]
        factors.append(scaling.factor)
        optimizer.step()
        scheduler.step()
    assert sizes == [16, 16, 32, 32, 64, 64, 128]
    assert all(other == (sizes, factors) for other in everywhere((sizes, factors)))
    assert len(set(factors)) > 3
    assert sorted(i for mine in everywhere(samples) for i in mine) == list(range(333))
    # Others than the first asked once, when the scheduler was made, and never to decide.
    assert everywhere(monitor.asked) == [4] + [1] * (world - 1)


@case(2)
def an_error_of_the_first_rank_reaches_the_others(rank: int, world: int) -> None:
    def decide() -> int:
        raise ValueError("no decision here")

    said = ""
    try:
        decide_on_first_rank(decide)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    expected = "ValueError: no decision here"
    if rank > 0:
        expected = f"GradStatsError: the first rank could not decide: {expected}"
    assert said == expected


@case(0)
def a_checkpoint_goes_on_with_other_ranks(rank: int, world: int) -> None:
    """Half an epoch by one rank alone, the rest by all: every sample once."""
    data, first = TensorDataset(torch.arange(101)), []
    alone = StepLoader(data, micro_batch_size=3, batch_size=9, rank=0, world_size=1)
    for number, step in enumerate(alone):
        first += [int(i) for (batch,), _ in step for i in batch]
        if number == 4:
            break
    loader = StepLoader(data, micro_batch_size=2, batch_size=4 * world)
    loader.load_state_dict(alone.state_dict())
    rest = [int(i) for step in loader for (batch,), _ in step for i in batch]
    assert sorted(first + [i for mine in everywhere(rest) for i in mine]) == list(range(101))
