"""The CUDA C++ kernel for linear layers as a variant of its own: checked, then timed beside Triton.

It is chosen only by name, so what is timed as `norms` and `norms+moments` is another backend. It has
to pass here before it is timed, and its failure leaves the other variants alone.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import checkout
import torch
from torch import Tensor

from gradstats import backends, reference
from gradstats.errors import first_line
from gradstats.ops import ops

NAMES = {False: "hopper norms", True: "hopper norms+moments"}
DW, NORMS, M2 = 0, 2, 4  # among the outputs of linear_stats
DW_TOLERANCE = 2**-7  # rounded to bfloat16 or float16, over the largest element
PATIENCE = 90  # seconds
FIRST = """
import checkout
import torch
from gradstats import backends
x, g = (torch.randn(3, 130, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
for moments in (False, True):
    backends.extension()[0].linear_stats_cuda(x, g, True, True, moments)
    torch.cuda.synchronize()
"""


@functools.cache
def refusal() -> str | None:
    """Why the kernel cannot be called here. It is asked once in a process that can be given up: a
    barrier that nobody completes would hang, an illegal access would end this process's context."""
    try:
        subprocess.run(
            [sys.executable, "-c", FIRST], cwd=checkout.BENCH, timeout=PATIENCE, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"its first call did not return within {PATIENCE} s"
    except subprocess.CalledProcessError as error:
        return f"its first call failed: {(error.stderr.strip() or 'no word').splitlines()[-1]}"
    return None


def stats(moments: bool) -> Callable[[Tensor, Tensor], Any]:
    def run(x: Tensor, g: Tensor) -> Any:
        with backends.use("cuda"):
            return ops.linear_stats(x, g, True, False, moments)

    return run


def difference(found: Sequence[Tensor], true: Sequence[Tensor], output: int) -> float:
    a, b = found[output].double(), true[output].double()
    if a.shape != b.shape or not bool(torch.isfinite(a).all()):
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)) if b.numel() else 0.0


def why_wrong(x: Tensor, g: Tensor, few: int, tolerance: float) -> str | None:
    """The first samples against float64, the whole batch against the automatic choice, twice."""
    for moments in (False, True):
        run = stats(moments)
        for part in (slice(few), slice(None)):
            a, b = x[part], g[part]
            found = run(a, b)
            again = run(a, b)
            if any(not torch.equal(p, q) for p, q in zip(found, again, strict=True)):
                return "two runs differ"
            if part.stop is None:
                true = ops.linear_stats(a, b, True, False, moments)
            else:
                true = reference.linear_stats(a.double(), b.double(), True, False, moments)
            limits = {DW: DW_TOLERANCE, NORMS: tolerance, M2: tolerance}
            for output, limit in limits.items():
                error = difference(found, true, output)
                if not error <= limit:
                    return f"output {output} of {len(a)} samples is off by {error:.1e}"
    return None


def variants(
    name: str, make: Callable[[], Sequence[Tensor]], device: str, dtype: torch.dtype, few: int,
    tolerance: float,
) -> dict[str, Callable[..., Any]]:  # fmt: skip
    """What is timed beside the other variants: nothing where it cannot run or is wrong."""
    why = backends.refusal("cuda", "linear_stats", device, dtype)
    if why is None:
        why = refusal()
    if why is None:
        try:
            why = why_wrong(*make(), few, tolerance)
        except RuntimeError as error:
            why = first_line(error)
    if why is not None:
        print(f"{name}: hopper is not timed: {why}", flush=True)
        return {}
    return {label: stats(moments) for moments, label in NAMES.items()}
