"""Optimizers against torch's own, hand-written float64 recurrences and a quadratic with a known answer."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from oracle import per_sample_gradients
from torch import Tensor, nn

import gradstats
from gradstats import BackendError, BatchScaling, InvalidArgumentError, NoStatisticsError, optim
from gradstats.stats import Coverage, GradStats

OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
]


def record(tr: float, sq: float, samples: int) -> GradStats:
    """A record with these unbiased tr Σ and |G|²."""
    grad_sq = torch.tensor(sq + tr / samples, dtype=torch.float64)
    mean_sq = grad_sq + tr * (samples - 1) / samples
    coverage = Coverage(("w",), (1,), torch.tensor([True]))
    return GradStats(samples, 1, mean_sq, grad_sq, torch.empty(0), coverage)


def net(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def backward(model: nn.Module, seed: int, n: int = 8) -> None:
    torch.manual_seed(seed)
    x = torch.randn(n, 5, dtype=next(model.parameters()).dtype)
    model.zero_grad()
    model(x).square().sum(1).mean().backward()


def whole_and_resumed(make, train, place):
    """The optimizers of one run and of one that went on from a file in the middle: same weights, to the bit.

    `make` gives (model, monitor, optimizer), `train` takes that and seeds.
    """
    whole, half, fresh = make(), make(), make()
    train(whole, range(8))
    train(half, range(4))
    torch.save([half[0].state_dict(), half[2].state_dict()], place)
    weights, state = torch.load(place, weights_only=True)
    fresh[0].load_state_dict(weights)
    fresh[2].load_state_dict(state)
    train(fresh, range(4, 8))
    for a, b in zip(whole[0].parameters(), fresh[0].parameters(), strict=True):
        assert torch.equal(a, b)
    return whole[2], fresh[2]


# --- AdaScale -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gain_of_one_is_sgd_to_the_bit(options, dtype):
    ours, theirs = net(dtype), net(dtype)
    one = optim.AdaScale(ours.parameters(), 0.03, base_batch_size=8, **options)
    other = torch.optim.SGD(theirs.parameters(), 0.03, **options)
    for seed in range(6):
        for model in (ours, theirs):
            backward(model, seed)
        one.observe(record(3.0, 0.1 * seed - 0.2, 8))
        one.step()
        other.step()
    assert one.gain == 1.0
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gain():
    def gain(tr, sq, small, large):
        return float(optim.adascale_gain(torch.tensor(tr), torch.tensor(sq), small, large))

    assert gain(8.0, 1.0, 4, 16) == pytest.approx((2 + 1) / (0.5 + 1))
    assert gain(8.0, 0.0, 4, 16) == 4  # noise alone: as many steps as batches
    assert gain(0.0, 1.0, 4, 16) == 1  # no noise: larger batches gain nothing
    assert gain(-1.0, -1.0, 4, 16) == 1
    assert gain(8.0, -3.0, 4, 16) == 4
    assert gain(8.0, 1.0, 16, 4) == pytest.approx(1.5 / 3)
    rule = gradstats.advice.scale_learning_rate(1.0, 4, 16, rule="noise", noise=8.0)
    assert gain(8.0, 1.0, 4, 16) == pytest.approx(rule)


def test_adascale_follows_its_recurrence():
    """θ ← θ − r·η·(momentum sum), r from averages by hand; a schedule by scale-invariant steps."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    half_life, base = 3.0, 4
    ada = optim.AdaScale([weight], 0.05, base_batch_size=base, momentum=0.5, half_life=half_life)
    schedule = torch.optim.lr_scheduler.LambdaLR(ada, lambda t: 1 / (1 + t))
    expected, buffer, invariant = weight.detach().clone(), torch.zeros(2, dtype=torch.float64), 0.0
    seen: list[tuple[float, float]] = []
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        noise = torch.randn(2, generator=generator, dtype=torch.float64)
        tr, sq, n = 5.0 + step, (0.5 if step % 3 else -0.3), 16 if step < 6 else 32
        weight.grad = weight.detach().clone() + noise
        ada.observe(record(tr, sq, n))
        ada.step()
        seen.append((tr, sq))
        weights = [0.5 ** ((len(seen) - 1 - i) / half_life) for i in range(len(seen))]
        mean_tr = sum(w * t for w, (t, _) in zip(weights, seen, strict=True)) / sum(weights)
        mean_sq = sum(w * s for w, (_, s) in zip(weights, seen, strict=True)) / sum(weights)
        mean_sq = max(mean_sq, 0.0)
        r = (mean_tr / base + mean_sq) / (mean_tr / n + mean_sq)
        assert ada.gain == pytest.approx(r, rel=1e-12)
        grad = expected + noise
        buffer = grad if step == 0 else 0.5 * buffer + grad
        expected = expected - r * 0.05 / (1 + math.floor(invariant)) * buffer
        invariant += r
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-14)
        for _ in range(ada.schedule_steps()):
            schedule.step()
        assert schedule.last_epoch == math.floor(invariant)
    assert ada.scale_invariant_steps == pytest.approx(invariant)
    assert ada.schedule_steps() == 0


def test_adascale_takes_fewer_steps_at_a_larger_batch_for_the_same_loss():
    """A quadratic with gradient noise of known covariance: steps of the batch against scale-invariant ones.

    With curvature 1 the mean loss after T small steps at rate η is known; AdaScale at 8 times the batch
    must come to the same loss after T scale-invariant steps, in fewer steps.
    """
    dim, base, rate, spread, target = 40, 4, 0.02, 1.0, 120.0

    def train(batch: int) -> tuple[float, int]:
        weight = nn.Parameter(torch.full((dim,), 1.0, dtype=torch.float64))
        ada = optim.AdaScale([weight], rate, base_batch_size=base)
        generator = torch.Generator().manual_seed(batch)
        steps = 0
        while ada.scale_invariant_steps < target:
            noise = spread * torch.randn(batch, dim, generator=generator, dtype=torch.float64)
            rows = weight.detach() + noise
            weight.grad = rows.mean(0)
            tr, sq = float(rows.var(0).sum()), float(weight.grad.square().sum())
            ada.observe(record(tr, sq - tr / batch, batch))
            ada.step()
            steps += 1
        return float(weight.detach().square().sum()) / 2, steps

    def closed_form(steps: int) -> float:
        keep = (1 - rate) ** 2
        noise = rate**2 * spread**2 / base * dim
        return (dim * keep**steps + noise * (1 - keep**steps) / (1 - keep)) / 2

    small, steps = train(base)
    assert steps == target
    assert small == pytest.approx(closed_form(steps), rel=0.3)
    large, fewer = train(8 * base)
    assert fewer < 0.75 * steps
    assert large == pytest.approx(closed_form(steps), rel=0.3)


def test_what_cannot_be_used_leaves_the_gain_as_it_is():
    ada = optim.AdaScale(net().parameters(), 0.1, base_batch_size=4)
    ada.observe(None)
    assert ada.gain == 1.0
    ada.observe(record(8.0, 1.0, 16))
    known = ada.gain
    ada.observe(None)
    ada.observe(record(math.nan, 1.0, 16))
    ada.observe(record(8.0, math.inf, 16))
    assert ada.gain == known == pytest.approx(2)


def test_adascale_goes_on_exactly_from_a_checkpoint(tmp_path):
    def make():
        model = net()
        monitor = gradstats.attach(model)
        ada = optim.AdaScale(model.parameters(), 0.1, base_batch_size=4, momentum=0.9)
        return model, monitor, ada

    def train(run, seeds):
        model, monitor, ada = run
        for seed in seeds:
            backward(model, seed)
            ada.observe(monitor.step())
            ada.step()
            ada.schedule_steps()

    whole, fresh = whole_and_resumed(make, train, tmp_path / "state")
    assert whole.gain == fresh.gain > 1
    assert whole.scale_invariant_steps == fresh.scale_invariant_steps


def test_adascale_refuses_what_does_not_fit():
    weights = net().parameters
    for options, words in [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"base_batch_size": 0}, "base_batch_size=0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"nesterov": True}, "nesterov=True"),
        ({"half_life": 0}, "half_life=0"),
    ]:
        with pytest.raises(InvalidArgumentError, match=words):
            optim.AdaScale(weights(), **{"lr": 0.1, "base_batch_size": 8, **options})
    ada = optim.AdaScale(weights(), 0.1, base_batch_size=8)
    with pytest.raises(InvalidArgumentError, match="scaled already, by AdaScale"):
        BatchScaling(ada, batch_size=8, rule="linear")
    with pytest.raises(InvalidArgumentError, match="of another optimizer"):
        ada.load_state_dict(torch.optim.SGD(weights(), 0.1).state_dict())


# --- Adam with per-sample variances ---------------------------------------------------------------


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1).mean()


@pytest.mark.parametrize("reference", [1, 3, 8, 100])
@pytest.mark.parametrize("change", ["none", "clipped", "summed", "accumulated"])
def test_second_moment_is_that_of_the_reference_batch(reference, change):
    model, n, lr, decay = net(torch.float64), 8, 0.01, 0.1
    monitor = gradstats.attach(
        model, moments=True, loss_reduction="sum" if change == "summed" else "mean"
    )
    ours = optim.PerSampleAdam(
        model.named_parameters(), lr=lr, weight_decay=decay, reference_batch_size=reference
    )
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 6):
        torch.manual_seed(step)
        x = torch.randn(n, 5, dtype=torch.float64)
        true = per_sample_gradients(model, loss, x)
        model.zero_grad()
        parts = x.split([5, 3]) if change == "accumulated" else [x]
        for part in parts:
            weight = n if change == "summed" else len(part) / n
            (weight * loss(model, part)).backward()
        stats = monitor.step()
        scale = n if change == "summed" else 1.0
        if change == "clipped":
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
            scale = 1e-3 / (norm + 1e-6)
        ours.observe(stats)
        ours.step()
        for name, p in expected.items():
            g, var = scale * true[name].mean(0), scale**2 * true[name].var(0)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * (g**2 + max(1 / reference - 1 / n, 0) * var)
            p.mul_(1 - lr * decay)
            root = (v[name] / (1 - 0.999**step)).sqrt() + 1e-8
            p.sub_(lr * m[name] / (1 - 0.9**step) / root)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-9, atol=1e-10)
            if reference == 1 and change == "none" and step == 1:
                square = ours.state[p]["exp_avg_sq"] / 0.001
                torch.testing.assert_close(square, true[name].square().mean(0))


def test_with_the_batch_as_reference_it_is_adamw():
    ours, theirs = net(torch.float64), net(torch.float64)
    monitor = gradstats.attach(ours, moments=True)
    one = optim.PerSampleAdam(
        ours.named_parameters(), lr=0.01, weight_decay=0.1, reference_batch_size=8
    )
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for seed in range(6):
        backward(ours, seed)
        backward(theirs, seed)
        one.observe(monitor.step())
        one.step()
        other.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_without_new_statistics_the_second_moment_stays():
    model = net()
    monitor = gradstats.attach(model, moments=True)
    adam = optim.PerSampleAdam(model.named_parameters(), lr=0.01)
    backward(model, 0)
    adam.observe(monitor.step())
    adam.step()
    first = model[0].weight
    kept = adam.state[first]["exp_avg_sq"].clone()
    for seed, n in ((1, 8), (2, 1)):
        before = first.detach().clone()
        backward(model, seed, n)
        stats = monitor.step()
        adam.observe(stats if n == 1 else None)
        adam.step()
    assert torch.equal(adam.state[first]["exp_avg_sq"], kept)
    # One step of three went into the second moment, and its bias is corrected for one.
    root = (kept / (1 - 0.999)).sqrt() + 1e-8
    step = 0.01 * adam.state[first]["exp_avg"] / (1 - 0.9**3) / root
    torch.testing.assert_close(first.detach(), before - step)


def test_per_sample_adam_goes_on_exactly_from_a_checkpoint(tmp_path):
    def make():
        model = net()
        named = model.named_parameters()
        return model, gradstats.attach(model, moments=True), optim.PerSampleAdam(named, lr=0.01)

    def train(run, seeds):
        model, monitor, adam = run
        for seed in seeds:
            backward(model, seed)
            adam.observe(monitor.step())
            adam.step()

    whole_and_resumed(make, train, tmp_path / "state")


def test_per_sample_adam_refuses_what_does_not_fit():
    model = net()
    for options, words in [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"reference_batch_size": 0}, "reference_batch_size=0"),
    ]:
        with pytest.raises(InvalidArgumentError, match=words):
            optim.PerSampleAdam(model.named_parameters(), **options)
    with pytest.raises(InvalidArgumentError, match=r"model\.named_parameters\(\)"):
        optim.PerSampleAdam(model.parameters())


def test_per_sample_adam_without_its_statistics():
    model = net()
    adam = optim.PerSampleAdam(model.named_parameters())
    backward(model, 0)
    with pytest.raises(NoStatisticsError, match=r"no variance for parameter '0\.weight'"):
        adam.step()
    with gradstats.attach(model) as monitor:
        backward(model, 0)
        with pytest.raises(NoStatisticsError, match="moments=True"):
            adam.observe(monitor.step())
    other = nn.Linear(5, 2)
    with gradstats.attach(other, moments=True) as monitor:
        other(torch.randn(4, 5)).sum().backward()
        adam.observe(monitor.step())
        with pytest.raises(NoStatisticsError, match="the names of the same model"):
            adam.step()


# --- LARS and LAMB --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_layerwise_optimizers_of_the_extra(name):
    """A layer moves by its own size, whatever its gradient's is, and by the scaled rate."""
    pytest.importorskip("pytorch_optimizer")

    def moved(batch: int, grad: float, size: float) -> float:
        weight = nn.Parameter(size * torch.ones(2, 2))
        weight.grad = grad * torch.ones(2, 2)
        made = getattr(optim, name)([weight], lr=0.001, weight_decay=0.0)
        scaling = BatchScaling(made, batch_size=8, rule="linear")
        scaling.update(batch)
        made.step()
        return size - float(weight.detach()[0, 0])

    one = moved(8, 0.1, 1.0)
    assert one > 0
    assert moved(16, 0.1, 1.0) == pytest.approx(2 * one, rel=1e-3)
    assert moved(8, 0.7, 1.0) == pytest.approx(one, rel=1e-2)
    assert moved(8, 0.1, 2.0) == pytest.approx(2 * one, rel=1e-2)


def test_a_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(BackendError, match=r'gradstats\.optim\.LAMB needs .* "gradstats\[optim\]"'):
        _ = optim.LAMB
    with pytest.raises(AttributeError, match="no attribute 'LOMB'"):
        _ = optim.LOMB


def test_states_are_copied_by_deepcopy():
    ada = optim.AdaScale(net().parameters(), 0.1, base_batch_size=4)
    ada.observe(record(8.0, 1.0, 16))
    assert copy.deepcopy(ada).gain == ada.gain
