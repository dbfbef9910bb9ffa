"""The numbers behind a sweep: the gradient's variance, steps to a target, who won."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradstats.errors import InvalidArgumentError
from gradstats.workbench.sweep.steps_to_target import crossing, fit_steps
from gradstats.workbench.sweep.summary import mean_interval, steps_to_target, verdicts
from gradstats.workbench.sweep.variance import gradient_variance, mean_tr_sigma
from gradstats.workbench.workload import Workload


def regression(size: int = 400) -> tuple[Workload, float]:
    """Least squares away from its minimum, and tr Σ of its samples' gradients."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(size, 6, generator=draw)
    y = x.sum(1, keepdim=True) + torch.randn(size, 1, generator=draw)
    model = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    grads = (2 * (x @ model.weight.T - y) * x).detach().double()
    tr_sigma = (grads - grads.mean(0)).square().sum(1).mean().item()
    return Workload(model, nn.MSELoss(), (x, y)), tr_sigma


def test_the_variance_falls_as_one_over_the_batch_and_agrees_with_the_monitor() -> None:
    made, tr_sigma = regression()
    found = gradient_variance(made, (4, 16, 64), precision=0.03)
    for point in found.points:
        assert point.direct * point.batch_size == pytest.approx(tr_sigma, rel=0.12)
        assert point.by_monitor * point.batch_size == pytest.approx(tr_sigma, rel=0.1)
        assert point.low < point.direct < point.high
    assert found.exponent == pytest.approx(-1, abs=0.06)
    assert found.constant == pytest.approx(tr_sigma, rel=0.06)
    assert found.worst < 0.1


def test_accumulated_batches_scatter_alike() -> None:
    made, tr_sigma = regression()
    found = gradient_variance(made, (16,), precision=0.06, micro_batch_size=4)
    assert found.points[0].direct * 16 == pytest.approx(tr_sigma, rel=0.2)
    assert found.points[0].by_monitor * 16 == pytest.approx(tr_sigma, rel=0.06)
    assert found.exponent is None


def test_a_variance_that_does_not_fall_is_seen() -> None:
    """Noise that all samples of a batch share: its variance is the same at each size."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 1, bias=False)

    def loss(model, batch):
        return model(batch[0]).sum() * 0 + torch.randn((), generator=draw) * model.weight.sum()

    made = Workload(model, loss, (torch.ones(50, 3),))
    found = gradient_variance(made, (4, 64), precision=0.1, measured=False)
    assert found.exponent == pytest.approx(0, abs=0.15)
    assert found.worst > 1
    assert found.points[0].direct == pytest.approx(3.0, rel=0.35)


def test_tr_sigma_of_the_monitor() -> None:
    made, tr_sigma = regression()
    assert mean_tr_sigma(made, 32, 4096, 0) == pytest.approx(tr_sigma, rel=0.1)
    assert made.model.weight.grad is None


def test_stopping_leaves_no_half_measurement() -> None:
    assert gradient_variance(regression()[0], (4, 8), stop=lambda: True) is None


def test_steps_on_the_curve_are_fitted_exactly() -> None:
    found = fit_steps({b: 120 * (1 + 50 / b) for b in (8, 32, 128, 512)})
    assert found.steps_min == pytest.approx(120, rel=0.01)
    assert found.critical_batch == pytest.approx(50, rel=0.01)
    assert found.samples_min == pytest.approx(6000, rel=0.01)
    assert found.product_median == pytest.approx(1, rel=0.05)
    assert found.worst_relative < 0.01
    assert found.determined
    assert found.steps(50) == pytest.approx(240, rel=0.01)


def test_steps_that_show_no_bend_are_told() -> None:
    assert not fit_steps({b: 6400 / b for b in (8, 16, 32)}).determined
    assert not fit_steps(dict.fromkeys((8, 16, 32), 100.0)).determined
    assert fit_steps({8: 100.0, 16: 60.0, 32: math.inf}).worst_relative < 0.01
    with pytest.raises(
        InvalidArgumentError, match=r"the steps of 1 batch size\(s\) determine no curve"
    ):
        fit_steps({8: 100.0, 16: math.inf})


def test_crossing() -> None:
    curve = [(0.0, 4.0), (10.0, 2.0), (20.0, 3.0), (30.0, 1.0)]
    assert [crossing(curve, t) for t in (5.0, 3.0, 2.0, 1.5, 0.5)] == [0, 5, 10, 27.5, math.inf]


def trial(plan: str, seed: int, final: float, *, seconds: float = 1.0, steps: int = 10) -> dict:
    """A trial whose loss falls on a straight line from 4."""
    size = int(plan.split("x")[0])
    curve = [
        {
            "step": s,
            "samples": s * size,
            "seconds": seconds * s / steps,
            "loss": v,
            "validation_loss": v,
        }
        for s, v in ((0, 4.0), (steps, final))
    ]
    return {"plan": plan, "batch_size": size, "seed": seed, "ok": True, "curve": curve}


def test_who_wins_and_who_cannot_be_told_apart() -> None:
    trials = []
    for seed, noise in enumerate((0.0, 0.3, -0.3)):
        trials += [
            trial("8x10", seed, 1.0 + noise),
            trial("16x5", seed, 1.5 + noise, steps=5, seconds=0.5),  # behind by 0.5 from every seed
            trial("40x2", seed, 1.05 - 2 * noise, steps=2, seconds=0.1),
        ]
    samples, steps, seconds = verdicts(trials)
    assert (samples.by, samples.budget, samples.best, samples.tied) == (
        "samples",
        80,
        "8x10",
        ("40x2",),
    )
    assert samples.behind["16x5"]["mean"] == pytest.approx(0.5)
    assert samples.behind["16x5"]["low"] == pytest.approx(0.5)
    assert "40x2 cannot be told from it" in str(samples)
    assert "16x5 is 0.5 above (90% interval 0.5 to 0.5)" in str(samples)
    assert (steps.budget, steps.best) == (2, "40x2")
    assert steps.means["8x10"] == pytest.approx(4 - 0.2 * 3)
    assert (seconds.budget, seconds.best) == (pytest.approx(0.1), "40x2")


def test_verdicts_need_two_plans_that_ended() -> None:
    assert verdicts([trial("8x10", 0, 1.0)]) == []
    assert verdicts([trial("8x10", 0, 1.0), {**trial("16x5", 0, 1.0), "ok": False}]) == []


def test_intervals_are_students() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["high"] - 2 == pytest.approx(2.91999 / math.sqrt(3), rel=1e-4)
    assert mean_interval([1.0]) == {"mean": 1.0, "low": None, "high": None}
    assert mean_interval([]) == {"mean": None, "low": None, "high": None}


def test_steps_to_a_target_take_the_quickest_rate_of_a_size() -> None:
    trials = [trial("8x40", 0, 1.0, steps=40), trial("16x30", 0, 1.0, steps=30)]
    trials += [
        trial("64x25", 0, 1.0, steps=25),
        {**trial("64x25", 0, 2.0, steps=25), "plan": "64x25@9"},
    ]
    found = steps_to_target(trials, 2.5)
    assert [p["steps"] for p in found["points"]] == pytest.approx([20, 15, 12.5])
    assert steps_to_target(trials)["target"] == 2.0  # that all reach
    assert steps_to_target(trials[:2]) is None
    assert steps_to_target(trials, 0.5) is None
