"""What a monitor remembers of its steps: scalars that wait on the device, and those that were read."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstats.stats import GradStats, Moments

HISTORY = 10_000

Columns = NDArray[np.float64]  # (3, K): samples, tr_sigma and true_grad_sq_norm of K steps


class Series:
    """Per step: samples, tr_sigma and true_grad_sq_norm, of the last `HISTORY` steps."""

    def __init__(self) -> None:
        # (samples, mean_sq_norm, grad_sq_norm) of steps that nobody has asked for yet. Numbers where they
        # are at hand: small tensors that stay would keep the gradients' memory from being used again.
        self.pending: deque[tuple[int | Tensor, Tensor | float, Tensor | float]] = deque(
            maxlen=HISTORY
        )
        self._columns: Columns = np.empty((3, 0))

    def add(self, stats: GradStats) -> None:
        """Remember a step, without waiting for the device."""
        mean, grad = stats.mean_sq_norm, stats.grad_sq_norm
        if mean.is_cpu and grad.is_cpu:
            self.pending.append((stats.samples, mean.item(), grad.item()))
        else:
            self.pending.append((stats.samples, mean, grad))

    def read(self) -> Columns:
        """(3, K) of the last steps, in time order. Waits for the device.

        The same array until there are other steps.
        """
        if self.pending:
            counts, means, grads = (_numbers(column) for column in zip(*self.pending, strict=True))
            self.pending.clear()
            found = np.empty((3, len(counts)))
            for k, (n, mean, grad) in enumerate(zip(map(int, counts), means, grads, strict=True)):
                step = Moments(n, 1, mean, grad)  # type: ignore[arg-type]
                found[:, k] = n, step.tr_sigma, step.true_grad_sq_norm
            self._columns = np.concatenate([self._columns, found], axis=1)[:, -HISTORY:]
        return self._columns

    def state_dict(self) -> dict[str, Any]:
        """Its columns, as plain numbers."""
        counts, tr_sigma, true_grad = self.read()
        return {
            "num_samples": [int(n) for n in counts],
            "tr_sigma": tr_sigma.tolist(),
            "true_grad_sq_norm": true_grad.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.pending.clear()
        columns = [state[key] for key in ("num_samples", "tr_sigma", "true_grad_sq_norm")]
        self._columns = np.array(columns, np.float64)


def _numbers(column: Sequence[float | Tensor]) -> list[float]:
    """Of numbers and of 0-d tensors, which are read all at once."""
    waiting = [value for value in column if isinstance(value, Tensor)]
    arrived = iter(torch.stack(waiting).tolist() if waiting else ())
    return [next(arrived) if isinstance(value, Tensor) else value for value in column]
