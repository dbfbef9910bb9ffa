"""Rows of a flattened input, and the samples that they belong to."""

from __future__ import annotations

import torch
from torch import Tensor

from gradstats.errors import BatchDimError


class Grouping:
    """Which of `batch` samples each row is of; brings rows to (batch, longest, …) and back.

    A sample with fewer rows than the longest is filled up with copies of some row, which nothing
    reads: their gradients are zero, so they add nothing to any statistic.
    """

    def __init__(self, ids: Tensor, batch: int) -> None:
        """`ids`: (rows,) whole numbers from 0 to `batch` − 1, in any order. Waits for the device.

        Raises BatchDimError for any others.
        """
        if ids.dim() != 1 or ids.is_floating_point():
            raise BatchDimError(
                f"sample ids are one whole number for each row, not {ids.dtype} of shape "
                f"{tuple(ids.shape)}. Give samples(ids=) a vector like [0, 0, 1, 1, 1]."
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < batch:
            raise BatchDimError(
                f"sample ids from {int(ids.min())} to {int(ids.max())} do not fit {batch} samples: "
                "they count from 0. Leave out rows of no sample, or pass num_samples=."
            )
        ids = ids.long()
        self.rows, self.batch = ids.shape[0], batch
        counts = torch.bincount(ids, minlength=batch)
        order = torch.argsort(ids, stable=True)
        begins = counts.cumsum(0) - counts
        slots = torch.empty_like(ids)
        slots[order] = torch.arange(self.rows, device=ids.device) - begins[ids[order]]
        longest = int(counts.max()) if batch else 0
        self._place = ids * longest + slots  # of each row among the samples' rows
        self._source = torch.zeros(batch * longest, dtype=torch.long, device=ids.device)
        self._source[self._place] = torch.arange(self.rows, device=ids.device)
        self._shape = (batch, longest)

    def gather(self, rows: Tensor) -> Tensor:
        """(rows, …) to (batch, longest, …)."""
        return rows.index_select(0, self._source).view(*self._shape, *rows.shape[1:])

    def scatter(self, samples: Tensor) -> Tensor:
        """(batch, longest, …) back to (rows, …)."""
        return samples.flatten(0, 1).index_select(0, self._place)


class Counted:
    """The samples of a forward that count. Those left out must add nothing to any gradient."""

    def __init__(self, mask: Tensor) -> None:
        """`mask`: booleans, an entry for each sample. Waits for the device."""
        self.size = mask.numel()
        self.inside = mask.flatten().nonzero().flatten()
        self.outside = (~mask).flatten().nonzero().flatten()


class Packed:
    """Rows that are (1, rows, …), whose samples `groups` tells."""

    def __init__(self, groups: Grouping) -> None:
        self._groups = groups

    def gather(self, rows: Tensor) -> Tensor:
        """(1, rows, …) to (batch, longest, …)."""
        return self._groups.gather(rows.squeeze(0))

    def scatter(self, samples: Tensor) -> Tensor:
        """(batch, longest, …) back to (1, rows, …)."""
        return self._groups.scatter(samples).unsqueeze(0)


class Flattened:
    """Rows that are (B·T, …), or (T·B, …), as many of every sample."""

    def __init__(self, batch: int, samples_first: bool) -> None:
        self._batch, self._samples_first = batch, samples_first

    def gather(self, rows: Tensor) -> Tensor:
        """(rows, …) to (B, T, …)."""
        rest = rows.shape[1:]
        if self._samples_first:
            return rows.reshape(self._batch, -1, *rest)
        return rows.reshape(-1, self._batch, *rest).transpose(0, 1)

    def scatter(self, samples: Tensor) -> Tensor:
        """(B, T, …) back to (rows, …)."""
        return (samples if self._samples_first else samples.transpose(0, 1)).flatten(0, 1)
