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
        # (samples, mean_sq_norm, grad_sq_norm) of steps that nobody has asked for yet.
        self.pending: deque[tuple[int | Tensor, Tensor, Tensor]] = deque(maxlen=HISTORY)
        self._read: deque[tuple[int, float, float]] = deque(maxlen=HISTORY)

    def add(self, stats: GradStats) -> None:
        """Remember a step, without waiting for the device."""
        self.pending.append((stats.samples, stats.mean_sq_norm, stats.grad_sq_norm))

    def read(self) -> tuple[list[int], list[float], list[float]]:
        """Samples, tr_sigma, true_grad_sq_norm of each step. Waits for the device, once."""
        if self.pending:
            pending = list(self.pending)
            self.pending.clear()
            values = torch.stack([torch.stack(pair) for _, *pair in pending]).double().cpu()
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
