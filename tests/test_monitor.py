"""The monitor in a loop: the closed form, resuming, records, a rule of the user's own."""

from __future__ import annotations

import json

import pytest
import torch
from biases import assert_unbiased
from models import loss
from oracle import assert_matches, per_sample_gradients
from torch import nn

import gradstats
from gradstats.cadence import measures


def _regression(dim: int, noise: float, seed: int):
    """y = x·w* + ε: tr Σ = 4[(d+1)|δ|² + d·σ²], |G|² = 4|δ|², and B_noise their ratio."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(dim, 1, bias=False)
    delta = torch.randn(dim, generator=generator) * 0.5
    nn.init.zeros_(model.weight)
    target = -delta

    def draw(n: int):
        x = torch.randn(n, dim, generator=generator)
        return x, x @ target + noise * torch.randn(n, generator=generator)

    square = float(delta.square().sum())
    tr_sigma = 4 * ((dim + 1) * square + dim * noise**2)
    return model, draw, tr_sigma, 4 * square


def test_closed_form_regression_is_unbiased_and_covered() -> None:
    model, draw, tr_sigma, grad_sq = _regression(8, 1.5, 0)
    monitor = gradstats.attach(model)
    for _ in range(4000):
        x, y = draw(32)
        model.zero_grad()
        (model(x).squeeze(1) - y).square().mean().backward()
        monitor.step()
    noise = monitor.noise_scale()
    counts, traces, squares = monitor._read()
    assert set(counts) == {32}
    assert_unbiased(traces, tr_sigma, known_to=0.006)
    assert_unbiased(squares, grad_sq, known_to=0.02)
    assert noise.low < tr_sigma / grad_sq < noise.high
    assert noise.high / noise.low < 1.2


def test_resuming_is_exact() -> None:
    def steps(model, draw, monitor, n):
        for _ in range(n):
            x, y = draw(16)
            model.zero_grad()
            (model(x).squeeze(1) - y).square().mean().backward()
            monitor.step()

    model, draw, *_ = _regression(5, 1.0, 1)
    monitor = gradstats.attach(model, every=2)
    steps(model, draw, monitor, 9)
    state = json.loads(json.dumps(monitor.state_dict()))
    monitor.detach()
    second = gradstats.attach(model, every=2)
    second.load_state_dict(state)
    assert second.noise_scale() == monitor.noise_scale()
    assert second.recommend().batch_size == monitor.recommend().batch_size
    assert second._source.interposer.enabled == monitor._source.interposer.enabled
    steps(model, draw, second, 3)
    assert second.noise_scale().num_steps == monitor.noise_scale().num_steps + 1


def test_sparse_steps_are_as_many_in_each_doubling() -> None:
    model, draw, *_ = _regression(3, 1.0, 1)
    monitor = gradstats.attach(model, every="sparse")
    measured = []
    for step in range(600):
        if step == 300:  # a resumed run leaves out the same steps
            state = json.loads(json.dumps(monitor.state_dict()))
            monitor.detach()
            monitor = gradstats.attach(model, every="sparse")
            monitor.load_state_dict(state)
        x, y = draw(4)
        model.zero_grad()
        (model(x).squeeze(1) - y).square().mean().backward()
        if monitor.step() is not None:
            measured.append(step)
    octaves = [(0, 32), (32, 64), (64, 128), (128, 256), (256, 512)]
    assert [sum(a <= s < b for s in measured) for a, b in octaves] == [32] * 5
    assert sum(measures(s, "sparse") for s in range(64_000, 128_000)) == 1000


def test_recommendation_reads_the_optimizer() -> None:
    model, draw, *_ = _regression(8, 1.0, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0625)
    monitor = gradstats.attach(model, optimizer=optimizer)
    for _ in range(300):
        x, y = draw(16)
        optimizer.zero_grad()
        (model(x).squeeze(1) - y).square().mean().backward()
        monitor.step()
    advice = monitor.recommend()
    assert advice.present_batch_size == 16
    assert advice.learning_rate is not None
    assert advice.micro_batch_size * advice.accumulation_steps == advice.batch_size
    assert str(advice.batch_size) in str(advice)
    assert monitor.recommend(learning_rate=1.0).learning_rate > advice.learning_rate


def test_an_epochs_last_batch_is_not_the_present_batch_size() -> None:
    model, draw, *_ = _regression(8, 1.0, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = gradstats.attach(model, optimizer=optimizer)
    assert monitor.batch_size is None
    for step in range(60):
        x, y = draw(3 if step % 6 == 5 else 16)
        optimizer.zero_grad()
        (model(x).squeeze(1) - y).square().mean().backward()
        monitor.step()
    assert monitor.batch_size == monitor.recommend().present_batch_size == 16
    other = gradstats.attach(nn.Linear(8, 1, bias=False))
    other.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert other.batch_size == 16


def test_records_merge_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    monitor = gradstats.attach(model, moments=True)
    records, grads = [], []
    for n in (3, 5, 2):
        data = torch.randn(n, 4)
        truth = per_sample_gradients(model, loss, data)
        grads.append(torch.cat([g.reshape(n, -1) for g in truth.values()], 1))
        model.zero_grad()
        loss(model, data).backward()
        records.append(monitor.step())
    a, b, c = records
    merged = a.merge(b).merge(c)
    within = sum((g - g.mean(0)).square().sum() for g in grads)
    assert merged.num_samples == 10
    assert float(merged.tr_sigma) == pytest.approx(float(within) / (10 - 3), rel=1e-4)
    other = a.merge(b.merge(c))
    for name in ("mean_sq_norm", "grad_sq_norm", "tr_sigma", "true_grad_sq_norm"):
        torch.testing.assert_close(getattr(merged, name), getattr(other, name))
    torch.testing.assert_close(merged.per_sample_sq_norm, torch.cat(
        [r.per_sample_sq_norm for r in records]))  # fmt: skip
    total = sum(float(v.sum()) for v in merged.grad_var.values())
    assert total == pytest.approx(float(merged.tr_sigma), rel=1e-4)
    assert torch.equal(gradstats.GradStats.merge_all(records).tr_sigma, merged.tr_sigma)
    other = nn.Linear(2, 2)
    with gradstats.attach(other) as stranger:
        other(torch.randn(3, 2)).sum().backward()
        with pytest.raises(gradstats.InvalidArgumentError, match="different models"):
            a.merge(stranger.step())


def test_layers_add_up_and_can_be_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    data = torch.randn(5, 4)
    with gradstats.attach(model, moments=True) as monitor:
        loss(model, data).backward()
        stats = monitor.step()
    for field in ("mean_sq_norm", "grad_sq_norm", "tr_sigma", "true_grad_sq_norm"):
        parts = sum(getattr(layer, field) for layer in stats.layers.values())
        torch.testing.assert_close(parts, getattr(stats, field), rtol=1e-4, atol=1e-5)
    for name, layer in stats.layers.items():
        torch.testing.assert_close(stats.grad_var[name].sum(), layer.tr_sigma, rtol=1e-4, atol=1e-5)
    with gradstats.attach(model, per_layer=False) as monitor:
        model.zero_grad()
        loss(model, data).backward()
        assert monitor.step().layers == {}


def test_add_a_rule() -> None:
    from gradstats.rules import RULES

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return torch.hypot(x, self.w)

    def spread_it(use, func, x, w):
        from gradstats.rules.elementwise import spread

        return func(x, spread(use, w, use.mark(w), x.dim()))

    gradstats.rule(torch.hypot)(spread_it)
    try:
        model, data = Half(), torch.randn(5, 3)
        true = per_sample_gradients(model, loss, data)
        monitor = gradstats.attach(model)
        loss(model, data).backward()
        assert_matches(monitor.step(), true, 1e-5)
        assert not monitor._source.interposer.fallbacks
    finally:
        del RULES[torch.hypot]
