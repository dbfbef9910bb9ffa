"""Is it right? Asked before anything is timed. The truth is float64, one sample at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from gradstats.attaching import attach
from gradstats.errors import GradStatsError
from gradstats.scaling import BatchScaling
from gradstats.schedulers import BatchSizeScheduler, noise_scale
from gradstats.workbench.bench.models import Problem
from gradstats.workbench.bench.peers import Step

SAMPLES = 3
TOLERANCE = 1e-5  # of gradstats in float32, on norms
PEER_TOLERANCE = 1e-3


class Monitored(Step):
    """The step with gradstats attached, `monitor.step()` included."""

    def prepare(self) -> None:
        self.monitor = attach(self.model, moments=self.moments)

    def backward(self) -> None:
        self.problem.loss(self.model).backward()
        stats = self.monitor.step()
        assert stats is not None  # every step is measured
        self.stats = stats


class Scheduled(Monitored):
    """The same with a batch-size scheduler, which decides but is held at the batch size."""

    world_size, accumulation_steps = 1, 1  # as of a loader of whole batches
    samples = 0
    dataset_size: int | None

    def prepare(self) -> None:
        super().prepare()
        self.micro_batch_size = self.dataset_size = len(self.problem.inputs)
        scaling = BatchScaling(self.optimizer, batch_size=self.micro_batch_size, rule="noise")
        self.scheduler = BatchSizeScheduler(
            noise_scale, self, monitor=self.monitor, scaling=scaling
        )

    def __call__(self) -> None:
        super().__call__()
        self.samples += self.micro_batch_size
        self.scheduler.step()


def worst(found: Tensor, true: Tensor) -> float:
    """Largest difference over the largest true value."""
    return float((found.double() - true).abs().max() / true.abs().max().clamp_min(1e-300))


def truth(problem: Problem, samples: int) -> dict[str, Tensor]:
    """Gradients of the first samples' own losses, by parameter: (samples, *shape), float64."""
    model = copy.deepcopy(problem.model).double()
    wide = problem.inputs.double() if problem.inputs.is_floating_point() else problem.inputs
    exact = Problem(model, wide, problem.targets)
    found: dict[str, list[Tensor]] = {}
    for i in range(samples):
        model.zero_grad()
        exact.loss(model, slice(i, i + 1)).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            found.setdefault(name, []).append(p.grad.clone())
    return {name: torch.stack(grads) for name, grads in found.items()}


def check_gradstats(problem: Problem) -> tuple[dict[str, float], Any]:
    """Errors of gradstats against the truth, and its record of the whole batch.

    `norms`: the first samples of the whole batch; `variance`: a batch of these samples alone.

    Raises:
        GradStatsError: an error is above the tolerance, or a parameter was not measured.
    """
    n = min(SAMPLES, len(problem.inputs))
    true = truth(problem, n)
    sq_norm = torch.stack([g.flatten(1).square().sum(1) for g in true.values()]).sum(0)
    step = Monitored(problem)
    step.backward()
    if step.stats.coverage.fraction < 1:
        missing = ", ".join(step.stats.coverage.missing)
        raise GradStatsError(f"not every parameter was measured: {missing}")
    errors = {"norms": worst(step.stats.per_sample_sq_norm[:n], sq_norm)}
    few = Problem(problem.model, problem.inputs[:n], problem.targets[:n])
    with_moments = Monitored(few, moments=True)
    with_moments.backward()
    found = with_moments.stats
    errors["norms with moments"] = worst(found.per_sample_sq_norm, sq_norm)
    total = sum(g.var(0).sum() for g in true.values())
    gaps = [(found.grad_var[name] - g.var(0)).abs().sum() for name, g in true.items()]
    errors["variance"] = float(sum(gaps) / total)
    for name, error in errors.items():
        limit = 10 * TOLERANCE if name == "variance" else TOLERANCE
        if not error <= limit:
            raise GradStatsError(
                f"{name} differ from the float64 truth by {error:.1e}, more than {limit:.0e}; nothing that "
                "is wrong is timed"
            )
    return errors, step.stats


def check_peer(step: Step, record: Any) -> tuple[str, float]:
    """One step of a peer against gradstats' record: ('ok' | 'partial' | 'wrong', error)."""
    step.backward()
    assert step.sq_norm is not None
    expected, status = record.per_sample_sq_norm, "ok"
    if step.measured is not None and set(step.measured) != set(record.layers):
        expected = sum(record.layers[name].per_sample_sq_norm for name in step.measured)
        status = "partial"
    error = worst(step.sq_norm.detach(), expected.double())
    step.zero_grad()
    return (status if error <= PEER_TOLERANCE else "wrong"), error
