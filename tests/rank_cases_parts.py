"""`attach(method="ranks")`: each rank's own gradient against the mean, under DistributedDataParallel."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from models import loss
from rank_tools import (
    Collectives,
    case,
    contributions,
    mine,
    same_everywhere,
    setup,
    uneven,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import gradstats


def make() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(sizes: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 6, dtype=torch.float64, generator=generator) for n in sizes]


def own_means(model: nn.Module, every: list[list[Tensor]]) -> Tensor:
    """(W, D) gradient of each rank's mean loss over its micro-batches, by autograd alone."""
    rows = []
    for parts in every:
        plain = copy.deepcopy(model)
        for x in parts:
            (plain(x).square().mean() / len(parts)).backward()
        rows.append(torch.cat([p.grad.flatten() for p in plain.parameters()]))
    return torch.stack(rows)


def expected(means: Tensor, sizes: list[int], shares: list[float]) -> tuple[float, float]:
    n, a = torch.tensor(sizes).double(), torch.tensor(shares, dtype=torch.float64)
    whole = (a[:, None] * means).sum(0).square().sum()
    tr = ((a * means.square().sum(1)).sum() - whole) / (a * (1 - a) / n).sum()
    return float(tr), float(whole - tr * (a**2 / n).sum())


def near(found: object, wanted: float) -> None:
    assert abs(float(found) - wanted) < 1e-9 * max(1.0, abs(wanted)), (found, wanted)


@case(0)
def ranks_of_a_model_without_per_sample_gradients(rank: int, world: int) -> None:
    for sizes, weighting in (
        ([4] * world, None),
        (uneven(world), "parts"),
        (uneven(world), "samples"),
    ):
        model = make()
        run = DDP(model, broadcast_buffers=False)
        monitor = gradstats.attach(run, method="ranks", weighting=weighting)
        every = batches(sizes)
        total = sum(sizes)
        for _ in range(2):
            means = own_means(model, [[x] for x in every])
            run.zero_grad()
            weight = world * sizes[rank] / total if weighting == "samples" else 1.0
            (weight * run(every[rank]).square().mean()).backward()
            with Collectives() as sent:
                stats = monitor.step()
            rows = len(list(model.parameters()))
            assert sent.sent == [(2 * rows + 2, 8)], sent.sent
            shares = [n / total for n in sizes] if weighting == "samples" else [1 / world] * world
            tr, true = expected(means, sizes, shares)
            near(stats.tr_sigma, tr)
            near(stats.true_grad_sq_norm, true)
            near(sum(v.tr_sigma for v in stats.layers.values()), tr)
            assert (stats.num_samples, stats.method) == (total, "ranks")
            assert stats.coverage.fraction == 1.0
            same_everywhere(stats.tr_sigma, stats.noise_scale)
        noise = monitor.noise_scale()
        same_everywhere(noise.value, noise.low, noise.high)
        assert "by comparing ranks" in str(noise)
        monitor.detach()


@case(0)
def ranks_that_accumulate(rank: int, world: int) -> None:
    model = make()
    run = DDP(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    monitor = gradstats.attach(run, method="ranks")
    every = [batches([3, 3], seed) for seed in range(world)]
    for step in range(2):
        means = own_means(model, every)
        run.zero_grad(set_to_none=step == 0)
        for k, x in enumerate(every[rank]):
            with run.no_sync() if k == 0 else contextlib.nullcontext():
                (run(x).square().mean() / 2).backward()
        tr, true = expected(means, [6] * world, [1 / world] * world)
        stats = monitor.step()
        near(stats.tr_sigma, tr)
        near(stats.true_grad_sq_norm, true)


@case(0)
def ranks_against_the_closed_form(rank: int, world: int) -> dict[str, float]:
    """Linear regression at a distance of 1: tr Σ = 4(2d + 1), |G|² = 4."""
    dim, size, steps = 8, 8, 1200 // world
    model = nn.Linear(dim, 1, bias=False)
    nn.init.zeros_(model.weight)
    target = torch.full((dim,), dim**-0.5)
    run = DDP(model)
    monitor = gradstats.attach(run, method="ranks")
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(steps):
        x = torch.randn(size, dim, generator=generator)
        y = x @ target + torch.randn(size, generator=generator)
        run.zero_grad()
        (run(x).squeeze(1) - y).square().mean().backward()
        monitor.step()
    noise = monitor.noise_scale()
    same_everywhere(noise.value, noise.low, noise.high)
    assert abs(noise.tr_sigma / (4 * (2 * dim + 1)) - 1) < 0.2, noise
    assert noise.low < 2 * dim + 1 < noise.high, noise
    return {"value": noise.value, "low": noise.low, "high": noise.high}


@case()
def ranks_misused(rank: int, world: int) -> dict[str, str]:
    found = {}

    def refused(what: str, run) -> None:
        try:
            run()
        except gradstats.GradStatsError as error:
            found[what] = str(error)
        else:
            raise AssertionError(what)

    model = make()
    refused("not wrapped", lambda: gradstats.attach(model, method="ranks"))
    refused("micro_batch", lambda: gradstats.attach(model, method="micro_batch"))
    run = DDP(model)
    unlike = "samples" if rank else "parts"
    refused("unlike", lambda: gradstats.attach(run, method="ranks", weighting=unlike))
    assert not run._forward_hooks
    monitor = gradstats.attach(run, method="ranks", every=2)
    (x,) = batches([4], rank)

    def good() -> None:
        run.zero_grad()
        run(x).square().mean().backward()
        assert torch.isfinite(monitor.step().tr_sigma)
        assert monitor.step() is None

    good()
    refused("no backward", monitor.step)
    assert monitor.step() is None
    good()
    run.zero_grad()
    run(x).square().mean().backward()
    if rank == 0:  # the other one is told
        nn.utils.clip_grad_norm_(run.parameters(), 1e-3)
    refused("clipped", monitor.step)
    assert monitor.step() is None
    good()
    run.zero_grad()
    for _ in range(2):
        (run(x).square().mean() / 2).backward()
    refused("averaged twice", monitor.step)
    assert monitor.step() is None
    good()
    run.zero_grad()
    with run.no_sync():
        run(x).square().mean().backward()
    stats = monitor.step()
    assert torch.isnan(stats.tr_sigma)
    found["not averaged"] = next(iter(stats.coverage.missing.values()))
    assert monitor.step() is None
    run.zero_grad()
    (y,) = batches([3 + rank])
    run(y).square().mean().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.isnan(monitor.step().tr_sigma)
    found["unequal"] = str(caught[0].message)
    assert monitor.step() is None
    good()
    return found


@case(0)
def normalisation_layers_on_ranks(rank: int, world: int) -> None:
    """The proxy, its calibration, and |G|² from momentum: alike on all ranks, and of all samples."""
    sizes = uneven(world)
    model, batch = setup("layer_norm", sizes)
    true = contributions(model, batch, sizes)
    run = DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)
    monitor = gradstats.attach(
        run, method="norm_layers", optimizer=optimizer, from_momentum=True, geometry="plain"
    )
    monitor.calibrate(14)
    for _ in range(28):
        optimizer.zero_grad()
        loss(run, mine(batch, sizes)).backward()
        stats = monitor.step()
        optimizer.step()
        part = torch.cat([true[n].reshape(sum(sizes), -1) for n in stats.coverage.names], 1)
        near(stats.tr_sigma, float(part.var(0).sum()))
        assert stats.coverage.missing
    assert len(monitor._source.parameters) == len(stats.coverage.names) < len(true)
    whole = torch.cat([g.reshape(sum(sizes), -1) for g in true.values()], 1)

    def scale(g: Tensor) -> float:
        tr = g.var(0).sum()
        return float(tr / (g.mean(0).square().sum() - tr / len(g)))

    factor = monitor._source.calibration
    if factor.usable:  # the same batch in every step: known exactly, where |G|² came out above zero
        near(factor.value, scale(whole) / scale(part))
    noise = monitor.noise_scale()
    same_everywhere(noise.value, noise.low, noise.high, factor.value)
    assert monitor._momentum._weights.breaks == 0
