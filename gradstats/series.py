"""What a monitor remembers of its steps: scalars that wait on the device, and those that were read."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradstats.stats import GradStats, Moments

HISTORY = 10_000


class Series:
    """Per step: samples, tr_sigma and true_grad_sq_norm, of the last `HISTORY` steps."""

    def __init__(self) -> None:
        # (samples, mean_sq_norm, grad_sq_norm) of steps that nobody has asked for yet. Numbers where they
        # are at hand: small tensors that stay would keep the gradients' memory from being used again.
        self.pending: deque[tuple[int | Tensor, Tensor | float, Tensor | float]] = deque(
            maxlen=HISTORY
        )
        self._read: deque[tuple[int, float, float]] = deque(maxlen=HISTORY)

    def add(self, stats: GradStats) -> None:
        """Remember a step, without waiting for the device."""
        mean, grad = stats.mean_sq_norm, stats.grad_sq_norm
        if mean.is_cpu and grad.is_cpu:
            self.pending.append((stats.samples, mean.item(), grad.item()))
        else:
            self.pending.append((stats.samples, mean, grad))

    def read(self) -> tuple[list[int], list[float], list[float]]:
        """Samples, tr_sigma, true_grad_sq_norm of each step. Waits for the device, once."""
        if self.pending:
            pending = list(self.pending)
            self.pending.clear()
            waiting: list[Any] = [pair for _, *pair in pending if isinstance(pair[0], Tensor)]
            stacked = [torch.stack(pair) for pair in waiting]
            arrived = iter(torch.stack(stacked).double().cpu() if stacked else ())
            values = [next(arrived) if isinstance(pair[0], Tensor)
                      else torch.tensor(pair, dtype=torch.float64) for _, *pair in pending]  # fmt: skip
            counted: Sequence[Any] = [n for n, *_ in pending]
            if any(isinstance(n, Tensor) for n in counted):  # of all ranks
                counted = torch.stack([torch.as_tensor(n) for n in counted]).long().tolist()
            for n, (mean_sq, grad_sq) in zip(counted, values, strict=True):
                step = Moments(n, 1, mean_sq, grad_sq)
                self._read.append((n, float(step.tr_sigma), float(step.true_grad_sq_norm)))
        return (
            [n for n, _, _ in self._read],
            [t for _, t, _ in self._read],
            [g for _, _, g in self._read],
        )

    def state_dict(self) -> dict[str, Any]:
        """Its columns, as plain numbers."""
        counts, tr_sigma, true_grad = self.read()
        return {"num_samples": counts, "tr_sigma": tr_sigma, "true_grad_sq_norm": true_grad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.pending.clear()
        self._read.clear()
        columns = (state[key] for key in ("num_samples", "tr_sigma", "true_grad_sq_norm"))
        self._read.extend(zip(*columns, strict=True))
