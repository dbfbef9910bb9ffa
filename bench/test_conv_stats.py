"""Convolutions: the weight and bias gradient alone against the gradient with statistics."""

from __future__ import annotations

import ops_common
import pytest
import torch

from gradstats import backends, reference
from gradstats.ops import ops

SHAPES = {  # B, I, O, image, kernel, stride, groups
    "first layer": (64, 3, 32, 32, 3, 1, 1),
    "stride 2": (64, 32, 64, 32, 3, 2, 1),
    "middle": (64, 64, 64, 16, 3, 1, 1),
    "last layer": (64, 64, 128, 16, 3, 2, 1),
    "resnet 4×4": (32, 256, 256, 4, 3, 1, 1),
    "pointwise": (32, 64, 128, 16, 1, 2, 1),
    "depthwise": (32, 64, 64, 16, 3, 1, 64),
}


@pytest.mark.parametrize(("backend", "moments"), ops_common.implementations("conv_stats"))
@pytest.mark.parametrize("shape", SHAPES)
def test_conv_stats(benchmark, shape: str, backend: str, moments: bool) -> None:
    b, i, o, image, kernel, stride, groups = SHAPES[shape]
    padding = kernel // 2
    torch.manual_seed(0)
    x = ops_common.random(b, i, image, image)
    out = (image + 2 * padding - kernel) // stride + 1
    g = ops_common.random(b, o, out, out)
    geometry = ([stride] * 2, [padding] * 2, [1, 1])
    group = f"conv_stats {shape} {SHAPES[shape]}"
    if backend == ops_common.TORCH:
        weight = ops_common.random(o, i // groups, kernel, kernel)
        backward = torch.ops.aten.convolution_backward
        ops_common.bench(benchmark, group, lambda: backward(
            g, x, weight, [o], *geometry, False, [0, 0], groups, [False, True, True]
        ))  # fmt: skip
        return
    rest = ([kernel] * 2, *geometry, groups, True, True, moments)
    few = (x[: ops_common.FEW], g[: ops_common.FEW])
    true = reference.conv_stats(*ops_common.wide(few), *rest)
    with backends.use(backend):
        ops_common.compare(ops.conv_stats(*few, *rest), true)
        whole = ops.conv_stats(x, g, *rest)
        ops_common.compare([s[: ops_common.FEW] for s in whole[2:4]], true[2:4])
        dw = reference.conv_stats(*ops_common.wide((x, g)), *rest[:-1], False)[0]
        ops_common.compare([whole[0]], [dw])
        ops_common.bench(benchmark, group, lambda: ops.conv_stats(x, g, *rest))
