"""Losses of a model as it stands, on samples of the data and of those held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from gradstats.kept import kept
from gradstats.workbench.workload import Workload

__all__ = ["evaluating", "mean_losses", "spread_out"]

SIZE = 256  # samples of one forward, whatever the plan: the same sums for all


def mean_losses(workload: Workload, most: int, *, train: bool) -> tuple[float | None, float | None]:
    """Mean loss of the data (where `train` asks for it) and of the samples held out (where there are any).

    In eval mode, on at most `most` samples of each, always the same. Random numbers stay as they were.
    """
    put_back = kept(())
    try:
        with evaluating(workload.model), torch.no_grad():
            loss = (
                _mean(workload, workload.take, spread_out(workload.num_samples, most))
                if train
                else None
            )
            held = spread_out(workload.num_validation, most)
            return loss, _mean(workload, workload.take_validation, held) if held else None
    finally:
        put_back()


def spread_out(size: int, most: int) -> list[int]:
    """At most `most` of the numbers below `size`, evenly spread."""
    if size <= most:
        return list(range(size))
    chosen: list[int] = np.linspace(0, size - 1, most).round().astype(int).tolist()
    return chosen


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode again after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _mean(
    workload: Workload, take: Callable[[Sequence[int]], Any], indices: Sequence[int]
) -> float:
    chunks = [indices[i : i + SIZE] for i in range(0, len(indices), SIZE)]
    sums = [float(workload.loss(take(chunk))) * len(chunk) for chunk in chunks]
    return math.fsum(sums) / len(indices) if all(map(math.isfinite, sums)) else math.nan
