"""The truth: one sample at a time, float64, plain autograd. Slow and obviously right."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor], Tensor]  # mean over the samples of a batch


def per_sample_gradients(model: nn.Module, loss: Loss, batch: Tensor) -> dict[str, Tensor]:
    """Gradient of each sample's own loss, by parameter name: (B, *shape), float64."""
    model = copy.deepcopy(model).double()
    wide = batch.double() if batch.is_floating_point() else batch
    found: dict[str, list[Tensor]] = {}
    for i in range(len(batch)):
        model.zero_grad()
        loss(model, wide[i : i + 1]).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
                found.setdefault(name, []).append(grad)
    return {name: torch.stack(grads) for name, grads in found.items()}


def relative(found: Tensor, true: Tensor) -> float:
    """Largest difference over the largest true value."""
    assert found.shape == true.shape, (found.shape, true.shape)
    if not true.numel():
        return 0.0
    scale = true.abs().max().clamp_min(1e-300)
    return float((found.double() - true.double()).abs().max() / scale)


def assert_matches(stats, true: dict[str, Tensor], tolerance: float) -> None:
    """Every number of a record against the oracle's gradients."""
    assert stats.coverage.fraction == 1.0, stats.coverage.missing
    assert set(stats.layers) == set(true)
    n = next(iter(true.values())).shape[0]
    assert stats.num_samples == n
    total = sum(g.reshape(len(g), -1).square().sum(1) for g in true.values())
    assert relative(stats.per_sample_sq_norm, total) < tolerance
    for name, g in true.items():
        layer, flat = stats.layers[name], g.reshape(len(g), -1)
        scale = flat.square().sum(1).max().clamp_min(total.max() * 1e-12)
        assert (layer.per_sample_sq_norm - flat.square().sum(1)).abs().max() / scale < tolerance, (
            name
        )
        assert abs(layer.grad_sq_norm - flat.mean(0).square().sum()) / scale < tolerance, name
        if name in stats.grad_var:
            var = g.var(0)
            # Where all samples agree, what is left is the square of rounding.
            scale = max(var.max(), 1e-9 * g.square().mean(0).max(), 1e-12 * total.max())
            assert (stats.grad_var[name] - var).abs().max() / scale < 10 * tolerance, name
            assert stats.grad_var[name].min() >= 0, name
    if n > 1:
        tr = sum(g.reshape(len(g), -1).var(0).sum() for g in true.values())
        mean = sum(g.mean(0).square().sum() for g in true.values())
        assert abs(stats.tr_sigma - tr) < 10 * tolerance * (tr + mean)
        assert abs(stats.true_grad_sq_norm - (mean - tr / n)) < 10 * tolerance * (tr + mean)
