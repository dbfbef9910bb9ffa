"""LayerNorm, RMSNorm and GroupNorm: torch's own backward against the backward with statistics."""

from __future__ import annotations

from typing import Any

import ops_common
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradstats import backends, reference
from gradstats.ops import ops

LAYER = {  # B, T, D
    "vit": (32, 65, 192),
    "gpt": (8, 256, 256),
    "wide": (4, 256, 2048),
}
GROUP = {  # B, C, S, groups
    "cnn 32×32": (64, 32, 1024, 8),
    "cnn 8×8": (64, 128, 64, 8),
}


def _torch_backward(call: Any, x: Tensor, scale: Tensor, bias: Tensor | None, g: Tensor) -> Any:
    """torch's backward alone, its graph kept from call to call."""
    leaves = [t.clone().requires_grad_() for t in (x, scale, bias) if t is not None]
    out = call(*leaves)
    return lambda: torch.autograd.grad(out, leaves, g, retain_graph=True)


def _run(
    benchmark: Any, op: str, group: str, backend: str, tensors: list[Any], moments: bool
) -> None:
    few = [t[: ops_common.FEW] if t is not None and t.dim() > 1 else t for t in tensors]
    flags = (True, True, tensors[2] is not None, moments)  # no shift where nothing is centred
    true = getattr(reference, op)(*ops_common.wide(few), *flags)
    run = getattr(ops, op)
    with backends.use(backend):
        ops_common.compare(run(*few, *flags), true)
        whole = run(*tensors, *flags)
        ops_common.compare([s[: ops_common.FEW] for s in whole[3:5]], true[3:5])
        ops_common.bench(benchmark, group, lambda: run(*tensors, *flags))


@pytest.mark.parametrize(("backend", "moments"), ops_common.implementations("layer_norm_stats"))
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", LAYER)
def test_layer_norm_stats(benchmark, shape: str, kind: str, backend: str, moments: bool) -> None:
    b, t, d = LAYER[shape]
    torch.manual_seed(0)
    g, x, scale = ops_common.random(b, t, d), ops_common.random(b, t, d), ops_common.random(d)
    bias = ops_common.random(d) if kind == "layer_norm" else None
    group = f"{kind} {shape} {LAYER[shape]}"
    if backend == ops_common.TORCH:
        call = F.layer_norm if kind == "layer_norm" else F.rms_norm
        backward = _torch_backward(lambda x, *p: call(x, (d,), *p), x, scale, bias, g)
        ops_common.bench(benchmark, group, backward)
        return
    wide = x.float()
    mean = wide.mean(-1) if kind == "layer_norm" else None
    centred = wide if mean is None else wide - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + 1e-5).rsqrt()
    tensors = [g, x, mean, rstd, scale]
    _run(benchmark, "layer_norm_stats", group, backend, tensors, moments)


@pytest.mark.parametrize(("backend", "moments"), ops_common.implementations("group_norm_stats"))
@pytest.mark.parametrize("shape", GROUP)
def test_group_norm_stats(benchmark, shape: str, backend: str, moments: bool) -> None:
    b, c, s, groups = GROUP[shape]
    torch.manual_seed(0)
    g, x = ops_common.random(b, c, s), ops_common.random(b, c, s)
    scale, bias = ops_common.random(c), ops_common.random(c)
    group = f"group_norm {shape} {GROUP[shape]}"
    if backend == ops_common.TORCH:
        backward = _torch_backward(lambda x, *p: F.group_norm(x, groups, *p), x, scale, bias, g)
        ops_common.bench(benchmark, group, backward)
        return
    grouped = x.float().reshape(b, groups, -1)
    rstd = (grouped.var(-1, correction=0) + 1e-5).rsqrt()
    tensors = [g, x, grouped.mean(-1), rstd, scale]
    _run(benchmark, "group_norm_stats", group, backend, tensors, moments)
