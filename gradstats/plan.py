"""How the samples of an epoch are dealt out: rows of micro-batches, one for each rank. Numbers only.

A row holds at most ``micro_batch_size × world_size`` samples, and at least one for every rank, so that
no rank runs out of micro-batches before another and collectives always meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray

__all__ = ["epoch_order", "row_sizes", "rows", "share"]


def epoch_order(samples: int, seed: int | None, epoch: int) -> NDArray[np.int64]:
    """(samples,) the order of an epoch, drawn from `seed` and its number; as they are without a seed."""
    order = np.arange(samples)
    if seed is not None:
        np.random.default_rng((seed, epoch)).shuffle(order)
    return order


def row_sizes(
    samples: int, micro_batch_size: int, world_size: int, *, full: bool = False
) -> Iterator[int]:
    """Sizes of the rows that `samples` samples make, in order.

    They add up to `samples`, but for what cannot make a row: fewer samples than ranks, or with `full`
    (rows of one size only) fewer than a row. Where the last row would hold fewer samples than there are
    ranks, it takes some of the row before; with a micro-batch size of 1, that row takes them instead.
    """
    size = micro_batch_size * world_size
    if full:
        return repeat(size, samples // size)
    number = min(-(-samples // size), samples // world_size)
    if number == 0:
        return iter(())
    last = samples - size * (number - 1)
    if last >= world_size:
        return chain(repeat(size, number - 1), [last])
    return chain(repeat(size, number - 2), [size + last - world_size, world_size])


def share(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first, end) of one rank's samples in a row of `size`: they differ by one sample at most."""
    each, more = divmod(size, world_size)
    first = rank * each + min(rank, more)
    return first, first + each + (rank < more)


def rows(
    start: int,
    end: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    *,
    full: bool = False,
) -> Iterator[tuple[int, int]]:
    """(first, end) positions of one rank's micro-batch in each row of the positions start to end."""
    for size in row_sizes(end - start, micro_batch_size, world_size, full=full):
        first, last = share(size, rank, world_size)
        yield start + first, start + last
        start += size
