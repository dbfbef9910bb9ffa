"""How sharp a minimum is: ε-sharpness in a box around it, and the largest eigenvalue of the Hessian.

Keskar et al. 2017 (arXiv:1609.04836), equations 3 and 4: with f the loss, x the n weights and A an n × p
matrix (the identity, or random),

    C_ε = {z ∈ R^p : |z_i| ≤ ε(|(A⁺x)_i| + 1)}
    φ(ε, A) = 100 · (max over z ∈ C_ε of f(x + Az) − f(x)) / (1 + f(x))

The maximum is sought by L-BFGS-B, as there, and from several starts: where the gradient vanishes, which
is what a minimum is, x itself is a stationary point of the search. A start is moved to the corner of the
box that its gradient points to for as long as the loss grows; for a convex f it never falls. What is found
is a local maximum: φ is at least that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.hessian import require_differentiable
from gradstats.kept import kept
from gradstats.workbench.sweep.evaluation import evaluating, spread_out
from gradstats.workbench.workload import Workload

__all__ = ["Box", "Sharpness", "epsilon_sharpness", "sharpness", "top_eigenvalue"]

SIZE = 256  # samples of one forward
CORNERS = 20  # moves to better corners, at most
SEARCHED = 3  # of the best places found by them, L-BFGS-B starts from

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sharpness:
    """What is asked for.

    `epsilon`: of the box; 5e-4 and 1e-3 in the paper. `subspace`: also in a random subspace of so many
    dimensions (100 in the paper). `iterations`: of L-BFGS-B from each start (10 in the paper).
    `samples`: of the data that f is the mean loss of, at most. `eigenvalue`: also the Hessian's largest.
    """

    epsilon: float = 1e-3
    subspace: int | None = None
    iterations: int = 10
    samples: int = 1024
    eigenvalue: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1 or (self.subspace is not None and self.subspace < 1):
            raise InvalidArgumentError(
                f"sharpness with epsilon={self.epsilon}, subspace={self.subspace} cannot be measured; pass "
                "an epsilon between 0 and 1, and a subspace of 1 dimension or more"
            )
        if self.iterations < 1 or self.samples < 1:
            raise InvalidArgumentError(
                f"sharpness with iterations={self.iterations}, samples={self.samples} cannot be "
                "measured; pass at least 1 of each"
            )


class Box:
    """A loss over a box of steps z around a model's weights: at x + Az, with its gradient in z.

    `matrix`: (n, p), or None for the identity. Use it as a context: the weights are put back after.
    """

    def __init__(
        self,
        loss: Callable[[], Iterator[tuple[Tensor, float]]],
        params: list[Tensor],
        epsilon: float,
        matrix: Array | None = None,
    ) -> None:
        self._loss, self._params, self._matrix = loss, params, matrix
        self.center = flat(params)
        inner = self.center if matrix is None else np.linalg.lstsq(matrix, self.center)[0]
        self.bound: Array = epsilon * (np.abs(inner) + 1)

    def __call__(self, z: Array) -> tuple[float, Array]:
        step = z if self._matrix is None else self._matrix @ z
        write(self._params, self.center + step)
        value, gradient = loss_and_gradient(self._loss, self._params)
        return value, gradient if self._matrix is None else self._matrix.T @ gradient

    def maximum(self, starts: list[Array], iterations: int) -> float:
        """The largest loss found: by moves between corners from `starts`, then by L-BFGS-B."""
        from scipy.optimize import Bounds, minimize

        def negative(z: Array) -> tuple[float, Array]:
            value, gradient = self(z)
            return -value, -gradient

        try:
            found = [self._corner(start) for start in starts]
            found.sort(key=lambda pair: -pair[1])
            best = found[0][1]
            for z, _ in found[:SEARCHED]:
                ended = minimize(
                    negative, z, jac=True, method="L-BFGS-B",
                    bounds=Bounds(-self.bound, self.bound), options={"maxiter": iterations},
                )  # fmt: skip
                best = max(best, -float(ended.fun))
        finally:
            write(self._params, self.center)
        return best

    def _corner(self, z: Array) -> tuple[Array, float]:
        value, gradient = self(z)
        for _ in range(CORNERS):
            corner = self.bound * np.sign(gradient)
            new, ahead = self(corner)
            if not new > value:
                break
            z, value, gradient = corner, new, ahead
        return z, value


def epsilon_sharpness(
    loss: Callable[[], Iterator[tuple[Tensor, float]]],
    params: list[Tensor],
    epsilon: float,
    *,
    subspace: int | None = None,
    iterations: int = 10,
    seed: int = 0,
    direction: Array | None = None,
) -> float:
    """φ(ε, A) in percent, the full space or a random one; at least 0.

    Args:
        loss: gives (mean loss of a part of the data with its graph, the part's share) for each part.
        params: float tensors, on one device; they are as before when it returns.
        subspace: dimensions p of a random A, of normal columns of length 1.
        direction: (n,), where one is known along which the loss rises; the search starts there too.
    """
    draw = np.random.default_rng(seed)
    matrix = None
    if subspace is not None:
        matrix = draw.standard_normal((sum(p.numel() for p in params), subspace))
        matrix /= np.linalg.norm(matrix, axis=0)
    box = Box(loss, params, epsilon, matrix)
    size = len(box.bound)
    starts = [np.zeros(size), *(box.bound * draw.choice([-1.0, 1.0], size) for _ in range(4))]
    if direction is not None:
        inner = direction if matrix is None else matrix.T @ direction
        starts += [box.bound * np.sign(inner), -box.bound * np.sign(inner)]
    base = loss_and_gradient(loss, params)[0]
    return 100 * max(box.maximum(starts, iterations) - base, 0.0) / (1 + base)


def top_eigenvalue(
    loss: Callable[[], Iterator[tuple[Tensor, float]]],
    params: list[Tensor],
    *,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> tuple[float, Array]:
    """The Hessian's largest eigenvalue (the most positive one) and its (n,) eigenvector.

    By Lanczos (scipy's eigsh) on Hessian-vector products from double backward.

    Raises UnsupportedLayerError where the loss cannot be differentiated twice, GradStatsError where
    Lanczos does not converge.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    size = sum(p.numel() for p in params)

    def product(vector: Array) -> Array:
        return hessian_product(loss, params, np.asarray(vector, np.float64).reshape(-1))

    if size == 1:
        return float(product(np.ones(1))[0]), np.ones(1)
    start = np.random.default_rng(seed).standard_normal(size)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    try:
        values, vectors = eigsh(operator, k=1, which="LA", v0=start, tol=tolerance)
    except ArpackNoConvergence as error:
        raise GradStatsError(f"the Hessian's largest eigenvalue was not found ({error})") from error
    return float(values[0]), vectors[:, 0]


def sharpness(workload: Workload, asked: Sharpness, *, seed: int = 0) -> dict[str, Any]:
    """Of the workload's model where it is, in eval mode: `full` and `subspace` φ in percent, and
    `top_eigenvalue`, with what was asked. Everything is as before when it returns.
    """
    params: list[Tensor] = [p for p in workload.model.parameters() if p.requires_grad]
    indices = spread_out(workload.num_samples, asked.samples)
    chunks = [indices[i : i + SIZE] for i in range(0, len(indices), SIZE)]

    def loss() -> Iterator[tuple[Tensor, float]]:
        for chunk in chunks:
            yield workload.loss(workload.take(chunk)), len(chunk) / len(indices)

    direction = value = None
    put_back = kept((workload.model,))
    try:
        with evaluating(workload.model), differentiable(workload.model):
            if asked.eigenvalue:
                value, direction = top_eigenvalue(loss, params, seed=seed)
            rest = {"iterations": asked.iterations, "seed": seed, "direction": direction}
            full = epsilon_sharpness(loss, params, asked.epsilon, **rest)  # type: ignore[arg-type]
            within = None
            if asked.subspace is not None:
                within = epsilon_sharpness(
                    loss, params, asked.epsilon, subspace=asked.subspace, **rest  # type: ignore[arg-type]
                )  # fmt: skip
    finally:
        put_back()
    found = {**asdict(asked), "samples": len(indices), "dimensions": asked.subspace}
    return {**found, "full": full, "subspace": within, "top_eigenvalue": value}


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Attention by a kernel whose backward can be differentiated."""
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield


def loss_and_gradient(
    loss: Callable[[], Iterator[tuple[Tensor, float]]], params: list[Tensor]
) -> tuple[float, Array]:
    """The mean loss over all parts, and its (n,) gradient."""
    value, gradient = 0.0, np.zeros(sum(p.numel() for p in params))
    for part, share in loss():
        found = torch.autograd.grad(part, params, allow_unused=True)
        value += share * float(part.detach())
        gradient += share * flat([_or_zero(g, p) for g, p in zip(found, params, strict=True)])
    return value, gradient


def hessian_product(
    loss: Callable[[], Iterator[tuple[Tensor, float]]], params: list[Tensor], vector: Array
) -> Array:
    """(n,) H·vector of the mean loss."""
    total = np.zeros_like(vector)
    names = [str(i) for i in range(len(params))]
    along = split(vector, params)
    for part, share in loss():
        grads = torch.autograd.grad(part, params, create_graph=True, allow_unused=True)
        require_differentiable(grads, names)
        pairs = [
            (g, v) for g, v in zip(grads, along, strict=True) if g is not None and g.requires_grad
        ]
        if not pairs:
            continue
        outputs, vectors = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, params, vectors, allow_unused=True)
        total += share * flat([_or_zero(h, p) for h, p in zip(found, params, strict=True)])
    return total


def flat(tensors: list[Tensor]) -> Array:
    """All entries, (n,) float64."""
    joined = torch.cat([t.detach().flatten().double() for t in tensors])
    return joined.cpu().numpy()


def split(vector: Array, params: list[Tensor]) -> list[Tensor]:
    """The vector's entries in the parameters' shapes, dtypes and on their device."""
    parts = torch.from_numpy(np.ascontiguousarray(vector)).split([p.numel() for p in params])
    return [v.view(p.shape).to(p) for v, p in zip(parts, params, strict=True)]


def write(params: list[Tensor], vector: Array) -> None:
    """Set the parameters to the vector's entries."""
    with torch.no_grad():
        for param, value in zip(params, split(vector, params), strict=True):
            param.copy_(value)


def _or_zero(found: Tensor | None, param: Tensor) -> Tensor:
    return torch.zeros_like(param) if found is None else found
