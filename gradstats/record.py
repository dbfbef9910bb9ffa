"""From what the backward delivered to the record of a step, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradstats import backends
from gradstats.errors import BatchDimError, NoStatisticsError
from gradstats.grouping import Counted
from gradstats.ops import call
from gradstats.probes import Delivery
from gradstats.stats import Coverage, GradStats, Scaled, at_least_one

STRAYS = (
    "samples that samples(mask=...) left out contributed to its gradient, as masked tokens do that "
    "others attend to; leave out only what has no part in the loss"
)


@dataclass
class Local:
    """What this process found in a step, a row per parameter, in units of `p.grad`'s own sums."""

    num_samples: int
    sq_norm: Tensor  # (P, N) of each sample's contribution to this process's gradient
    ok: Tensor  # (P,) delivered as it should be
    grad_sq_norm: Tensor  # (P,) of p.grad, or of what this process holds of it
    trainable: tuple[bool, ...]
    lost: Tensor | None = None  # (P,) contributed to, but without a gradient
    strays: Tensor | None = None  # (P,) contributed to by samples that do not count


@dataclass
class Joined:
    """What the processes that train together found; the same on each of them. (P,) per parameter."""

    ranks: int
    num_samples: Tensor  # 0-d, of all
    sum_sq_norm: Tensor  # of all samples' contributions, each to its own process's gradient
    grad_sq_norm: Tensor
    ok: Tensor
    failed: Tensor  # 0-d, on how many step() failed
    causes: tuple[tuple[Tensor, str], ...]  # why parameters were not measured


class Group(NamedTuple):
    """What one backward() call delivered for its samples. `rows`: (P, B + 1)."""

    batch: int
    rows: Tensor
    counted: Counted | None


def group(deliveries: Sequence[Delivery], reasons: Mapping[str, str]) -> list[Group]:
    """Deliveries of one backward() call are of the same samples, and are added up."""
    if not deliveries and reasons:
        name, why = next(iter(reasons.items()))
        raise NoStatisticsError(
            "step() found nothing that was measured since the last step(). Of the parameters, "
            f"{len(reasons)} cannot be, as {name!r}: {why}. Otherwise, call it after loss.backward()."
        )
    if not deliveries:
        raise NoStatisticsError(
            "step() found no backward pass through the attached model since the last step(). "
            "Call it once per optimizer step, after loss.backward(); the forward must run with "
            "gradients enabled (not under torch.no_grad or inference_mode) and its loss must "
            "depend on a trainable parameter."
        )
    if len(deliveries) == 1:
        (only,) = deliveries
        return [Group(only.batch, only.gradient(), only.counted)]
    _mark_repeated([d for d in deliveries if d.number is not None])
    groups: dict[int, Group] = {}
    for delivery in deliveries:
        rows = delivery.gradient()
        known = groups.get(delivery.task)
        if known is None:
            groups[delivery.task] = Group(delivery.batch, rows, delivery.counted)
            continue
        if known.counted is not delivery.counted:
            raise BatchDimError(
                "one backward() went through forwards inside and outside of samples(mask=...), or of two "
                "masks. Put all of them into one block."
            )
        if known.batch != delivery.batch:
            raise BatchDimError(
                f"one backward() went through forwards of {known.batch} and of {delivery.batch} samples, "
                "so it is not known which gradients belong to the same sample. Call backward() for "
                "each forward, or pass the samples through the model together."
            )
        groups[delivery.task] = known._replace(rows=known.rows + rows)
    return list(groups.values())


def _mark_repeated(deliveries: Sequence[Delivery]) -> None:
    """Count a second backward through one forward as what it is: of no sample alone."""
    if len(deliveries) > 1:
        numbers = torch.stack([d.number for d in deliveries])  # type: ignore[misc]
        again = (numbers[:, None] == numbers).triu(1).any(0)
        for delivery, twice in zip(deliveries, again, strict=True):
            delivery.gradient()[:, -1] += 2 * twice


def gather(
    names: tuple[str, ...],
    params: Sequence[Tensor],
    groups: Sequence[Group],
    reasons: Mapping[str, str],
    absent: Sequence[bool] | None = None,
) -> Local:
    """This process's part. `names` and `params` are all parameters in row order.

    `absent`: the parameters that got nothing from this process (default: those without gradient).
    """
    strays = None
    if any(g.counted is not None for g in groups):
        groups, strays = _leave_out(groups)
    if len(groups) == 1:
        rows = groups[0].rows
        delivered, ok = rows[:, :-1], rows[:, -1] == 1
    else:
        delivered = torch.cat([g.rows[:, :-1] for g in groups], 1)
        counts = torch.stack([g.rows[:, -1] for g in groups], 1)
        ok = (counts <= 1).all(1) & (counts.sum(1) >= 1)
    trainable = tuple([p.requires_grad for p in params])
    received = tuple([p.requires_grad and p.grad is not None for p in params])
    present = received if absent is None else tuple([not yes for yes in absent])
    if not all(present):  # no gradient, no contribution: measured, as zero
        ok = ok | ~flags_on(present, delivered.device)
    lost = None
    if present is not received:
        without = tuple([a and not b for a, b in zip(present, received, strict=True)])
        if any(without):
            lost = flags_on(without, delivered.device)
            ok = ok & ~lost
    if strays is not None:
        ok = ok & ~strays
    if reasons:
        ok = ok & ~flags_on(tuple(name in reasons for name in names), delivered.device)
    grad_sq = _grad_sq_norms(params, received, delivered)
    return Local(sum(g.batch for g in groups), delivered, ok, grad_sq, trainable, lost, strays)


def at_once(
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    params: Sequence[Tensor],
    groups: Sequence[Group],
    summed_loss: bool,
    per_layer: bool,
    m2: Mapping[str, Tensor],
    shortcuts: object | None = None,
) -> GradStats | None:
    """What `gather` and `build` make of an ordinary step of one process, in one call of the extension.

    None where the step has something special, or there is no extension for it. `shortcuts` know of
    gradients that were squared as the backward made them.
    """
    n, rows, counted = groups[0]
    native = backends.compiled("step_sums")
    if native is None or len(groups) > 1 or counted is not None:
        return None
    square = 1.0 if summed_loss else float(n) ** 2
    grad_square = 1 / at_least_one(n) ** 2 if summed_loss else 1.0
    sums = native(rows, params, sizes, square, grad_square, shortcuts)
    if sums is None:
        return None
    sq_norm, ok, grad_sq, total, mean, grad_total = sums
    return GradStats(
        n, 1, mean, grad_total, total, Coverage(names, sizes, ok, {}, ()),
        Scaled(m2, square / (n - 1)) if m2 and n > 1 else {},
        sq_norm if per_layer else None, grad_sq if per_layer else None,
    )  # fmt: skip


def _leave_out(groups: Sequence[Group]) -> tuple[list[Group], Tensor]:
    """The groups of the samples that count, and (P,) which parameters others contributed to."""
    kept, strays = [], torch.zeros_like(groups[0].rows[:, 0], dtype=torch.bool)
    for g in groups:
        if g.counted is not None:
            strays = strays | (g.rows.index_select(1, g.counted.outside) != 0).any(1)
            inside = torch.cat((g.counted.inside, g.counted.inside.new_full((1,), g.batch)))
            g = Group(len(g.counted.inside), g.rows.index_select(1, inside), None)
        kept.append(g)
    return kept, strays


def build(
    names: tuple[str, ...],
    params: Sequence[Tensor],
    local: Local,
    joined: Joined | None,
    reasons: Mapping[str, str],
    summed_loss: bool,
    per_layer: bool,
    m2: Mapping[str, Tensor],
    loss_scale: Tensor | None = None,
) -> GradStats:
    """The record. `m2`: Σ(c_i − c̄)² by name, of all processes, in the units of `local`.

    `loss_scale`: 0-d, what every contribution and `p.grad` was multiplied by.
    """
    n: Any = local.num_samples if joined is None else joined.num_samples
    ok, grad_sq = (
        (local.ok, local.grad_sq_norm) if joined is None else (joined.ok, joined.grad_sq_norm)
    )
    ranks = 1 if joined is None else joined.ranks
    # A process's gradient is divided by their number: g_i = unit · contribution, Ḡ = mean · p.grad.
    unit = 1.0 if summed_loss else n / ranks
    square: Any = unit**2
    if loss_scale is not None:
        square = square / loss_scale**2
        grad_sq = grad_sq / loss_scale**2
    sq_norm = local.sq_norm * square
    if summed_loss:
        grad_sq = grad_sq * (ranks / at_least_one(n)) ** 2
    counted = (ok / ok.any()).to(sq_norm.dtype)  # nothing measured: 0/0, and every total is NaN
    total = torch.mv(sq_norm.t(), counted)
    if joined is None:
        means, mean = None, total.mean() if len(total) else total.sum()
    else:
        means = (joined.sum_sq_norm * (square / at_least_one(n))).to(sq_norm.dtype)
        mean = torch.dot(means, counted)
    grad_total = torch.dot(grad_sq, counted)
    causes = () if joined is None else joined.causes
    if local.strays is not None:
        causes = ((local.strays, STRAYS), *causes)
    if not all(local.trainable):
        indices = tuple([i for i, yes in enumerate(local.trainable) if yes])
        part = indices_on(indices, sq_norm.device)
        sq_norm, grad_sq, ok = sq_norm[part], grad_sq[part], ok[part]
        means = None if means is None else means[part]
        causes = tuple([(mask[part], text) for mask, text in causes])
    known, sizes = _trainable(names, local.trainable, tuple([p.numel() for p in params]))
    free = n - 1 if isinstance(n, int) else torch.where(n > 1, n - 1, torch.nan)
    return GradStats(
        samples=n,
        num_groups=1,
        mean_sq_norm=mean,
        grad_sq_norm=grad_total,
        per_sample_sq_norm=total,
        coverage=Coverage(known, sizes, ok, reasons, tuple(causes)),
        grad_var=Scaled(m2, square / free) if m2 and not (isinstance(n, int) and n < 2) else {},
        layer_sq_norm=sq_norm if per_layer else None,
        layer_grad_sq_norm=grad_sq if per_layer else None,
        layer_mean_sq_norm=means if per_layer else None,
    )


@lru_cache(maxsize=64)
def _trainable(
    names: tuple[str, ...], trainable: tuple[bool, ...], sizes: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return (
        tuple(n for n, yes in zip(names, trainable, strict=True) if yes),
        tuple(n for n, yes in zip(sizes, trainable, strict=True) if yes),
    )


# Kept, because a copy to the device waits for it. Functions of their own: (0, 1) == (False, True) as a key.
@lru_cache(maxsize=64)
def indices_on(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """(n,) int64."""
    return torch.tensor(indices, dtype=torch.long, device=device)


@lru_cache(maxsize=64)
def flags_on(flags: tuple[bool, ...], device: torch.device) -> Tensor:
    """(n,) bool."""
    return torch.tensor(flags, device=device)


@lru_cache(maxsize=64)
def numbers_on(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """In float64."""
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _grad_sq_norms(params: Sequence[Tensor], received: Sequence[bool], like: Tensor) -> Tensor:
    grads = [p.grad for p, yes in zip(params, received, strict=True) if yes]
    if not grads:
        return like.new_zeros(len(params))
    norms = call.multi_sq_norm([held(g) for g in grads]).to(like.dtype)
    if all(received):
        return norms  # type: ignore[no-any-return]
    where = indices_on(tuple(i for i, yes in enumerate(received) if yes), like.device)
    return like.new_zeros(len(params)).index_copy(0, where, norms)


def held(grad: Any) -> Tensor:
    """The gradient as a plain tensor; of a sharded one, this process's shard."""
    if type(grad) is not Tensor and hasattr(grad, "to_local"):
        return grad.to_local()  # type: ignore[no-any-return]
    return grad.to_dense() if grad.is_sparse else grad  # type: ignore[no-any-return]
