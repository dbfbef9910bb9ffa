"""What every rank of tests/test_distributed.py runs: `ranks.py RANK WORLD DIRECTORY`.

Each case trains as its name says and compares what this rank's monitor found with the oracle.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from models import PROBLEMS, loss
from oracle import assert_matches, per_sample_gradients, relative
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import gradstats

CASES: dict[str, tuple[int, Callable[[int, int], object]]] = {}


def case(world: int = 2) -> Callable[[Callable[[int, int], object]], object]:
    """Run by `world` ranks, or by each number of ranks (0)."""

    def register(run: Callable[[int, int], object]) -> object:
        CASES[run.__name__] = (world, run)
        return run

    return register


def setup(name: str, sizes: list[int], dtype: torch.dtype = torch.float64):
    """The same model and the same whole batch on every rank."""
    torch.manual_seed(3)
    model = PROBLEMS[name].make().to(dtype)
    batch = PROBLEMS[name].data(sum(sizes))
    return model, batch.to(dtype) if batch.is_floating_point() else batch


def contributions(model: nn.Module, batch: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    """g_i = N·c_i, with c_i what sample i adds to the mean over ranks of their mean losses."""
    true = per_sample_gradients(model, loss, batch)
    per_rank = [sum(sizes) / (len(sizes) * n) for n in sizes for _ in range(n)]
    scale = torch.tensor(per_rank, dtype=torch.float64)
    return {n: g * scale.view(-1, *[1] * (g.dim() - 1)) for n, g in true.items()}


def mine(batch: Tensor, sizes: list[int]) -> Tensor:
    return batch.split(sizes)[dist.get_rank()]


def compare(stats, true: dict[str, Tensor], sizes: list[int], tolerance: float = 1e-9) -> None:
    """Global numbers against all samples, the rows against this rank's."""
    assert stats.coverage.fraction == 1.0, stats.coverage.missing
    assert set(stats.layers) == set(true), set(stats.layers) ^ set(true)
    total_n = sum(sizes)
    assert stats.num_samples == total_n
    assert isinstance(stats.num_samples, int)
    flat = {n: g.reshape(len(g), -1) for n, g in true.items()}
    rows = sum(g.square().sum(1) for g in flat.values())
    assert relative(stats.per_sample_sq_norm, mine(rows, sizes)) < tolerance
    mean_sq, grad_sq = rows.mean(), sum(g.mean(0).square().sum() for g in flat.values())
    tr = sum(g.var(0).sum() for g in flat.values())

    def close(found: Tensor, wanted: Tensor, scale: Tensor, what: str) -> None:
        assert abs(found.double() - wanted) < tolerance * scale, (what, found, wanted)

    close(stats.mean_sq_norm, mean_sq, mean_sq, "mean_sq_norm")
    close(stats.grad_sq_norm, grad_sq, mean_sq, "grad_sq_norm")
    close(stats.tr_sigma, tr, 10 * mean_sq, "tr_sigma")
    close(stats.true_grad_sq_norm, grad_sq - tr / total_n, 10 * mean_sq, "true_grad_sq_norm")
    for name, g in flat.items():
        layer, sq = stats.layers[name], g.square().sum(1)
        scale = sq.max().clamp_min(1e-12 * mean_sq)
        own = mine(sq, sizes)
        assert (layer.per_sample_sq_norm.double() - own).abs().max() < tolerance * scale, name
        close(layer.mean_sq_norm, sq.mean(), scale, name)
        close(layer.grad_sq_norm, g.mean(0).square().sum(), scale, name)
        close(layer.tr_sigma, g.var(0).sum(), 10 * scale, name)
        if name in stats.grad_var:
            var = true[name].var(0)
            scale = var.max().clamp_min(1e-9 * mean_sq)
            gap = (stats.grad_var[name].double() - var).abs().max()
            assert gap < 10 * tolerance * scale, (name, gap / scale)


def same_everywhere(*values: float) -> None:
    every: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(every, [float(v).hex() for v in values])
    assert all(v == every[0] for v in every), every


class Collectives:
    """Counts what goes out in `step()`."""

    def __enter__(self) -> Collectives:
        self.sent: list[tuple[int, int]] = []
        name = "all_gather_single"
        self.name = name if hasattr(dist, name) else "all_gather_into_tensor"
        self._kept = getattr(dist, self.name), dist.all_reduce

        def gather(out: Tensor, part: Tensor, **kwargs: object) -> object:
            self.sent.append((part.numel(), part.element_size()))
            return self._kept[0](out, part, **kwargs)

        def reduce(part: Tensor, **kwargs: object) -> object:
            self.sent.append((part.numel(), part.element_size()))
            return self._kept[1](part, **kwargs)

        setattr(dist, self.name, gather)
        dist.all_reduce = reduce
        return self

    def __exit__(self, *exc: object) -> None:
        setattr(dist, self.name, self._kept[0])
        dist.all_reduce = self._kept[1]


def uneven(world: int) -> list[int]:
    return [3, 5, 2, 4][:world]


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
    from test_situations import Checkpointed

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
            monitor._interposer.take()
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


def fsdp_steps(name, sizes, wrap, dtype=torch.float64, tol=1e-9, **options):
    model, batch = setup(name, sizes, dtype)
    true = contributions(model, batch, sizes)
    monitor, run = wrap(model, **options)
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


@case(0)
def fsdp_moments(rank: int, world: int) -> None:
    for wrap in (sharded_before, sharded_after):
        stats = fsdp_steps("layer_norm", uneven(world), wrap, moments=True)
        assert set(stats.grad_var) == set(stats.layers)


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


def main() -> None:
    rank, world, place = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place / 'init'}",
        timeout=timedelta(seconds=30),
        world_size=world,
        rank=rank,
    )
    results = {}
    for name, (wanted, run) in CASES.items():
        if wanted not in (0, world) or (len(sys.argv) > 4 and name not in sys.argv[4:]):
            continue
        start = time.perf_counter()
        try:
            results[name] = {"figures": run(rank, world)}
            results[name]["seconds"] = round(time.perf_counter() - start, 2)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        (place / f"{rank}.json").write_text(json.dumps(results))
        torch._dynamo.reset()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
