"""The operations that `gpu.py` measures: inputs, the check against float64, and what is timed.

A case makes its inputs several times over, so that no timed call finds them in the L2 cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gpu_hopper
import gpu_schedules
import torch
import torch.nn.functional as F
from torch import Tensor

from gradstats import backends, reference
from gradstats.ops import ops

ROTATE_BYTES = 512 * 2**20  # inputs in rotation: several times the L2 cache
FEW = 2  # samples that are compared with float64
BF16_TOLERANCE, FP32_TOLERANCE = 2e-3, 1e-5
Call = Callable[[], Any]


@dataclass
class Case:
    """`base` and `variants` are timed in turns; `limits` are of the ratio to the base."""

    name: str
    base: tuple[str, Call]
    variants: dict[str, Call]
    limits: dict[str, float] = field(default_factory=dict)
    bytes_moved: int = 0  # that the task must move at least, for GB/s
    flops: int = 0
    check: Callable[[], float] = lambda: 0.0
    tolerance: float = BF16_TOLERANCE
    remarks: dict[str, str] = field(default_factory=dict)
    warmup: int = 17  # each of the inputs in rotation, and once more


def shared(
    make: Callable[[], Sequence[Tensor]], runs: dict[str, Callable[..., Any]]
) -> dict[str, Call]:
    """The same rotation of inputs for every one of `runs`."""
    pool = [make()]
    size = sum(t.numel() * t.element_size() for t in pool[0])
    if pool[0][0].is_cuda:
        pool += [make() for _ in range(min(15, ROTATE_BYTES // size))]

    def call(run: Callable[..., Any]) -> Call:
        turn = itertools.cycle(pool)
        return lambda: run(*next(turn))

    return {name: call(run) for name, run in runs.items()}


def worst(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Largest relative error of several statistics."""
    errors = [0.0]
    for a, b in zip(found, true, strict=True):
        if b.numel():
            scale = b.abs().max().clamp_min(1e-300)
            errors.append(float((a.double() - b).abs().max() / scale))
    return max(errors)


def linear_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """dW + norms and + second moment over the library's dW alone."""
    long = [(16, 1024, 768, 3072), (8, 2048, 4096, 4096), (4, 4096, 4096, 11008),
            (16, 1024, 768, 50304)]  # fmt: skip
    short = [(32, t, w, w) for t in (64, 128, 197, 256) for w in (1024, 4096)]
    shapes = [
        *((s, 1.05) for s in long),
        *((s, 1.10) for s in short),
        ((4096, 1, 4096, 4096), 1.03),
    ]
    if small:
        shapes = [((4, 5, 8, 6), 1.05), ((4, 1, 8, 6), 1.03)]
    for (b, t, i, o), limit in shapes:

        def make(b: int = b, t: int = t, i: int = i, o: int = o) -> tuple[Tensor, Tensor]:
            torch.manual_seed(0)
            return tuple(torch.randn(b, t, w, device=device, dtype=dtype) for w in (i, o))

        def alone(x: Tensor, g: Tensor) -> Tensor:
            return g.reshape(-1, g.shape[2]).t() @ x.reshape(-1, x.shape[2])

        def norms(x: Tensor, g: Tensor) -> Any:
            return ops.linear_stats(x, g, True, False, False)

        def moments(x: Tensor, g: Tensor) -> Any:
            return ops.linear_stats(x, g, True, False, True)

        def check(make: Any = make) -> float:
            few = [a[:FEW] for a in make()]
            true = reference.linear_stats(*(a.double() for a in few), True, False, True)
            pairs = [(moments(*few)[2], true[2]), (norms(*few)[2], true[2]),
                     (moments(*few)[4], true[4])]  # fmt: skip
            return worst(*zip(*pairs, strict=True))

        name = f"linear B={b} T={t} I={i} O={o}"
        runs = {"dW alone": alone, "norms": norms, "norms+moments": moments}
        runs |= gpu_hopper.variants(name, make, device, dtype, FEW, BF16_TOLERANCE)
        runs |= gpu_schedules.variants(name, make, device, dtype)
        limits = {"norms": limit, "norms+moments": 1.25}
        limits |= {gpu_hopper.NAMES[False]: limit, gpu_hopper.NAMES[True]: 1.25}
        calls = shared(make, runs)
        yield Case(
            name, ("dW alone", calls.pop("dW alone")), calls, limits, flops=2 * b * t * i * o,
            check=check,
        )  # fmt: skip


def norm_cases(device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """LayerNorm and RMSNorm backward with norms over torch's own backward."""
    for rms, d in itertools.product((False, True), (12,) if small else (768, 2048, 4096, 8192)):
        b, t = (3, 4) if small else (8, 2048)

        def make(b: int = b, t: int = t, d: int = d, rms: bool = rms) -> list[Tensor]:
            torch.manual_seed(0)
            g, x = (torch.randn(b, t, d, device=device, dtype=dtype) for _ in range(2))
            scale = torch.randn(d, device=device, dtype=dtype)
            wide = x.double()
            mean = torch.zeros_like(wide[..., 0]) if rms else wide.mean(-1)
            centred = wide - mean.unsqueeze(-1)
            rstd = (centred.square().mean(-1) + 1e-5).rsqrt()
            return [g, x, mean.float(), rstd.float(), scale]

        def stats(
            g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, rms: bool = rms,
            run: Any = ops.layer_norm_stats,
        ) -> Any:  # fmt: skip
            return run(g, x, None if rms else mean, rstd, scale, True, True, not rms, False)

        graphs: dict[int, Any] = {}

        def own(
            g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, rms: bool = rms,
            d: int = d, graphs: dict[int, Any] = graphs,
        ) -> Any:  # fmt: skip
            """torch's backward alone: the forward of each input runs once, on its first turn."""
            if x.data_ptr() not in graphs:
                leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
                if not rms:
                    leaves.append(torch.zeros_like(scale).requires_grad_())
                forward = F.rms_norm if rms else F.layer_norm
                graphs[x.data_ptr()] = forward(leaves[0], (d,), *leaves[1:]), leaves
            out, leaves = graphs[x.data_ptr()]
            return torch.autograd.grad(out, leaves, g, retain_graph=True)

        def check(make: Any = make, stats: Any = stats) -> float:
            few = [a[:FEW] if a.dim() > 1 else a for a in make()]
            true = stats(*(a.double() for a in few), run=reference.layer_norm_stats)
            return worst(stats(*few)[3:5], true[3:5])

        calls = shared(make, {"torch": own, "norms": stats})
        size = 3 * b * t * d * torch.finfo(dtype).bits // 8  # x and g read, dx written
        name = f"{'rms' if rms else 'layer'}_norm backward B={b} T={t} D={d}"
        yield Case(name, ("torch", calls.pop("torch")), calls, {"norms": 1.0}, size, check=check)


def multi_cases(device: str, shapes: Sequence[tuple[int, ...]]) -> Iterator[Case]:
    """Squared norms and inner products of GPT-2's gradients in one launch, over a copy.

    A copy reads and writes: copying half of the data moves as many bytes as reading all of it.
    """
    for kind in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        tensors = [torch.randn(s, device=device, dtype=kind) for s in shapes]
        size = sum(t.numel() * t.element_size() for t in tensors)
        source = torch.empty(size // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)

        def check(tensors: list[Tensor] = tensors) -> float:
            true = torch.stack([t.double().square().sum() for t in tensors])
            return worst([ops.multi_sq_norm(tensors)], [true])

        yield Case(
            f"multi_sq_norm {len(shapes)} tensors {str(kind).removeprefix('torch.')}",
            ("copy", lambda s=source, t=target: t.copy_(s)),
            {"norms": lambda ts=tensors: ops.multi_sq_norm(ts),
             "torch._foreach_norm": lambda ts=tensors: torch._foreach_norm(ts)},
            {"norms": 1 / 0.85}, size, check=check, tolerance=FP32_TOLERANCE,
        )  # fmt: skip
        dot = getattr(backends.extension()[0], "multi_dot_cuda", None)
        if dot is None or device != "cuda":
            continue
        others = [torch.randn_like(t) for t in tensors]

        def check_dot(a: list[Tensor] = tensors, b: list[Tensor] = others, dot: Any = dot) -> float:
            products = [p.double() * q.double() for p, q in zip(a, b, strict=True)]
            true = torch.stack([p.sum() for p in products])
            scale = torch.stack([p.abs().sum() for p in products])
            return float(((dot(a, b).double() - true).abs() / scale).max())

        both = torch.empty(size, dtype=torch.uint8, device=device)
        into = torch.empty_like(both)
        yield Case(
            f"multi_dot {len(shapes)} tensors {str(kind).removeprefix('torch.')}",
            ("copy", lambda s=both, t=into: t.copy_(s)),
            {"dot": lambda a=tensors, b=others, dot=dot: dot(a, b),
             "torch: products, sums": lambda a=tensors, b=others: [
                 p.sum() for p in torch._foreach_mul(a, b)]},
            {"dot": 1 / 0.85}, 2 * size, check=check_dot, tolerance=FP32_TOLERANCE,
        )  # fmt: skip


def chosen(device: str, dtype: torch.dtype) -> dict[str, str]:
    """The backend of every operation here."""
    names = ("linear_stats", "layer_norm_stats", "embedding_stats", "conv_stats", "tied_cross",
             "multi_sq_norm")  # fmt: skip
    return {name: backends.choose(name, device, dtype) for name in names}
