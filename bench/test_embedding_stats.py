"""Embedding lookups: the dense weight gradient alone against the gradient with statistics."""

from __future__ import annotations

import ops_common
import pytest
import torch

from gradstats import backends, reference
from gradstats.ops import ops

SHAPES = {  # B, T, V, D
    "gpt": (8, 256, 1024, 256),
    "large vocabulary": (8, 256, 16384, 256),
    "every id repeats": (8, 256, 16, 256),
}


@pytest.mark.parametrize(("backend", "moments"), ops_common.implementations("embedding_stats"))
@pytest.mark.parametrize("shape", SHAPES)
def test_embedding_stats(benchmark, shape: str, backend: str, moments: bool) -> None:
    b, t, v, d = SHAPES[shape]
    torch.manual_seed(0)
    ids, g = torch.randint(v, (b, t), device=ops_common.DEVICE), ops_common.random(b, t, d)
    group = f"embedding_stats {shape} {SHAPES[shape]}"
    if backend == ops_common.TORCH:
        dense = torch.ops.aten.embedding_dense_backward
        ops_common.bench(benchmark, group, lambda: dense(g, ids, v, -1, False))
        return
    few = (ids[: ops_common.FEW], g[: ops_common.FEW])
    true = reference.embedding_stats(*ops_common.wide(few), v, -1, moments)
    with backends.use(backend):
        ops_common.compare(ops.embedding_stats(*few, v, -1, moments), true)
        whole = ops.embedding_stats(ids, g, v, -1, moments)
        ops_common.compare([whole[1][: ops_common.FEW]], [true[1]])
        dw = torch.zeros(v, d, dtype=torch.double, device=ops_common.DEVICE)
        ops_common.compare([whole[0]], [dw.index_add_(0, ids.flatten(), g.double().flatten(0, 1))])
        ops_common.bench(benchmark, group, lambda: ops.embedding_stats(ids, g, v, -1, moments))
