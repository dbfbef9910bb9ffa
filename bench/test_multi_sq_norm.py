"""Squared norms of a whole list of gradients: torch's foreach norm against one call."""

from __future__ import annotations

import ops_common
import pytest
import torch

from gradstats import backends, reference
from gradstats.ops import ops

DIM = 256
LISTS = {
    "gpt": [(1024, DIM)]
    + [(3 * DIM, DIM), (DIM, DIM), (4 * DIM, DIM), (DIM, 4 * DIM), (DIM,), (DIM,)] * 4,
    "many small": [(64,)] * 500,
    "one large": [(2048, 2048)],
}


@pytest.mark.parametrize(
    ("backend", "moments"), ops_common.implementations("multi_sq_norm", moments=False)
)
@pytest.mark.parametrize("shapes", LISTS)
def test_multi_sq_norm(benchmark, shapes: str, backend: str, moments: bool) -> None:
    assert not moments
    torch.manual_seed(0)
    tensors = [ops_common.random(*shape) for shape in LISTS[shapes]]
    group = f"multi_sq_norm {shapes}"
    if backend == ops_common.TORCH:
        ops_common.bench(benchmark, group, lambda: torch._foreach_norm(tensors))
        return
    true = reference.multi_sq_norm(ops_common.wide(tensors))
    with backends.use(backend):
        ops_common.compare([ops.multi_sq_norm(tensors)], [true])
        ops_common.bench(benchmark, group, lambda: ops.multi_sq_norm(tensors))
