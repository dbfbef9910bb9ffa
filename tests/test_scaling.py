"""Learning-rate rules by hand, and their factor under torch's learning-rate schedulers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as lrs

from gradstats import BatchScaling, InvalidArgumentError
from gradstats.advice import scale_learning_rate
from gradstats.rates import half_life, noise_learning_rate, scale_decay, warm_up
from gradstats.schedulers import batch_for_momentum

# --- the rules: pure numbers ----------------------------------------------------------------------


def test_noise_learning_rate():
    assert noise_learning_rate(0.8, 100, 300) == pytest.approx(0.2)
    assert noise_learning_rate(0.8, 100, math.inf) == 0
    assert noise_learning_rate(0.8, 100, 0) == 0.8
    # It is the rule by which a rate is scaled from batch to batch.
    scaled = scale_learning_rate(
        noise_learning_rate(0.8, 64, 300), 64, 256, rule="noise", noise=300
    )
    assert scaled == pytest.approx(noise_learning_rate(0.8, 256, 300))


def test_warm_up():
    assert [warm_up(s, 100, 1.0, 3.0) for s in (-5, 0, 25, 100, 200)] == [1.0, 1.0, 1.5, 3.0, 3.0]
    assert warm_up(0, 0, 1.0, 3.0) == 3.0


def test_half_life():
    assert half_life(0.5, 32) == pytest.approx(32)
    assert half_life(0.999, 512) == pytest.approx(512 * math.log(0.5) / math.log(0.999))
    assert half_life(0.0, 8) == 0
    assert half_life(1.0, 8) == math.inf


@settings(deadline=None)
@given(st.floats(0.01, 0.9999), st.integers(1, 10_000), st.integers(1, 10_000))
def test_a_decay_keeps_its_half_life(decay, start, end):
    scaled = scale_decay(decay, start, end)
    assert 0 <= scaled <= 1
    if 1e-12 < scaled < 1 - 1e-9:
        assert half_life(scaled, end) == pytest.approx(half_life(decay, start), rel=1e-5)


def stationary_variance(rate, momentum, batch, curvature=1.0):
    """Of SGD with momentum on a parabola whose gradient has noise of variance 1/batch: an AR(2) process."""
    first, second = 1 + momentum - rate * curvature, -momentum
    noise = rate**2 / batch
    return noise * (1 - second) / ((1 + second) * ((1 - second) ** 2 - first**2))


def decay_per_sample(rate, momentum, batch, curvature=1.0):
    """Logarithm of what a sample leaves of the distance to the minimum: of the slower root."""
    first = 1 + momentum - rate * curvature
    return math.log((first + math.sqrt(first**2 - 4 * momentum)) / 2) / batch


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("times", [2, 4])
def test_scaled_hyperparameters_leave_noise_and_speed_as_they_were(momentum, times):
    """The linear rule with momentum's half-life: same drift per sample, same scatter, on a parabola."""
    scaled = optimizer(momentum=momentum)
    scaled.param_groups[0]["lr"] = 1e-4
    scaling = BatchScaling(scaled, batch_size=16, rule="linear", half_life=("momentum",))
    scaling.update(16 * times)
    scaled.step()
    rate, new = scaled.seen[0][0]
    found, expected = (rate, new, 16 * times), (1e-4, momentum, 16)
    assert decay_per_sample(*found) == pytest.approx(decay_per_sample(*expected), rel=0.01)
    assert stationary_variance(*found) == pytest.approx(stationary_variance(*expected), rel=0.01)


def test_a_larger_batch_makes_up_for_more_momentum():
    batch = batch_for_momentum(64, 0.9, 0.98)
    found, expected = (1e-6, 0.98, batch), (1e-6, 0.9, 64)
    assert stationary_variance(*found) == pytest.approx(stationary_variance(*expected), rel=0.01)
    assert decay_per_sample(*found) == pytest.approx(decay_per_sample(*expected), rel=0.01)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: noise_learning_rate(-1.0, 8, 8), "max_learning_rate=-1.0"),
        (lambda: noise_learning_rate(1.0, 0, 8), "batch_size=0"),
        (lambda: noise_learning_rate(1.0, 8, math.nan), "noise=nan"),
        (lambda: warm_up(1, -1, 0, 1), "over=-1"),
        (lambda: half_life(1.5, 8), "decay=1.5"),
        (lambda: half_life(0.5, 0), "batch_size=0"),
        (lambda: scale_decay(0.5, 0, 8), "from_batch, to_batch"),
    ],
)
def test_out_of_range(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()


# --- under schedulers ----------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: lrs.StepLR(o, 3),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.2, total_steps=14),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=4), lrs.CosineAnnealingLR(o, 6)], [4]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.5, 3), lrs.ExponentialLR(o, 0.9)]
    ),
}


class Recorder(torch.optim.SGD):
    """Remembers the hyperparameters that its steps saw."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def step(self, closure=None):
        self.seen.append([(float(g["lr"]), g["momentum"]) for g in self.param_groups])
        return super().step(closure)


def optimizer(kind=Recorder, **options):
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones(2)
    groups = [{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]], "lr": 0.02}]
    return kind(groups, **({"lr": 0.1, "momentum": 0.9} | options))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_factor_is_there_in_every_step_once_and_the_scheduler_knows_nothing(name):
    plain, scaled = optimizer(), optimizer()
    schedules = [SCHEDULERS[name](plain), SCHEDULERS[name](scaled)]
    scaling = BatchScaling(scaled, batch_size=32, rule="linear")
    sizes = [32, 32, 64, 64, 128, 16, 16, 96, 96, 96, 96, 32]
    for size in sizes:
        scaling.update(size)
        expected = [g["lr"] * size / 32 for g in scaled.param_groups]
        assert scaling.learning_rates() == expected
        for one, schedule in zip((plain, scaled), schedules, strict=True):
            one.step()
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    for size, a, b in zip(sizes, plain.seen, scaled.seen, strict=True):
        assert [lr * size / 32 for lr, _ in a] == [lr for lr, _ in b]
        assert [m for _, m in a] == [m for _, m in b]
    states = [_plain(schedule.state_dict()) for schedule in schedules]
    assert states[0] == states[1]
    assert plain.state_dict()["param_groups"] == scaled.state_dict()["param_groups"]


def _plain(state):
    """A scheduler's state as values: the schedulers inside, functions by their name."""
    if isinstance(state, dict):
        return {k: _plain(v) for k, v in state.items() if not callable(v)}
    if isinstance(state, (list, tuple)):
        return [_plain(v) for v in state]
    return _plain(state.state_dict()) if hasattr(state, "state_dict") else state


def test_momentum_of_a_cycle_keeps_its_half_life():
    scaled = optimizer()
    schedule = lrs.OneCycleLR(scaled, 0.2, total_steps=6)
    scaling = BatchScaling(scaled, batch_size=32, rule=None, half_life=("momentum",))
    scaling.update(64)
    momenta = []
    for _ in range(6):
        momenta.append(scaled.param_groups[0]["momentum"])
        scaled.step()
        if len(momenta) < 6:
            schedule.step()
    assert len(set(momenta)) > 2
    assert [m for ((_, m), _) in scaled.seen] == pytest.approx([m**2 for m in momenta])


def test_undamped_momentum_takes_its_share_of_the_rate():
    """Over a long run each gradient moves the weights by lr/(1 − m), which is what rules speak of."""
    scaled = optimizer(momentum=0.5)
    scaling = BatchScaling(scaled, batch_size=32, rule="linear", half_life=("momentum",))
    scaling.update(64)
    scaled.step()
    assert scaled.seen[0][0] == pytest.approx((0.1 * 2 * (1 - 0.25) / (1 - 0.5), 0.25))
    damped = optimizer(momentum=0.5, dampening=0.5)
    scaling = BatchScaling(damped, batch_size=32, rule="linear", half_life=("momentum",))
    scaling.update(64)
    damped.step()
    assert damped.seen[0][0] == pytest.approx((0.1 * 2, 0.25))


@pytest.mark.parametrize(
    ("kind", "options", "key", "expected"),
    [
        (torch.optim.Adam, {"betas": (0.9, 0.99)}, "betas", (0.9**4, 0.99**4)),
        (torch.optim.RMSprop, {"alpha": 0.99}, "alpha", 0.99**4),
    ],
)
def test_betas_keep_their_half_life(kind, options, key, expected):
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    scaled = kind([weight], lr=0.1, **options)
    scaling = BatchScaling(scaled, batch_size=8, rule="sqrt", half_life=("momentum", "beta2"))
    seen = []
    scaled.register_step_pre_hook(lambda o, *_: seen.append(dict(o.param_groups[0])))
    before = copy.deepcopy(scaled.state_dict()["param_groups"])
    scaling.update(32)
    scaled.step()
    assert seen[0]["lr"] == pytest.approx(0.2)
    assert seen[0][key] == pytest.approx(expected)
    assert scaled.state_dict()["param_groups"] == before


def test_a_rate_held_in_a_tensor_is_scaled_in_that_tensor():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    rate = torch.tensor(0.1)
    sgd = torch.optim.SGD([weight], lr=rate, foreach=True)
    scaling = BatchScaling(sgd, batch_size=1, rule="linear")
    scaling.update(3)
    sgd.step()
    assert weight.tolist() == pytest.approx([0.7, 0.7])
    assert sgd.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1)


def test_a_step_that_a_grad_scaler_leaves_out():
    weight = nn.Parameter(torch.ones(1))
    scaled = Recorder([weight], lr=0.1)
    scaling = BatchScaling(scaled, batch_size=8, rule="linear", warm_up=32)
    scaling.update(16)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    for grad in (1.0, math.inf, 1.0, 1.0):
        weight.grad = None
        scaler.scale(grad * weight.sum()).backward()
        scaler.step(scaled)
        scaler.update()
    # The warm-up goes by samples that were stepped on.
    assert [lr for ((lr, _),) in scaled.seen] == pytest.approx([0.1, 0.15, 0.2])
    assert scaled.param_groups[0]["lr"] == 0.1


def test_a_compiled_step():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    sgd = torch.optim.SGD([weight], lr=0.1)
    scaling = BatchScaling(sgd, batch_size=8, rule="linear")
    step = torch.compile(lambda: sgd.step(), backend="eager")
    for size in (16, 24):
        scaling.update(size)
        step()
    assert weight.tolist() == pytest.approx([0.5, 0.5])
    assert sgd.param_groups[0]["lr"] == 0.1


def test_warm_up_to_a_larger_factor_and_at_once_to_a_smaller():
    scaled = optimizer()
    scaling = BatchScaling(scaled, batch_size=10, rule="linear", warm_up=100)
    scaling.update(40)
    for _ in range(4):
        scaled.step()
    scaling.update(20)
    scaled.step()
    factors = [group[0][0] / 0.1 for group in scaled.seen]
    assert factors == pytest.approx([1, 2.2, 3.4, 4, 2])


def test_a_noise_scale_that_moves_on_does_not_start_the_warm_up_again():
    scaled = optimizer()
    scaling = BatchScaling(scaled, batch_size=10, rule="noise", warm_up=100)
    for noise in (90.0, 91.0, 89.0, 90.0):
        scaling.update(40, noise)
        scaled.step()
    assert scaling.factor == pytest.approx(scale_learning_rate(1, 10, 40, rule="noise", noise=90))


def test_an_unknown_noise_scale_gives_the_lowest_rate_and_is_then_remembered():
    scaling = BatchScaling(optimizer(), batch_size=32, rule="noise")
    assert scaling.update(64, math.nan) == 1.0
    assert scaling.update(16) == 0.5
    known = scaling.update(64, 100.0)
    assert known == pytest.approx((1 + 100 / 32) / (1 + 100 / 64))
    assert scaling.update(64, math.nan) == known
    assert scaling.update(64, math.inf) == 2.0


def test_a_step_that_raises_leaves_no_factor_behind():
    scaled = optimizer()
    scaling = BatchScaling(scaled, batch_size=32, rule="linear")
    scaling.update(64)

    def closure():
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        scaled.step(closure)
    scaled.step()
    assert scaled.seen[-1][0][0] == pytest.approx(0.2)
    assert scaled.param_groups[0]["lr"] == 0.1


def test_state_goes_on_exactly():
    def make():
        one = optimizer()
        return one, BatchScaling(one, batch_size=10, rule="noise", warm_up=300)

    (one, scaling), (other, fresh) = make(), make()
    scaling.update(40, 90.0)
    one.step()
    one.step()
    fresh.load_state_dict(pickle.loads(pickle.dumps(scaling.state_dict())))
    for scaled, held in ((one, scaling), (other, fresh)):
        scaled.step()
        held.update(80, math.nan)
        scaled.step()
    assert one.seen[-2:] == other.seen[-2:]


def test_two_factors_are_refused_and_one_can_be_removed():
    scaled = optimizer()
    scaling = BatchScaling(scaled, batch_size=32, rule="linear")
    with pytest.raises(InvalidArgumentError, match="scaled already, by BatchScaling"):
        BatchScaling(scaled, batch_size=32, rule="linear")
    scaling.update(64)
    scaling.close()
    scaled.step()
    assert scaled.seen[-1][0][0] == 0.1
    BatchScaling(scaled, batch_size=32, rule="linear")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rule": "cube"}, "rule='cube'"),
        ({"half_life": ("beta3",)}, "half_life"),
        ({"warm_up": -1}, "warm_up=-1"),
    ],
)
def test_arguments_out_of_range(change, words):
    with pytest.raises(InvalidArgumentError, match=words):
        BatchScaling(optimizer(), **{"batch_size": 8, "rule": "linear", **change})


def test_state_of_other_settings_is_refused():
    state = BatchScaling(optimizer(), batch_size=32, rule="linear").state_dict()
    with pytest.raises(InvalidArgumentError, match="arguments of the run that is resumed"):
        BatchScaling(optimizer(), batch_size=64, rule="linear").load_state_dict(state)
