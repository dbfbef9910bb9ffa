"""Long series made short enough to draw and to keep in a page, without losing what they show."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["POINTS", "envelope", "kept_indices", "smoothed", "thinned"]

POINTS = 300  # of a line: more than a picture of this size can show apart

Array = NDArray[np.float64]


def kept_indices(length: int, most: int = POINTS) -> NDArray[np.intp]:
    """(≤ most,) positions spread evenly over `length`, the first and the last among them."""
    if length <= most:
        return np.arange(length)
    return np.unique(np.linspace(0, length - 1, most).round().astype(np.intp))


def envelope(x: Array, y: Array, most: int = POINTS) -> tuple[Array, Array, Array]:
    """x, lowest and highest y of (n,) points in `most` stretches; each point itself where they are few."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    parts = np.array_split(np.arange(len(x)), min(most, len(x)) or 1)
    parts = [part for part in parts if len(part)]
    if not parts:
        return x, y, y
    middle = np.array([x[part].mean() for part in parts])
    return middle, np.array([y[p].min() for p in parts]), np.array([y[p].max() for p in parts])


def smoothed(y: Array, reach: int) -> Array:
    """(n,) the mean of the known entries at most `reach` places away, before or after; NaN stays NaN.

    It does not lag, and at the ends it looks to one side.
    """
    known = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(y))
    first, end = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(y))
    mean: Array = np.full(len(y), np.nan)
    mean[known] = ((sums[end] - sums[first]) / np.maximum(counts[end] - counts[first], 1))[known]
    return mean


def thinned(value: Any, most: int) -> tuple[Any, int]:
    """The same nest with no list longer than `most`, and how many entries were left out of all lists."""
    if isinstance(value, dict):
        parts = {key: thinned(part, most) for key, part in value.items()}
        return {k: part for k, (part, _) in parts.items()}, sum(n for _, n in parts.values())
    if isinstance(value, (list, tuple)):
        kept = [thinned(value[i], most) for i in kept_indices(len(value), most)]
        left_out = len(value) - len(kept)
        return [part for part, _ in kept], left_out + sum(n for _, n in kept)
    return value, 0
