"""Linear layers: weight and bias gradient alone against the gradient with statistics."""

from __future__ import annotations

import ops_common
import pytest
import torch

from gradstats import backends, reference
from gradstats.ops import ops

SHAPES = {  # B, T, I, O
    "mlp T=1": (256, 1, 1024, 1024),
    "vit T=65": (32, 65, 192, 768),
    "gpt T=256": (8, 256, 256, 1024),
    "gpt head T=256": (8, 256, 256, 4096),
    "long T=1024": (2, 1024, 256, 256),
}


@pytest.mark.parametrize(("backend", "moments"), ops_common.implementations("linear_stats"))
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_stats(benchmark, shape: str, backend: str, moments: bool) -> None:
    b, t, i, o = SHAPES[shape]
    torch.manual_seed(0)
    x, g = ops_common.random(b, t, i), ops_common.random(b, t, o)
    group = f"linear_stats {shape} {SHAPES[shape]}"
    if backend == ops_common.TORCH:
        ops_common.bench(
            benchmark, group, lambda: (g.reshape(-1, o).t() @ x.reshape(-1, i), g.sum((0, 1)))
        )
        return
    few = (x[: ops_common.FEW], g[: ops_common.FEW])
    true = reference.linear_stats(*ops_common.wide(few), True, True, moments)
    with backends.use(backend):
        ops_common.compare(ops.linear_stats(*few, True, True, moments), true)
        whole = ops.linear_stats(x, g, True, True, moments)
        ops_common.compare([s[: ops_common.FEW] for s in whole[2:4]], true[2:4])
        dw = g.double().reshape(-1, o).t() @ x.double().reshape(-1, i)
        ops_common.compare([whole[0]], [dw])
        ops_common.bench(benchmark, group, lambda: ops.linear_stats(x, g, True, True, moments))
