"""From what the backward delivered to the record of a step, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gradstats.errors import BatchDimError
from gradstats.ops import call
from gradstats.probes import Delivery
from gradstats.stats import Coverage, GradStats, Scaled


def group(deliveries: Sequence[Delivery]) -> list[tuple[int, Tensor]]:
    """Deliveries of one backward() call are of the same samples: (batch, rows (P, B + 1)) each."""
    groups: dict[int, tuple[int, Tensor]] = {}
    for delivery in deliveries:
        rows = delivery.gradient()
        known = groups.get(delivery.task)
        if known is None:
            groups[delivery.task] = (delivery.batch, rows)
            continue
        if known[0] != delivery.batch:
            raise BatchDimError(
                f"one backward() went through forwards of {known[0]} and of {delivery.batch} samples, "
                "so it is not known which gradients belong to the same sample. Call backward() for "
                "each forward, or pass the samples through the model together."
            )
        groups[delivery.task] = (delivery.batch, known[1] + rows)
    return list(groups.values())


def build(
    names: tuple[str, ...],
    params: Sequence[Tensor],
    groups: Sequence[tuple[int, Tensor]],
    reasons: Mapping[str, str],
    summed_loss: bool,
    per_layer: bool,
    m2: Mapping[str, Tensor],
) -> GradStats:
    """The record. `names` and `params` are all parameters in row order; `m2` their Σ(c_i − c̄)²."""
    n = sum(batch for batch, _ in groups)
    unit = 1.0 if summed_loss else float(n)  # g_i = unit · c_i
    if len(groups) == 1:
        rows = groups[0][1]
        delivered, ok = rows[:, :-1], rows[:, -1] == 1
    else:
        delivered = torch.cat([r[:, :-1] for _, r in groups], 1)
        counts = torch.stack([r[:, -1] for _, r in groups], 1)
        ok = (counts <= 1).all(1) & (counts.sum(1) >= 1)
    sq_norm = delivered * unit**2
    trainable = tuple([p.requires_grad for p in params])
    received = tuple([p.requires_grad and p.grad is not None for p in params])
    if not all(received):  # no gradient, no contribution: measured, as zero
        ok = ok | ~_on_device(received, sq_norm.device)
    if reasons:
        ok = ok & ~_on_device(tuple(name in reasons for name in names), sq_norm.device)
    grad_sq = _grad_sq_norms(params, received, sq_norm)
    if unit != n:
        grad_sq = grad_sq * (unit / max(n, 1)) ** 2
    counted = ok.to(sq_norm.dtype)
    counted = counted / counted.amax()  # nothing measured: 0/0, and every total is NaN
    total = torch.mv(sq_norm.t(), counted)
    part: Any = slice(None)
    if not all(trainable):
        part = _indices(tuple([i for i, yes in enumerate(trainable) if yes]), sq_norm.device)
    known, sizes = _trainable(names, trainable, tuple([p.numel() for p in params]))
    return GradStats(
        num_samples=n,
        num_groups=1,
        mean_sq_norm=total.sum() / max(n, 1),
        grad_sq_norm=torch.dot(grad_sq, counted),
        per_sample_sq_norm=total,
        coverage=Coverage(known, sizes, ok[part], reasons),
        grad_var=Scaled(m2, unit**2 / (n - 1)) if m2 and n > 1 else {},
        layer_sq_norm=sq_norm[part] if per_layer else None,
        layer_grad_sq_norm=grad_sq[part] if per_layer else None,
    )


@lru_cache(maxsize=64)
def _trainable(
    names: tuple[str, ...], trainable: tuple[bool, ...], sizes: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return (
        tuple(n for n, yes in zip(names, trainable, strict=True) if yes),
        tuple(n for n, yes in zip(sizes, trainable, strict=True) if yes),
    )


# Kept, because a copy to the device waits for it. Two functions: (0, 1) == (False, True) as a key.
@lru_cache(maxsize=64)
def _indices(indices: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(indices, dtype=torch.long, device=device)


@lru_cache(maxsize=64)
def _on_device(flags: tuple[bool, ...], device: torch.device) -> Tensor:
    return torch.tensor(flags, device=device)


def _grad_sq_norms(params: Sequence[Tensor], received: Sequence[bool], like: Tensor) -> Tensor:
    grads = [p.grad for p, yes in zip(params, received, strict=True) if yes]
    if not grads:
        return like.new_zeros(len(params))
    norms = call.multi_sq_norm([g.to_dense() if g.is_sparse else g for g in grads]).to(like.dtype)  # type: ignore[union-attr]
    if all(received):
        return norms  # type: ignore[no-any-return]
    where = _indices(tuple(i for i, yes in enumerate(received) if yes), like.device)
    return like.new_zeros(len(params)).index_copy(0, where, norms)
