"""|G|² from a momentum buffer: unbiased, covered, and never used where it is something else."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import gradstats
from gradstats.estimators import noise_scale
from gradstats.momentum import (
    BufferWeights,
    Freshness,
    MomentumStep,
    compare,
    momentum_grad_sq_norm,
)

DIM, BATCH, TR, SQ = 24, 16, 400.0, 1.0  # B_noise = 400


def run_of(steps, rng, decay=0.9, entry=0.1, first=None, turn=0.0, batch=BATCH):
    """Gaussian gradients with |G|² = 1 and tr Σ = 400; G turns by `turn` radians a step."""
    scale = np.sqrt(TR / DIM / batch)
    grads = scale * rng.standard_normal((steps, DIM))
    angle = turn * np.arange(steps)
    grads[:, 0] += np.cos(angle)
    grads[:, 1] += np.sin(angle)
    found, buffer = [], None
    for grad in grads:
        before = None if buffer is None else float(buffer @ buffer)
        inner = 0.0 if buffer is None else float(buffer @ grad)
        weight = entry if buffer is not None or first is None else first
        found.append(MomentumStep(batch, TR, float(grad @ grad), before, inner, decay, weight))
        buffer = weight * grad if buffer is None else decay * buffer + weight * grad
    return found


@pytest.mark.parametrize(
    ("decay", "entry", "first"),
    [(0.9, 0.1, None), (0.9, 1.0, 1.0), (0.8, 0.5, 1.0), (0.98, 0.02, None)],
    ids=["adam", "sgd", "dampening", "long"],
)
def test_both_estimates_are_unbiased_once_the_buffer_is_filled(decay, entry, first):
    rng = np.random.default_rng(0)
    steps = 40 if decay < 0.95 else 80
    runs = np.array(
        [momentum_grad_sq_norm(run_of(steps, rng, decay, entry, first)) for _ in range(3000)]
    )
    held = entry * np.cumsum(decay ** np.arange(steps - 1))  # W before the steps from the second on
    if first is not None:
        held += (first - entry) * decay ** np.arange(steps - 1)
    filled = held * (1 - decay) >= (1 - math.exp(-1)) * entry
    assert 0 < filled.sum() < steps - 1 or decay == 0.8
    known = np.isfinite(runs).all(axis=(0, 1))
    assert known.tolist() == [False, *filled]
    mean, error = runs[:, :, known].mean(axis=0), runs[:, :, known].std(axis=0) / len(runs) ** 0.5
    assert (np.abs(mean - SQ) < 4.5 * error).all()


@pytest.mark.parametrize("decay", [0.9, 0.95])
def test_a_long_run_is_unbiased_and_steadier_than_single_steps(decay):
    rng = np.random.default_rng(1)
    steps = run_of(60_000, rng, decay, 1 - decay)
    own, cross = (np.array(v)[100:] for v in momentum_grad_sq_norm(steps))
    single = np.array([s.grad_sq_norm - TR / BATCH for s in steps])[100:]
    blocks = [v[:59_900].reshape(-1, 100).mean(1) for v in (own, cross, single)]
    for block in blocks[:2]:  # of a hundred steps, and so nearly independent
        error = block.std() / len(block) ** 0.5
        assert error < 0.02
        assert abs(block.mean() - SQ) < 3 * error
    assert blocks[0].std() < 0.6 * blocks[2].std()


@pytest.mark.parametrize(("decay", "steps"), [(0.9, 80), (0.9, 200), (0.98, 200)])
def test_interval_covers_also_where_the_buffer_remembers_much_of_the_run(decay, steps):
    rng = np.random.default_rng(2)
    known, without = [], []
    for _ in range(400):
        own, _ = momentum_grad_sq_norm(run_of(steps, rng, decay, 1 - decay))
        columns = [BATCH] * steps, rng.normal(TR, 40, steps), own
        for hits, told in ((known, decay), (without, 0.0)):
            noise = noise_scale(*columns, decay=told)
            hits.append(noise.low <= TR / SQ <= noise.high)
    assert 0.86 <= np.mean(known) <= 0.99
    if decay == 0.98:  # what it is for
        assert np.mean(without) < 0.8


@pytest.mark.parametrize(
    ("turn", "batch", "stale"), [(0.0, 256, False), (0.1, 256, True), (0.1, 2, None)]
)
def test_staleness_is_seen_where_the_gradient_turns_and_not_where_it_stands(turn, batch, stale):
    rng = np.random.default_rng(3)
    found = []
    for _ in range(100):
        steps = run_of(400, rng, turn=turn, batch=batch)
        own, cross = momentum_grad_sq_norm(steps)
        seen = compare(own, [s.grad_sq_norm - TR / batch for s in steps], half_life=500)
        found.append(seen.stale)
        if (
            turn and batch == 256
        ):  # |G|² is 1: the buffer and its product with the gradient miss half of it
            assert np.nanmean(own) < 0.65
            assert np.nanmean(cross) < 0.65
            assert seen.bound > 1.5
    assert np.mean([f is stale for f in found]) >= 0.85


def test_staleness_needs_steps_and_takes_exact_agreement():
    assert compare([], [], half_life=10.0) == Freshness(None, math.inf)
    assert compare([1.0] * 5, [1.1] * 5, half_life=10.0).stale is None
    assert compare([1.0] * 50, [1.0] * 50, half_life=10.0) == Freshness(False, 1.0)
    assert compare([-1.0] * 50, [1.0] * 50, half_life=10.0).stale is None


def test_a_buffer_that_is_something_else_is_not_used_until_it_faded():
    rng = np.random.default_rng(4)
    steps = run_of(200, rng)
    weights = BufferWeights()
    found = []
    for i, step in enumerate(steps):
        if i == 50:  # the one before was clipped, say
            step = step._replace(buffer_sq_norm=0.9 * step.buffer_sq_norm)
        found.append(weights.follow(step)[0])
    assert weights.breaks == 2  # when it became other, and when it was the true one again
    known = np.isfinite(found)
    assert not known[:10].any()  # 0.9^10 < 1/e < 0.9^9
    assert known[10:50].all()
    assert not known[50:95].any()  # 0.9^44 > 0.01 > 0.9^45
    assert known[97:].all()


def test_a_step_that_was_left_out_changes_nothing():
    weights = BufferWeights()
    steps = run_of(30, np.random.default_rng(5))
    for step in steps[:20]:
        weights.follow(step)
    kept = weights.total, weights.noise
    same = steps[19]._replace(grad_sq_norm=math.nan, inner=math.nan)
    weights.follow(same)  # as after a step that overflowed
    weights.follow(same)
    assert (weights.breaks, weights.unknown) == (0, 0.0)
    assert (weights.total, weights.noise) == kept or weights.total > kept[0]


# --- with real optimizers ---------------------------------------------------------------------


def train(optimizer_of, steps=60, clip=None, options=None, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = optimizer_of(model.named_parameters())
    monitor = gradstats.attach(
        model, optimizer=optimizer, from_momentum=True, moments=True, **(options or {})
    )
    grads = []
    for _ in range(steps):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        (model(x) - x[:, :2]).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
        stats = monitor.step()
        if hasattr(optimizer, "observe"):
            optimizer.observe(stats)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return monitor, grads


@pytest.mark.parametrize(
    ("optimizer_of", "weights"),
    [
        (lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9), lambda s: 0.9**s),
        (lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9, nesterov=True), lambda s: 0.9**s),
        (
            lambda p: torch.optim.SGD(p, 1e-4, momentum=0.8, dampening=0.5),
            lambda s: 0.8**s * (0.5 if s < 58 else 1.0),
        ),
        (lambda p: torch.optim.Adam(p, 1e-5), lambda s: 0.9**s),
        (
            lambda p: torch.optim.AdamW(p, 1e-5, weight_decay=0.1, betas=(0.8, 0.99)),
            lambda s: 0.8**s,
        ),
        (lambda p: gradstats.optim.PerSampleAdam(p, 1e-5), lambda s: 0.9**s),
        (
            lambda p: gradstats.optim.AdaScale(
                (q for _, q in p), 1e-4, base_batch_size=8, momentum=0.9
            ),
            lambda s: 0.9**s,
        ),
    ],
    ids=["sgd", "nesterov", "dampening", "adam", "adamw", "per_sample_adam", "adascale"],
)
def test_buffers_of_optimizers_are_read_as_they_are(optimizer_of, weights) -> None:
    monitor, grads = train(optimizer_of)
    reader = monitor._momentum
    reader._read()
    assert (reader._weights.breaks, reader._weights.unknown) == (0, 0.0)
    counts, traces, _ = monitor._read()
    w = torch.tensor([weights(s) for s in range(59)], dtype=torch.float64).flip(0)
    mean = (w[:, None] * torch.stack(grads[:59])).sum(0) / w.sum()
    noise = (w.square().sum() / w.sum() ** 2) * traces[-1] / counts[-1]
    assert reader._found[-1] == pytest.approx(
        float(mean.square().sum() - noise), rel=1e-3, abs=1e-7
    )
    inner = reader._weights.last[4] / reader._weights.total
    assert inner == pytest.approx(float(mean @ grads[-1]), rel=1e-3, abs=1e-7)
    assert "momentum buffer" in str(monitor.noise_scale())


@pytest.mark.parametrize("name", ["clipped", "decay changed"])
def test_a_buffer_of_other_gradients_is_noticed(name: str) -> None:
    if name == "clipped":
        monitor, _ = train(lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9), clip=1e-2)
    else:

        class Sly(torch.optim.SGD):
            def step(self, closure=None):
                self.param_groups[0]["momentum"] = 0.5
                found = super().step(closure)
                self.param_groups[0]["momentum"] = 0.9
                return found

        monitor, _ = train(lambda p: Sly(p, 1e-4, momentum=0.9))
    noise = monitor.noise_scale()
    assert (
        "|G|² from single steps: the buffer does not average the measured gradients" in noise.note
    )
    assert monitor._momentum._weights.breaks > 50
    plain = noise_scale(*monitor._read(), half_life=500.0)
    assert noise.value == plain.value


def test_changed_betas_are_followed() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    monitor = gradstats.attach(model, optimizer=optimizer, from_momentum=True)
    for step in range(40):
        optimizer.param_groups[0]["betas"] = (0.9 if step < 20 else 0.7, 0.999)
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        monitor.step()
        optimizer.step()
    monitor.noise_scale()
    assert monitor._momentum._weights.breaks == 0


def test_attached_in_the_middle_it_waits_for_the_past_to_fade() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def steps(count, monitor=None):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(16, 8)).square().mean().backward()
            if monitor is not None:
                monitor.step()
            optimizer.step()

    steps(10)
    monitor = gradstats.attach(model, optimizer=optimizer, from_momentum=True)
    steps(40, monitor)
    assert "holds too few steps yet" in monitor.noise_scale().note
    steps(30, monitor)
    assert "momentum buffer" in monitor.noise_scale().note
    assert monitor._momentum._weights.breaks == 0


def test_a_grad_scaler_does_not_matter() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    plain = copy.deepcopy(model)
    found = []
    for net, factor in ((plain, 1.0), (model, 1024.0)):
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=factor, growth_interval=10**6)
        monitor = gradstats.attach(net, optimizer=optimizer, from_momentum=True, grad_scaler=scaler)
        generator = torch.Generator().manual_seed(1)
        for _ in range(30):
            optimizer.zero_grad()
            x = torch.randn(16, 8, generator=generator)
            scaler.scale(net(x).square().mean()).backward()
            monitor.step()
            scaler.step(optimizer)
            scaler.update()
        found.append(monitor.noise_scale())
        assert monitor._momentum._weights.breaks == 0
    assert found[0].true_grad_sq_norm == pytest.approx(found[1].true_grad_sq_norm, rel=1e-4)


def test_resuming_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def steps(monitor):
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(16, 8)).square().mean().backward()
            monitor.step()
            optimizer.step()

    monitor = gradstats.attach(model, optimizer=optimizer, from_momentum=True)
    steps(monitor)
    state = json.loads(json.dumps(monitor.state_dict()))
    second = monitor
    monitor.detach()
    second = gradstats.attach(model, optimizer=optimizer, from_momentum=True)
    second.load_state_dict(state)
    assert second.noise_scale() == monitor.noise_scale()
    steps(second)
    second.noise_scale()
    assert second._momentum._weights.breaks == 0
    assert len(second._momentum._found) == 40


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), {"every": 2}, r"every=1 \(not 2\)"),
        (lambda p: None, {}, r"needs attach\(optimizer=...\)"),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), {"loss_reduction": "sum"}, "not 'sum'"),
        (lambda p: torch.optim.SGD(p, 0.1), {}, "SGD must have momentum or betas"),
        (
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
            {},
            "SGD adds weight_decay=0.1 to the gradient",
        ),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), {}, r"decoupled weight decay \(AdamW\)"),
    ],
)
def test_misuse(make, options, message: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(gradstats.InvalidArgumentError, match=message):
        gradstats.attach(model, optimizer=make(model.parameters()), from_momentum=True, **options)
    assert "forward" not in vars(model)
