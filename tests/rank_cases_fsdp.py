"""FSDP2: sharded parameters, before and after attaching."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from models import loss
from rank_cases_ddp import accumulate
from rank_tools import (
    Collectives,
    case,
    compare,
    contributions,
    mine,
    same_everywhere,
    setup,
    uneven,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradstats


def shard(model: nn.Module, mesh=None) -> nn.Module:
    for module in model.children():
        if next(module.parameters(), None) is not None:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_after(model: nn.Module, **options):
    run = shard(model)
    return gradstats.attach(run, **options), run


def sharded_before(model: nn.Module, **options):
    monitor = gradstats.attach(model, **options)
    return monitor, shard(model)


def fsdp_steps(name, sizes, wrap, dtype=torch.float64, tol=1e-9, compiled="", **options):
    model, batch = setup(name, sizes, dtype)
    true = contributions(model, batch, sizes)
    monitor, run = wrap(model, **options)
    if compiled == "whole":
        run.compile(backend="aot_eager")
    elif compiled == "parts":
        for module in run.children():
            module.compile(backend="aot_eager")
    for _ in range(2):
        run.zero_grad()
        loss(run, mine(batch, sizes)).backward()
        stats = monitor.step()
        compare(stats, true, sizes, tol)
        same_everywhere(stats.mean_sq_norm, stats.grad_sq_norm, stats.noise_scale)
    return stats


@case(0)
def fsdp_uneven(rank: int, world: int) -> None:
    for name in ("layer_norm", "positions", "functional"):
        for wrap in (sharded_before, sharded_after):
            stats = fsdp_steps(name, uneven(world), wrap)
            assert not any("module" in n for n in stats.layers)


@case()
def fsdp_float32_and_frozen(rank: int, world: int) -> None:
    fsdp_steps("layer_norm", [3, 5], sharded_after, torch.float32, 1e-5)
    fsdp_steps("frozen_parts", [3, 5], sharded_after)


@case()
def fsdp_weights_of_modules_that_do_not_run(rank: int, world: int) -> None:
    for wrap in (sharded_before, sharded_after):
        stats = fsdp_steps("attention", [3, 5], wrap)
        assert "inner.out_proj.weight" in stats.layers


@case(0)
def fsdp_moments(rank: int, world: int) -> None:
    for wrap in (sharded_before, sharded_after):
        stats = fsdp_steps("layer_norm", uneven(world), wrap, moments=True)
        assert set(stats.grad_var) == set(stats.layers)


@case(0)
def fsdp_compiled(rank: int, world: int) -> None:
    for wrap in (sharded_before, sharded_after):
        for compiled in ("whole", "parts"):
            torch._dynamo.reset()
            fsdp_steps("layer_norm", uneven(world), wrap, compiled=compiled, moments=True)


@case()
def fsdp_accumulation(rank: int, world: int) -> None:
    import contextlib

    sizes = [5, 7]
    for moments in (False, True):
        model, batch = setup("layer_norm", sizes)
        monitor, run = sharded_after(copy.deepcopy(model), moments=moments)

        @contextlib.contextmanager
        def quiet(run=run):
            run.set_requires_gradient_sync(False)
            yield
            run.set_requires_gradient_sync(True)

        accumulate(model, batch, sizes, run, monitor, quiet)


@case()
def fsdp_gradients_that_were_not_averaged(rank: int, world: int) -> None:
    model, batch = setup("mlp", [4, 4])
    monitor, run = sharded_after(model)
    run.set_requires_gradient_sync(False)
    loss(run, mine(batch, [4, 4])).backward()
    stats = monitor.step()
    assert stats.coverage.fraction == 0
    assert "no_sync" in stats.coverage.missing["0.weight"]


@case()
def fsdp_one_collective(rank: int, world: int) -> None:
    model, batch = setup("layer_norm", [3, 5])
    monitor, run = sharded_after(model)
    loss(run, mine(batch, [3, 5])).backward()
    with Collectives() as collectives:
        monitor.step()
    assert collectives.sent == [(3 * len(list(model.parameters())) + 2, 8)]


@case(4)
def fsdp_hybrid_shards(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

    def wrap(model: nn.Module, **options):
        run = shard(model, mesh)
        return gradstats.attach(run, **options), run

    fsdp_steps("layer_norm", [3, 5, 2, 4], wrap, moments=True)
