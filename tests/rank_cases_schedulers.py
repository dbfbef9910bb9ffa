"""Several processes with a batch-size scheduler: one decision, every sample once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from rank_tools import case
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import gradstats
from gradstats import BatchScaling, BatchSizeScheduler, NoiseScale, StepLoader, optim
from gradstats.distributed import ALONE
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


@case(0)
def a_training_is_that_of_one_process(rank: int, world: int) -> None:
    """Two epochs with an uneven end, DDP and FSDP2: samples, sizes, rates and weights, to rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(203, 5, generator=generator, dtype=torch.float64)
    y = x[:, :2] + torch.randn(203, 2, generator=generator, dtype=torch.float64)
    data = TensorDataset(x, y)
    torch.manual_seed(1)
    first = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()

    def train(
        wrap: Callable[[nn.Module], nn.Module], ranks: int, mine: int
    ) -> tuple[list[int], list[float], list[torch.Tensor]]:
        model = copy.deepcopy(first)
        run = wrap(model)
        monitor = gradstats.attach(run, process_group=None if ranks > 1 else ALONE, half_life=20)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        loader = StepLoader(
            data, micro_batch_size=8 // ranks, batch_size=16, rank=mine, world_size=ranks
        )
        scaling = BatchScaling(optimizer, batch_size=16, rule="noise", warm_up=64)
        scheduler = BatchSizeScheduler(
            noise_scale, loader, monitor=monitor, scaling=scaling, every=3
        )
        sizes, rates = [], []
        while loader.epoch < 2:
            for step in loader:
                for (a, b), weight in step:
                    (weight * (run(a) - b).square().sum(1).mean()).backward()
                stats = monitor.step()
                assert stats is not None
                assert stats.num_samples == step.num_samples
                rates += scaling.learning_rates()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                sizes.append(scheduler.batch_size)
        monitor.detach()
        weights = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
        return sizes, rates, weights

    own_sizes, own_rates, own_weights = train(lambda model: model, 1, 0)
    for wrap in (DistributedDataParallel, fully_shard):
        sizes, rates, weights = train(wrap, world, rank)
        assert len(set(sizes)) > 1
        assert sizes == own_sizes
        torch.testing.assert_close(torch.tensor(rates), torch.tensor(own_rates), rtol=1e-8, atol=0)
        torch.testing.assert_close(weights, own_weights, rtol=1e-8, atol=1e-10)


@case(2)
def adascale_steps_shards(rank: int, world: int) -> None:
    """FSDP2: the same weights as AdaScale on one process; PerSampleAdam refuses shards."""
    torch.manual_seed(1)
    whole = nn.Linear(5, 4).double()
    run = fully_shard(copy.deepcopy(whole))
    torch.manual_seed(2)
    for model, group in ((run, None), (whole, ALONE)):
        monitor = gradstats.attach(model, process_group=group)
        ada = optim.AdaScale(model.parameters(), 0.1, base_batch_size=2, momentum=0.9)
        for seed in range(4):
            torch.manual_seed(seed)
            batch = torch.randn(8, 5, dtype=torch.float64)
            part = batch.chunk(world)[rank] if group is None else batch
            model.zero_grad()
            model(part).square().sum(1).mean().backward()
            ada.observe(monitor.step())
            ada.step()
        assert ada.gain > 1
        monitor.detach()
    for sharded, own in zip(run.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(sharded.full_tensor(), own.detach(), rtol=1e-10, atol=1e-12)
    adam, said = optim.PerSampleAdam(run.named_parameters()), ""
    try:
        adam.step()
    except gradstats.UnsupportedLayerError as error:
        said = str(error)
    assert "sharded over processes" in said


@case(2)
def per_sample_adam_is_that_of_one_process(rank: int, world: int) -> None:
    torch.manual_seed(1)
    whole = nn.Linear(5, 4).double()
    shared = copy.deepcopy(whole)
    for model, ranks in ((shared, world), (whole, 1)):
        run = DistributedDataParallel(model) if ranks > 1 else model
        monitor = gradstats.attach(run, moments=True, process_group=None if ranks > 1 else ALONE)
        adam = optim.PerSampleAdam(model.named_parameters(), lr=0.01, reference_batch_size=3)
        for seed in range(4):
            torch.manual_seed(seed)
            batch = torch.randn(8, 5, dtype=torch.float64)
            model.zero_grad()
            run(batch.chunk(ranks)[rank % ranks]).square().sum(1).mean().backward()
            adam.observe(monitor.step())
            adam.step()
        monitor.detach()
    torch.testing.assert_close(
        list(shared.parameters()), list(whole.parameters()), rtol=1e-9, atol=1e-11
    )
