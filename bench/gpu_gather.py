"""The cases of `gpu.py` whose kernels gather: embeddings, convolutions, tied weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from gpu_case import FEW, Case, Cases, operation, worst
from torch import Tensor

from gradstats import reference
from gradstats.ops import ops

EMBEDDINGS = {  # B, T, V, D
    "tokens": (16, 1024, 50257, 768),
    "positions": (16, 1024, 1024, 768),
    "two types": (32, 512, 2, 768),
    "categories": (4096, 1, 100, 64),
}
CONVOLUTIONS = {  # B, I, O, image, kernel, stride, groups
    "stem": (64, 3, 64, 224, 7, 2, 1),
    "first stage": (64, 64, 64, 56, 3, 1, 1),
    "second stage": (64, 128, 128, 28, 3, 1, 1),
    "third stage": (64, 256, 256, 14, 3, 1, 1),
    "last stage": (64, 512, 512, 7, 3, 1, 1),
    "pointwise": (64, 256, 64, 56, 1, 1, 1),
    "patches": (64, 3, 768, 224, 16, 16, 1),
    "32 groups": (64, 256, 256, 28, 3, 1, 32),
    "depthwise": (64, 384, 384, 14, 7, 1, 384),
}


def embedding_cases(device: str, dtype: torch.dtype, small: bool) -> Cases:
    """Gradient of a lookup with statistics over torch's own gradient."""
    for kind, shape in ({"tokens": (3, 5, 9, 6)} if small else EMBEDDINGS).items():
        name = "embedding {} B={} T={} V={} D={}".format(kind, *shape)
        yield name, partial(embedding_case, kind, shape, device, dtype)


def embedding_case(kind: str, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Case:
    b, t, v, d = shape

    def make() -> list[Tensor]:
        torch.manual_seed(0)
        ids = torch.randint(v, (b, t), device=device)
        if kind == "tokens":  # a few words make up most of a text
            ids = (v * torch.rand(b, t, device=device) ** 4).long()
        if kind == "positions":
            ids = torch.arange(t, device=device).expand(b, t).contiguous()
        return [torch.randn(b, t, d, device=device, dtype=dtype), ids]

    def own(g: Tensor, ids: Tensor) -> Tensor:
        return torch.ops.aten.embedding_dense_backward(g, ids, v, -1, False)

    def norms(g: Tensor, ids: Tensor) -> Any:
        return ops.embedding_stats(ids, g, v, -1, False)

    def moments(g: Tensor, ids: Tensor) -> Any:
        return ops.embedding_stats(ids, g, v, -1, True)

    def check() -> float:
        g, ids = (a[:FEW] for a in make())
        true = reference.embedding_stats(ids, g.double(), v, -1, True)
        return worst(moments(g, ids)[1:], true[1:])

    size = (b * t * d + v * d) * torch.finfo(dtype).bits // 8  # g read, the gradient written
    runs = {"torch": own, "norms": norms, "norms+moments": moments}
    return operation(make, runs, bytes_moved=size, check=check)


def conv_cases(device: str, dtype: torch.dtype, small: bool) -> Cases:
    """Weight gradient of a convolution with statistics over the library's."""
    shapes = CONVOLUTIONS
    if small:
        shapes = {"middle": (3, 4, 6, 7, 3, 1, 2), "depthwise": (3, 4, 4, 7, 3, 2, 4)}
    for kind, shape in shapes.items():
        b, i, o, image, k, *_ = shape
        name = f"conv {kind} B={b} {i}→{o} {image}² {k}×{k}"
        yield name, partial(conv_case, shape, device, dtype)


def conv_case(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Case:
    b, i, o, image, k, stride, groups = shape
    padding = 0 if k == stride else k // 2
    size = (image + 2 * padding - k) // stride + 1
    where = ([stride] * 2, [padding] * 2, [1, 1])

    def make() -> list[Tensor]:
        torch.manual_seed(0)
        images = (
            torch.randn(b, c, s, s, device=device, dtype=dtype) for c, s in ((i, image), (o, size))
        )
        return [t.to(memory_format=torch.channels_last) for t in images]

    def own(x: Tensor, g: Tensor) -> Any:
        like = x.new_empty(o, i // groups, k, k)
        rest = (*where, False, [0, 0], groups, [False, True, False])
        return torch.ops.aten.convolution_backward(g, x, like, None, *rest)

    def norms(x: Tensor, g: Tensor, moments: bool = False, run: Any = ops.conv_stats) -> Any:
        return run(x, g, [k, k], *where, groups, True, False, moments)

    def moments(x: Tensor, g: Tensor) -> Any:
        return norms(x, g, moments=True)

    def check() -> float:
        few = [a[:FEW] for a in make()]
        true = norms(*(a.double() for a in few), moments=True, run=reference.conv_stats)
        found = norms(*few, moments=True)
        return worst([found[2], norms(*few)[2], found[4]], [true[2], true[2], true[4]])

    flops = 2 * b * size * size * k * k * (i // groups) * o
    runs = {"torch": own, "norms": norms, "norms+moments": moments}
    return operation(make, runs, flops=flops, check=check)


def tied_cases(device: str, dtype: torch.dtype, small: bool) -> Cases:
    """The tied cross term, over the head's own weight gradient, beside which it is computed."""
    shape = (3, 5, 9, 6) if small else (8, 1024, 50304, 768)
    name = "tied cross B={} T={} V={} D={}".format(*shape)
    yield name, partial(tied_case, shape, device, dtype)


def tied_case(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Case:
    b, t, v, d = shape

    def make() -> list[Tensor]:
        torch.manual_seed(0)
        h, e, a = (torch.randn(b, t, n, device=device, dtype=dtype) for n in (v, d, d))
        return [h, e, a, torch.randint(v, (b, t), device=device)]

    def head(h: Tensor, e: Tensor, a: Tensor, ids: Tensor) -> Tensor:
        return h.reshape(-1, v).t() @ a.reshape(-1, d)

    def cross(h: Tensor, e: Tensor, a: Tensor, ids: Tensor) -> Tensor:
        return ops.tied_cross(ids, e, h, a)

    def check() -> float:
        h, e, a, ids = (t[:FEW] for t in make())
        true = reference.tied_cross(ids, e.double(), h.double(), a.double())
        return worst([ops.tied_cross(ids, e, h, a)], [true])

    size = torch.finfo(dtype).bits // 8 * b * t * (2 * d + t)  # of h one element for each pair
    runs = {"dW of the head": head, "cross term": cross}
    return operation(make, runs, bytes_moved=size, flops=2 * b * t * t * d, check=check)
