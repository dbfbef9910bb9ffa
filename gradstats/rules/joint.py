"""Several uses of one parameter in a forward pass: their gradients have inner products.

|Σ_u G_u|² = Σ_u |G_u|² + 2 Σ_{u<v} ⟨G_u, G_v⟩, per sample, with every inner product taken from the
uses' own factors: no gradient of a sample is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradstats.ops import call
from gradstats.probes import row_gradient
from gradstats.reference import stats_dtype

CHUNK_BYTES = 2**24  # of inner products of positions at a time


class Product(NamedTuple):
    """G = Σ_t left_t right_tᵀ: left (B, T, rows of the weight), right (B, T, columns)."""

    left: Tensor
    right: Tensor


class Lookup(NamedTuple):
    """G = Σ_t onehot(id_t) g_tᵀ: ids (B, T), -1 for no row; g (B, T, columns)."""

    ids: Tensor
    g: Tensor


class Total(NamedTuple):
    """G itself: (B, entries)."""

    each: Tensor


Factors = Product | Lookup | Total


class Joint:
    """The uses of one parameter in one pass, and what their backwards left for each other."""

    def __init__(self) -> None:
        self.uses = 0
        self.arrived: list[tuple[int, Factors]] = []
        self.total: Tensor | None = None  # (B,): delivered so far

    def of_product(self, node: int, sq_norm: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """`row_gradient` of a use as the matrix of a product."""
        return self.row_gradient(node, sq_norm, lambda: Product(left, right))

    def of_sum(self, node: int, sq_norm: Tensor, g: Tensor) -> Tensor:
        """`row_gradient` of a use as what is added to every position: g (B, T, entries)."""
        return self.row_gradient(node, sq_norm, lambda: Total(g.sum(1, dtype=sq_norm.dtype)))

    def row_gradient(self, node: int, sq_norm: Tensor, make: Callable[[], Factors]) -> Tensor:
        """As `probes.row_gradient`, with the inner products with the uses that came before.

        `make` gives this use's factors, and is called where there are other uses. `node`, a number,
        tells the uses apart: one that comes again is counted again, and so found out.
        """
        if self.uses < 2:
            return row_gradient(sq_norm)
        if any(known == node for known, _ in self.arrived):
            self._forget()
            return row_gradient(sq_norm)
        first, factors = not self.arrived, make()
        for _, other in self.arrived:
            sq_norm = sq_norm + 2 * inner_product(factors, other).to(sq_norm.dtype)
        if self.total is not None:  # uses that cancel leave rounding, of either sign
            sq_norm = torch.maximum(sq_norm, -self.total)
        self.total = sq_norm if self.total is None else self.total + sq_norm
        # By number and without their history: the graph holds this, and must not hold itself.
        self.arrived.append((node, type(factors)(*(t.detach() for t in factors))))
        if len(self.arrived) == self.uses:
            self._forget()
        row = row_gradient(sq_norm)
        if not first:
            row[-1] = 0.0  # together they are delivered once
        return row

    def _forget(self) -> None:
        self.arrived.clear()
        self.total = None


def inner_product(a: Factors, b: Factors) -> Tensor:
    """(B,): ⟨G_a, G_b⟩ of every sample."""
    if isinstance(a, Total) and isinstance(b, Total):
        return (a.each * b.each).sum(1)
    if isinstance(a, Product) and isinstance(b, Product):
        return _pairs(a.left, b.left, a.right, b.right)
    if isinstance(a, Lookup) and isinstance(b, Lookup):
        same = (a.ids.unsqueeze(2) == b.ids.unsqueeze(1)) & (a.ids >= 0).unsqueeze(2)
        return (torch.bmm(_wide(a.g), _wide(b.g).transpose(1, 2)) * same).sum((1, 2))
    if isinstance(a, Product) and isinstance(b, Lookup):
        a, b = b, a
    assert isinstance(a, Lookup)
    assert isinstance(b, Product)
    return call.tied_cross(a.ids, a.g, b.left.to(a.g.dtype), b.right.to(a.g.dtype))  # type: ignore[no-any-return]


def _pairs(left: Tensor, left_2: Tensor, right: Tensor, right_2: Tensor) -> Tensor:
    """Σ_ts (left_t · left₂_s)(right_t · right₂_s), so many samples at a time."""
    bytes_each = 8 * left.shape[1] * left_2.shape[1]
    step = max(1, CHUNK_BYTES // max(bytes_each, 1))
    parts = [
        (torch.bmm(_wide(a), _wide(b).transpose(1, 2)) * torch.bmm(_wide(c), _wide(d).transpose(1, 2)))
        .sum((1, 2))
        for a, b, c, d in zip(*(t.split(step) for t in (left, left_2, right, right_2)), strict=True)
    ]  # fmt: skip
    return torch.cat(parts) if parts else left.new_zeros(0)


def _wide(t: Tensor) -> Tensor:
    return t.to(stats_dtype(t.dtype))
