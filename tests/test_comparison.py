"""Batch a for b steps against batch c for d steps: against the closed form."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstats.comparison import compare
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale
from gradstats.step_time import fit_step_time

NAN, INF = math.nan, math.inf
SIZES = st.integers(1, 10**6)


def measured(value=192.0, low=64.0, high=448.0):
    return NoiseScale(value, low, high, 0.9, 6400, 200, 0, value, 1.0)


def test_closed_form():
    """N = 192: steps of 64 are worth 1/4, of 256 4/7 of a step without noise."""
    found = compare(measured(), (64, 1000), (256, 250))
    assert found.first.noiseless_steps == pytest.approx(250)
    assert found.second.noiseless_steps == pytest.approx(1000 / 7)
    assert found.ratio == pytest.approx(1.75)
    # At N = 64: 500 against 200; at N = 448: 125 against 1000/11.
    assert (found.first.low, found.first.high) == pytest.approx((125, 500))
    assert (found.low, found.high) == pytest.approx((1.375, 2.5))
    assert found.further is found.first
    assert (found.first.samples, found.second.samples) == (64_000, 64_000)
    assert found.time_ratio is None


@given(SIZES, SIZES, st.integers(1, 10**4), st.floats(0, 1e9))
def test_equal_samples(small, factor, steps, noise):
    """ab = cd: the small batch never gets less far, by (c + N)/(a + N), and at most c/a."""
    large = small * factor
    found = compare(measured(noise, noise, noise), (small, steps * factor), (large, steps))
    assert found.ratio == pytest.approx((large + noise) / (small + noise), rel=1e-9)
    assert 1 - 1e-9 <= found.ratio <= factor * (1 + 1e-9)


@given(SIZES, SIZES, SIZES, SIZES, st.tuples(*[st.floats(0, 1e9)] * 3).map(sorted))
def test_the_interval_holds_the_value_and_turns_with_the_question(a, b, c, d, ends):
    low, value, high = ends
    found = compare(measured(value, low, high), (a, b), (c, d))
    back = compare(measured(value, low, high), (c, d), (a, b))
    assert found.low * (1 - 1e-9) <= found.ratio <= found.high * (1 + 1e-9)
    assert (1 / back.ratio, 1 / back.high, 1 / back.low) == pytest.approx(
        (found.ratio, found.low, found.high), rel=1e-9
    )
    assert found.first.low <= found.first.noiseless_steps <= found.first.high <= b
    more = compare(measured(value, low, high), (a, b + 1), (c, d))
    assert more.ratio > found.ratio
    larger = compare(measured(value, low, high), (a + 1, b), (c, d))
    assert larger.ratio >= found.ratio


def test_an_unknown_noise_scale_leaves_the_limits():
    found = compare(measured(NAN, 0.0, INF), (64, 1000), (256, 250))
    assert math.isnan(found.ratio)
    assert (found.low, found.high) == pytest.approx((1, 4))  # by samples alone, by steps alone
    assert found.further is None
    assert "get 1 to 4 × as far as 250 steps of 256 (64,000 samples), whatever" in str(found)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["ratio"] is None


def test_an_unbounded_noise_scale_counts_samples():
    found = compare(measured(INF, 192.0, INF), (64, 1000), (256, 500))
    assert found.ratio == pytest.approx(0.5)
    assert found.further is found.second
    json.dumps(found.to_dict(), allow_nan=False)


def test_time_and_price():
    timing = fit_step_time(
        {(m, k): [0.1 + k * (0.01 + 0.001 * m)] for m in (16, 32) for k in (1, 2)}, world_size=2
    )
    found = compare(
        measured(), (64, 1000), (256, 250), step_seconds=timing, world_size=2, device_hour_price=3.6
    )
    assert found.first.seconds == pytest.approx(1000 * (0.1 + 0.01 + 0.032))
    assert found.second.seconds == pytest.approx(250 * (0.1 + 4 * (0.01 + 0.032)))
    assert found.time_ratio == pytest.approx(142 / 67)
    assert found.first.price == pytest.approx(142 * 2 * 0.001)
    half = compare(
        measured(),
        (64, 1000),
        (256, 250),
        step_seconds=timing,
        world_size=2,
        max_micro_batch_size=16,
    )
    assert half.second.seconds == pytest.approx(250 * (0.1 + 8 * (0.01 + 0.016)))
    assert str(found) == (
        "1,000 steps of 64 (64,000 samples) get 1.75 × as far as 250 steps of 256 (64,000 samples) "
        "(90% interval 1.38 to 2.5 ×), in 2.12 × the time: 0.826 × as far per second; they cost 0.284 "
        "and 0.134. Why: noise scale 192 (90% interval 64 to 448), from 6,400 samples in 200 steps."
    )


def test_what_the_interval_leaves_open_is_said():
    found = compare(measured(), (64, 600), (256, 250))
    assert found.further is None
    assert "the interval leaves open which gets further" in str(found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first": (0, 5)}, "first=0 cannot be used; pass a whole number of at least 1"),
        (
            {"first": (64, 5, 1)},
            r"first=\(64, 5, 1\).*; pass \(global batch size, optimizer steps\)",
        ),
        ({"second": 64}, "second=64 cannot be used; pass .global batch size, optimizer steps."),
        ({"second": (64, 0)}, "second=0 cannot be used"),
        ({"second": (64.5, 1)}, "second=64.5 cannot be used"),
        ({"world_size": 3}, r"first=\(64, 5\) cannot be used; pass a multiple of world_size=3"),
        ({"device_hour_price": 2.0}, "device_hour_price=2.0.*step_seconds"),
        ({"step_seconds": {64: 1.0, 100: 2.0}}, r"second=\(128, 5\).*from 64 to 100 were timed"),
        ({"step_seconds": {64: 1.0}}, "two or more batch sizes"),
    ],
)
def test_bad_arguments(options, words):
    given_ = {"first": (64, 5), "second": (128, 5), **options}
    with pytest.raises(InvalidArgumentError, match=words):
        compare(measured(), **given_)
