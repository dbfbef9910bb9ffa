"""A dataset of the numbers below n, and those that a step takes."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset


def numbers(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(n))


def taken(step) -> list[int]:
    return [int(i) for (batch,), _ in step for i in batch]
