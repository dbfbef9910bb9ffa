"""The operations that `gpu.py` measures: inputs, the check against float64, and what is timed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import gpu_hopper
import gpu_schedules
import torch
import torch.nn.functional as F
from gpu_case import BF16_TOLERANCE, FEW, FP32_TOLERANCE, Case, Cases, operation, worst
from torch import Tensor

from gradstats import backends, reference
from gradstats.ops import ops

LINEAR = {  # (B, T, I, O): limit of norms over dW alone
    (16, 1024, 768, 3072): 1.05,
    (8, 2048, 4096, 4096): 1.05,
    (4, 4096, 4096, 11008): 1.05,
    (16, 1024, 768, 50304): 1.05,
    **{(32, t, w, w): 1.10 for t in (64, 128, 197, 256) for w in (1024, 4096)},
    (4096, 1, 4096, 4096): 1.03,
}
TINY = {(4, 5, 8, 6): 1.05, (4, 1, 8, 6): 1.03}
MOMENTS = 1.25
COPY = 1 / 0.85  # 85% of the bandwidth of a copy


def linear_cases(device: str, dtype: torch.dtype, small: bool) -> Cases:
    """dW + norms and + second moment over the library's dW alone."""
    for shape, limit in (TINY if small else LINEAR).items():
        name = "linear B={} T={} I={} O={}".format(*shape)
        yield name, partial(linear_case, name, shape, limit, device, dtype)


def linear_case(
    name: str, shape: tuple[int, ...], limit: float, device: str, dtype: torch.dtype
) -> Case:
    b, t, i, o = shape

    def make() -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randn(b, t, w, device=device, dtype=dtype) for w in (i, o)]

    def alone(x: Tensor, g: Tensor) -> Tensor:
        return g.reshape(-1, o).t() @ x.reshape(-1, i)

    def norms(x: Tensor, g: Tensor) -> Any:
        return ops.linear_stats(x, g, True, False, False)

    def moments(x: Tensor, g: Tensor) -> Any:
        return ops.linear_stats(x, g, True, False, True)

    def check() -> float:
        few = [a[:FEW] for a in make()]
        true = reference.linear_stats(*(a.double() for a in few), True, False, True)
        pairs = [(moments(*few)[2], true[2]), (norms(*few)[2], true[2]),
                 (moments(*few)[4], true[4])]  # fmt: skip
        return worst(*zip(*pairs, strict=True))

    runs = {"dW alone": alone, "norms": norms, "norms+moments": moments}
    runs |= gpu_hopper.variants(name, make, device, dtype, FEW, BF16_TOLERANCE)
    runs |= gpu_schedules.variants(name, make, device, dtype)
    limits = {"norms": limit, "norms+moments": MOMENTS}
    limits |= {gpu_hopper.NAMES[False]: limit, gpu_hopper.NAMES[True]: MOMENTS}
    return operation(make, runs, limits=limits, flops=2 * b * t * i * o, check=check)


def norm_cases(device: str, dtype: torch.dtype, small: bool) -> Cases:
    """LayerNorm and RMSNorm backward with norms over torch's own backward."""
    b, t = (3, 4) if small else (8, 2048)
    for rms, d in itertools.product((False, True), (12,) if small else (768, 2048, 4096, 8192)):
        name = f"{'rms' if rms else 'layer'}_norm backward B={b} T={t} D={d}"
        yield name, partial(norm_case, rms, b, t, d, device, dtype)


def norm_case(rms: bool, b: int, t: int, d: int, device: str, dtype: torch.dtype) -> Case:
    def make() -> list[Tensor]:
        torch.manual_seed(0)
        g, x = (torch.randn(b, t, d, device=device, dtype=dtype) for _ in range(2))
        scale = torch.randn(d, device=device, dtype=dtype)
        wide = x.double()
        mean = torch.zeros_like(wide[..., :1]) if rms else wide.mean(-1, keepdim=True)
        rstd = ((wide - mean).square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return [g, x, mean.float(), rstd.float(), scale]

    def stats(
        g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor,
        run: Any = ops.layer_norm_stats,
    ) -> Any:  # fmt: skip
        centre = None if rms else mean.squeeze(-1)
        return run(g, x, centre, rstd.squeeze(-1), scale, True, True, not rms, False)

    def own(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor) -> Any:
        """torch's backward alone."""
        if not rms:
            backward = torch.ops.aten.native_layer_norm_backward
            return backward(g, x, [d], mean, rstd, scale, scale, [True] * 3)
        if x.is_cuda:
            backward = torch.ops.aten._fused_rms_norm_backward
            return backward(g, x, [d], rstd, scale, [True] * 2)
        leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]  # not timed
        return torch.autograd.grad(F.rms_norm(leaves[0], (d,), leaves[1]), leaves, g)

    def check() -> float:
        few = [a[:FEW] if a.dim() > 1 else a for a in make()]
        true = stats(*(a.double() for a in few), run=reference.layer_norm_stats)
        return worst(stats(*few)[3:5], true[3:5])

    size = 3 * b * t * d * torch.finfo(dtype).bits // 8  # x and g read, dx written
    runs = {"torch": own, "norms": stats}
    return operation(make, runs, limits={"norms": 1.0}, bytes_moved=size, check=check)


def multi_cases(device: str, shapes: Sequence[tuple[int, ...]]) -> Cases:
    """Squared norms and inner products of GPT-2's gradients in one launch, over a copy.

    A copy reads and writes: copying half of the data moves as many bytes as reading all of it.
    """
    for dtype in (torch.float32, torch.bfloat16):
        title = f"{len(shapes)} tensors {str(dtype).removeprefix('torch.')}"
        yield f"multi_sq_norm {title}", partial(multi_sq_norm, shapes, device, dtype)
        dot = getattr(backends.extension()[0], "multi_dot_cuda", None)
        if dot is not None and device == "cuda":
            yield f"multi_dot {title}", partial(multi_dot, dot, shapes, device, dtype)


def lists(n: int, shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype) -> Any:
    """Makes `n` lists of tensors, one after the other."""

    def make() -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randn(s, device=device, dtype=dtype) for _ in range(n) for s in shapes]

    return make


def copier(size: int, device: str) -> Any:
    """Copies half as many bytes as `size`."""
    source = torch.empty(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda *_: target.copy_(source)


def multi_sq_norm(shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype) -> Case:
    make = lists(1, shapes, device, dtype)
    size = sum(map(math.prod, shapes)) * torch.finfo(dtype).bits // 8

    def check() -> float:
        tensors = make()
        true = torch.stack([t.double().square().sum() for t in tensors])
        return worst([ops.multi_sq_norm(tensors)], [true])

    runs = {
        "copy": copier(size, device),
        "norms": lambda *ts: ops.multi_sq_norm(ts),
        "torch._foreach_norm": lambda *ts: torch._foreach_norm(ts),
    }
    return operation(
        make, runs, limits={"norms": COPY}, bytes_moved=size, check=check, tolerance=FP32_TOLERANCE
    )


def multi_dot(dot: Any, shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype) -> Case:
    n, make = len(shapes), lists(2, shapes, device, dtype)
    size = 2 * sum(map(math.prod, shapes)) * torch.finfo(dtype).bits // 8

    def check() -> float:
        tensors = make()
        products = [p.double() * q.double() for p, q in zip(tensors[:n], tensors[n:], strict=True)]
        true = torch.stack([p.sum() for p in products])
        scale = torch.stack([p.abs().sum() for p in products])
        return float(((dot(tensors[:n], tensors[n:]).double() - true).abs() / scale).max())

    runs = {
        "copy": copier(size, device),
        "dot": lambda *ts: dot(ts[:n], ts[n:]),
        "torch: products, sums": lambda *ts: [p.sum() for p in torch._foreach_mul(ts[:n], ts[n:])],
    }
    return operation(
        make, runs, limits={"dot": COPY}, bytes_moved=size, check=check, tolerance=FP32_TOLERANCE
    )


def chosen(device: str, dtype: torch.dtype) -> dict[str, str]:
    """The backend of every operation here."""
    names = ("linear_stats", "layer_norm_stats", "embedding_stats", "conv_stats", "tied_cross",
             "multi_sq_norm")  # fmt: skip
    return {name: backends.choose(name, device, dtype) for name in names}
