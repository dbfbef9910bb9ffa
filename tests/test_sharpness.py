"""Sharpness of minima whose curvature is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gradstats.errors import InvalidArgumentError, UnsupportedLayerError
from gradstats.workbench.sweep.sharpness import (
    Sharpness,
    epsilon_sharpness,
    sharpness,
    top_eigenvalue,
)
from gradstats.workbench.workload import Workload

EPSILON = 0.01


def quadratic(hessian: np.ndarray, at: np.ndarray, offset: float = 0.5):
    """offset + ½ (x − at)ᵀ H (x − at) in two parts of unlike share, and x = at, of two parameters."""
    matrix, center = torch.tensor(hessian), torch.tensor(at)
    params = [p.clone().requires_grad_() for p in center.split([2, len(at) - 2])]

    def loss():
        for factor, share in ((0.5, 0.25), (3.5 / 3, 0.75)):
            delta = torch.cat(params) - center
            yield factor * (offset + 0.5 * delta @ matrix @ delta), share

    return loss, params


def mixed(eigenvalues: list[float], seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    basis = np.linalg.qr(draw.standard_normal((len(eigenvalues),) * 2))[0]
    return basis @ np.diag(eigenvalues) @ basis.T


def corners(size: int) -> np.ndarray:
    """All of them."""
    return np.array(np.meshgrid(*[[-1.0, 1.0]] * size)).reshape(size, -1).T


def test_the_largest_eigenvalue_is_the_most_positive_one() -> None:
    values = [-90.0, -1.0, 0.0, 0.5, 2.0, 30.0, 31.0]
    loss, params = quadratic(mixed(values), np.linspace(-1, 2, 7))
    found, vector = top_eigenvalue(loss, params, tolerance=1e-9)
    assert found == pytest.approx(31.0, rel=1e-6)
    assert mixed(values) @ vector == pytest.approx(31 * vector, abs=1e-4)


def test_one_weight_is_enough() -> None:
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found, _ = top_eigenvalue(lambda: iter([((weight**2).sum() * 3, 1.0)]), [weight])
    assert found == pytest.approx(6.0)


@pytest.mark.parametrize(
    "values", [[1.0, 2.0, 3.0, 4.0, 5.0, 9.0], [0.0, 0.0, 0.0, 0.1, 1.0, 50.0]]
)
def test_epsilon_sharpness_of_a_convex_minimum_is_that_of_a_best_corner(values) -> None:
    """Which of 64 is the best no search is sure to find; a corner that no move improves comes close."""
    hessian, at = mixed(values, 3), np.array([0.0, -2.0, 1.0, 0.3, 5.0, -0.1])
    loss, params = quadratic(hessian, at)
    _, top = top_eigenvalue(loss, params)
    found = epsilon_sharpness(loss, params, EPSILON, direction=top)
    steps = corners(6) * EPSILON * (np.abs(at) + 1)
    best = 0.5 * np.einsum("ki,ij,kj->k", steps, hessian, steps).max()
    assert 0.95 < found / (100 * best / 1.5) < 1 + 1e-9
    assert torch.equal(torch.cat(params).detach(), torch.tensor(at))  # put back to the bit


def test_epsilon_sharpness_of_a_saddle_leaves_the_falling_directions_alone() -> None:
    values, at = np.array([4.0, -7.0, 2.0, -1.0]), np.array([1.0, 1.0, 0.0, 3.0])
    loss, params = quadratic(np.diag(values), at)
    bound = EPSILON * (np.abs(at) + 1)
    best = 0.5 * (np.maximum(values, 0) * bound**2).sum()
    assert epsilon_sharpness(loss, params, EPSILON) == pytest.approx(100 * best / 1.5, rel=1e-5)


def test_epsilon_sharpness_in_a_subspace() -> None:
    """Of one dimension: the ends of the interval along that column, by the definition."""
    hessian, at = mixed([1.0, 2.0, 3.0, 4.0]), np.array([1.0, -1.0, 2.0, 0.0])
    loss, params = quadratic(hessian, at)
    found = epsilon_sharpness(loss, params, EPSILON, subspace=1, seed=5)
    column = np.random.default_rng(5).standard_normal((4, 1))
    column /= np.linalg.norm(column)
    end = EPSILON * (abs((np.linalg.pinv(column) @ at).item()) + 1) * column[:, 0]
    assert found == pytest.approx(100 * 0.5 * end @ hessian @ end / 1.5, rel=1e-6)


def test_a_workload_is_left_as_it_was_and_measured_on_its_data() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 5)
    model = nn.Linear(5, 1)
    made = Workload(model, nn.MSELoss(), (x, x.sum(1, keepdim=True)))
    before = [p.detach().clone() for p in model.parameters()]
    found = sharpness(made, Sharpness(subspace=2))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    ones = torch.cat([x, torch.ones(300, 1)], 1).double()
    exact = torch.linalg.eigvalsh(2 * ones.T @ ones / 300)[-1].item()
    assert found["top_eigenvalue"] == pytest.approx(exact, rel=1e-3)
    assert found["full"] > found["subspace"] > 0


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


def test_a_backward_that_cannot_be_differentiated_is_refused() -> None:
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(
        UnsupportedLayerError, match=r"cannot be differentiated|differentiable once"
    ):
        top_eigenvalue(lambda: iter([((Opaque.apply(weight) ** 2).sum(), 1.0)]), [weight])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"subspace": 0}, "subspace=0"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_what_is_out_of_range_is_refused(more, message) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Sharpness(**more)
