"""Ranks that fail or differ, groups of ranks, and what a step communicates."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from models import loss
from oracle import assert_matches, per_sample_gradients, relative
from rank_cases_ddp import after
from rank_cases_fsdp import shard
from rank_tools import (
    Collectives,
    case,
    compare,
    contributions,
    mine,
    setup,
    uneven,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP

import gradstats


@case()
def gradients_that_were_not_averaged_are_not_covered(rank: int, world: int) -> None:
    model, batch = setup("mlp", [4, 4])
    monitor = gradstats.attach(model)  # no DDP around it
    loss(model, mine(batch, [4, 4])).backward()
    stats = monitor.step()
    assert stats.coverage.fraction == 0
    assert "no_sync" in stats.coverage.missing["0.weight"]
    assert torch.isnan(stats.noise_scale)
    monitor.detach()
    monitor, run = after(model)
    with run.no_sync():
        loss(run, mine(batch, [4, 4])).backward()
    assert monitor.step().coverage.fraction == 0


@case()
def a_failing_rank_leaves_no_other_waiting(rank: int, world: int) -> None:
    sizes = [4, 4]
    for moments in (False, True):
        model, batch = setup("mlp", sizes)
        monitor, run = after(model, moments=moments, every=2)
        loss(run, mine(batch, sizes)).backward()
        if rank == 0:
            monitor._source.interposer.take()
        text = ""
        try:
            monitor.step()
        except gradstats.NoStatisticsError as error:
            text = str(error)
        wanted = "found no backward" if rank == 0 else "error on another rank (1 of 2)"
        assert wanted in text, text
        assert monitor.step() is None  # left out, on both
        run.zero_grad()
        true = contributions(model, batch, sizes)
        loss(run, mine(batch, sizes)).backward()
        compare(monitor.step(), true, sizes)
        monitor.detach()


@case(0)
def one_collective_of_a_few_numbers_per_parameter(rank: int, world: int) -> object:
    sizes = uneven(world)
    model, batch = setup("layer_norm", sizes)
    found = {}
    for moments in (False, True):
        monitor, run = after(model, moments=moments)
        with Collectives() as collectives:
            loss(run, mine(batch, sizes)).backward()
            monitor.step()
        params = list(model.parameters())
        wanted = [(3 * len(params) + 2, 8)]
        if moments:
            wanted.append((sum(p.numel() for p in params), 8))
        assert collectives.sent == wanted, collectives.sent
        found[f"moments={moments}"] = [n * size for n, size in collectives.sent]
        monitor.detach()
    return {"parameters": len(params), "bytes": found}


@case()
def merged_records_state_and_advice(rank: int, world: int) -> None:
    sizes = [3, 5]
    model, batch = setup("layer_norm", sizes)
    monitor, run = after(model, moments=True)
    records = []
    for _ in range(2):
        run.zero_grad()
        loss(run, mine(batch, sizes)).backward()
        records.append(monitor.step())
    both = gradstats.GradStats.merge_all(records)
    assert both.num_samples == 16
    assert abs(both.tr_sigma - records[0].tr_sigma) < 1e-9 * both.tr_sigma
    assert len(both.per_sample_sq_norm) == 2 * sizes[rank]
    layer = "0.weight"
    gap = both.layers[layer].mean_sq_norm - records[0].layers[layer].mean_sq_norm
    assert abs(gap) < 1e-9 * both.layers[layer].mean_sq_norm
    assert relative(both.grad_var[layer], records[0].grad_var[layer]) < 1e-9
    state = json.loads(json.dumps(monitor.state_dict()))
    assert state["num_samples"] == [8, 8]
    assert state["batch_size"] == 8
    every: list[object] = [None, None]
    dist.all_gather_object(every, state)
    assert every[0] == every[1]
    advice = monitor.recommend()
    assert advice.world_size == 2
    assert advice.batch_size % 2 == 0
    monitor.load_state_dict(state)
    assert monitor.state_dict() == state
    plain = model.state_dict()
    monitor.detach()
    assert list(model.state_dict()) == list(plain)
    assert not any(p._backward_hooks for p in model.parameters())


@case(4)
def a_group_of_some_ranks(rank: int, world: int) -> None:
    """Two pairs train two models; each pair is a group."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = pairs[rank // 2]
    sizes = [3, 5]
    model, batch = setup("mlp", sizes)
    batch = batch + rank // 2
    true = contributions(model, batch, sizes)
    run = DDP(model, process_group=own)
    part = batch.split(sizes)[rank % 2]
    for options in ({}, {"process_group": own}):
        with gradstats.attach(run, **options) as monitor:
            run.zero_grad()
            loss(run, part).backward()
            stats = monitor.step()
            assert stats.num_samples == 8
            flat = torch.cat([g.reshape(8, -1) for g in true.values()], 1)
            assert abs(stats.tr_sigma - flat.var(0).sum()) < 1e-9 * stats.tr_sigma


@case()
def a_group_of_one_rank_measures_alone(rank: int, world: int) -> None:
    alone = [dist.new_group([r]) for r in range(world)][rank]
    mesh = DeviceMesh("cpu", [rank])
    for wrap in (lambda m: m, lambda m: shard(m, mesh)):
        model, batch = setup("layer_norm", [5])
        true = per_sample_gradients(model, loss, batch)
        monitor = gradstats.attach(wrap(model), process_group=alone, moments=True)
        with Collectives() as collectives:
            loss(model, batch).backward()
            assert_matches(monitor.step(), true, 1e-9)
        assert not collectives.sent


@case()
def check_runs_on_one_rank_alone(rank: int, world: int) -> None:
    if rank == 0:
        model, batch = setup("layer_norm", [5])
        assert gradstats.check(model, loss, batch).ok
    dist.barrier()


@case()
def refusals(rank: int, world: int) -> object:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    texts = {}

    def refused(what: str, kind: type, run: Callable[[], object]) -> None:
        try:
            run()
        except kind as error:
            texts[what] = str(error)

    mesh = init_device_mesh("cpu", (world,))
    model, batch = setup("mlp", [4, 4])
    monitor = gradstats.attach(model)
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    refused("tensor parallel later", gradstats.UnsupportedLayerError, lambda: model(batch))
    monitor.detach()
    refused("tensor parallel", gradstats.AttachError, lambda: gradstats.attach(model))
    alone = [dist.new_group([r]) for r in range(world)][rank]
    model, _ = setup("mlp", [4, 4])
    run = DDP(model)
    refused("ddp", gradstats.AttachError, lambda: gradstats.attach(run, process_group=alone))
    for factor, group in ((1.0, None), (None, alone)):
        model, _ = setup("mlp", [4, 4])
        run = shard(model)
        monitor = gradstats.attach(run, process_group=group)
        if factor:
            run[0].set_gradient_divide_factor(factor)
        loss(run, batch).backward()
        refused("divisor" if factor else "shards", gradstats.GradStatsError, monitor.step)
    model, _ = setup("mlp", [4, 4])
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2 + rank))
    refused("unlike models", gradstats.AttachError, lambda: gradstats.attach(other))
    assert not hasattr(other[0].weight, "_gradstats")
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    refused("fsdp1", gradstats.AttachError, lambda: gradstats.attach(wrapped))
    return texts
