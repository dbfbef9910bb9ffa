"""Linear regression at a fixed distance from its solution: gradients whose noise is known exactly.

y = xᵀw* + ε with x ~ N(0, diag(h)), ε ~ N(0, σ²), at w = w* + δ under the loss (xᵀw − y)²: a sample's
gradient is g = 2x(xᵀδ − ε), so G = 2hδ and, with q = Σ h δ² + σ², Σ = 4(diag(h q) + (hδ)(hδ)ᵀ); the Hessian
is 2 diag(h). From the sums of such gradients over parts of a step's samples, every way to see the noise gets
the numbers that it takes from a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gradstats.geometry import adam_moments, sign_moments
from gradstats.momentum import MomentumStep, momentum_grad_sq_norm
from gradstats.parts import estimate
from gradstats.stats import Moments

Array = np.ndarray[Any, Any]
PARTS = 8  # of a step
CHUNK = 2**23  # numbers drawn at a time


class Sums(NamedTuple):
    """Of K steps of B samples: mean gradients of equal parts (K, 8, d), mean squares (K, d); float64."""

    samples: int
    parts: Tensor
    squares: Tensor

    @property
    def mean(self) -> Tensor:
        """(K, d): the gradient of each step."""
        return self.parts.mean(1)

    @property
    def var(self) -> Tensor:
        """(K, d): unbiased, between the samples of each step."""
        return (self.squares - self.mean**2) * (self.samples / (self.samples - 1))


@dataclass(frozen=True)
class Regression:
    """`curvature` h and `delta` δ, (d,) each, and the standard deviation `sigma` of the targets' noise.

    `normal`: not of the regression's gradients, but of normal ones with the same mean and variances.
    """

    curvature: Tensor
    delta: Tensor
    sigma: float
    normal: bool = False

    @classmethod
    def with_noise_scale(cls, dim: int, noise_scale: float, normal: bool = False) -> Regression:
        """h = 1, |δ| = 1, unequal entries: B_noise = d + 1 + d·σ²."""
        delta = torch.linspace(0.8, 1.2, dim)
        sigma = ((noise_scale - dim - 1) / dim) ** 0.5
        return cls(torch.ones(dim), delta / delta.norm(), sigma, normal)

    @property
    def grad(self) -> Tensor:
        """G, (d,)."""
        return 2 * self.curvature.double() * self.delta.double()

    @property
    def var(self) -> Tensor:
        """The diagonal of Σ, (d,)."""
        h, delta = self.curvature.double(), self.delta.double()
        return 4 * (h * ((h * delta**2).sum() + self.sigma**2) + (h * delta) ** 2)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs (*shape, d) and noise of the targets, (*shape), float32."""
        x = torch.randn(*shape, len(self.delta), generator=generator)
        return x * self.curvature.sqrt(), self.sigma * torch.randn(*shape, generator=generator)

    def gradients(self, x: Tensor, noise: Tensor, distance: Tensor | float = 1.0) -> Tensor:
        """(..., d), at `distance` times δ from the solution."""
        return x * (2 * (distance * (x @ self.delta) - noise))[..., None]

    def sums(
        self, samples: int, steps: int, generator: torch.Generator, distance: Tensor | None = None
    ) -> Sums:
        """Of steps drawn afresh, each at its own `distance` (K,) where they are given."""
        dim = len(self.delta)
        at_a_time = max(1, CHUNK // (samples * dim))
        parts, squares = [], []
        for begin in range(0, steps, at_a_time):
            size = min(at_a_time, steps - begin)
            x, noise = self.draw((size, samples), generator)
            if self.normal:
                grads = self.grad.float() + self.var.sqrt().float() * x
            else:
                far = 1.0 if distance is None else distance[begin : begin + size, None]
                grads = self.gradients(x, noise, far)
            parts.append(grads.view(size, PARTS, samples // PARTS, dim).mean(2).double())
            squares.append(grads.square_().mean(1).double())
        return Sums(samples, torch.cat(parts), torch.cat(squares))


class ScaleNorm(nn.Module):
    """What is left of a normalisation layer where its input is normalised already."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Halves(nn.Module):
    """xᵀw at w = `weight`, the first half of w in a normalisation layer and the rest in a linear one."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.half = len(weight) // 2
        self.norm = ScaleNorm(self.half)
        self.linear = nn.Linear(len(weight) - self.half, 1, bias=False)
        with torch.no_grad():
            self.norm.weight.copy_(weight[: self.half])
            self.linear.weight[0].copy_(weight[self.half :])

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x[..., : self.half], x[..., self.half :]
        out: Tensor = self.norm(first).sum(-1) + self.linear(rest)[..., 0]
        return out


def exact(sums: Sums, entries: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """(tr Σ, |G|²) of each step, (K,), from every sample; of some `entries` of the gradient."""
    squares = sums.squares[:, entries].sum(1), sums.mean[:, entries].square().sum(1)
    moments = Moments(sums.samples, 1, *squares)
    return moments.tr_sigma, moments.true_grad_sq_norm


def parted(sums: Sums, eighths: tuple[int, ...], by_samples: bool) -> tuple[Tensor, Tensor]:
    """(tr Σ, |G|²) of each step, (K,), from parts of so many eighths of the samples."""
    means = torch.stack([part.mean(1) for part in sums.parts.split(eighths, 1)], 1)
    count = torch.tensor(eighths, dtype=torch.float64) * (sums.samples / PARTS)
    share = count / count.sum() if by_samples else torch.full_like(count, 1 / len(count))
    added = share[:, None] * means
    return estimate(count, added.square().sum(-1), added.sum(1).square().sum(-1), by_samples)


Column = Callable[[Sums], tuple[Tensor, Tensor]]


class Way(NamedTuple):
    """One to see the noise: `column` gives each step's (tr Σ, |G|²), of which `truth` is known."""

    column: Column
    truth: tuple[float, float]


def ways(fixture: Regression) -> dict[str, Way]:
    """Those that need one step at a time, by name."""
    var, grad = fixture.var, fixture.grad
    first = slice(len(grad) // 2)
    plain = float(var.sum()), float(grad.square().sum())
    weight = torch.linspace(0.2, 3.0, len(var), dtype=torch.float64)  # an Adam's 1/√v̂
    signs = torch.ones_like(grad)
    signs[::5] = -1  # of a momentum that has some of them wrong

    def in_geometry(moments: Callable[..., Any], state: Tensor) -> Column:
        def column(sums: Sums) -> tuple[Tensor, Tensor]:
            of_step = torch.vmap(lambda g, v: moments(g, v, state, sums.samples))
            found: tuple[Tensor, Tensor] = of_step(sums.mean, sums.var)
            return found

        return column

    def parts(*eighths: int, by_samples: bool = True) -> Way:
        return Way(lambda sums: parted(sums, eighths, by_samples), plain)

    return {
        "per_sample": Way(exact, plain),
        "one layer": Way(
            lambda sums: exact(sums, first),
            (float(var[first].sum()), float(grad[first].square().sum())),
        ),
        "micro_batch, 2": parts(4, 4),
        "micro_batch, 8": parts(*[1] * 8),
        "micro_batch, unequal (samples alike)": parts(2, 6),
        "ranks, 4": parts(*[2] * 4, by_samples=False),
        "ranks, unequal (ranks alike)": parts(2, 6, by_samples=False),
        'geometry="adam"': Way(
            in_geometry(adam_moments, weight),
            (float((weight * var).sum()), float((weight * grad**2).sum())),
        ),
        'geometry="sign"': Way(
            in_geometry(sign_moments, signs),
            (float(var.sqrt().sum()), float((signs * grad).sum())),
        ),
    }


def buffered(means: Tensor, traces: Tensor, samples: int, decay: float) -> Array:
    """|G|² by a momentum buffer, (R, K), of R runs whose mean gradients are (R, K, d)."""
    squares = means.square().sum(-1)
    before, inner = torch.empty_like(squares), torch.empty_like(squares)
    buffer = torch.zeros_like(means[:, 0])
    for k in range(means.shape[1]):
        before[:, k], inner[:, k] = (buffer**2).sum(-1), (buffer * means[:, k]).sum(-1)
        buffer = decay * buffer + (1 - decay) * means[:, k]
    found = []
    for rows in zip(*(t.tolist() for t in (traces, squares, before, inner)), strict=True):
        steps = [
            MomentumStep(samples, tr, sq, old if k else None, product, decay, 1 - decay)
            for k, (tr, sq, old, product) in enumerate(zip(*rows, strict=True))
        ]
        found.append(momentum_grad_sq_norm(steps)[0])
    return np.array(found)
