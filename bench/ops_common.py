"""What the operation suites share: which backends run, and the check that comes before timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import checkout  # noqa: F401
import pytest
import torch
from torch import Tensor

from gradstats import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
TORCH = "torch"  # torch's own gradient, without statistics: what the table compares with
FEW = 4  # samples that are compared with the float64 reference


def implementations(op: str, *, moments: bool = True) -> list[Any]:
    """Parameters (backend, moments) for `parametrize`: torch's own, then each backend that runs."""
    found = [pytest.param(TORCH, False, id="torch")]
    for name in backends.NAMES:
        if name != "auto" and backends.refusal(name, op, DEVICE, DTYPE) is None:
            for flag in (False, True)[: 1 + moments]:
                label = f"{name}{'+moments' if flag else ''}"
                found.append(pytest.param(name, flag, id=label))
    return found


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def wide(values: Sequence[Any]) -> list[Any]:
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def compare(found: Sequence[Tensor], true: Sequence[Tensor], loose: float = 1.0) -> None:
    """Outputs of an operation against the same of the reference in float64.

    Statistics (wider than the inputs) to the tolerance, gradients to the rounding of their dtype.
    """
    assert len(found) == len(true)
    for i, (a, b) in enumerate(zip(found, true, strict=True)):
        assert a.shape == b.shape, (i, a.shape, b.shape)
        if b.numel():
            limit = max(TOLERANCE[DTYPE], 2 * torch.finfo(a.dtype).eps) * loose
            error = float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-300))
            assert error <= limit, f"output {i} is off by {error:.1e} > {limit:.0e}"


def synchronised(call: Callable[[], Any]) -> Callable[[], Any]:
    if DEVICE == "cpu":
        return call

    def run() -> Any:
        out = call()
        torch.cuda.synchronize()
        return out

    return run


def bench(benchmark: Any, group: str, call: Callable[[], Any]) -> None:
    """Time `call`; one shape is one group of the table. Timings are never asserted on."""
    benchmark.group = group
    if DEVICE == "cpu":
        torch.set_num_threads(2)
    benchmark(synchronised(call))
