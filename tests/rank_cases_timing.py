"""Several processes that measure their step together: one result, whatever each of them saw."""

from __future__ import annotations

import copy
import time

import torch
import torch.distributed as dist
from rank_tools import case
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradstats
from gradstats.estimators import NoiseScale


def everywhere(found: object) -> list:
    every: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    return every


def measured(model: nn.Module, run: nn.Module, rank: int, **options):
    """A step that is slower and needs more memory on higher ranks; what was left of it."""
    optimizer = torch.optim.Adam(run.parameters(), 0.01)
    monitor = gradstats.attach(run)
    tried = set()

    def step(micro: int, count: int) -> None:
        tried.add(micro)
        held = torch.empty(micro * 100_000 * (rank + 1), dtype=torch.uint8)
        for _ in range(count):
            run(torch.randn(micro + rank, 5)).square().mean().backward()  # uneven shares
        time.sleep(0.002 * rank)
        del held
        monitor.step()
        optimizer.step()
        optimizer.zero_grad()

    step(2, 1)
    kept = copy.deepcopy((monitor.state_dict(), [whole(p) for p in run.parameters()]))
    state = [whole(v).clone() for s in optimizer.state.values() for v in s.values()]
    drawn = torch.get_rng_state()
    timing = gradstats.measure_step(
        step, (2, 4, 8, 16), restore=(run, optimizer, monitor), warmup=1, rounds=2, **options
    )
    assert torch.equal(torch.get_rng_state(), drawn)
    assert monitor.state_dict() == kept[0]
    assert all(torch.equal(whole(p), q) for p, q in zip(run.parameters(), kept[1], strict=True))
    now = [whole(v) for s in optimizer.state.values() for v in s.values()]
    assert all(map(torch.equal, now, state))
    monitor.detach()
    return timing, tried


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@case(0)
def a_step_is_measured_alike_and_left_as_it_was(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    timing, tried = measured(model, DistributedDataParallel(model), rank)
    assert tried == {2, 4, 8, 16}
    assert timing.world_size == world
    assert all(other == timing for other in everywhere(timing))
    assert all(p.seconds >= 0.002 * (world - 1) for p in timing.points)  # the slowest rank's
    assert abs(timing.bytes_per_sample / (100_000 * world) - 1) < 0.1  # the largest rank's
    noise = NoiseScale(400.0, 350.0, 450.0, 0.9, 100, 10, 0, 1.0, 1.0)
    options = {"batch_size": 8 * world, "world_size": world, "step_seconds": timing}
    advice = gradstats.recommend(noise, **options, steps_left=100, device_hour_price=1.0)
    assert all(other == advice for other in everywhere(advice))
    assert advice.micro_batch_size <= 16


@case(2)
def the_rank_with_the_least_memory_decides(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    run = DistributedDataParallel(model)
    # Rank 1 has room for 8 samples and a little, rank 0 for all.
    timing, tried = measured(model, run, rank, memory_bytes=2_000_000 if rank else 10**9)
    assert everywhere(tried) == [{2, 4, 8}] * 2
    assert timing.max_micro_batch_size == 8
    assert timing.memory_bytes == 2_000_000


@case(2)
def shards_are_left_as_they_were(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    timing, _ = measured(model, fully_shard(model), rank)
    assert all(other == timing for other in everywhere(timing))


@case()
def a_budget_measures_the_same_steps_on_all_ranks(rank: int, world: int) -> list[int]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(5, 3))
    monitor = gradstats.attach(model, every=gradstats.Budget(1.0))
    found = []
    for step in range(100):
        monitor._cadence._costs.extend([2.5 + 50 * rank] * 9)  # the first one's: one step in three
        model.zero_grad()
        model(torch.randn(2, 5)).square().mean().backward()
        if monitor.step() is not None:
            found.append(step)
    monitor.detach()
    assert everywhere(found) == [found] * world
    assert found == [*range(16), *range(17, 24, 2), *range(26, 100, 3)]
    return found
