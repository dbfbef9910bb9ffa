"""Scaled losses and half precision: absolute norms in units of the loss, and steps that overflow."""

from __future__ import annotations

import math

import pytest
import torch
from models import loss
from oracle import assert_matches, per_sample_gradients, relative
from torch import nn

import gradstats


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def _scaler(scale: float = 2.0**10, **options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_norms_are_in_units_of_the_loss(model, reduction: str, with_optimizer: bool) -> None:
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), _scaler(growth_interval=1)
    monitor = gradstats.attach(
        model, optimizer=optimizer if with_optimizer else None, grad_scaler=scaler, moments=True,
        loss_reduction=reduction,
    )  # fmt: skip
    scales = []
    for _ in range(3):  # the scale doubles after each
        batch = torch.randn(6, 6)
        true = per_sample_gradients(model, loss, batch)
        optimizer.zero_grad()
        for part in batch.split([4, 2]):
            value = loss(model, part) * len(part) / (len(batch) if reduction == "mean" else 1)
            scaler.scale(value).backward()
        assert_matches(monitor.step(), true, 1e-5)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scales.append(scaler.get_scale())
        scaler.update()
    assert scales == [2.0**10, 2.0**11, 2.0**12]


def test_a_disabled_scaler_changes_nothing(model) -> None:
    scaler = _scaler(enabled=False)
    monitor = gradstats.attach(model, grad_scaler=scaler)
    batch = torch.randn(5, 6)
    true = per_sample_gradients(model, loss, batch)
    scaler.scale(loss(model, batch)).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_without_the_scaler_only_absolute_norms_have_its_factor(model) -> None:
    monitor, scaler = gradstats.attach(model), _scaler(8.0)
    batch = torch.randn(5, 6)
    true = per_sample_gradients(model, loss, batch)
    scaler.scale(loss(model, batch)).backward()
    stats = monitor.step()
    assert_matches(stats, {n: 8 * g for n, g in true.items()}, 1e-5)
    flat = torch.cat([g.flatten(1) for g in true.values()], 1)
    tr, mean_sq = flat.var(0).sum(), flat.mean(0).square().sum()
    assert float(stats.noise_scale) == pytest.approx(float(tr / (mean_sq - tr / 5)), rel=1e-4)


def test_unscaled_gradients_are_refused_in_every_step(model) -> None:
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.0), _scaler()
    monitor = gradstats.attach(model, optimizer=optimizer, grad_scaler=scaler)
    for step in range(12):  # by value this is looked for in some steps only
        optimizer.zero_grad()
        scaler.scale(loss(model, torch.randn(5, 6))).backward()
        if step == 10:
            scaler.unscale_(optimizer)
            with pytest.raises(gradstats.OrderError, match=r"unscaled\).*before scaler\.unscale_"):
                monitor.step()
        elif step == 11:
            scaler.step(optimizer)
            with pytest.raises(gradstats.OrderError, match=r"stepped\).*and scaler\.step"):
                monitor.step()
        else:
            monitor.step()
            scaler.step(optimizer)
        if step != 10:
            scaler.update()
        else:
            scaler.step(optimizer)
            scaler.update()
    assert monitor.noise_scale().num_steps == 10


def test_a_scaler_that_scaled_nothing_is_refused(model) -> None:
    monitor = gradstats.attach(model, grad_scaler=_scaler())
    loss(model, torch.randn(5, 6)).backward()
    with pytest.raises(
        gradstats.OrderError, match=r"has not scaled any loss.*scaler\.scale\(loss\)"
    ):
        monitor.step()
    with pytest.raises(gradstats.InvalidArgumentError, match="has no method scale"):
        gradstats.attach(nn.Linear(2, 2), grad_scaler=1024.0)


def _float16_step(model, batch, scaler):
    with torch.autocast("cpu", dtype=torch.float16):
        out = model(batch)
        value = out.float().square().flatten(1).sum(1).mean()
    scaler.scale(value).backward()


def test_float16_with_steps_that_overflow(model) -> None:
    """The scaler skips them and lowers its scale; the monitor leaves them out and counts them."""
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.01), _scaler(2.0**20)
    monitor = gradstats.attach(model, optimizer=optimizer, grad_scaler=scaler)
    torch.manual_seed(1)
    skipped = 0
    for _ in range(20):
        batch = torch.randn(8, 6)
        true = per_sample_gradients(model, lambda m, b: m(b).square().sum(1).mean(), batch)
        optimizer.zero_grad()
        _float16_step(model, batch, scaler)
        stats = monitor.step()
        overflowed = any(not p.grad.isfinite().all() for p in model.parameters())
        assert overflowed == (not math.isfinite(float(stats.tr_sigma)))
        if not overflowed:
            total = sum(g.flatten(1).square().sum(1) for g in true.values())
            assert relative(stats.per_sample_sq_norm, total) < 2e-2
            mean_sq = sum(g.mean(0).square().sum() for g in true.values())
            assert float(stats.grad_sq_norm) == pytest.approx(float(mean_sq), rel=2e-2)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale() < before) == overflowed
        skipped += overflowed
    noise = monitor.noise_scale()
    assert 0 < skipped < 20
    assert (noise.num_skipped, noise.num_steps) == (skipped, 20 - skipped)
    assert f"{skipped} steps left out (not finite" in str(noise)
    assert math.isfinite(noise.value)


def test_bfloat16_autocast_with_a_scaler(model) -> None:
    batch = torch.randn(8, 6)
    true = per_sample_gradients(model, lambda m, b: m(b).square().sum(1).mean(), batch)
    scaler = _scaler(2.0**16)
    monitor = gradstats.attach(model, grad_scaler=scaler)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(batch)
    scaler.scale(out.float().square().sum(1).mean()).backward()
    stats = monitor.step()
    total = sum(g.flatten(1).square().sum(1) for g in true.values())
    assert relative(stats.per_sample_sq_norm, total) < 5e-2
    grad_sq = sum(p.grad.double().div(2.0**16).square().sum() for p in model.parameters())
    assert float(stats.grad_sq_norm) == pytest.approx(float(grad_sq), rel=1e-5)
