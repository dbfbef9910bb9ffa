"""DistributedDataParallel: how models are trained, and what every rank must find."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from layers import Checkpointed
from models import loss
from oracle import per_sample_gradients, relative
from rank_tools import (
    case,
    compare,
    contributions,
    mine,
    same_everywhere,
    setup,
    uneven,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import gradstats
from gradstats.distributed import ALONE


def ddp_steps(name: str, sizes: list[int], wrap, dtype=torch.float64, tol=1e-9, **options):
    """Two steps under DDP; `wrap(model)` gives the monitor and what is trained."""
    model, batch = setup(name, sizes, dtype)
    true = contributions(model, batch, sizes)
    plain = copy.deepcopy(model)
    monitor, run = wrap(model, **options)
    for _ in range(2):
        run.zero_grad()
        loss(run, mine(batch, sizes)).backward()
        stats = monitor.step()
        compare(stats, true, sizes, tol)
        same_everywhere(stats.mean_sq_norm, stats.grad_sq_norm, stats.noise_scale)
    sum(loss(plain, part) for part in batch.split(sizes)).div(len(sizes)).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            assert relative(p.grad, q.grad) < max(tol, 1e-9)
    scale = monitor.noise_scale()
    same_everywhere(scale.value, scale.low, scale.high)
    assert scale.num_samples == 2 * sum(sizes)
    return monitor, stats


def before(model: nn.Module, **options):
    monitor = gradstats.attach(model, **options)
    return monitor, DDP(model)


def after(model: nn.Module, **options):
    run = DDP(model)
    return gradstats.attach(run, **options), run


def inside(model: nn.Module, **options):
    run = DDP(model, gradient_as_bucket_view=True)
    return gradstats.attach(run.module, **options), run


@case(0)
def ddp_even(rank: int, world: int) -> None:
    ddp_steps("layer_norm", [4] * world, after)


@case()
def a_log_says_how_many_processes_trained(rank: int, world: int) -> None:
    class Noted:
        def __call__(self, row, step):
            self.row = row

        def about(self, about, step):
            self.world_size = about.world_size

    monitor, stats = ddp_steps("mlp", [3, 5], after)
    assert monitor.world_size == world
    log = gradstats.Log(monitor, noted := Noted())
    log.step(stats)
    assert (noted.world_size, noted.row["batch_size"]) == (world, 8)


@case(0)
def ddp_uneven(rank: int, world: int) -> None:
    for name in ("layer_norm", "positions", "group_norm", "custom"):
        ddp_steps(name, uneven(world), after)


@case()
def ddp_float32(rank: int, world: int) -> None:
    ddp_steps("layer_norm", [3, 5], after, torch.float32, 1e-5, moments=True)


@case()
def ddp_attached_before_wrapping_or_to_the_module_inside(rank: int, world: int) -> None:
    names = [list(ddp_steps("mlp", [3, 5], wrap)[1].layers) for wrap in (before, after, inside)]
    assert names == [["0.weight", "0.bias", "2.weight", "2.bias"]] * 3


@case()
def ddp_fallback_modules(rank: int, world: int) -> None:
    warnings.simplefilter("ignore")
    for name in ("attention", "tied"):
        ddp_steps(name, [3, 5], after, moments=True)


@case()
def ddp_frozen_parameters(rank: int, world: int) -> None:
    ddp_steps("frozen_parts", [3, 5], after, moments=True)


@case()
def ddp_compiled(rank: int, world: int) -> None:
    def compiled(model: nn.Module, **options):
        run = torch.compile(DDP(model), backend="aot_eager")
        return gradstats.attach(run, **options), run

    def compiled_inside(model: nn.Module, **options):
        run = DDP(torch.compile(model, backend="aot_eager", fullgraph=True))
        return gradstats.attach(run, **options), run

    for wrap in (compiled, compiled_inside):
        torch._dynamo.reset()
        ddp_steps("layer_norm", [3, 5], wrap, moments=True)


@case(0)
def ddp_moments(rank: int, world: int) -> None:
    _, stats = ddp_steps("layer_norm", uneven(world), after, moments=True)
    assert set(stats.grad_var) == set(stats.layers)
    for name, var in stats.grad_var.items():
        assert abs(var.sum() - stats.layers[name].tr_sigma) < 1e-9 * var.sum()


def accumulate(model, batch, sizes, run, monitor, quiet, parts=(2, 1)) -> None:
    """`parts` samples in micro-batches before the last, whose backward averages."""
    true = contributions(model, batch, sizes)
    own = mine(batch, sizes)
    for _ in range(2):
        run.zero_grad()
        pieces = own.split([*parts, len(own) - sum(parts)])
        for k, piece in enumerate(pieces):
            scaled = len(piece) / len(own)
            if k < len(pieces) - 1:
                with quiet():
                    (loss(run, piece) * scaled).backward()
            else:
                (loss(run, piece) * scaled).backward()
        compare(monitor.step(), true, sizes)


@case(0)
def ddp_no_sync(rank: int, world: int) -> None:
    sizes = [5, 7, 4, 6][:world]
    for moments in (False, True):
        model, batch = setup("layer_norm", sizes)
        monitor, run = after(model, moments=moments)
        # Ranks need not have as many micro-batches as each other.
        accumulate(model, batch, sizes, run, monitor, run.no_sync, (2, 1) if rank else (1,))
        monitor.detach()


@case()
def ddp_every_backward_averaged(rank: int, world: int) -> None:
    import contextlib

    sizes = [5, 7]
    model, batch = setup("layer_norm", sizes)
    monitor, run = after(model, moments=True)
    accumulate(model, batch, sizes, run, monitor, contextlib.nullcontext)


@case()
def ddp_checkpointed(rank: int, world: int) -> None:
    for reentrant in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(reentrant)
        batch = torch.randn(8, 6)
        true = contributions(model, batch, [3, 5])
        monitor, run = after(model, moments=True)
        for _ in range(2):
            run.zero_grad()
            loss(run, mine(batch, [3, 5])).backward()
            compare(monitor.step(), true, [3, 5], 1e-5)


@case()
def ddp_summed_loss(rank: int, world: int) -> None:
    sizes = [3, 5]
    model, batch = setup("layer_norm", sizes)
    true = per_sample_gradients(model, loss, batch)
    monitor, run = after(model, loss_reduction="sum", moments=True)
    (loss(run, mine(batch, sizes)) * sizes[rank]).backward()
    compare(monitor.step(), true, sizes)


class Sometimes(nn.Module):
    """Its second layer is used where the first sample is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        if x[0, 0] > 0:
            y = y + torch.tanh(self.second(x))
        return self.head(y)


@case()
def ddp_parameter_unused_on_one_rank(rank: int, world: int) -> None:
    sizes = [3, 5]
    torch.manual_seed(0)
    model, batch = Sometimes().double(), torch.randn(8, 6).double()
    batch[:3, 0], batch[3:, 0] = batch[:3, 0].abs(), -batch[3:, 0].abs()
    true = contributions(model, batch, sizes)
    run = DDP(model, find_unused_parameters=True)
    monitor = gradstats.attach(run, moments=True)
    for _ in range(2):
        run.zero_grad()
        loss(run, mine(batch, sizes)).backward()
        compare(monitor.step(), true, sizes)


@case()
def a_penalty_on_one_rank_is_missing_on_all(rank: int, world: int) -> None:
    sizes = [3, 5]
    torch.manual_seed(0)
    model, batch = Sometimes().double(), torch.randn(8, 6).double()
    batch[:3, 0], batch[3:, 0] = batch[:3, 0].abs(), -batch[3:, 0].abs()
    run = DDP(model)
    monitor = gradstats.attach(run)
    value = loss(run, mine(batch, sizes))
    if rank == 1:  # where the forward leaves the second layer out
        value = value + sum(p.square().sum() for p in model.second.parameters())
    value.backward()
    stats = monitor.step()
    assert set(stats.coverage.missing) == {"second.weight", "second.bias"}
    wanted = "outside the model's forward" if rank == 1 else "another rank did not measure it"
    assert wanted in stats.coverage.missing["second.bias"]
    assert torch.isnan(stats.layers["second.bias"].mean_sq_norm)
    same_everywhere(stats.mean_sq_norm, stats.grad_sq_norm, stats.coverage.fraction)


def _scaled(state, bucket):  # torch reads the annotations, which are strings here
    done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return done.then(lambda f: f.value()[0])  # a sum, not a mean


@case(0)
def ddp_communication_hooks(rank: int, world: int) -> object:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def hooked(model: nn.Module, **options):
        monitor, run = after(model, **options)
        run.register_comm_hook(None, allreduce_hook)
        return monitor, run

    ddp_steps("layer_norm", [4] * world, hooked)
    model, batch = setup("mlp", [4] * world)
    monitor, run = after(model)
    run.register_comm_hook(None, _scaled)
    loss(run, mine(batch, [4] * world)).backward()
    try:
        monitor.step()
    except gradstats.UnsupportedLayerError as error:
        return {"text": str(error)}
    return None


@case(0)
def ddp_tokens_as_samples(rank: int, world: int) -> None:
    sizes = uneven(world)
    model, batch = setup("positions", sizes)
    alone = copy.deepcopy(model)
    one = gradstats.attach(alone, sample="token", process_group=ALONE)
    for part in batch.split(sizes):
        (loss(alone, part) / world).backward()
    want = one.step()
    monitor, run = after(model, sample="token")
    loss(run, mine(batch, sizes)).backward()
    found = monitor.step()
    assert found.num_samples == want.num_samples == batch.numel()
    for field in ("mean_sq_norm", "grad_sq_norm", "tr_sigma", "noise_scale"):
        assert relative(getattr(found, field), getattr(want, field)) < 1e-9, field
