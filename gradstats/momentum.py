"""|G|² from the optimizer's momentum buffer: an average over more samples than one step's. Numbers only.

Before step t the buffer is m = Σ_s w_s ḡ_s over the steps before, with weights that follow from its own
recursion m ← β m + c ḡ (SGD: c = 1 − dampening, 1 at first; Adam: c = 1 − β₁). For gradients of N_s
samples, W = Σ w_s and Q = Σ w_s²/N_s (for equal N and c = 1 − β, Q/W² → (1 − β)/(1 + β)/N),

    |m|²/W² − tr Σ·Q/W²      is unbiased for |G|² where G stood still over the buffer's memory
    ⟨m, ḡ_t⟩/W               is unbiased for ⟨G before, G now⟩: no samples in common, no correction

Where G turns, both fall short, and nearly alike (they see the same lags), so the one is no test of the
other. The test is against single steps, ‖ḡ‖² − tr Σ/N: noisy, but of G as it is now.
That the buffer is what it is taken for is seen in every step, from numbers that are there anyway:
|m'|² = β²|m|² + 2βc⟨m, ḡ⟩ + c²|ḡ|². Clipping, weight decay in the gradient, steps that were not
measured and other decays break it; the average then begins anew, once the old content has faded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gradstats.estimators import critical_value, mean_covariance

__all__ = ["BufferWeights", "Freshness", "MomentumStep", "compare", "momentum_grad_sq_norm"]

TOLERANCE = 1e-4  # of the recursion, against the sizes of its terms
FADED = 1e-2  # what may be left of a buffer's unknown past
# Of its final weight, from which on a buffer is an average over its memory.
FILLED = 1 - math.exp(-1)
STALE = 0.1  # a difference between buffer and single steps that matters, as a share of |G|²
BOUND = 2.0  # |G|² may be this many times the buffer's, where the buffer is to be used


class MomentumStep(NamedTuple):
    """One step, before the optimizer's: all squares are in the units of the record.

    `buffer_sq_norm`: |m|², None where there is no buffer yet; `inner`: ⟨m, ḡ⟩; `decay`, `entry`: the β
    and c that the optimizer's step is to use.
    """

    num_samples: int
    tr_sigma: float
    grad_sq_norm: float
    buffer_sq_norm: float | None
    inner: float
    decay: float
    entry: float


@dataclass
class BufferWeights:
    """What is known of a buffer: W, Q, and the share of its past that is not (`unknown`).

    `breaks`: how often it was not what its recursion makes it.
    """

    total: float = 0.0
    noise: float = 0.0
    unknown: float = 1.0
    breaks: int = 0
    last: tuple[float | None, ...] | None = None  # the MomentumStep before

    def follow(self, step: MomentumStep) -> tuple[float, float]:
        """Take in a step. Returns (|G|² by the buffer, by the inner product); NaN where not known.

        Nor in a buffer's first ``1/(1 − β)`` steps: averages of a few steps scatter most, and what they
        hold is in the later ones too.
        """
        before = None if self.last is None else MomentumStep(*self.last)  # type: ignore[arg-type]
        self.last = tuple(step)
        if step.buffer_sq_norm is None:
            self.total, self.noise, self.unknown = 0.0, 0.0, 0.0
            return math.nan, math.nan
        if before is None:
            self.total, self.noise, self.unknown = 0.0, 0.0, 1.0
        elif _follows(before, step.buffer_sq_norm):
            self.total = before.decay * self.total + before.entry
            self.noise = before.decay**2 * self.noise + before.entry**2 / before.num_samples
            self.unknown *= before.decay
        elif step.buffer_sq_norm != before.buffer_sq_norm:  # else the step was left out
            self.total, self.noise, self.unknown = 0.0, 0.0, 1.0
            self.breaks += 1
        filled = self.total * (1 - step.decay) >= FILLED * step.entry
        if self.unknown > FADED or self.total <= 0 or not filled:
            return math.nan, math.nan
        noise = self.noise / self.total**2
        own = step.buffer_sq_norm / self.total**2 - noise * step.tr_sigma
        return own, step.inner / self.total

    def to_dict(self) -> dict[str, Any]:
        """The fields, as plain numbers."""
        state = asdict(self)
        state["last"] = None if self.last is None else list(self.last)
        return state

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> BufferWeights:
        """From `to_dict()`."""
        known = {f.name: state[f.name] for f in fields(cls)}
        known["last"] = None if state["last"] is None else tuple(state["last"])
        return cls(**known)


def momentum_grad_sq_norm(steps: Iterable[MomentumStep]) -> tuple[list[float], list[float]]:
    """|G|² of each step of a run from its beginning, by the buffer and by the inner product."""
    weights = BufferWeights()
    found = [weights.follow(step) for step in steps]
    return [own for own, _ in found], [cross for _, cross in found]


@dataclass(frozen=True)
class Freshness:
    """What single steps say of a buffer's |G|².

    `stale`: it is off by more than a tenth, and by more than chance allows; None where it cannot be told.
    `bound`: |G|² is at most so many times what the buffer gives, as far as single steps can tell.
    """

    stale: bool | None
    bound: float


def compare(
    own: ArrayLike, single: ArrayLike, *, half_life: float, confidence: float = 0.9
) -> Freshness:
    """The buffer's |G|² against that of single steps, (K,) each, of the same steps in time order.

    It cannot be told where single steps leave room for twice what the buffer gives, or in fewer than 12.
    """
    pairs = np.stack([np.asarray(own, float), np.asarray(single, float)], axis=1)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if not len(pairs):
        return Freshness(None, math.inf)
    weights = np.exp2(-np.arange(len(pairs), dtype=float)[::-1] / half_life)
    weights /= weights.sum()
    gap = np.stack([pairs[:, 1] - pairs[:, 0]] * 2, axis=1)
    size = max(float(np.abs(gap).max()), np.finfo(float).tiny)
    covariance, freedom = mean_covariance(gap / size, weights)
    level, mean = float(weights @ pairs[:, 0]), float(weights @ gap[:, 0])
    if not freedom or level <= 0:
        return Freshness(None, math.inf)
    reach = critical_value(freedom, confidence) * size * math.sqrt(covariance[0, 0])
    bound = 1 + (mean + reach) / level
    if abs(mean) > max(STALE * level, reach):
        return Freshness(True, bound)
    return Freshness(False if bound <= BOUND else None, bound)


def _follows(before: MomentumStep, now: float) -> bool:
    """Whether the buffer's norm is what the step before must have made it."""
    if before.buffer_sq_norm is None:
        expected = before.entry**2 * before.grad_sq_norm
        scale = expected
    else:
        decay, entry = before.decay, before.entry
        old, new = before.buffer_sq_norm, before.grad_sq_norm
        expected = decay**2 * old + 2 * decay * entry * before.inner + entry**2 * new
        scale = (decay * math.sqrt(max(old, 0.0)) + entry * math.sqrt(max(new, 0.0))) ** 2
    return abs(now - expected) <= TOLERANCE * scale  # False for NaN
