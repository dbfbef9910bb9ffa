"""Advice from plain numbers: the formulas, the limits, the words."""

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gradstats.advice import recommend, scale_learning_rate
from gradstats.batch_advice import BatchSizeAdvice
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale, samples_ratio, steps_ratio
from gradstats.terminal import advice_table, between
from gradstats.words import span

NAN, INF = math.nan, math.inf


def measured(value=312.0, low=240.0, high=410.0):
    return NoiseScale(value, low, high, 0.9, 6400, 200, 0, value, 1.0)


def linear_times(fixed, slope, *sizes):
    return {size: fixed + slope * size for size in sizes}


# --- without step times: the noise scale itself -----------------------------------------------


@pytest.mark.parametrize(
    ("value", "now", "world", "expected"),
    [
        (312, 64, 1, 256),
        (312, 300, 1, 300),  # the present size is nearer than any round one
        (400, 64, 1, 384),  # 1.5 × 256
        (11, 4, 1, 8),  # no 12: small sizes are powers of two
        (400, 60, 6, 384),  # 6 × 64
        (400, 56, 7, 448),  # 7 × 64
        (0.3, 64, 1, 1),
        (0.3, 64, 8, 8),
        (0.0, 64, 8, 8),
    ],
)
def test_batch_size_is_the_noise_scale_rounded(value, now, world, expected):
    advice = recommend(measured(value, value / 2, value * 2), batch_size=now, world_size=world)
    assert advice.batch_size == expected
    assert advice.low <= expected <= advice.high


def test_costs_at_the_noise_scale():
    advice = recommend(measured(256, 200, 300), batch_size=64)
    assert advice.steps == pytest.approx(2 / steps_ratio(64, 256))
    assert advice.samples == pytest.approx(2 / samples_ratio(64, 256))
    assert advice.seconds is None


def test_limit_on_the_batch_size():
    advice = recommend(measured(), batch_size=64, max_batch_size=100)
    assert (advice.batch_size, advice.low, advice.high) == (96, 96, 96)
    assert "a larger size may do better, but was not allowed or not timed" in advice.reason


def test_number_of_ranks_limits_from_below():
    advice = recommend(measured(16, 12, 20), batch_size=64, world_size=64)
    assert advice.batch_size == 64
    assert "a smaller size may do better" in advice.reason


@pytest.mark.parametrize(
    ("room", "world", "micro", "accumulation"),
    [(None, 1, 256, 1), (256, 1, 256, 1), (100, 1, 64, 4), (1, 2, 1, 128), (128, 2, 128, 1)],
)
def test_accumulation(room, world, micro, accumulation):
    advice = recommend(measured(), batch_size=64, max_micro_batch_size=room, world_size=world)
    assert advice.batch_size == 256
    assert (advice.micro_batch_size, advice.accumulation_steps) == (micro, accumulation)


# --- with step times --------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [100.0, 1000.0, 10000.0])
@pytest.mark.parametrize("balance", [4, 64, 1024])
def test_time_to_target_is_within_5_percent_of_the_optimum(noise, balance):
    seconds = linear_times(balance * 1e-4, 1e-4, *(2**k for k in range(16)))
    found = measured(noise, noise / 2, noise * 2)
    advice = recommend(found, batch_size=32, step_seconds=seconds)

    def time(size):
        return (1 + noise / size) * (balance + size)

    optimum = math.sqrt(noise * balance)
    assert time(advice.batch_size) <= 1.05 * 1.05 * time(optimum)  # flat, and sizes are round
    assert advice.batch_size < optimum * 1.5
    assert advice.seconds == pytest.approx(time(advice.batch_size) / time(32))


def test_fewer_samples_are_preferred_among_equal_times():
    advice = recommend(
        measured(), batch_size=64, step_seconds=linear_times(0.015, 1.3e-4, 16, 64, 1024)
    )
    assert advice.batch_size == 128
    assert "reached soonest at 192; 128 takes at most 5% longer and fewer samples" in advice.reason
    assert "0.015 s plus 0.00013 s per sample" in advice.reason


def test_nothing_beyond_the_sizes_timed():
    found = measured(1e5, 8e4, 1.2e5)
    advice = recommend(found, batch_size=64, step_seconds={32: 0.01, 64: 0.01, 500: 0.01})
    assert advice.batch_size in (384, 500)
    assert max(point.batch_size for point in advice.curve) == 500
    assert "a larger size may do better" in advice.reason
    down = recommend(found, batch_size=64, step_seconds={32: 0.01, 64: 0.02, 500: 0.15})
    assert down.batch_size >= 32


def test_present_size_outside_the_sizes_timed_stays_possible():
    rising, flat = {64: 0.1, 128: 0.2}, {64: 0.1, 128: 0.1}
    advice = recommend(measured(), batch_size=2048, step_seconds=rising)
    assert advice.batch_size == 64
    assert advice.curve[-1].batch_size == 2048
    assert recommend(measured(), batch_size=2048, step_seconds=flat).batch_size == 2048
    alone = recommend(measured(), batch_size=32, max_batch_size=48, step_seconds=flat)
    assert alone.batch_size == 32


def test_fit_ignores_the_scale_and_weighs_relative_errors():
    seconds = linear_times(0.2, 1e-3, 8, 64, 512)
    noise = dict(zip(seconds, (1.02, 0.98, 1.01), strict=True))
    noisy = {size: t * noise[size] for size, t in seconds.items()}
    found = [
        recommend(measured(), batch_size=64, step_seconds=times).seconds
        for times in (seconds, {b: 60 * t for b, t in seconds.items()}, noisy)
    ]
    assert found[1] == pytest.approx(found[0])
    assert found[2] == pytest.approx(found[0], rel=0.05)


def test_times_that_fall_with_the_batch_give_no_negative_slope():
    advice = recommend(measured(), batch_size=64, step_seconds={32: 0.3, 64: 0.2, 128: 0.1})
    assert advice.batch_size == 128
    assert "plus 0 s per sample" in advice.reason


# --- where the measurement decides nothing ----------------------------------------------------


@pytest.mark.parametrize(
    ("found", "low", "high", "word"),
    [
        (measured(NAN, 0.0, INF), 1, None, "unknown"),
        (measured(INF, 40.0, INF), 48, None, "not bounded above"),
        (measured(300.0, 40.0, INF), 48, None, "too uncertain to act on: measure more steps"),
        (measured(300.0, 40.0, 401.0), 48, 384, "too uncertain to act on: measure more steps"),
        (measured(300.0, 0.0, 310.0), 1, 256, "too uncertain"),
        (measured(INF, 900.0, INF), 1024, None, "its low end calls for a larger batch"),
        (measured(3.0, 1.0, 17.0), 1, 16, "its high end calls for a smaller batch"),
    ],
)
@pytest.mark.parametrize("optimizer", [None, "SGD", "Muon"])
def test_stay_and_say_why(found, low, high, word, optimizer):
    advice = recommend(found, batch_size=64, learning_rate=0.1, optimizer=optimizer)
    assert (advice.batch_size, advice.low, advice.high) == (64, low, high)
    assert (advice.learning_rate, advice.curve) == (0.1, ())
    assert (advice.steps, advice.samples, advice.seconds) == (1.0, 1.0, None)
    assert word in advice.reason
    assert str(advice).startswith("keep batch size 64 (")


def test_interval_of_a_factor_of_ten_is_still_acted_on():
    assert recommend(measured(300.0, 100.0, 1000.0), batch_size=64).batch_size == 256


# --- the learning rate ------------------------------------------------------------------------


def test_linear_and_square_root_rules():
    assert scale_learning_rate(0.1, 64, 256, rule="linear") == pytest.approx(0.4)
    assert scale_learning_rate(0.1, 256, 64, rule="linear") == pytest.approx(0.025)
    assert scale_learning_rate(0.1, 64, 256, rule="sqrt") == pytest.approx(0.2)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(1e-3, 1e9))
def test_noise_rule(start, end, noise):
    rate = scale_learning_rate(0.1, start, end, rule="noise", noise=noise)
    assert rate * (1 + noise / end) == pytest.approx(0.1 * (1 + noise / start), rel=1e-9)
    # AdaScale's gain, with σ² = tr Σ / start and μ² = |G|², is the same number.
    sigma_sq, mu_sq, scale = noise / start, 1.0, end / start
    gain = (sigma_sq + mu_sq) / (sigma_sq / scale + mu_sq)
    assert rate == pytest.approx(0.1 * gain, rel=1e-9)
    back = scale_learning_rate(rate, end, start, rule="noise", noise=noise)
    assert back == pytest.approx(0.1, rel=1e-9)


def test_noise_rule_is_linear_below_and_constant_above():
    assert scale_learning_rate(0.1, 8, 32, rule="noise", noise=1e9) == pytest.approx(0.4)
    assert scale_learning_rate(0.1, 8, 32, rule="noise", noise=INF) == pytest.approx(0.4)
    assert scale_learning_rate(0.1, 8, 32, rule="noise", noise=0.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("optimizer", "expected", "words"),
    [
        ("SGD", 0.1 * (1 + 256 / 64) / 2, "reach it by a gradual warm-up"),
        ("sgd", 0.1 * (1 + 256 / 64) / 2, 'rule "noise" of scale_learning_rate'),
        ("AdamW", 0.2, "adaptive optimizers often make use of more samples"),
        ("RMSprop", 0.2, 'rule "sqrt" of scale_learning_rate'),
        ("Muon", None, "no rule is known for optimizer='Muon'"),
        (None, None, "no rule is known for optimizer=None"),
    ],
)
def test_rule_of_the_optimizer(optimizer, expected, words):
    advice = recommend(
        measured(256, 200, 300), batch_size=64, learning_rate=0.1, optimizer=optimizer
    )
    assert advice.batch_size == 256
    assert advice.learning_rate == (None if expected is None else pytest.approx(expected))
    assert words in advice.reason


def test_no_learning_rate_without_the_present_one():
    advice = recommend(measured(), batch_size=64, optimizer="SGD")
    assert advice.learning_rate is None
    assert "learning rate" not in str(advice)


def test_smaller_batch_lowers_the_rate():
    advice = recommend(measured(64, 50, 80), batch_size=512, learning_rate=0.1, optimizer="SGD")
    assert advice.learning_rate == pytest.approx(0.1 * (1 + 64 / 512) / 2)
    assert "lower it with the batch size" in advice.reason


# --- properties -------------------------------------------------------------------------------


@st.composite
def calls(draw):
    low, value, high = sorted(draw(st.tuples(*[st.floats(0, 1e15)] * 3)))
    kinds = [(value, low, high), (value, value / 2, value * 2), (value, low, INF)]
    kinds += [(INF, low, INF), (NAN, 0.0, INF)]
    found = measured(*draw(st.sampled_from(kinds)))
    world = draw(st.integers(1, 64))
    now = world * draw(st.integers(1, 3000))
    options = {"batch_size": now, "world_size": world}
    if draw(st.booleans()):
        options["max_batch_size"] = now + draw(st.integers(0, 10**5))
    if draw(st.booleans()):
        options["max_micro_batch_size"] = draw(st.integers(1, 300))
    if draw(st.booleans()):
        seconds = st.floats(1e-6, 1e3)
        options["step_seconds"] = draw(
            st.dictionaries(st.integers(1, 10**5), seconds, min_size=2, max_size=5)
        )
    if draw(st.booleans()):
        options |= {"learning_rate": draw(st.floats(0, 10)), "optimizer": "SGD"}
    return found, options


@given(calls())
def test_every_advice_keeps_the_limits(call):
    found, options = call
    advice = recommend(found, **options)
    now, world = options["batch_size"], options["world_size"]
    assert advice.micro_batch_size * advice.accumulation_steps * world == advice.batch_size
    assert advice.batch_size <= options.get("max_batch_size", INF)
    assert 1 <= advice.micro_batch_size <= options.get("max_micro_batch_size", INF)
    if found.actionable:
        assert advice.low <= advice.batch_size <= advice.high
    else:
        assert advice.batch_size == now
    if times := options.get("step_seconds"):
        assert advice.batch_size == now or min(times) <= advice.batch_size <= max(times)
        assert 0 < advice.seconds <= 1.05 * (1 + 1e-9)
    if "learning_rate" in options:
        assert 0 <= advice.learning_rate < INF
    assert advice == recommend(found, **options)
    json.dumps(advice.to_dict(), allow_nan=False)
    assert str(advice).endswith(".")


@given(st.floats(1e-2, 1e7), st.integers(1, 10**5))
def test_curve_is_the_hyperbola(noise, now):
    advice = recommend(measured(noise, noise / 2, noise * 2), batch_size=now)
    sizes = [point.batch_size for point in advice.curve]
    assert sizes == sorted(set(sizes))
    assert {now, advice.batch_size, advice.low, advice.high} <= set(sizes)
    for point in advice.curve:
        steps = point.steps * steps_ratio(now, noise) - 1
        samples = point.samples * samples_ratio(now, noise) - 1
        assume(min(steps, samples) > 1e-6)  # else the difference from one is rounding
        assert steps * samples == pytest.approx(1, rel=1e-6)
    (present,) = (point for point in advice.curve if point.batch_size == now)
    assert (present.steps, present.samples) == (1.0, 1.0)


# --- words and refusals -----------------------------------------------------------------------


def test_sentence():
    advice = recommend(
        measured(),
        batch_size=64,
        learning_rate=0.1,
        optimizer="AdamW",
        step_seconds=linear_times(0.015, 1.3e-4, 16, 64, 1024),
        max_micro_batch_size=20,
        world_size=2,
    )
    assert str(advice) == (
        "change batch size 64 to 128 (the interval gives 128 to 192) as micro_batch_size 16 × "
        "accumulation_steps 4 × world_size 2; learning rate 0.1414; expected against now: 0.585 × "
        "the steps, 1.17 × the samples, 0.794 × the time. Why: noise scale 312 (90% interval 240 "
        "to 410), from 6,400 samples in 200 steps; a step takes 0.015 s plus 0.00013 s per sample, "
        "so a target is reached soonest at 192; 128 takes at most 5% longer and fewer samples; "
        'learning rate by rule "sqrt" of scale_learning_rate; adaptive optimizers often make use '
        "of more samples than the noise scale."
    )


def test_an_interval_of_one_size_is_that_size():
    advice = recommend(measured(96, 95, 97), batch_size=64)
    assert (advice.low, advice.high) == (96, 96)
    assert "change batch size 64 to 96 (the interval gives 96) as" in str(advice)
    (_, cells) = advice_table(advice.to_dict(), None).columns
    assert next(iter(cells.cells)) == "64 → 96   (the interval gives 96)"
    assert [span("30", "50"), span("30", None), between(96.01, 96.04)] == [
        "30 to 50",
        "30 up",
        "96",
    ]


def test_to_dict_is_json():
    advice = recommend(measured(300.0, 40.0, INF), batch_size=np.int64(64))
    assert isinstance(advice, BatchSizeAdvice)
    back = json.loads(json.dumps(advice.to_dict()))
    assert (back["batch_size"], back["high"], back["curve"]) == (64, None, [])
    curve = recommend(measured(), batch_size=64).to_dict()["curve"]
    layout = {"batch_size", "micro_batch_size", "accumulation_steps", "world_size"}
    assert curve[0].keys() == layout | {"steps", "samples", "seconds", "cost", "hours", "price"}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"batch_size": 0}, ["batch_size=0", "whole number of at least 1"]),
        ({"batch_size": 2.5}, ["batch_size=2.5", "whole number of at least 1"]),
        ({"batch_size": None}, ["batch_size=None", "whole number of at least 1"]),
        ({"world_size": 0}, ["world_size=0", "whole number of at least 1"]),
        ({"world_size": 3}, ["batch_size=64", "multiple of world_size=3"]),
        ({"max_batch_size": 0}, ["max_batch_size=0", "whole number of at least 1"]),
        ({"max_batch_size": 63}, ["max_batch_size=63", "not be below batch_size=64"]),
        ({"max_micro_batch_size": 0}, ["max_micro_batch_size=0", "at least 1"]),
        ({"learning_rate": -0.1}, ["learning_rate=-0.1", "at least 0"]),
        ({"learning_rate": NAN}, ["learning_rate=nan", "at least 0"]),
        ({"step_seconds": {}}, ["step_seconds={}", "two or more batch sizes"]),
        ({"step_seconds": {64: 1.0}}, ["step_seconds={64: 1.0}", "two or more batch sizes"]),
        ({"step_seconds": {32: -1.0, 64: 1.0}}, ["32: -1.0", "seconds above 0"]),
        ({"step_seconds": {32: INF, 64: 1.0}}, ["32: inf", "seconds above 0"]),
        ({"step_seconds": {0: 1.0, 64: 1.0}}, ["step_seconds=0", "at least 1"]),
    ],
)
def test_bad_arguments(options, parts):
    with pytest.raises(InvalidArgumentError) as error:
        recommend(measured(), **({"batch_size": 64} | options))
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        ({"rule": "cubic"}, "rule='cubic' cannot be used; pass one of ('linear', 'sqrt', 'noise')"),
        ({"rule": "noise"}, "noise=None cannot be used; pass the noise scale, at least 0"),
        ({"rule": "noise", "noise": -1.0}, "noise=-1.0"),
        ({"rule": "linear", "to_batch": 0}, "to_batch=0"),
        ({"rule": "linear", "from_batch": 0}, "from_batch=0"),
        ({"rule": "linear", "learning_rate": INF}, "learning_rate=inf"),
    ],
)
def test_bad_arguments_of_the_rules(call, part):
    given_ = {"learning_rate": 0.1, "from_batch": 8, "to_batch": 16} | call
    with pytest.raises(InvalidArgumentError) as error:
        scale_learning_rate(**given_)
    assert part in str(error.value)
