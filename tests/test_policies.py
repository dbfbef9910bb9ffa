"""Each policy of the batch-size schedulers, by hand."""

from __future__ import annotations

import pytest
from scripted import INF, NAN, measured, seen

import gradstats
from gradstats import InvalidArgumentError
from gradstats.schedulers import (
    batch_for_momentum,
    instead_of_decay,
    milestones,
    noise_scale,
    norm_test,
    ramp,
    soonest,
)


@pytest.mark.parametrize(
    ("noise", "now", "wanted"),
    [
        (measured(256), 64, 256),
        (measured(16), 64, 16),
        (measured(256, 50, 400), 64, 64),  # the interval holds the present size
        (measured(256, 65, 700), 64, 64),  # too wide to act on
        (measured(90), 64, 64),  # below the hysteresis
        (measured(96), 64, 96),  # at it
        (measured(50), 64, 64),
        (measured(NAN, 1, INF), 64, 64),
        (measured(INF, 300, INF), 64, 64),
        (measured(0.0, 0.0, 0.0), 64, 1),  # not below a sample
    ],
)
def test_noise_scale_acts_only_when_it_is_sure(noise, now, wanted):
    assert noise_scale(seen(noise, now)) == wanted


def test_noise_scale_settings():
    assert noise_scale(seen(measured(90)), hysteresis=1.2) == 90
    assert noise_scale(seen(measured(256)), factor=0.5) == 128
    assert noise_scale(seen(measured(128)), factor=0.5) == 64
    assert noise_scale(seen(measured(256)), hysteresis=5) == 64


def test_soonest_is_the_batch_with_the_shortest_time_to_a_target():
    a, b = 0.3, 0.002  # seconds of a step, and of a sample
    noise = measured(700)
    size = soonest(seen(noise), fixed=a / b)
    assert size == pytest.approx((700 * 150) ** 0.5)
    seconds = {n: (1 + 700 / n) * (a + b * n) for n in (size, 0.99 * size, 1.01 * size)}
    assert min(seconds, key=seconds.get) == size


@pytest.mark.parametrize(
    ("noise", "now", "wanted"),
    [
        (measured(400), 64, 200),
        (measured(4), 64, 20),
        (measured(400, 160, 1600), 64, 200),  # sure that it is not 64, though not of much more
        (measured(400, 60, 700), 64, 64),  # too wide to act on
        (measured(400), 140, 140),  # below the hysteresis
        (measured(400, 40, 400), 64, 64),  # the interval, 63 to 200, holds the present size
        (measured(NAN, 1, INF), 64, 64),
    ],
)
def test_soonest_acts_only_when_it_is_sure(noise, now, wanted):
    assert soonest(seen(noise, now), fixed=100) == wanted


def test_norm_test():
    # tr Σ = 100, |G|² = 1: ‖ḡ‖² = 1 + 100/64, and θ²‖ḡ‖² against 100/64
    noise = measured(100, tr=100, sq=1)
    assert norm_test(seen(noise), theta=0.5) == pytest.approx(100 / (0.25 * (1 + 100 / 64)))
    assert norm_test(seen(noise), theta=1.0) == 64
    assert norm_test(seen(noise, now=10_000), theta=0.5) == 10_000  # passed, and never smaller
    size = norm_test(seen(noise, now=500), theta=0.3)
    assert 100 / size == pytest.approx(0.09 * (1 + 100 / 500))
    assert norm_test(seen(measured(NAN, 1, INF, tr=NAN, sq=NAN))) == 64
    assert norm_test(seen(measured(INF, 1, INF, tr=100, sq=-3.0)), theta=0.5) == 64 / 0.25


def test_instead_of_decay_undoes_the_decay_of_the_scaled_rate():
    for rule, noise in (("linear", None), ("sqrt", None), ("noise", measured(1000))):
        size = instead_of_decay(seen(noise, decay=0.4, rule=rule))
        value = None if noise is None else noise.value
        rate = gradstats.advice.scale_learning_rate(0.4, 64, round(size), rule=rule, noise=value)
        assert rate == pytest.approx(1, rel=1e-3)
    assert instead_of_decay(seen(decay=0.25, rule="linear")) == 256
    assert instead_of_decay(seen(decay=0.5, rule="sqrt")) == 256
    assert instead_of_decay(seen(decay=1.0, rule="linear")) == 64
    assert instead_of_decay(seen(decay=0.0, rule="linear")) == INF
    # Rule "noise" cannot make up for more than 1 + N/base.
    assert instead_of_decay(seen(measured(64), decay=0.4, rule="noise")) == INF
    assert instead_of_decay(seen(measured(NAN, 1, INF), decay=0.4, rule="noise")) == 64
    assert instead_of_decay(seen(measured(INF, 1, INF), decay=0.5, rule="noise")) == 128


def test_fixed_ramps():
    sizes = [ramp(seen(samples=s), start=32, end=256, over=1000) for s in (0, 500, 1000, 5000)]
    assert sizes == [32, 144, 256, 256]
    steps = {0: 64, 100: 128, 300: 32}
    assert [milestones(seen(samples=s), sizes=steps) for s in (0, 99, 100, 299, 300)] == [
        64, 64, 128, 128, 32,
    ]  # fmt: skip
    assert milestones(seen(samples=5), sizes={10: 128}) == 64


def test_batch_for_momentum():
    assert batch_for_momentum(128, 0.9, 0.95) == pytest.approx(256)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: noise_scale(seen(measured(9)), factor=0), "factor=0"),
        (lambda: batch_for_momentum(0, 0.9, 0.95), "batch_size=0"),
        (lambda: noise_scale(seen(measured(9)), hysteresis=0.5), "hysteresis=0.5"),
        (lambda: noise_scale(seen()), "noise_scale decides by the measured noise scale"),
        (lambda: soonest(seen(measured(9)), fixed=0), "fixed=0"),
        (lambda: soonest(seen(measured(9)), fixed=INF), "fixed=inf"),
        (lambda: soonest(seen(measured(9)), fixed=9, hysteresis=0.5), "hysteresis=0.5"),
        (lambda: soonest(seen(), fixed=9), "soonest decides by the measured noise scale"),
        (lambda: norm_test(seen(measured(9)), theta=0), "theta=0"),
        (lambda: norm_test(seen()), "pass monitor="),
        (lambda: instead_of_decay(seen()), "pass scaling="),
        (lambda: instead_of_decay(seen(decay=0.5, rule="noise")), "pass monitor="),
        (lambda: ramp(seen(), start=0, end=8, over=10), "start=0"),
        (lambda: ramp(seen(), start=8, end=0, over=10), "end=0"),
        (lambda: ramp(seen(), start=8, end=8, over=-1), "over=-1"),
        (lambda: milestones(seen(), sizes={}), "sizes="),
        (lambda: batch_for_momentum(8, 0.9, 1.0), "new_momentum=1.0"),
    ],
)
def test_what_a_policy_cannot_use(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()
