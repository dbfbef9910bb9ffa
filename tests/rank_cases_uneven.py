"""Many short trainings of several processes whose shares change from step to step, down to nothing."""

from __future__ import annotations

import random

import torch
import torch.distributed as dist
from rank_tools import case
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradstats

RUNS = 200


@case(0)
def two_hundred_runs_of_uneven_batches(rank: int, world: int) -> None:
    """Ranks leave (no samples) and join again at random: nobody waits, and all read the whole batch."""
    draw = random.Random(world)  # the same on every rank
    left = 0
    for number in range(RUNS):
        torch.manual_seed(number)
        model = nn.Linear(3, 1, bias=False).double()
        parallel = DistributedDataParallel(model)
        monitor = gradstats.attach(parallel, moments=number % 2 == 0)
        for _ in range(draw.randint(1, 3)):
            # Samples of each rank's micro-batches: as many micro-batches everywhere, as DDP needs.
            micro = draw.randint(1, 3)
            sizes = [[draw.choice((0, 0, 1, 2, 5)) for _ in range(micro)] for _ in range(world)]
            sizes[draw.randrange(world)][0] += 1  # one sample at least
            left += sum(not any(own) for own in sizes)
            total = sum(map(sum, sizes))
            x = torch.randn(total, 3, dtype=torch.float64)
            begin = sum(map(sum, sizes[:rank]))
            for k, size in enumerate(sizes[rank]):
                parallel.require_backward_grad_sync = k == micro - 1
                part, begin = x[begin : begin + size], begin + size
                (parallel(part).square().sum() * world / total).backward()
            stats = monitor.step()
            assert stats is not None
            each = 2 * (x @ model.weight.detach().T) * x
            assert stats.num_samples == total, number
            assert stats.coverage.fraction == 1.0, stats.coverage.missing
            close = {"rtol": 1e-10, "atol": 1e-12}
            sq_norm = each.square().sum(1)
            torch.testing.assert_close(stats.mean_sq_norm, sq_norm.mean(), **close)
            torch.testing.assert_close(stats.grad_sq_norm, each.mean(0).square().sum(), **close)
            if total > 1:
                torch.testing.assert_close(stats.tr_sigma, each.var(0).sum(), **close)
            if total > 1 and number % 2 == 0:
                torch.testing.assert_close(stats.grad_var["weight"][0], each.var(0), **close)
            parallel.zero_grad()
        noise = monitor.noise_scale()
        every: list[object] = [None] * world
        dist.all_gather_object(every, (noise.value.hex(), noise.low.hex(), noise.num_samples))
        assert all(other == every[0] for other in every), (number, every)
        monitor.detach()
    assert left > RUNS / 4
