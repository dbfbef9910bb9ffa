"""What the checks of Triton kernels share: under the interpreter, and compiled, on a card.

The interpreter has to be chosen before the kernels are imported, so the checks (functions named
`check_*`) run in a pytest process of their own, started by one test per file.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Norms, m2, gradients. The interpreter truncates to bfloat16 where a GPU rounds: 1 ulp, not half.
TOLERANCE = {
    torch.float32: (1e-5, 1e-4, 1e-5),
    torch.bfloat16: (2e-3, 2e-3, 8e-3),
    torch.float16: (2e-3, 2e-3, 1e-3),
}
DEVICE = os.environ.get("GRADSTATS_CHECKED_ON", "cpu")
LAYOUTS = ("contiguous", "positions first", "every other", "one off", "expanded", "all alike")


def version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def run_checks(file: str, device: str = "cpu") -> None:
    triton = pytest.importorskip("triton")
    if device == "cpu" and version(triton) < (3, 7) and version(numpy) >= (2, 4):
        pytest.skip("the interpreter of triton < 3.7 fails with numpy >= 2.4")
    command = [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider"]
    env = {"TRITON_INTERPRET": str(int(device == "cpu")), "GRADSTATS_CHECKED_ON": device}
    if device != "cpu":
        env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic algorithms ask for
        if importlib.util.find_spec("xdist"):  # hundreds of kernels to compile; some take 17 GB
            command += ["-n", "4"]
    result = subprocess.run(
        [*command, "-o", "python_functions=check_*"],
        env={**os.environ, **env},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN, so that whatever a kernel fails to write shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    # Only a warning for the reference's operations that a card does in any order.
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    torch.backends.cudnn.allow_tf32 = False  # else dW, where the library's, has ten bits
    with torch.device(DEVICE):
        assert torch.empty(3).isnan().all()
        assert torch.ones(1).new_empty(3).isnan().all()
        yield
    torch.use_deterministic_algorithms(before)


def random(*shape: int, dtype: torch.dtype, layout: str = "contiguous") -> torch.Tensor:
    """(B, T, D) values in some memory layout."""
    b, t, d = shape
    if layout == "positions first":
        return torch.randn(b, d, t).to(dtype).transpose(1, 2)
    if layout == "every other":
        return torch.randn(2 * b, 2 * t, 2 * d).to(dtype)[::2, 1::2, ::2]
    if layout == "one off":
        return torch.randn(b * t * d + 1).to(dtype)[1:].view(b, t, d)
    if layout == "expanded":
        return torch.randn(b, 1, d).to(dtype).expand(b, t, d)
    if layout == "all alike":
        return torch.randn(1, 1, 1).to(dtype).expand(b, t, d)
    return torch.randn(b, t, d).to(dtype)


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def compare(got, expected, dtype: torch.dtype, names: str) -> None:
    sq, m2, gradient = TOLERANCE[dtype]
    for name, a, e in zip(names.split(), got, expected, strict=True):
        assert a.shape == e.shape, (name, a.shape, e.shape)
        assert not a.isnan().any(), name
        limit = sq if name.endswith("sq") else m2 if name.endswith("m2") else gradient
        if a.numel():
            scale = e.abs() if name.endswith("sq") else e.abs().max()
            worst = ((a.double() - e).abs() / scale.clamp_min(1e-12)).max().item()
            assert worst <= limit, (name, worst, limit)
        if not name.startswith("d"):
            assert a.dtype == torch.float32, name
