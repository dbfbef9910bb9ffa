"""Which steps are measured."""

from __future__ import annotations

from typing import Literal

__all__ = ["Every", "measures"]

Every = int | Literal["sparse"]

DENSE = 32  # steps measured one by one, and then in each doubling of their number
SPARSEST = 64


def measures(step: int, every: Every) -> bool:
    """Whether a step, counted from 0, is measured.

    One out of `every`; or, as the noise scale moves with the logarithm of the steps, ever fewer of them:
    the first 32, and then 32 in each doubling of the number of steps, down to one out of 64.
    """
    if every == "sparse":
        return step % min(SPARSEST, 1 << max(0, (step // DENSE).bit_length() - 1)) == 0
    return step % every == 0
