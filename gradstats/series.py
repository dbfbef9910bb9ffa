"""What a monitor remembers of its steps: scalars that wait on the device, and those that were read."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradstats.stats import GradStats, Moments

HISTORY = 10_000

Columns = tuple[list[int], list[float], list[float]]


class Series:
    """Per step: samples, tr_sigma and true_grad_sq_norm, of the last `HISTORY` steps."""

    def __init__(self) -> None:
        # (samples, mean_sq_norm, grad_sq_norm) of steps that nobody has asked for yet. Numbers where they
        # are at hand: small tensors that stay would keep the gradients' memory from being used again.
        self.pending: deque[tuple[int | Tensor, Tensor | float, Tensor | float]] = deque(
            maxlen=HISTORY
        )
        self._read: deque[tuple[int, float, float]] = deque(maxlen=HISTORY)
        self._columns: Columns | None = None

    def add(self, stats: GradStats) -> None:
        """Remember a step, without waiting for the device."""
        mean, grad = stats.mean_sq_norm, stats.grad_sq_norm
        if mean.is_cpu and grad.is_cpu:
            self.pending.append((stats.samples, mean.item(), grad.item()))
        else:
            self.pending.append((stats.samples, mean, grad))

    def read(self) -> Columns:
        """Samples, tr_sigma, true_grad_sq_norm of each step. Waits for the device.

        The same object until there are other steps.
        """
        if self.pending:
            counts, means, grads = (_numbers(column) for column in zip(*self.pending, strict=True))
            self.pending.clear()
            for n, mean, grad in zip(map(int, counts), means, grads, strict=True):
                step = Moments(n, 1, mean, grad)  # type: ignore[arg-type]
                self._read.append((n, float(step.tr_sigma), float(step.true_grad_sq_norm)))
            self._columns = None
        if self._columns is None:
            self._columns = ([n for n, _, _ in self._read], [t for _, t, _ in self._read],
                             [g for _, _, g in self._read])  # fmt: skip
        return self._columns

    def state_dict(self) -> dict[str, Any]:
        """Its columns, as plain numbers."""
        n, tr_sigma, true_grad = self.read()
        return {
            "num_samples": list(n),
            "tr_sigma": list(tr_sigma),
            "true_grad_sq_norm": list(true_grad),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.pending.clear()
        self._read.clear()
        self._columns = None
        columns = (state[key] for key in ("num_samples", "tr_sigma", "true_grad_sq_norm"))
        self._read.extend(zip(*columns, strict=True))


def _numbers(column: Sequence[float | Tensor]) -> list[float]:
    """Of numbers and of 0-d tensors, which are read all at once."""
    waiting = [value for value in column if isinstance(value, Tensor)]
    arrived = iter(torch.stack(waiting).tolist() if waiting else ())
    return [next(arrived) if isinstance(value, Tensor) else value for value in column]
