"""The proxy: exact for its own parameters, says what it is, and learns what it is to the model."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from biases import assert_unbiased
from models import loss
from oracle import per_sample_gradients
from torch import nn

import gradstats
from gradstats.calibration import Calibration, calibrate
from gradstats.estimators import NoiseScale, noise_scale
from gradstats.loggers import JsonLines, read_log
from gradstats.schedulers import noise_scale as noise_scale_policy
from gradstats.schedulers import norm_test
from gradstats.schedulers.policies import Seen


class Scale(nn.Module):
    """A norm of one's own, known by its name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class MyRMSNorm(Scale):
    pass


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), MyRMSNorm(8), nn.Linear(8, 2)
    )


NORMS = ("1.weight", "1.bias", "4.weight")


def exact(model, data):
    true = per_sample_gradients(model, loss, data)
    every = {name: g.reshape(len(g), -1) for name, g in true.items()}
    return torch.cat([every[n] for n in NORMS], 1), torch.cat(list(every.values()), 1)


@pytest.mark.parametrize("calibrating", [False, True])
@pytest.mark.parametrize("options", [{}, {"per_layer": False}, {"moments": True}], ids=str)
def test_record_is_exact_for_the_normalisation_layers(calibrating: bool, options) -> None:
    model, data = make(), torch.randn(7, 6)
    part, _ = exact(model, data)
    monitor = gradstats.attach(model, method="norm_layers", **options)
    if calibrating:
        monitor.calibrate(2)
    loss(model, data).backward()
    stats = monitor.step()
    assert stats.method == "norm_layers"
    torch.testing.assert_close(
        stats.per_sample_sq_norm.double(), part.square().sum(1), rtol=1e-4, atol=0
    )
    assert float(stats.tr_sigma) == pytest.approx(float(part.var(0).sum()), rel=1e-4)
    assert stats.coverage.names == NORMS
    total = sum(p.numel() for p in model.parameters())
    assert stats.coverage.fraction == pytest.approx(24 / total)
    assert "normalisation layers only" in stats.coverage.missing["0.weight"]
    assert set(stats.layers) == (set() if options.get("per_layer") is False else set(NORMS))
    assert set(stats.grad_var) == (set(NORMS) if options.get("moments") else set())


def test_only_those_layers_are_looked_at() -> None:
    model = make()
    monitor = gradstats.attach(model, method="norm_layers")
    assert tuple(monitor._source.interposer.index) == NORMS
    monitor.detach()
    assert not any("forward" in vars(m) for m in model.modules())


def train(model, monitor, steps, generator, batch=16):
    for _ in range(steps):
        x = torch.randn(batch, 6, generator=generator)
        model.zero_grad()
        (model(x) - x[:, :2]).square().mean().backward()
        monitor.step()


def test_calibration_finds_the_factor() -> None:
    model = make()
    whole = gradstats.attach(model)
    train(model, whole, 600, torch.Generator().manual_seed(1))
    truth = whole.noise_scale()
    whole.detach()
    monitor = gradstats.attach(model, method="norm_layers")
    monitor.calibrate(200)
    names = monitor.state_dict()["parameters"]
    train(model, monitor, 200, torch.Generator().manual_seed(2))
    assert tuple(monitor._source.interposer.index) == NORMS
    assert names == monitor.state_dict()["parameters"]
    train(model, monitor, 200, torch.Generator().manual_seed(3))
    factor = monitor._source.calibration
    assert factor.usable
    assert factor.steps == 200
    noise = monitor.noise_scale()
    assert noise.low < truth.value < noise.high
    assert noise.value == pytest.approx(truth.value, rel=0.2)
    assert noise.calibration == factor.value
    assert noise.actionable
    assert "from the normalisation layers, times a calibration of" in str(noise)
    assert "measured in 200 steps" in str(factor)


def test_without_a_calibration_it_is_a_proxy_and_says_so() -> None:
    model = make()
    monitor = gradstats.attach(model, method="norm_layers")
    train(model, monitor, 100, torch.Generator().manual_seed(1))
    noise = monitor.noise_scale()
    assert noise.uncalibrated
    assert not noise.actionable
    text = str(noise)
    assert text.startswith("noise scale of the normalisation layers ")
    assert "a proxy of unknown calibration: monitor.calibrate() measures" in text
    assert "% of the trainable parameters" in text
    monitor.detach()
    given = gradstats.attach(model, method="norm_layers", calibration=2.0)
    train(model, given, 100, torch.Generator().manual_seed(1))
    twice = given.noise_scale()
    assert twice.value == pytest.approx(2 * noise.value)
    assert (twice.low, twice.high) == pytest.approx((2 * noise.low, 2 * noise.high))
    assert twice.actionable
    assert twice.value == pytest.approx(twice.tr_sigma / twice.true_grad_sq_norm)
    assert twice.unbiased == pytest.approx(2 * noise.unbiased)
    assert "as given" in str(given._source.calibration)


def test_resuming_in_and_after_a_calibration() -> None:
    model = make()
    monitor = gradstats.attach(model, method="norm_layers")
    monitor.calibrate(30)
    train(model, monitor, 10, torch.Generator().manual_seed(1))
    state = json.loads(json.dumps(monitor.state_dict()))
    monitor.detach()
    second = gradstats.attach(model, method="norm_layers")
    second.load_state_dict(state)
    train(model, second, 29, torch.Generator().manual_seed(2))
    assert second._source.calibration is None
    train(model, second, 1, torch.Generator().manual_seed(3))
    assert second._source.calibration.steps == 30
    state = json.loads(json.dumps(second.state_dict()))
    second.detach()
    third = gradstats.attach(model, method="norm_layers")
    third.load_state_dict(state)
    assert third.noise_scale() == second.noise_scale()


def test_misuse() -> None:
    with pytest.raises(gradstats.AttachError, match=r'no trainable normalisation layer.*"Norm"'):
        gradstats.attach(nn.Linear(2, 2), method="norm_layers")
    model = make()
    exact = gradstats.attach(model)
    with pytest.raises(gradstats.InvalidArgumentError, match="measures all parameters"):
        exact.calibrate()
    exact.detach()
    monitor = gradstats.attach(model, method="norm_layers")
    with pytest.raises(gradstats.InvalidArgumentError, match="steps=0 must be"):
        monitor.calibrate(0)
    mixed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.LayerNorm(4))
    gradstats.attach(mixed, method="norm_layers")
    with pytest.raises(gradstats.UnsupportedLayerError, match="BatchNorm"):
        mixed(torch.randn(3, 6))


def test_schedulers_do_not_act_on_it_until_it_is_calibrated() -> None:
    fields = {"confidence": 0.9, "num_samples": 6400, "num_steps": 200, "num_skipped": 0}
    noise = NoiseScale(400.0, 380.0, 420.0, **fields, tr_sigma=400.0, true_grad_sq_norm=1.0)
    proxy = replace(noise, method="norm_layers")
    known = replace(proxy, calibration=1.0)
    for policy in (noise_scale_policy, norm_test):
        asked = [policy(Seen(16, 16, noise=n)) for n in (noise, known, proxy)]
        assert asked[0] == asked[1] > 16
        assert asked[2] == 16


# --- the factor, numbers only -----------------------------------------------------------------


def steps_of(rng, steps):
    """Four correlated series with a true factor of (6/2)/(3/2) = 2."""
    shared = rng.standard_normal((steps, 2))
    own = rng.standard_normal((steps, 4))
    whole = np.array([6.0, 2.0]) * (1 + 0.5 * shared + 0.2 * own[:, :2])
    part = np.array([3.0, 2.0]) * (1 + 0.5 * shared + 0.2 * own[:, 2:])
    return whole, part


def test_the_factor_is_unbiased_and_its_interval_covers() -> None:
    rng = np.random.default_rng(0)
    found = [calibrate(*steps_of(rng, 100)) for _ in range(1000)]
    assert_unbiased([f.value for f in found], 2.0)
    assert 0.85 <= np.mean([f.low <= 2.0 <= f.high for f in found]) <= 0.97
    assert all(f.usable for f in found)


def test_the_calibrated_interval_covers() -> None:
    rng = np.random.default_rng(2)
    hits, values = [], []
    for _ in range(500):
        factor = calibrate(*steps_of(rng, 100))
        _, part = steps_of(rng, 200)
        noise = factor.apply(noise_scale(np.full(200, 8), part[:, 0], part[:, 1]))
        hits.append(noise.low <= 3.0 <= noise.high)
        values.append(noise.value)
    assert_unbiased(values, 3.0)
    assert 0.85 <= np.mean(hits) <= 0.97


@pytest.mark.parametrize("steps", [16, 40])
def test_in_few_steps_the_interval_covers_and_the_unbiased_factor_is_that(steps: int) -> None:
    """A |G|² of the part known to 28% and 18%, where most runs know the factor worse than to within 1.5×."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(2000):
        whole, part = steps_of(rng, steps)
        part[:, 1] += 2 * rng.standard_normal(steps)
        found.append(calibrate(whole, part))
    known = [f for f in found if f.low > 0]
    assert 0.86 <= np.mean([f.low <= 2.0 <= f.high for f in known]) <= 0.95
    assert_unbiased([f.unbiased for f in found if f.unbiased is not None], 2.0, known_to=0.01)


def test_an_uncertain_factor_widens_the_interval_and_is_not_acted_on(tmp_path) -> None:
    model = make()
    monitor = gradstats.attach(model, method="norm_layers", calibration=2.0)
    train(model, monitor, 100, torch.Generator().manual_seed(1))
    sure = monitor.noise_scale()
    monitor._source.calibration = Calibration(2.0, 1.2, 4.0, 20, 1.9)
    unsure = monitor.noise_scale()
    assert unsure.value == sure.value
    assert unsure.unbiased == pytest.approx(sure.unbiased * 1.9 / 2)
    assert unsure.low < min(sure.low, sure.value * 1.2 / 2)
    assert unsure.high > max(sure.high, sure.value * 2)
    assert sure.actionable
    assert unsure.uncalibrated
    assert not unsure.actionable
    text = str(unsure)
    assert "a proxy of uncertain calibration: monitor.calibrate() with more steps" in text
    assert "from the normalisation layers, times a calibration of 2" in text
    file = tmp_path / "steps.jsonl"
    log = gradstats.Log(monitor, JsonLines(file), every=1, layers=False)
    log.step()
    log.close()
    logged = read_log(file).noise_scale()
    assert logged == unsure
    assert logged.uncalibrated
    monitor._source.calibration = Calibration(2.0, 0.0, math.inf, 8)  # too few steps to say
    assert monitor.noise_scale().calibration is None


def test_a_factor_that_is_not_known_is_not_used() -> None:
    rng = np.random.default_rng(1)
    whole, part = steps_of(rng, 8)
    few = calibrate(whole, part)
    assert (few.low, few.high) == (0.0, math.inf)
    assert not few.usable
    negative = calibrate(whole, -part)
    assert math.isnan(negative.value)
    assert not negative.usable
    assert "no calibration could be had from 8 steps" in str(negative)
    assert not calibrate(np.zeros((0, 2)), np.zeros((0, 2))).usable
    assert not Calibration(2.0, 1.0, 4.0, 50).usable


@pytest.mark.parametrize("early", [True, False])
def test_a_compiled_model_is_calibrated_too(early: bool) -> None:
    model = make()
    run = torch.compile(model, backend="eager", fullgraph=True)
    data = torch.randn(7, 6)
    if not early:
        run(data)
    monitor = gradstats.attach(model, method="norm_layers")
    part, whole = exact(model, data)
    monitor.calibrate(13)
    for _ in range(16):
        model.zero_grad()
        loss(run, data).backward()
        stats = monitor.step()
        assert float(stats.tr_sigma) == pytest.approx(float(part.var(0).sum()), rel=1e-4)

    def scale(g):
        tr = g.var(0).sum()
        return float(tr / (g.mean(0).square().sum() - tr / len(g)))

    assert monitor._source.calibration.value == pytest.approx(scale(whole) / scale(part), rel=1e-3)
