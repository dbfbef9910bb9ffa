"""The noise scale in the optimizer's geometry and by curvature, against what is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from biases import assert_unbiased
from models import loss
from oracle import per_sample_gradients
from torch import nn

import gradstats
from gradstats.estimators import noise_scale, readable
from gradstats.geometry import adam_moments, sign_moments

DIM, BATCH = 12, 16


def draws(steps, seed=0):
    """(grad, var) of steps of normal gradients with a known G and diagonal Σ, float64."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.linspace(-1, 1, DIM, dtype=torch.float64)
    sigma = torch.linspace(0.5, 4, DIM, dtype=torch.float64)
    noise = torch.randn(steps, BATCH, DIM, dtype=torch.float64, generator=generator)
    samples = true + sigma * noise
    return samples.mean(1), samples.var(1), true, sigma


def test_adam_moments_are_unbiased_and_their_interval_covers() -> None:
    grads, variances, true, sigma = draws(40_000)
    weight = torch.linspace(0.2, 3, DIM, dtype=torch.float64)
    pairs = np.array([[float(v) for v in adam_moments(g, s, weight, BATCH)]
                      for g, s in zip(grads, variances, strict=True)])  # fmt: skip
    noise, signal = float((weight * sigma**2).sum()), float((weight * true**2).sum())
    assert_unbiased(pairs[:, 0], noise)
    assert_unbiased(pairs[:, 1], signal, known_to=0.007)
    hits = []
    for rows in pairs.reshape(200, 200, 2):
        found = noise_scale(np.full(200, BATCH), rows[:, 0], rows[:, 1])
        hits.append(found.low <= noise / signal <= found.high)
    assert 0.85 <= np.mean(hits) <= 0.97


def test_sign_moments_are_unbiased_for_what_the_signs_gain() -> None:
    grads, variances, true, sigma = draws(20_000, seed=1)
    momentum = true.clone()
    momentum[:3] *= -1  # three signs are wrong
    pairs = np.array([[float(v) for v in sign_moments(g, s, momentum, BATCH)]
                      for g, s in zip(grads, variances, strict=True)])  # fmt: skip
    gain = float((momentum.sign() * true).sum())
    assert_unbiased(pairs[:, 0], float(sigma.sum()), known_to=0.001)
    assert_unbiased(pairs[:, 1], gain, known_to=0.01)
    exact = sign_moments(grads[0], variances[0], true, torch.tensor(BATCH))[1]
    assert float(exact) == pytest.approx(float((true.sign() * grads[0]).sum()))


def test_sign_moments_of_heavy_tails_fall_short_by_what_is_said() -> None:
    """Products of two normal numbers have a kurtosis of 9."""
    generator = torch.Generator().manual_seed(2)
    samples, dim = 64, 50
    shares = []
    for _ in range(1000):
        draw = torch.randn(2, samples, dim, dtype=torch.float64, generator=generator)
        grads = draw[0] * draw[1]
        found = sign_moments(grads.mean(0), grads.var(0), torch.ones(dim), samples)[0]
        shares.append(float(found) / dim)
    error = np.std(shares) / len(shares) ** 0.5
    assert error < 0.0008
    assert 1 - np.mean(shares) == pytest.approx((9 - 3) / (8 * samples), abs=3 * error)


def train(optimizer_of, geometry, steps, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = optimizer_of(model.parameters())
    monitor = gradstats.attach(
        model, optimizer=optimizer, geometry=geometry, moments=True, **options
    )
    for _ in range(steps):
        x = torch.randn(BATCH, 6)
        optimizer.zero_grad()
        loss(model, x).backward()
        monitor.step()
        optimizer.step()
    return model, optimizer, monitor


@pytest.mark.parametrize(
    ("make", "preconditioner"),
    [
        (
            lambda p: torch.optim.Adam(p, 1e-3),
            lambda s: 1 / ((s["exp_avg_sq"] / (1 - 0.999 ** float(s["step"]))).sqrt() + 1e-8),
        ),
        (
            lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
            lambda s: 1 / ((s["max_exp_avg_sq"] / (1 - 0.999 ** float(s["step"]))).sqrt() + 1e-8),
        ),
        (
            lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9),
            lambda s: 1 / (s["square_avg"].sqrt() + 1e-8),
        ),
    ],
    ids=["adam", "amsgrad", "rmsprop"],
)
def test_what_is_followed_is_what_the_definition_says(make, preconditioner) -> None:
    model, optimizer, monitor = train(make, ("plain", "adam", "sign"), 5)
    data = torch.randn(BATCH, 6)
    optimizer.zero_grad()
    loss(model, data).backward()
    monitor.step()
    true = per_sample_gradients(model, loss, data)
    rows = {kind: monitor._geometry._rows(kind)[-1] for kind in ("plain", "adam", "sign")}
    shorter = math.exp(math.lgamma(8) - math.lgamma(7.5)) * math.sqrt(2 / 15)
    for i, (name, param) in enumerate(model.named_parameters()):
        g, state = true[name], optimizer.state[param]
        var, mean = g.var(0), g.mean(0)
        weight = preconditioner(state).double()
        m = state.get("momentum_buffer", state.get("exp_avg")).double()
        wanted = {
            "plain": (var.sum(), mean.square().sum() - var.sum() / BATCH),
            "adam": (
                (weight * var).sum(),
                (weight * (mean.square() - var / BATCH)).sum(),
            ),
            "sign": (var.sqrt().sum() / shorter, (m.sign() * mean).sum()),
        }
        for kind, (noise, signal) in wanted.items():
            assert rows[kind][i][0] == pytest.approx(float(noise), rel=1e-3), (kind, name)
            assert rows[kind][i][1] == pytest.approx(
                float(signal), rel=1e-3, abs=1e-3 * float(noise) / BATCH
            ), (kind, name)
    # The first step had no optimizer state yet.
    assert monitor.noise_scale("adam").num_steps == 5
    assert monitor.layer_noise_scales("plain")["0.weight"].num_steps == 6


def test_steps_by_sign_go_by_the_roots_of_averaged_variances() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9, dampening=0.9)
    monitor = gradstats.attach(
        model, optimizer=optimizer, geometry="sign", moments=True, half_life=math.inf
    )
    variances = {name: [] for name, _ in model.named_parameters()}
    for _ in range(20):
        optimizer.zero_grad()
        loss(model, torch.randn(BATCH, 6) ** 3).backward()  # heavy tails
        stats = monitor.step()
        for name, seen in variances.items():
            seen.append(stats.grad_var[name].double())
        optimizer.step()
    found = monitor.layer_noise_scales("sign")
    factors = []
    for name, seen in variances.items():
        rows = torch.stack(seen)
        jackknife = (20 * rows.mean(0).sqrt() - rows.sqrt().mean(0)).sum() / 19
        norms = rows.sqrt().flatten(1).sum(1)
        factors.append(float(jackknife / norms.mean()))
        # The first step has no momentum, and so no part in the noise scale.
        assert found[name].tr_sigma == pytest.approx(
            factors[-1] * float(norms[1:].mean()), rel=1e-4
        )
        assert found[name].num_steps == 19
    assert max(factors) > 1.2  # for normal gradients 1.017
    noise = monitor.noise_scale("sign")
    assert noise.tr_sigma == pytest.approx(sum(f.tr_sigma for f in found.values()))
    assert noise.value == pytest.approx((noise.tr_sigma / noise.true_grad_sq_norm) ** 2)
    assert noise.low < noise.value < noise.high


def test_sentences_layers_and_resuming() -> None:
    def adam(p):
        return torch.optim.Adam(p, 1e-5)

    model, _, monitor = train(adam, ("adam", "plain", "sign"), 60, tokens_per_sample=4)
    found = monitor.noise_scale("adam")
    assert str(found).startswith("noise scale under Adam's preconditioner ")
    assert found.tokens == 4 * found.value
    assert "noise scale of steps by sign" in str(monitor.noise_scale("sign"))
    assert "at most" in str(monitor.noise_scale("sign"))
    layers = monitor.layer_noise_scales()
    assert set(layers) == {n for n, _ in model.named_parameters()}
    whole = monitor.noise_scale()
    total = sum(v.tr_sigma for v in layers.values())
    assert total == pytest.approx(whole.tr_sigma, rel=1e-4)
    state = json.loads(json.dumps(monitor.state_dict()))
    monitor.detach()
    second = gradstats.attach(
        model, optimizer=adam(model.parameters()), geometry=("adam", "plain", "sign"), moments=True,
        tokens_per_sample=4,
    )  # fmt: skip
    second.load_state_dict(state)
    assert second.noise_scale("adam") == found
    assert second.layer_noise_scales("sign") == monitor.layer_noise_scales("sign")
    del state["geometry"]["roots"]  # of a version that took each step's roots as they are
    second.load_state_dict(state)
    assert second.noise_scale("sign").tr_sigma < monitor.noise_scale("sign").tr_sigma


def test_adam_sees_a_sum_or_a_scaled_loss_as_the_mean() -> None:
    found = []
    for factor, scale in ((1, None), (BATCH, None), (1, 1024.0)):
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        optimizer = torch.optim.Adam(model.parameters(), 0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        monitor = gradstats.attach(
            model, optimizer=optimizer, geometry="adam", moments=True,
            grad_scaler=scaler if scale else None,
            loss_reduction="mean" if factor == 1 else "sum",
        )  # fmt: skip
        for _ in range(10):
            optimizer.zero_grad()
            scaler.scale(factor * model(torch.randn(BATCH, 6)).square().mean()).backward()
            monitor.step()
            scaler.step(optimizer)
            scaler.update()
        found.append(monitor.noise_scale("adam").value)
    assert found == pytest.approx([found[0]] * 3, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"geometry": "adam"}, "needs the elementwise variances"),
        ({"geometry": "sign", "moments": True}, "reads the optimizer's state"),
        ({"geometry": "fisher"}, "geometry='fisher' is not known"),
        ({"geometry": "plain", "per_layer": False}, "needs per_layer=True"),
    ],
)
def test_geometry_misused(options, message: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(gradstats.InvalidArgumentError, match=message):
        gradstats.attach(model, **options)
    assert "forward" not in vars(model)


def test_geometries_that_are_not_followed() -> None:
    monitor = gradstats.attach(nn.Linear(2, 2))
    with pytest.raises(gradstats.InvalidArgumentError, match="no geometry is followed"):
        monitor.noise_scale("adam")
    other = gradstats.attach(nn.Linear(2, 2), geometry="plain")
    with pytest.raises(gradstats.InvalidArgumentError, match=r"follows \('plain',\) here"):
        other.noise_scale("adam")


# --- curvature --------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """½ wᵀHw + bᵀw for each sample's b."""

    def __init__(self, hessian) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, len(hessian), dtype=torch.float64))
        self.register_buffer("hessian", hessian)

    def forward(self, b):
        return 0.5 * self.w @ self.hessian @ self.w + b @ self.w


def quadratic(dim=40):
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(dim, dim, dtype=torch.float64, generator=generator) / dim**0.5
    hessian = root @ root.T + torch.eye(dim, dtype=torch.float64)
    sigma = torch.linspace(2, 3, dim, dtype=torch.float64)
    model = Quadratic(hessian)
    grad = hessian @ model.w.detach()
    truth = {
        "tr_h_sigma": float((hessian.diag() * sigma**2).sum()),
        "g_h_g": float(grad @ hessian @ grad),
        "true_grad_sq_norm": float(grad.square().sum()),
        "tr_sigma": float((sigma**2).sum()),
    }
    return model, sigma, truth


def mean(model, batch):
    return model(batch).mean()


def test_curvature_of_a_quadratic_is_unbiased_and_covered() -> None:
    model, sigma, truth = quadratic()
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(150):
        data = sigma * torch.randn(30, 4, 40, dtype=torch.float64, generator=generator)
        found.append(gradstats.curvature(model, mean, list(data)))
    whole = gradstats.Curvature.merge_all(found)
    for name, wanted in truth.items():
        assert np.mean(getattr(whole, name)) == pytest.approx(wanted, rel=0.01), name
    noise, rate = truth["tr_h_sigma"] / truth["g_h_g"], truth["true_grad_sq_norm"] / truth["g_h_g"]
    assert whole.noise_scale.value == pytest.approx(noise, rel=0.01)
    assert whole.max_learning_rate.value == pytest.approx(rate, rel=0.01)
    assert whole.learning_rate(4) == pytest.approx(rate / (1 + noise / 4), rel=0.01)
    hits = [f.noise_scale.low <= noise <= f.noise_scale.high for f in found]
    assert 0.85 <= np.mean(hits) <= 0.99
    text = str(whole)
    assert text.startswith("noise scale by curvature ")
    assert (
        f"the best learning rate of plain SGD is {readable(whole.max_learning_rate.value)} " in text
    )


def test_curvature_that_differs_from_sample_to_sample() -> None:
    """Linear regression: E H = 2I, so both noise scales agree, and ε_max = ½."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.5)

    def squared(model, batch):
        x, y = batch
        return (model(x).squeeze(1) - y).square().mean()

    batches = []
    for _ in range(3000):
        x = torch.randn(8, 4, dtype=torch.float64)
        batches.append((x, torch.randn(8, dtype=torch.float64)))
    found = gradstats.curvature(model, squared, batches)
    tr, square = 4 * (5 * 1.0 + 4), 4.0
    assert np.mean(found.tr_sigma) == pytest.approx(tr, rel=0.05)
    assert found.noise_scale.low < tr / square < found.noise_scale.high
    assert found.max_learning_rate.low < 0.5 < found.max_learning_rate.high


def test_curvature_leaves_everything_as_it_was_also_under_a_monitor() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    monitor = gradstats.attach(model)
    loss(model, torch.randn(5, 6)).backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    batches = [torch.randn(5, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    with pytest.raises(gradstats.InvalidArgumentError, match=r"monitor\.curvature"):
        gradstats.curvature(model, loss, batches)
    found = monitor.curvature(loss, batches)
    assert len(found.g_h_g) == 4
    assert all(math.isfinite(v) for v in (*found.tr_h_sigma, *found.g_h_g))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert monitor.step().num_samples == 5


def test_curvature_refuses_what_it_cannot_use() -> None:
    model, *_ = quadratic()
    two = [torch.randn(4, 40).double() for _ in range(2)]
    with pytest.raises(gradstats.InvalidArgumentError, match=r"three batches.*got 2 of \[4\]"):
        gradstats.curvature(model, mean, two)
    with pytest.raises(gradstats.InvalidArgumentError, match=r"got 3 of \[4, 5\]"):
        gradstats.curvature(model, mean, [*two, torch.randn(5, 40).double()])
    a = gradstats.curvature(model, mean, [*two, two[0]])
    b = gradstats.curvature(model, mean, [t[:3] for t in (*two, two[0])])
    with pytest.raises(gradstats.InvalidArgumentError, match="batches of 4 and 3 samples"):
        a.merge(b)


def test_a_backward_that_cannot_be_differentiated_is_refused() -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(gradstats.UnsupportedLayerError, match=r"'weight' \(1, 3\) depends on no"):
        gradstats.curvature(model, lambda m, x: m(x).mean(), list(torch.randn(4, 5, 3)))

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    with pytest.raises(gradstats.UnsupportedLayerError, match="once_differentiable"):
        gradstats.curvature(
            model, lambda m, x: (m(x) + Once.apply(m(x)).tanh()).mean(), list(torch.randn(4, 5, 3))
        )


def test_downward_curvature_has_no_best_rate() -> None:
    model, sigma, _ = quadratic()
    model.hessian.neg_()
    data = sigma * torch.randn(15, 4, 40, dtype=torch.float64)
    found = gradstats.curvature(model, mean, list(data))
    assert "no upward curvature along the gradient" in str(found)
    assert found.learning_rate(1e9) == math.inf
