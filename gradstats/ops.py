"""The statistics operations as torch.library ops: schema, fake kernel, one implementation.

They are opaque to a compiler and take no part in autograd: the functions in `gradstats.rules` call
them in their backward. `gradstats.reference` says what each computes; `gradstats.backends` picks who
computes it at run time, so the ops exist even where nothing was compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gradstats import backends
from gradstats.reference import LinearStats, NormStats, stats_dtype

_FLAGS = "bool weight, bool bias, bool moments"
_NORM = f"Tensor rstd, Tensor? scale, bool input, {_FLAGS}"
_SIX = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_SEVEN = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

SCHEMAS = {
    "linear_stats": f"(Tensor x, Tensor g, {_FLAGS}) -> {_SIX}",
    "layer_norm_stats": f"(Tensor g, Tensor x, Tensor? mean, {_NORM}) -> {_SEVEN}",
    "group_norm_stats": f"(Tensor g, Tensor x, Tensor mean, {_NORM}) -> {_SEVEN}",
    "embedding_stats": "(Tensor ids, Tensor g, SymInt num_embeddings, int padding_idx, "
    "bool moments) -> (Tensor, Tensor, Tensor)",
    "conv_stats": "(Tensor x, Tensor g, SymInt[] kernel_size, int[] stride, int[] padding, "
    f"int[] dilation, int groups, {_FLAGS}) -> {_SIX}",
    "tied_cross": "(Tensor ids, Tensor e, Tensor h, Tensor a) -> Tensor",
    "multi_sq_norm": "(Tensor[] tensors) -> Tensor",
}

# Called with (operation, arguments, results) after each run; see `gradstats.self_check`.
observers: list[Callable[[str, tuple[Any, ...], Any], None]] = []

_library = torch.library.Library("gradstats", "DEF")


def _define(name: str) -> Callable[..., Any]:
    # Ids are integers: their ops compute on the next argument. A list op looks at its first.
    pick = {
        "embedding_stats": lambda a: a[1],
        "tied_cross": lambda a: a[1],
        "multi_sq_norm": lambda a: a[0][0],
    }.get(name, lambda a: a[0])

    def run(*args):  # type: ignore[no-untyped-def]
        results = backends.implementation(name, pick(args))(*args)
        for observe in observers:
            observe(name, args, results)
        return results

    _library.define(f"{name}{SCHEMAS[name]}", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, run, "CompositeExplicitAutograd")
    op = getattr(torch.ops.gradstats, name)

    def call(*args):  # type: ignore[no-untyped-def]
        if torch.compiler.is_compiling() or type(pick(args)) not in _PLAIN or _watched():
            return op(*args)
        return run(*args)

    return call


_PLAIN = (Tensor, nn.Parameter)


def native_linear(x: Tensor, weight: Tensor) -> Callable[..., Tensor] | None:
    """The extension's autograd node of a linear layer; None where another backend serves such tensors,
    or something wants to see the operation. The samples of `x` are in dimension 0.
    """
    plain = type(x) in _PLAIN and type(weight) in _PLAIN and x.dtype == weight.dtype
    if not plain or x.dim() < 2 or torch.compiler.is_compiling() or observers or _watched():
        return None
    return backends.native("linear", "linear_stats", x)


def _watched() -> bool:
    """Whether something between the caller and the kernels wants to see the op: a mode, functorch."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


ops = torch.ops.gradstats
# The same functions for eager callers: past the dispatcher, which takes longer than a small layer.
call = SimpleNamespace(**{name: _define(name) for name in SCHEMAS})


def _fake(name: str):  # type: ignore[no-untyped-def]
    return torch.library.register_fake(f"gradstats::{name}", lib=_library)


def _stats(
    like: Tensor, batch: int, shape: Sequence[int], wanted: bool, moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake (gradient, sq_norm, m2) of one parameter; `like` gives device and gradient dtype."""
    wide = stats_dtype(like.dtype)
    return (
        like.new_empty(tuple(shape) if wanted else (0,)),
        like.new_empty(batch if wanted else 0, dtype=wide),
        like.new_empty(tuple(shape) if wanted and moments else (0,), dtype=wide),
    )


@_fake("linear_stats")
def _(x: Tensor, g: Tensor, weight: bool, bias: bool, moments: bool) -> LinearStats:
    shape = (g.shape[2], x.shape[2])
    dw, w_sq, w_m2 = _stats(x, x.shape[0], shape, weight, moments)
    db, b_sq, b_m2 = _stats(g, x.shape[0], shape[:1], bias, moments)
    return dw, db, w_sq, b_sq, w_m2, b_m2


def _fake_norm(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, scale: Tensor | None,
    input: bool, weight: bool, bias: bool, moments: bool, *, dim: int,
) -> NormStats:  # fmt: skip
    like = x if scale is None else scale
    dw, w_sq, w_m2 = _stats(like, x.shape[0], (x.shape[dim],), weight, moments)
    db, b_sq, b_m2 = _stats(like, x.shape[0], (x.shape[dim],), bias, moments)
    dx = x.new_empty(x.shape if input else (0,))
    return dx, dw, db, w_sq, b_sq, w_m2, b_m2


@_fake("layer_norm_stats")
def _(*args):  # type: ignore[no-untyped-def]
    return _fake_norm(*args, dim=2)


@_fake("group_norm_stats")
def _(*args):  # type: ignore[no-untyped-def]
    return _fake_norm(*args, dim=1)


@_fake("embedding_stats")
def _(
    ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int, moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _stats(g, ids.shape[0], (num_embeddings, g.shape[2]), True, moments)


@_fake("conv_stats")
def _(x, g, kernel_size, stride, padding, dilation, groups, weight, bias, moments):  # type: ignore[no-untyped-def]
    shape = (g.shape[1], x.shape[1] // groups, *kernel_size)
    dw, w_sq, w_m2 = _stats(x, x.shape[0], shape, weight, moments)
    db, b_sq, b_m2 = _stats(g, x.shape[0], shape[:1], bias, moments)
    return dw, db, w_sq, b_sq, w_m2, b_m2


@_fake("tied_cross")
def _(ids: Tensor, e: Tensor, h: Tensor, a: Tensor) -> Tensor:
    return e.new_empty(e.shape[0], dtype=stats_dtype(e.dtype))


@_fake("multi_sq_norm")
def _(tensors: Sequence[Tensor]) -> Tensor:
    wide = {stats_dtype(t.dtype) for t in tensors}
    dtype = torch.float64 if wide == {torch.float64} else torch.float32
    return tensors[0].new_empty(len(tensors), dtype=dtype)


# ---- which forward of a compiled graph it is ----------------------------------------------------

EXACT = 2**24  # whole numbers up to it are exact in float32

# An op of its own: what a graph computes itself, it may compute again in the backward.
_library.define("next_number(Tensor(a!) counter) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def _next_number(counter: Tensor) -> Tensor:
    """Add 1 to a 0-d counter; 0-d, its value modulo `EXACT`."""
    return counter.add_(1).remainder(EXACT)


_library.impl("next_number", _next_number, "CompositeExplicitAutograd")


@_fake("next_number")
def _(counter: Tensor) -> Tensor:
    return counter.new_empty(())
