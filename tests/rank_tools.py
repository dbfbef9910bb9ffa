"""What the cases of several processes share: the oracle of all ranks, and how a case is registered."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from models import PROBLEMS, loss
from oracle import per_sample_gradients, relative
from torch import Tensor, nn

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
