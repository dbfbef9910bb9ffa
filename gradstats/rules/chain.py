"""Several uses of one parameter inside a compiled graph, which cannot hold `joint.Joint`.

Every use is linear in the parameter W: y_u = L_u(W). So with G_v the gradient through a later use v,
⟨G_u, G_v⟩ = ⟨g_u, L_u(G_v)⟩, and L_u(G_v) has the shape of y_u. A use gives out zeros of that shape,
its slot; each later use takes the slot and returns L_u(G_v) as its gradient. What arrives is the sum
over all later uses, and a product with g_u gives this use's inner products with them. The state is in
the graph alone, and no gradient of a sample is ever formed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradstats.reference import stats_dtype

# What a use does with W (R rows, C columns), and what is known of it in the forward.
PRODUCT = "x Wᵀ"  # x (B, T, C)
FLIPPED = "x W"  # x (B, T, R)
LOOKUP = "W[ids]"  # ids (B, T), -1 for no row
SHIFT = "W once per position"  # nothing; W is a vector


class Past(NamedTuple):
    """An earlier use: its slot, of the shape of its output, and what it was a function of."""

    kind: str
    slot: Tensor
    known: Tensor


class Chain:
    """The uses of one parameter so far, while a graph is traced."""

    def __init__(self, rows: int) -> None:
        self.rows = rows  # R
        self.uses = 0
        self.past: tuple[Past, ...] = ()

    def link(self, out: Tensor, row: Tensor, kind: str, known: Tensor, batch_dim: int) -> Any:
        """`out`, once this use's inner products with all others are seen to. `known` as in the kinds."""
        kinds = tuple(p.kind for p in self.past)
        flat = [t for p in self.past for t in (p.slot, p.known)]
        known = known.detach()
        out, slot = Link.apply(out, row, known, (kind, batch_dim, self.rows, kinds), *flat)
        self.past = (*self.past, Past(kind, slot, known))
        return out


class Link(torch.autograd.Function):
    """The identity of `out`, and zeros for later uses; see the module's text."""

    @staticmethod
    def forward(ctx, out, row, known, about, *past):  # type: ignore[no-untyped-def]
        ctx.about = about
        ctx.save_for_backward(known, *past[1::2])
        batch, positions, width = three(out, about[1]).shape
        shape = (batch, width) if about[0] == SHIFT else (batch, positions, width)
        return out.clone(), out.new_zeros(shape, dtype=stats_dtype(out.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, slot):  # type: ignore[no-untyped-def]
        kind, batch_dim, rows, kinds = ctx.about
        known, *theirs = ctx.saved_tensors
        each = three(g, batch_dim).to(slot.dtype)
        if kind == SHIFT:
            each = each.sum(1)
        cross = 2 * (each * slot).flatten(1).sum(1)
        row = torch.cat((cross, cross.new_zeros(1)))
        back = []
        for their_kind, their in zip(kinds, theirs, strict=True):
            back += [_reached(kind, known, each, their_kind, their, rows), None]
        return g, row, None, None, *back


class Floor(torch.autograd.Function):
    """A row whose gradient is at least zero: uses that cancel leave rounding, of either sign."""

    @staticmethod
    def forward(ctx, row):  # type: ignore[no-untyped-def]
        return row.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g.clamp_min(0)


def _reached(kind: str, known: Tensor, g: Tensor, to: str, x: Tensor, rows: int) -> Tensor:
    """L(G): the gradient G of one use (what it knew, g) in the place of the weight of another."""
    if kind == SHIFT:
        return g
    if kind == LOOKUP:
        return _looked_up(known, g, to, x, rows)
    left, right = (g, known.to(g.dtype)) if kind == PRODUCT else (known.to(g.dtype), g)
    if to == PRODUCT:
        return x.to(g.dtype) @ right.mT @ left
    if to == FLIPPED:
        return x.to(g.dtype) @ left.mT @ right
    at = x.clamp_min(0).unsqueeze(1).expand(-1, left.shape[1], -1)
    return (left.gather(2, at) * (x >= 0).unsqueeze(1)).mT @ right


def _looked_up(ids: Tensor, g: Tensor, to: str, x: Tensor, rows: int) -> Tensor:
    """The same for G = Σ_t onehot(id_t) g_tᵀ."""
    if to == LOOKUP:
        same = (x.unsqueeze(2) == ids.unsqueeze(1)) & (x >= 0).unsqueeze(2)
        return same.to(g.dtype) @ g
    at = ids.clamp_min(0).unsqueeze(1).expand(-1, x.shape[1], -1)
    kept = (ids >= 0).unsqueeze(1)
    if to == FLIPPED:
        return (x.to(g.dtype).gather(2, at) * kept) @ g
    zeros = g.new_zeros(x.shape[0], x.shape[1], rows)
    return zeros.scatter_add(2, at, x.to(g.dtype) @ g.mT * kept)


def three(t: Tensor, batch_dim: int) -> Tensor:
    """(B, T, features) from any rank."""
    if batch_dim != 0:
        t = t.movedim(batch_dim, 0)
    return t.unsqueeze(1) if t.dim() == 2 else t.flatten(1, -2)
