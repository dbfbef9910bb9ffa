"""The noise scale with the loss's own curvature, B_noise = tr(HΣ)/(GᵀHG), and the best learning rate.

A step of size ε along a mean of B gradients changes the loss by −ε|G|² + ½ε²(GᵀHG + tr(HΣ)/B) in the mean,
which is best at ε(B) = ε_max/(1 + B_noise/B) with ε_max = |G|²/(GᵀHG) (McCandlish et al.,
arXiv:1812.06162, equations 2.4 to 2.8). From three batches a, b, c of n samples each,

    ḡ_bᵀ H_c ḡ_a                 is unbiased for GᵀHG
    n(ḡ_aᵀ H_c ḡ_a − ḡ_bᵀ H_c ḡ_a)    for tr(HΣ), likewise with b
    ḡ_aᵀ ḡ_b                     for |G|², and n(‖ḡ_a‖² − ḡ_aᵀ ḡ_b) for tr Σ

because no two of their gradients and curvatures share a sample. Each batch takes every part in turn; a
batch costs about four backward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from gradstats.batches import Samples
from gradstats.calls import random_state, restore_random_state
from gradstats.errors import GradStatsError, InvalidArgumentError, UnsupportedLayerError
from gradstats.estimators import NoiseScale, noise_scale, readable
from gradstats.install import ENTRY

__all__ = ["Curvature", "curvature"]

WINDOW = 3  # batches of an estimate


@dataclass(frozen=True)
class Curvature:
    """Estimates from windows of three batches. `merge` pools those of several calls.

    Per window, unbiased: `tr_h_sigma`, `g_h_g`, `true_grad_sq_norm`, `tr_sigma`; `batch_size` is n.
    """

    batch_size: int
    tr_h_sigma: tuple[float, ...]
    g_h_g: tuple[float, ...]
    true_grad_sq_norm: tuple[float, ...]
    tr_sigma: tuple[float, ...]
    confidence: float = 0.9

    @property
    def noise_scale(self) -> NoiseScale:
        """tr(HΣ)/(GᵀHG), in samples; its `tr_sigma` and `true_grad_sq_norm` are those two.

        The interval needs 12 windows. It may be infinite: along the gradient there may be no curvature.
        """
        found = self._ratio(self.tr_h_sigma, self.g_h_g)
        return replace(found, geometry="hessian")

    @property
    def max_learning_rate(self) -> NoiseScale:
        """ε_max = |G|²/(GᵀHG), the best rate of SGD without noise, as a ratio with its interval."""
        return self._ratio(self.true_grad_sq_norm, self.g_h_g)

    def learning_rate(self, batch_size: float) -> float:
        """ε_max/(1 + B_noise/B), the best rate of plain SGD for one step of so many samples."""
        bottom = _mean(self.g_h_g) + _mean(self.tr_h_sigma) / batch_size
        top = max(_mean(self.true_grad_sq_norm), 0.0)
        return top / bottom if bottom > 0 else math.inf

    def merge(self, other: Curvature) -> Curvature:
        """Of both, in time order. Raises InvalidArgumentError for batches of unlike size."""
        if self.batch_size != other.batch_size:
            raise InvalidArgumentError(
                f"curvatures from batches of {self.batch_size} and {other.batch_size} samples cannot be "
                "merged; use batches of one size"
            )
        names = ("tr_h_sigma", "g_h_g", "true_grad_sq_norm", "tr_sigma")
        return replace(self, **{n: getattr(self, n) + getattr(other, n) for n in names})

    @staticmethod
    def merge_all(found: Sequence[Curvature]) -> Curvature:
        """All of a list."""
        return reduce(Curvature.merge, found)

    def __str__(self) -> str:
        rate = self.max_learning_rate
        text = f"{self.noise_scale}; "
        if not math.isfinite(rate.value) or rate.value <= 0:
            return (
                text
                + "no best learning rate follows: no upward curvature along the gradient was found"
            )
        best = readable(self.learning_rate(self.batch_size))
        return text + (
            f"the best learning rate of plain SGD is {readable(rate.value)} without noise, {best} for "
            f"{self.batch_size:,} samples"
        )

    def _ratio(self, top: Sequence[float], bottom: Sequence[float]) -> NoiseScale:
        counts = [max(self.batch_size, 2)] * len(top)  # each window brings one more batch
        return noise_scale(
            counts, top, bottom, half_life=math.inf, confidence=self.confidence, overlap=WINDOW
        )


def curvature(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    *,
    batch_dim: int = 0,
    confidence: float = 0.9,
) -> Curvature:
    """Measure tr(HΣ), GᵀHG, |G|² and tr Σ where the model is, by Hessian-vector products.

    Args:
        model: not attached to a monitor (for one that is, `Monitor.curvature`).
        loss_fn: loss_fn(model, batch), the mean loss of a batch, as for `gradstats.check`.
        batches: at least three, of different samples, all of one size (dimension `batch_dim`).
            Twelve or more give intervals.

    Leaves parameters, gradients, buffers and random numbers as they were. Where several processes train
    together, it is of this one's batches alone.

    Raises:
        InvalidArgumentError: fewer than three batches, or of unlike size; a monitor is attached.
        UnsupportedLayerError: the model's backward cannot be differentiated.
    """
    batches = list(batches)
    sizes = {Samples(batch, batch_dim).size for batch in batches}
    if len(batches) < 3 or len(sizes) != 1:
        raise InvalidArgumentError(
            f"curvature() needs at least three batches of one size, and got {len(batches)} of "
            f"{sorted(sizes)} samples"
        )
    if any(getattr(m.__dict__.get(ENTRY, (None,))[0], "enabled", False) for m in model.modules()):
        raise InvalidArgumentError(
            "a monitor is attached to the model, and what it measures cannot be differentiated twice: call "
            "monitor.curvature(loss_fn, batches)"
        )
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    kept = [b.clone() for b in model.buffers()]
    rng = random_state(params[0].device)
    try:
        return _measure(model, loss_fn, batches, params, sizes.pop(), confidence)
    except GradStatsError:
        raise
    except RuntimeError as error:
        if not any(word in str(error) for word in ("derivative", "differentia")):
            raise
        raise UnsupportedLayerError(
            f"the backward of {type(model).__name__} cannot be differentiated, which curvature needs "
            f"({error}). Run attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), and a compiled "
            "model uncompiled."
        ) from error
    finally:
        restore_random_state(rng)
        with torch.no_grad():
            for buffer, old in zip(model.buffers(), kept, strict=True):
                buffer.copy_(old)


def _measure(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    params: list[Tensor],
    size: int,
    confidence: float,
) -> Curvature:
    names = [n for n, p in model.named_parameters() if p.requires_grad]

    def gradient(batch: Any, graph: bool) -> list[Tensor]:
        with torch.enable_grad():
            loss = loss_fn(model, batch)
            found = torch.autograd.grad(loss, params, create_graph=graph, allow_unused=True)
        if graph:
            require_differentiable(found, names)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]

    a, b = (gradient(batch, False) for batch in batches[:2])
    rows: list[Tensor] = []
    for batch in (*batches[2:], *batches[:2]):
        c = gradient(batch, True)
        ha, hb = (_product(c, params, v) for v in (a, b))
        aa, ab, bb = _dot(a, a), _dot(a, b), _dot(b, b)
        aha, ahb, bhb = _dot(a, ha), _dot(b, ha), _dot(b, hb)
        noise = size * ((aha + bhb) / 2 - ahb), ahb, ab, size * ((aa + bb) / 2 - ab)
        rows.append(torch.stack(noise))
        a, b = b, [g.detach() for g in c]
    tr_h_sigma, g_h_g, true, tr_sigma = map(tuple, torch.stack(rows).t().tolist())
    return Curvature(size, tr_h_sigma, g_h_g, true, tr_sigma, confidence)


def require_differentiable(grads: Sequence[Tensor | None], names: Sequence[str]) -> None:
    """Autograd leaves out what it cannot differentiate, without a word, where no path leads through it."""
    todo: list[Any] = []
    for grad, name in zip(grads, names, strict=True):
        if grad is not None and grad.grad_fn is None:
            raise UnsupportedLayerError(
                f"the gradient of parameter {name!r} {tuple(grad.shape)} depends on no parameter: the loss "
                "is linear and has no curvature, or an operation's backward cannot be differentiated, and "
                "the curvature would be wrong. Replace that operation."
            )
        todo += [] if grad is None else [grad.grad_fn]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.name() == "torch::autograd::Error":
            raise UnsupportedLayerError(
                "an operation of the model is marked as differentiable once (once_differentiable), so the "
                "curvature would be wrong. Replace that operation."
            )
        new = {f for f, _ in node.next_functions if f is not None} - seen
        seen |= new
        todo += new


def _product(grads: list[Tensor], params: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
    """H·vector, with `grads` that can be differentiated."""
    pairs = [(g, v) for g, v in zip(grads, vector, strict=True) if g.requires_grad]
    outputs, vectors = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, params, vectors, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if h is None else h for h, p in zip(found, params, strict=True)]


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    parts = [torch.dot(x.detach().flatten().double(), y.detach().flatten().double())
             for x, y in zip(a, b, strict=True)]  # fmt: skip
    return torch.stack(parts).sum()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
