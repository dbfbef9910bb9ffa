"""Monitors on a regression whose noise is known: fed with synthetic steps, and attached to real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from closed_form import Array, Halves, Regression, Sums, buffered, ways
from torch import Tensor

import gradstats
from gradstats.calibration import calibrate
from gradstats.estimators import DEFAULT_HALF_LIFE, NoiseScale
from gradstats.momentum import BufferWeights
from gradstats.roots import AveragedRoots

Batch = tuple[Tensor, Tensor]
DECAY = 0.9  # of the momentum buffer


def loss_fn(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Mean over the samples of (xᵀw − y)²."""
    x, noise = batch
    return (model(x) - noise).square().mean()


def monitor_of(fixture: Regression, decay: float = DECAY, **options: Any) -> gradstats.Monitor:
    """Attached to a model at w* + δ, where w* = 0 and so y = ε; its optimizer never moves it."""
    model = Halves(fixture.delta)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=decay, dampening=decay)
    return gradstats.attach(model, optimizer=optimizer, **options)


def told(
    monitor: gradstats.Monitor, blank: dict[str, Any], samples: int, pairs: Array, **more: Any
) -> gradstats.Monitor:
    """The monitor of state `blank`, as if it had measured steps of `samples` and (tr Σ, |G|²) of `pairs`.

    `pairs`: (2, K).
    """
    steps = {"num_samples": [samples] * pairs.shape[1], "steps": pairs.shape[1]}
    columns = {"tr_sigma": pairs[0].tolist(), "true_grad_sq_norm": pairs[1].tolist()}
    monitor.load_state_dict({**blank, **steps, **columns, **more})
    return monitor


def by_norm_layers(
    fixture: Regression, samples: int, whole: Array, part: Array
) -> list[NoiseScale]:
    """Of each run, from (R, 2, K) of the model and of its first layer: calibrated in the run before."""
    monitor, found = monitor_of(fixture, method="norm_layers"), []
    blank = monitor.state_dict()
    for learn, narrow, use in zip(whole[:-1], part[:-1], part[1:], strict=True):
        factor = calibrate(learn.T, narrow.T)
        told(monitor, blank, samples, use, calibration=factor.to_dict(), calibrating=0)
        found.append(monitor.noise_scale())
    monitor.detach()
    return found


def by_momentum(
    fixture: Regression, samples: int, pairs: Array, means: Tensor
) -> tuple[Array, list[NoiseScale]]:
    """|G|² of each step by the buffer, (R, K − 1), and each run's noise scale.

    From (R, 2, K) of every sample and the mean gradients (R, K, d).
    """
    own = buffered(means, torch.from_numpy(pairs[:, 0]), samples, DECAY)
    monitor, found = monitor_of(fixture, from_momentum=True), []
    blank = monitor.state_dict()
    for pair, buffer in zip(pairs, own, strict=True):
        state = {"weights": BufferWeights().to_dict(), "found": buffer.tolist()}
        found.append(told(monitor, blank, samples, pair, momentum=state).noise_scale())
    monitor.detach()
    return own[:, 1:], found


def by_geometry(
    fixture: Regression,
    samples: int,
    kind: str,
    pairs: Array,
    layer: bool = False,
    variances: Tensor | None = None,
) -> list[NoiseScale]:
    """Of each run, from (R, 2, K) of each step's two moments: of the model, or of one `layer`.

    `variances`: (R, K, d), of each step.
    """
    monitor, found = monitor_of(fixture, geometry=kind, moments=True), []
    blank = monitor.state_dict()
    for run, rows in enumerate(pairs):
        steps = [[samples, [[pair]]] for pair in rows.T.tolist()]
        roots = AveragedRoots(DEFAULT_HALF_LIFE)
        for var in [] if variances is None else variances[run]:
            roots.add([var], [len(var)], samples)
        state = {"names": ["norm.weight"], "found": steps, "roots": roots.state_dict()}
        monitor.load_state_dict({**blank, "geometry": state})
        layers = monitor.layer_noise_scales(kind) if layer else {}
        found.append(layers["norm.weight"] if layer else monitor.noise_scale(kind))
    monitor.detach()
    return found


def by_curvature(
    fixture: Regression, samples: int, windows: int, runs: int, generator: torch.Generator
) -> list[gradstats.Curvature]:
    """Of each run; by Hessian-vector products of a real model."""
    model = Halves(fixture.delta)
    found = []
    for _ in range(runs):
        x, noise = fixture.draw((windows, samples), generator)
        found.append(gradstats.curvature(model, loss_fn, list(zip(x, noise, strict=True))))
    return found


def attached(
    fixture: Regression, samples: int, steps: int, generator: torch.Generator
) -> dict[str, float]:
    """How far the records of attached monitors are from those of the same samples by formula.

    The largest difference of a step, in standard deviations of that column over the steps.
    """
    x, noise = fixture.draw((steps, samples), generator)
    grads = fixture.gradients(x, noise).double()
    parts = grads.view(steps, 8, samples // 8, -1).mean(2)
    sums, known = Sums(samples, parts, grads.square().mean(1)), ways(fixture)
    runs: Sequence[tuple[str, str, int]] = (
        ("per_sample", "per_sample", 1),
        ("one layer", "norm_layers", 1),
        ("micro_batch, 2", "micro_batch", 2),
        ("micro_batch, 8", "micro_batch", 8),
    )
    found = {}
    for name, method, pieces in runs:
        monitor = monitor_of(fixture, method=method)
        model, optimizer = monitor._model, monitor.optimizer
        assert optimizer is not None
        for inputs, targets in zip(x, noise, strict=True):
            for batch in zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True):
                (loss_fn(model, batch) / pieces).backward()
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
        state = monitor.state_dict()
        monitor.detach()
        seen = np.array([state["tr_sigma"], state["true_grad_sq_norm"]])
        wanted = torch.stack(known[name].column(sums)).numpy()
        found[name] = float((np.abs(seen - wanted).max(1) / wanted.std(1)).max())
    return found
