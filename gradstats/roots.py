"""Standard deviations from the variances of many steps: averaged first, the root taken last.

The root of a variance of N samples falls short of σ in the mean, by a share of about (κ − 1)/(8N) for
samples of kurtosis κ, and of a weight that few samples have to do with by nearly all of it. Of variances
averaged over K steps the shortfall is a K-th, and what is left of it their difference tells: (K·root of
the average − average of the roots)/(K − 1) lacks the terms in 1/N (Quenouille's jackknife, Biometrika 43,
1956, from one step to K). It takes no distribution for granted.

Averages of a few hundred weights of each parameter are kept, spread over it; what they lack, all do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["AveragedRoots", "shortness"]

FOLLOWED = 256  # weights of a larger parameter, about
# Weights of the steps and their squares, variances, their roots, and those as for normal samples.
WEIGHTS, SQUARES, VARIANCES, ROOTS, NORMAL = range(5)


def shortness(samples: int | Tensor) -> float | Tensor:
    """Mean of the standard deviation of N normal samples, over the true one. NaN below two."""
    if isinstance(samples, Tensor):
        n = samples.double()
        return torch.exp(torch.lgamma(n / 2) - torch.lgamma((n - 1) / 2)) * torch.sqrt(2 / (n - 1))
    if samples < 2:
        return math.nan
    half = samples / 2
    return math.exp(math.lgamma(half) - math.lgamma(half - 0.5)) / math.sqrt(half - 0.5)


class AveragedRoots:
    """By what factor a step's ‖σ‖₁ of each parameter falls short. Steps fade with `half_life`."""

    def __init__(self, half_life: float) -> None:
        decay = 0.5 ** (1 / half_life)
        self._decays = torch.full((5, 1), decay, dtype=torch.float64)
        self._decays[SQUARES] = decay**2
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._sums: Tensor | None = None  # (5, weights that are followed)
        self._lengths: list[int] = []

    def add(
        self, variances: Sequence[Tensor | None], sizes: Sequence[int], samples: int | Tensor
    ) -> None:
        """Take in a step's variances, of N samples, of parameters of so many weights. No wait."""
        strides = [_stride(size) for size in sizes]
        device = next((v.device for v in variances if v is not None), None)
        if device is None:
            return
        picked = [
            torch.full((math.ceil(size / stride),), torch.nan, device=device)
            if var is None
            else var.flatten()[::stride]
            for var, size, stride in zip(variances, sizes, strides, strict=True)
        ]
        var = torch.cat(picked).double()
        roots = var.sqrt()
        ones = torch.ones_like(var)
        rows = torch.stack((ones, ones, var, roots, roots / shortness(samples)))
        rows = torch.where(var.isfinite(), rows, 0.0)  # a step that overflowed, or has one sample
        if self._sums is None:
            self._lengths = [len(p) for p in picked]
            self._sums = torch.zeros_like(rows)
        if self._sums.device != device:  # as after a resume
            self._sums = self._sums.to(device)
        if self._decays.device != device:
            self._decays = self._decays.to(device)
        self._sums.mul_(self._decays).add_(rows)

    def factors(self) -> list[float]:
        """By how much each parameter's ‖σ‖₁ has to be longer. Waits for the device."""
        if self._sums is None:
            return []
        sums = self._sums.cpu()
        steps = sums[WEIGHTS].square() / sums[SQUARES]
        # Per unit of weight; of one step alone there is nothing to compare.
        root, mean = (sums[VARIANCES] / sums[WEIGHTS]).sqrt(), sums[ROOTS] / sums[WEIGHTS]
        several = (steps * root - mean) / (steps - 1)
        normal = sums[NORMAL] / sums[WEIGHTS]
        best = torch.where(steps > 1 + 1e-6, several, normal)
        found = [
            float(b.nansum() / n.nansum())
            for b, n in zip(best.split(self._lengths), normal.split(self._lengths), strict=True)
        ]
        return [f if f > 0 and math.isfinite(f) else 1.0 for f in found]

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        sums = None if self._sums is None else self._sums.tolist()
        return {"sums": sums, "lengths": self._lengths}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from `state_dict()`."""
        self.clear()
        if state is not None and state["sums"] is not None:
            self._sums = torch.tensor(state["sums"], dtype=torch.float64)
            self._lengths = list(state["lengths"])


@cache
def _stride(size: int) -> int:
    """From one followed weight to the next: prime to the size, and so at all places of its rows."""
    about = math.ceil(size / FOLLOWED)
    near = (s for d in range(about + 1) for s in (about - d, about + d))
    return next((s for s in near if s > 0 and math.gcd(s, size) == 1), 1)
