"""What is true of a few samples by plain autograd, one at a time; and where in the inputs they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gradstats import mixing
from gradstats.batches import Samples
from gradstats.calls import named
from gradstats.errors import InvalidArgumentError
from gradstats.trial import Trial

Reduction = Literal["mean", "sum", "weighted"]
Gradients = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Truth:
    """`count` samples out of dimension `dim`, together and alone.

    `reduction`: how the loss joins them; None where the batch's gradient is not a weighted sum of
    theirs, by a relative `gap`. `sq_norm`: (count,) squared norms of their contributions, by
    parameter. `gradient`: the batch's. `alone`: why a sample alone does not run, if so.
    """

    samples: Samples
    dim: int
    count: int
    gradient: Gradients
    reduction: Reduction | None
    gap: float
    sq_norm: Mapping[str, Tensor]
    mixing: mixing.Mixing | None
    alone: str | None


def find(trial: Trial, batch: Any, wanted: int, given: int | None) -> tuple[Truth, str | None]:
    """The truth for the dimension that holds the samples, and what else to know of that choice.

    It is the first one in which samples do not influence each other and their gradients add up to
    the batch's; one after the first must be found in every tensor of the batch. Where there is none,
    it is the first.
    """
    if given is not None:
        return look(trial, batch, given, wanted), None
    first = look(trial, batch, 0, wanted)
    if first.mixing is None and first.reduction is not None:
        return first, None
    depth = max(t.dim() for t in first.samples.leaves if isinstance(t, Tensor))
    for dim in range(1, depth):
        try:
            truth = look(trial, batch, dim, wanted)
        except InvalidArgumentError:
            continue
        if truth.samples.everywhere and truth.mixing is None and truth.reduction is not None:
            seen = first.mixing
            why = f" ({named(seen.path)} mixes those of dimension 0)" if seen else ""
            return truth, (
                f"the samples were found in dimension {dim} of the inputs{why}; if they are in "
                "dimension 0, say so with check(..., batch_dim=0)"
            )
    return first, None


def look(trial: Trial, batch: Any, dim: int, wanted: int) -> Truth:
    """The truth if dimension `dim` held the samples. Raises InvalidArgumentError where it cannot."""
    try:
        samples = Samples(batch, dim)
    except ValueError as error:
        raise InvalidArgumentError(f"{error}, so it holds no samples there") from None
    if samples.size < 2:
        raise InvalidArgumentError(
            f"the batch has {samples.size} sample{'s' * (samples.size != 1)} in dimension {dim}. check "
            "needs at least 2: a batch of one does not show how samples are joined."
        )
    count = samples.few(wanted)
    few = list(range(count))
    together = samples.take(few, trial.dtype)
    whole = trial.gradients(together)
    alone: str | None = None
    joined: tuple[Reduction | None, float, dict[str, Tensor]] = (None, 1.0, {})
    try:
        single = [trial.gradients(samples.take([i], trial.dtype)) for i in few]
    except InvalidArgumentError as error:
        alone = str(error.__cause__ or error).strip().splitlines()[0]
    else:
        joined = _join(whole, single, trial.tolerance)
    mixed = mixing.find(
        trial.fresh, trial.loss, together, samples.take([1, *few[1:]], trial.dtype), count,
        trial.tolerance,
    )  # fmt: skip
    return Truth(samples, dim, count, whole, *joined, mixed, alone)


def _join(
    whole: Gradients, single: Sequence[Gradients], tolerance: float
) -> tuple[Reduction | None, float, dict[str, Tensor]]:
    """How the samples' gradients make the batch's, by how much they do not, and Truth.sq_norm."""
    gram = torch.tensor([[_inner(a, b) for b in single] for a in single], dtype=torch.float64)
    right = torch.tensor([_inner(a, whole) for a in single], dtype=torch.float64)
    size, count = _inner(whole, whole), len(single)
    if size == 0 and not gram.any():
        raise InvalidArgumentError(
            f"every gradient is zero on the first {count} samples, so there is nothing to compare. "
            "Check with a batch on which the model learns."
        )
    if not (math.isfinite(size) and gram.isfinite().all()):
        raise InvalidArgumentError(
            f"gradients are not finite on the first {count} samples, so there is nothing to compare. "
            "Check with a batch whose loss is a number."
        )

    def gap(weights: Tensor) -> float:  # ‖whole − Σ wᵢ·singleᵢ‖, relative to the largest of them
        rest = size - 2 * weights @ right + weights @ gram @ weights
        scale = max(size, float((weights.square() * gram.diagonal()).max()), 1e-300)
        return math.sqrt(max(float(rest), 0.0) / scale)

    best = torch.linalg.pinv(gram, hermitian=True) @ right
    tries: list[tuple[Reduction, Tensor]] = [
        ("mean", torch.full((count,), 1 / count, dtype=torch.float64)),
        ("sum", torch.ones(count, dtype=torch.float64)),
        ("weighted", best),
    ]
    for reduction, weights in tries:
        if gap(weights) < tolerance:
            sq_norm = {}
            for name in whole:
                parts = [0.0 if g[name] is None else _inner({name: g[name]}, g) for g in single]
                sq_norm[name] = torch.tensor(parts, dtype=torch.float64) * weights.square()
            return reduction, gap(weights), sq_norm
    return None, gap(best), {}


def _inner(a: Gradients, b: Gradients) -> float:
    total = 0.0
    for name, x in a.items():
        y = b[name]
        if x is not None and y is not None:
            total += float((x.double() * y.double()).sum())
    return total
