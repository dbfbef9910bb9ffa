"""The line through step times: against times of known make."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstats.errors import InvalidArgumentError
from gradstats.step_time import fit_step_time, peak_at

COSTS = (0.02, 0.003, 1e-4)  # update, launch, per sample
KINDS = [(m, k) for m in (8, 16, 32, 64) for k in (1, 2)]


def made(costs, kinds=KINDS, rounds=1, noise=None):
    update, launch, each = costs
    seconds = {(m, k): update + k * (launch + each * m) for m, k in kinds}
    return {
        kind: [t * (1 if noise is None else float(noise())) for _ in range(rounds)]
        for kind, t in seconds.items()
    }


@settings(deadline=None)  # the first call loads scipy.optimize
@given(st.tuples(*[st.floats(1e-6, 10.0)] * 3))
def test_times_on_a_line_give_it_back(costs):
    fit = fit_step_time(made(costs))
    largest = max(costs[0], 2 * costs[1], 128 * costs[2])
    assert (fit.update, fit.launch, fit.per_sample) == pytest.approx(costs, abs=1e-9 * largest)
    assert fit.misfit < 1e-9
    for m, k in [(8, 1), (500, 7)]:
        expected = costs[0] + k * (costs[1] + costs[2] * m)
        assert fit.seconds(m, k) == pytest.approx(expected, rel=1e-6)
        assert fit.interval(m, k) == pytest.approx((expected, expected), rel=1e-6)


def test_one_number_of_micro_batches_puts_what_is_fixed_into_each():
    fit = fit_step_time(made(COSTS, [(8, 1), (64, 1)]))
    assert fit.update == 0
    assert fit.launch == pytest.approx(0.023)
    assert fit.seconds(8, 4) == pytest.approx(4 * (0.023 + 8e-4))


@pytest.mark.parametrize("world", [1, 3])
def test_fixed_samples_are_those_that_take_as_long_as_the_rest_of_a_step(world):
    fit = fit_step_time(made(COSTS), world_size=world)
    by_size, by_number = fit.fixed_samples(), fit.fixed_samples(16)
    assert fit.seconds(by_size / world) == pytest.approx(2 * fit.seconds(0))
    assert fit.seconds(16, by_number / world / 16) == pytest.approx(2 * fit.update)
    free = fit_step_time({(8, 1): [0.2], (64, 1): [0.1]})
    assert free.fixed_samples() == math.inf
    with pytest.raises(
        InvalidArgumentError, match=r"micro_batch_size=16 .* two or more numbers of"
    ):
        free.fixed_samples(16)


def test_a_slow_spell_does_no_harm():
    times = made(COSTS, rounds=7)
    for i, seconds in enumerate(times.values()):
        seconds[i % 3] *= 30
    fit = fit_step_time(times)
    assert (fit.update, fit.launch, fit.per_sample) == pytest.approx(COSTS, rel=1e-6)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    draw, held, trials = np.random.default_rng(1), 0, 200
    for _ in range(trials):
        fit = fit_step_time(made(COSTS, rounds=15, noise=lambda: 1 + 0.1 * draw.standard_normal()))
        low, high = fit.interval(48, 2)
        held += low <= COSTS[0] + 2 * (COSTS[1] + 48 * COSTS[2]) <= high
    assert 0.80 <= held / trials <= 0.97


@settings(deadline=None)  # the first call loads scipy.optimize
@given(
    st.dictionaries(
        st.tuples(st.integers(1, 4096), st.integers(1, 16)),
        st.lists(st.floats(1e-6, 1e3), min_size=3, max_size=3),
        min_size=2,
        max_size=6,
    ).filter(lambda times: len({m for m, _ in times}) > 1)
)
def test_any_times_give_a_step_time_that_grows(times):
    fit = fit_step_time(times)
    assert min(fit.update, fit.launch, fit.per_sample) >= 0
    assert 0 < fit.seconds(1, 1) <= fit.seconds(2, 1) <= fit.seconds(2, 2)
    low, high = fit.interval(100, 2)
    assert 0 <= low <= fit.seconds(100, 2) <= high < math.inf
    json.dumps(fit.to_dict(), allow_nan=False)
    assert str(fit).startswith("a step takes ")


def test_units():
    times = made(COSTS, rounds=5, noise=np.random.default_rng(0).lognormal)
    fit = fit_step_time(times)
    longer = fit_step_time({kind: [60 * t for t in ts] for kind, ts in times.items()})
    assert longer.seconds(33, 3) == pytest.approx(60 * fit.seconds(33, 3))
    assert longer.interval(33, 3) == pytest.approx([60 * t for t in fit.interval(33, 3)])
    assert longer.misfit == pytest.approx(fit.misfit)


def test_peak_memory_between_and_beyond_the_sizes_measured():
    peaks = {8: 1000, 16: 1000, 32: 1800}
    assert [peak_at(peaks, m) for m in (4, 12, 16, 24, 64)] == [1000, 1000, 1000, 1400, 3400]
    assert peak_at({8: 1000}, 8) is None
    fit = fit_step_time(made(COSTS, KINDS[:6]), peak_bytes={(m, 2): b for m, b in peaks.items()})
    assert (fit.bytes(64), fit.bytes_per_sample) == (3400, 50)
    assert fit_step_time(made(COSTS)).bytes_per_sample is None


def test_sentence():
    fit = fit_step_time(made(COSTS), peak_bytes={(8, 2): 10**6, (64, 2): 57 * 10**6})
    assert str(fit) == (
        "a step takes 0.02 s, plus 0.003 s per micro-batch and 0.0001 s per sample of a rank (±0% at "
        "64), timed at 8, 16, 32 and 64 samples per micro-batch; a sample takes 1 MB of a rank's memory"
    )
    bent = fit_step_time({(8, 1): [1.0], (16, 1): [1.0], (64, 1): [4.0]})
    assert bent.misfit > 0.1
    assert f"times are up to {100 * bent.misfit:.0f}% off that line: trust" in str(bent)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ({}, "seconds for two or more micro-batch sizes"),
        ({(8, 1): [1.0], (8, 2): [1.0]}, "seconds for two or more micro-batch sizes"),
        ({(8, 1): [], (9, 1): []}, "seconds for two or more micro-batch sizes"),
        ({(8, 1): [1.0], (9, 1): [0.0]}, "pass seconds above 0"),
        ({(8, 1): [1.0], (9, 1): [math.inf]}, "pass seconds above 0"),
    ],
)
def test_bad_times(times, words):
    with pytest.raises(InvalidArgumentError, match=words):
        fit_step_time(times)


@pytest.mark.parametrize("confidence", [0, 1, math.nan])
def test_bad_confidence(confidence):
    with pytest.raises(InvalidArgumentError, match="confidence="):
        fit_step_time(made(COSTS)).interval(8, confidence=confidence)
