"""The operations, checked and timed with pytest-benchmark: torch's own kernel and each backend.

    pytest bench --benchmark-enable --benchmark-only --benchmark-group-by=group

One shape is one group of the table. Timings are never asserted on.
"""

from __future__ import annotations

from typing import Any

import checkout  # noqa: F401
import pytest
import torch

from gradstats import backends
from gradstats.workbench.bench import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = "torch"


def _cases() -> list[Any]:
    found = []
    for name, shape in ops.names():
        operation = ops.make(name, ops.SHAPES[name][1][shape], DEVICE)
        kinds = [(TORCH, False)]
        for backend in ops.backends_of(operation.name, DEVICE):
            kinds += [(backend, moments) for moments in (False, True)[: 2 - operation.as_list]]
        for backend, moments in kinds:
            label = f"{name} {shape} {backend}{'+moments' if moments else ''}"
            found.append(pytest.param(name, shape, backend, moments, id=label))
    return found


@pytest.mark.parametrize(("name", "shape", "backend", "moments"), _cases())
def test_op(benchmark: Any, name: str, shape: str, backend: str, moments: bool) -> None:
    sizes = ops.SHAPES[name][1][shape]
    operation = ops.make(name, sizes, DEVICE)
    benchmark.group = f"{name} {shape}"
    if DEVICE == "cpu":
        torch.set_num_threads(2)
    if backend == TORCH:
        benchmark(_synchronised(operation.torch()))
        return
    with backends.use(backend):
        assert operation.error(moments) <= 1
        benchmark(_synchronised(operation.ours(moments)))


def _synchronised(call: Any) -> Any:
    if DEVICE == "cpu":
        return call

    def run() -> Any:
        out = call()
        torch.cuda.synchronize()
        return out

    return run
