"""Taking samples out of a batch: any nest of tuples, lists and dicts that holds tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Samples:
    """A batch of `size` samples. Tensor leaf i holds them in dimension `dims[i]`, or not at all (None)."""

    def __init__(self, batch: Any, dim: int) -> None:
        """Samples lie in dimension `dim` of the first tensor that has one; elsewhere by their number.

        Raises ValueError where no tensor has a dimension `dim`.
        """
        self.leaves, self.spec = pytree.tree_flatten(batch)
        first = next((t for t in self.leaves if isinstance(t, Tensor) and t.dim() > dim), None)
        if first is None:
            raise ValueError(f"no tensor of the batch has a dimension {dim}")
        self.size = first.shape[dim]
        self.dims = [
            sample_dim(t, dim, self.size) if isinstance(t, Tensor) else None for t in self.leaves
        ]

    @property
    def everywhere(self) -> bool:
        """Whether every tensor with a dimension holds the samples."""
        return all(
            d is not None or not isinstance(t, Tensor) or t.dim() == 0
            for t, d in zip(self.leaves, self.dims, strict=True)
        )

    def take(self, indices: Sequence[int], dtype: torch.dtype | None = None) -> Any:
        """The batch of these samples, in this order; floating tensors in `dtype`, if given."""
        taken = []
        for t, dim in zip(self.leaves, self.dims, strict=True):
            if not isinstance(t, Tensor):
                taken.append(t)
                continue
            part = t.detach()
            if dim is not None:
                part = part.index_select(dim, torch.tensor(indices, device=t.device))
            taken.append(part.to(dtype) if dtype and part.is_floating_point() else part)
        return pytree.tree_unflatten(taken, self.spec)

    def few(self, wanted: int) -> int:
        """A number of samples near `wanted` that is no other dimension's size, where there is one."""
        others = set()
        for t, dim in zip(self.leaves, self.dims, strict=True):
            if isinstance(t, Tensor):
                others |= {size for d, size in enumerate(t.shape) if d != dim}
        most = min(wanted, self.size)
        tries = [*range(most, 1, -1), *range(most + 1, min(self.size, 2 * wanted) + 1)]
        return next((k for k in tries if k not in others), most)


def sample_dim(tensor: Tensor, dim: int, size: int) -> int | None:
    """Which dimension of `tensor` holds `size` samples: `dim`, else the first, else the only one."""
    fits = [d for d, n in enumerate(tensor.shape) if n == size]
    if dim in fits:
        return dim
    if 0 in fits:
        return 0
    return fits[0] if len(fits) == 1 else None
