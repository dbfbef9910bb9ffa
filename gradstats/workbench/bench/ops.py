"""The operations with statistics, beside the kernels of torch that they replace.

Each `Op` holds random inputs of one shape, how torch computes the gradients from them, how the operation
computes gradients and statistics, and what the gradients alone must read, write and multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstats import backends, reference
from gradstats.ops import ops

__all__ = ["SHAPES", "Op", "backends_of", "dtype_on", "make", "names"]

FEW = 4  # samples that are compared with the float64 reference
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
Tensors = Sequence[Any]


@dataclass(frozen=True)
class Op:
    """One operation on one shape.

    `tensors`: its inputs, samples first where they have more than one dimension (lists of parameters have
    no samples). `plain`: torch's gradients of them, a tuple. `rest(moments)`: the operation's other
    arguments. `rows`: where its per-sample norms are among what it returns, after the gradients. `flops`
    of the gradients; `bytes` that they must move, each tensor once.
    """

    name: str
    tensors: tuple[Any, ...]
    plain: Callable[[Tensors], tuple[Tensor, ...]]
    rest: Callable[[bool], tuple[Any, ...]]
    rows: slice
    flops: float
    as_list: bool = False

    def torch(self) -> Callable[[], Any]:
        """torch's own kernel, without statistics."""
        return lambda: self.plain(self.tensors)

    def ours(self, moments: bool = False) -> Callable[[], Any]:
        """The operation, by the backend that is in use when it is called."""
        return lambda: self.call(self.tensors, moments)

    def call(self, tensors: Tensors, moments: bool, by: Any = ops) -> Sequence[Tensor]:
        run = getattr(by, self.name)
        if self.as_list:
            return [run(list(tensors))]
        return run(*tensors, *self.rest(moments))  # type: ignore[no-any-return]

    @property
    def bytes(self) -> float:
        moved = [*self.tensors, *self.plain(self.tensors)]
        return float(sum(t.numel() * t.element_size() for t in moved if t is not None))

    def error(self, moments: bool = False) -> float:
        """The largest error of any output over its tolerance: right where it is at most 1.

        Of the first samples, all outputs against the float64 reference; of the whole batch, the gradients
        against torch's in float64, and the first samples' norms.
        """
        few = self.tensors if self.as_list else tuple(_first(t) for t in self.tensors)
        true = self.call(_wide(few), moments, reference)
        worst = _off(self.call(few, moments), true)
        if not self.as_list:
            found = self.call(self.tensors, moments)
            exact = self.plain(_wide(self.tensors))
            worst = max(worst, _off(found[: len(exact)], exact))
            rows = [row[:FEW] for row in found[self.rows]]
            worst = max(worst, _off(rows, true[self.rows]))
        return worst


def _first(value: Any) -> Any:
    return value[:FEW] if isinstance(value, Tensor) and value.dim() > 1 else value


def _wide(values: Tensors) -> tuple[Any, ...]:
    return tuple(
        v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values
    )


def _off(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Statistics (wider than the inputs) to the tolerance, gradients to the rounding of their dtype."""
    worst = 0.0
    for a, b in zip(found, true, strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        if b.numel():
            limit = max(TOLERANCE.get(a.dtype, 1e-5), 2 * torch.finfo(a.dtype).eps)
            error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300)
            worst = max(worst, float(error) / limit)
    return worst


def _linear(random: Any, b: int, t: int, i: int, o: int) -> Op:
    def plain(tensors: Tensors) -> tuple[Tensor, ...]:
        x, g = tensors
        return g.reshape(-1, o).t() @ x.reshape(-1, i), g.sum((0, 1))

    inputs = (random(b, t, i), random(b, t, o))
    return Op(
        "linear_stats", inputs, plain, lambda m: (True, True, m), slice(2, 4), 2.0 * b * t * i * o
    )


def _conv(
    random: Any, b: int, i: int, o: int, image: int, kernel: int, stride: int, groups: int
) -> Op:
    padding = kernel // 2
    out = (image + 2 * padding - kernel) // stride + 1
    geometry = ([stride] * 2, [padding] * 2, [1, 1])

    def plain(tensors: Tensors) -> tuple[Tensor, ...]:
        x, g = tensors
        weight = x.new_empty(o, i // groups, kernel, kernel)  # its values have no part
        found = torch.ops.aten.convolution_backward(
            g, x, weight, [o], *geometry, False, [0, 0], groups, [False, True, True]
        )
        return tuple(found[1:])

    return Op(
        "conv_stats",
        (random(b, i, image, image), random(b, o, out, out)),
        plain,
        lambda m: ([kernel] * 2, *geometry, groups, True, True, m),
        slice(2, 4),
        2.0 * b * o * out**2 * (i // groups) * kernel**2,
    )


def _embedding(random: Any, b: int, t: int, v: int, d: int) -> Op:
    g = random(b, t, d)
    ids = torch.randint(v, (b, t), device=g.device)

    def plain(tensors: Tensors) -> tuple[Tensor, ...]:
        return (torch.ops.aten.embedding_dense_backward(tensors[1], tensors[0], v, -1, False),)

    return Op(
        "embedding_stats", (ids, g), plain, lambda m: (v, -1, m), slice(1, 2), float(b * t * d)
    )


def _layer_norm(random: Any, b: int, t: int, d: int) -> Op:
    x, scale = random(b, t, d), random(d)
    wide = x.float()
    mean = wide.mean(-1)
    rstd = ((wide - mean.unsqueeze(-1)).square().mean(-1) + 1e-5).rsqrt()

    def plain(tensors: Tensors) -> tuple[Tensor, ...]:
        g, x, mean, rstd, scale = tensors
        rows = (mean.unsqueeze(-1), rstd.unsqueeze(-1))
        backward = torch.ops.aten.native_layer_norm_backward
        return tuple(backward(g, x, [d], *rows, scale, scale, [True, True, True]))

    inputs = (random(b, t, d), x, mean, rstd, scale)
    return Op(
        "layer_norm_stats", inputs, plain, lambda m: (True, True, True, m), slice(3, 5), 11.0 * x.numel()
    )  # fmt: skip


def _rms_norm(random: Any, b: int, t: int, d: int) -> Op:
    x, scale = random(b, t, d), random(d)
    rstd = (x.float().square().mean(-1) + 1e-5).rsqrt()
    graphs: dict[Any, Any] = {}

    def plain(tensors: Tensors) -> tuple[Tensor, ...]:
        g, x, _, _, scale = tensors
        if id(x) not in graphs:  # torch's backward alone: its graph is kept from call to call
            leaves = [t.detach().clone().requires_grad_() for t in (x, scale)]
            graphs[id(x)] = (x, leaves, F.rms_norm(leaves[0], (d,), leaves[1], 1e-5))
        _, leaves, out = graphs[id(x)]
        return tuple(torch.autograd.grad(out, leaves, g, retain_graph=True))

    inputs = (random(b, t, d), x, None, rstd, scale)
    return Op(
        "layer_norm_stats", inputs, plain, lambda m: (True, True, False, m), slice(3, 4), 9.0 * x.numel()
    )  # fmt: skip


def _group_norm(random: Any, b: int, c: int, s: int, groups: int) -> Op:
    x, scale = random(b, c, s), random(c)
    grouped = x.float().reshape(b, groups, -1)
    rstd = (grouped.var(-1, correction=0) + 1e-5).rsqrt()

    def plain(tensors: Tensors) -> tuple[Tensor, ...]:
        g, x, mean, rstd, scale = tensors
        backward = torch.ops.aten.native_group_norm_backward
        return tuple(backward(g, x, mean, rstd, scale, b, c, s, groups, [True, True, True]))

    inputs = (random(b, c, s), x, grouped.mean(-1), rstd, scale)
    return Op(
        "group_norm_stats", inputs, plain, lambda m: (True, True, True, m), slice(3, 5), 11.0 * x.numel()
    )  # fmt: skip


def _multi(random: Any, *shapes: tuple[int, ...]) -> Op:
    tensors = tuple(random(*shape) for shape in shapes)

    def plain(tensors: Tensors) -> tuple[Tensor, ...]:
        return tuple(torch._foreach_norm(list(tensors)))

    flops = 2.0 * sum(t.numel() for t in tensors)
    return Op("multi_sq_norm", tensors, plain, lambda m: (), slice(0, 0), flops, as_list=True)


_D = 256
_GPT = [(3 * _D, _D), (_D, _D), (4 * _D, _D), (_D, 4 * _D), (_D,), (_D,)] * 4
SHAPES: dict[str, tuple[Callable[..., Op], dict[str, tuple[Any, ...]]]] = {
    "linear": (_linear, {  # B, T, I, O
        "mlp T=1": (256, 1, 1024, 1024),
        "vit T=65": (32, 65, 192, 768),
        "gpt T=256": (8, 256, 256, 1024),
        "gpt head T=256": (8, 256, 256, 4096),
        "long T=1024": (2, 1024, 256, 256),
    }),
    "conv": (_conv, {  # B, I, O, image, kernel, stride, groups
        "first layer": (64, 3, 32, 32, 3, 1, 1),
        "stride 2": (64, 32, 64, 32, 3, 2, 1),
        "middle": (64, 64, 64, 16, 3, 1, 1),
        "last layer": (64, 64, 128, 16, 3, 2, 1),
        "resnet 4×4": (32, 256, 256, 4, 3, 1, 1),
        "pointwise": (32, 64, 128, 16, 1, 2, 1),
        "depthwise": (32, 64, 64, 16, 3, 1, 64),
    }),
    "embedding": (_embedding, {  # B, T, V, D
        "gpt": (8, 256, 1024, 256),
        "large vocabulary": (8, 256, 16384, 256),
        "every id repeats": (8, 256, 16, 256),
    }),
    "layer_norm": (_layer_norm, {  # B, T, D
        "gpt": (8, 256, 256), "vit": (32, 65, 192), "wide": (4, 256, 2048),
    }),
    "rms_norm": (_rms_norm, {
        "gpt": (8, 256, 256), "vit": (32, 65, 192), "wide": (4, 256, 2048),
    }),
    "group_norm": (_group_norm, {  # B, C, S, groups
        "cnn 32×32": (64, 32, 1024, 8), "cnn 8×8": (64, 128, 64, 8),
    }),
    "multi_sq_norm": (_multi, {
        "gpt": ((1024, _D), *_GPT), "many small": ((64,),) * 500, "one large": ((2048, 2048),),
    }),
}  # fmt: skip


def names() -> list[tuple[str, str]]:
    """(operation, shape) of all."""
    return [(op, shape) for op, (_, shapes) in SHAPES.items() for shape in shapes]


def make(name: str, sizes: Sequence[Any], device: str = "cpu", seed: int = 0) -> Op:
    """An operation of `SHAPES` on inputs of these sizes: float32, bfloat16 on CUDA."""
    dtype = dtype_on(device)
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SHAPES[name][0](random, *sizes)


def dtype_on(device: str) -> torch.dtype:
    """What a device's operations are timed in."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def backends_of(op: str, device: str) -> list[str]:
    """The backends that can run one of gradstats' operations here."""
    dtype = dtype_on(device)
    return [
        name
        for name in backends.NAMES
        if name != "auto" and backends.refusal(name, op, device, dtype) is None
    ]
