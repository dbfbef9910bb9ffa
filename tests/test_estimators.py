"""Noise scale against closed forms: unbiased averages, an interval that covers, clear sentences."""

import json
import math

import numpy as np
import pytest
from biases import assert_unbiased
from hypothesis import given
from hypothesis import strategies as st

from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.estimators import NoiseScale, noise_scale, readable, samples_ratio, steps_ratio

BATCH, DIM = 32, 8
NAN, INF = math.nan, math.inf


def regression_steps(steps, sigma, seed):
    """Per-step (tr_sigma, true_grad_sq_norm) of linear regression at a fixed distance of 1.

    y = x·w* + ε with x ~ N(0, I), ε ~ N(0, sigma²): g_i = 2 x_i (x_i·δ − ε_i).
    """
    rng = np.random.default_rng(seed)
    delta = np.full(DIM, DIM**-0.5)
    tr, sq = [], []
    for size in [4000] * (steps // 4000):
        x = rng.standard_normal((size, BATCH, DIM))
        q = 2 * (x @ delta - sigma * rng.standard_normal((size, BATCH)))
        mean_sq_norm = (q**2 * (x**2).sum(-1)).mean(-1)
        grad_sq_norm = ((np.einsum("kb,kbd->kd", q, x) / BATCH) ** 2).sum(-1)
        tr.append((mean_sq_norm - grad_sq_norm) * BATCH / (BATCH - 1))
        sq.append(grad_sq_norm - tr[-1] / BATCH)
    return np.concatenate(tr), np.concatenate(sq)


def truth(sigma):
    """(tr Σ, |G|²) of ``regression_steps``."""
    return 4.0 * ((DIM + 1) + DIM * sigma**2), 4.0


def autoregressive(series, mean, phi):
    """Rows of independent entries made AR(1), with the same mean and variance."""
    out = series - mean
    for k in range(1, series.shape[1]):
        out[:, k] = phi * out[:, k - 1] + math.sqrt(1 - phi**2) * out[:, k]
    return mean + out


@pytest.fixture(scope="module", params=[1.0, 3.0], ids=["B_noise=17", "B_noise=81"])
def run(request):
    return *regression_steps(100_000, request.param, seed=2024), *truth(request.param)


def coverage_of(run, steps, phi=0.0, replications=500, **options):
    tr, sq, true_tr, true_sq = run
    rows = [series[: replications * steps].reshape(replications, steps) for series in (tr, sq)]
    rows = [autoregressive(r, m, phi) for r, m in zip(rows, (true_tr, true_sq), strict=True)]
    counts = np.full(steps, BATCH)
    found = [noise_scale(counts, a, b, **options) for a, b in zip(*rows, strict=True)]
    return np.mean([f.low <= true_tr / true_sq <= f.high for f in found])


# --- the averages -----------------------------------------------------------------------------


@pytest.mark.parametrize("half_life", [0.5, 7.0, 500.0, INF])
def test_average_is_the_recursion_with_bias_correction(half_life):
    rng = np.random.default_rng(0)
    tr, sq = rng.gamma(2.0, 5.0, 300), rng.normal(1.0, 2.0, 300)
    decay = 0.5 ** (1 / half_life)
    average = np.zeros(2)
    weight = 0.0
    for step in zip(tr, sq, strict=True):
        average = decay * average + np.array(step)
        weight = decay * weight + 1
    average /= weight
    found = noise_scale(np.full(300, 16), tr, sq, half_life=half_life)
    np.testing.assert_allclose([found.tr_sigma, found.true_grad_sq_norm], average, rtol=1e-11)
    assert found.value == pytest.approx(average[0] / average[1], rel=1e-11)


def test_averages_are_unbiased_where_clamping_and_mean_ratios_are_not(run):
    tr, sq, true_tr, true_sq = run
    assert_unbiased(tr, true_tr, known_to=0.002)
    assert_unbiased(sq, true_sq, known_to=0.01)
    blocks = zip(tr.reshape(-1, 100), sq.reshape(-1, 100), strict=True)
    short = [noise_scale(np.full(100, BATCH), a, b, half_life=50) for a, b in blocks]
    assert_unbiased([s.tr_sigma for s in short], true_tr, known_to=0.002)
    assert_unbiased([s.true_grad_sq_norm for s in short], true_sq, known_to=0.01)
    if true_tr / true_sq > BATCH:
        assert abs(np.maximum(sq, 0).mean() / true_sq - 1) > 0.02
        assert abs((tr / sq).mean() / (true_tr / true_sq) - 1) > 0.1


def test_default_half_life_is_nearly_a_mean_early_on():
    tr, sq = np.linspace(1, 2, 20), np.ones(20)
    assert noise_scale(np.full(20, 8), tr, sq).value == pytest.approx(1.5, rel=0.01)


# --- the interval -----------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [0.0, 0.5])
@pytest.mark.parametrize("steps", [60, 200])
def test_interval_covers_as_often_as_it_says(run, steps, phi):
    assert 0.85 <= coverage_of(run, steps, phi) <= 0.97


@pytest.mark.parametrize(
    ("steps", "phi", "options"),
    [
        (20, 0.0, {}),
        (60, 0.0, {"half_life": INF}),
        (200, 0.5, {"half_life": INF}),
        (200, 0.8, {"half_life": INF}),
        (200, 0.8, {}),
        (200, 0.0, {"half_life": 20}),
        (200, 0.0, {"half_life": 60}),
    ],
)
def test_interval_covers_for_other_memories_and_correlations(run, steps, phi, options):
    assert 0.85 <= coverage_of(run, steps, phi, **options) <= 0.97


def test_interval_covers_where_most_of_it_is_unbounded():
    tr, sq = regression_steps(40_000, 8.0, seed=7)
    assert 0.85 <= coverage_of((tr, sq, *truth(8.0)), 200, replications=200) <= 0.97


def test_confidence_level_is_kept(run):
    assert 0.45 <= coverage_of(run, 60, confidence=0.5) <= 0.57


@pytest.mark.parametrize("steps", [12, 30])
def test_interval_covers_where_steps_are_known_to_overlap(steps):
    """Moving sums of three, in a ring, as windows of batches are."""
    rng = np.random.default_rng(11)
    new = rng.normal([6.0, 1.0], [2.0, 0.5], (2000, steps, 2))
    told, untold = [], []
    for run in (new + np.roll(new, 1, axis=1) + np.roll(new, 2, axis=1)) / 3:
        for overlap, hits in ((3, told), (1, untold)):
            found = noise_scale([8] * steps, *run.T, half_life=INF, overlap=overlap)
            hits.append(found.low <= 6 <= found.high)
    assert 0.85 <= np.mean(told) <= 0.93
    assert np.mean(untold) < np.mean(told)
    assert steps > 12 or np.mean(untold) < 0.85


def test_interval_narrows_with_steps_and_holds_the_value(run):
    tr, sq, *_ = run
    found = [noise_scale(np.full(k, BATCH), tr[:k], sq[:k]) for k in (100, 400, 1600)]
    widths = [f.high / f.low for f in found]
    assert widths == sorted(widths, reverse=True)
    assert all(f.low <= f.value <= f.high for f in found)


def test_correlation_widens_the_interval(run):
    tr, sq, true_tr, true_sq = run
    tr, sq = tr[:400], sq[:400]
    slow = [autoregressive(s[None], m, 0.8)[0] for s, m in ((tr, true_tr), (sq, true_sq))]
    plain, wide = noise_scale(np.full(400, 2), tr, sq), noise_scale(np.full(400, 2), *slow)
    ratio = math.log(wide.high / wide.low) / math.log(plain.high / plain.low)
    assert 2 < ratio < 5  # AR(1) of 0.8 leaves a ninth of the independent steps: about 3


def test_units_do_not_matter(run):
    tr, sq = run[0][:100], run[1][:100]
    plain = noise_scale(np.full(100, BATCH), tr, sq)
    for unit in (1e-150, 1e-12, 1e150):
        scaled = noise_scale(np.full(100, BATCH), tr * unit, sq * unit)
        for name in ("value", "low", "high"):
            assert getattr(scaled, name) == pytest.approx(getattr(plain, name), rel=1e-9)


def test_negative_average_gives_infinity_and_a_low_end_of_use():
    rng = np.random.default_rng(3)
    tr, sq = rng.normal(100, 5, 100), rng.normal(-0.01, 1, 100)
    sq += -0.01 - sq.mean()
    found = noise_scale(np.full(100, 8), tr, sq, half_life=INF)
    assert found.true_grad_sq_norm == pytest.approx(-0.01)  # kept as it is
    assert found.value == found.high == INF
    # The largest |G|² that scatter of 1 over 100 steps leaves plausible is about 0.17 to 0.2.
    assert 100 / 0.35 < found.low < 100 / 0.1
    assert not found.actionable


def test_significantly_negative_average_still_has_a_finite_low_end():
    rng = np.random.default_rng(3)
    found = noise_scale(np.full(100, 8), rng.normal(100, 5, 100), rng.normal(-1, 0.1, 100))
    assert found.value == INF
    assert 0 < found.low < INF


def test_negative_variance_estimates_are_allowed():  # small against big batch can give them
    found = noise_scale([8] * 40, np.tile([-3.0, 1.0], 20), np.tile([4.0, 4.1], 20))
    assert found.value == found.low == 0.0
    assert found.tr_sigma < 0
    assert not math.isnan(found.high)


def test_identical_steps_have_no_scatter():
    found = noise_scale([4] * 20, [6.0] * 20, [2.0] * 20)
    assert (found.low, found.value, found.high) == pytest.approx((3.0, 3.0, 3.0))


@pytest.mark.parametrize("steps", [1, 2, 11])
def test_too_few_steps_have_a_value_and_no_interval(steps):
    found = noise_scale([4] * steps, [6.0] * steps, [2.0] * steps)
    assert (found.value, found.low, found.high) == (pytest.approx(3.0), 0.0, INF)


def test_memory_of_too_few_steps_has_no_interval():
    found = noise_scale([4] * 50, [6.0] * 50, [2.0] * 50, half_life=2.0)
    assert (found.low, found.high) == (0.0, INF)


# --- steps left out ---------------------------------------------------------------------------


def test_unusable_steps_are_left_out_and_counted():
    good = noise_scale([4, 8, 6, 5], [1.0, 2.0, 3.0, 2.0], [1.0, 1.5, 1.0, 1.2])
    mixed = noise_scale(
        [4, 1, 8, 16, 6, 9, 5, 0, NAN],
        [1.0, 5.0, 2.0, NAN, 3.0, 1.0, 2.0, 1.0, 1.0],
        [1.0, 5.0, 1.5, 1.0, 1.0, INF, 1.2, 1.0, 1.0],
    )
    assert mixed.num_skipped == 5
    assert mixed == NoiseScale(**(good.__dict__ | {"num_skipped": 5}))
    assert (mixed.num_samples, mixed.num_steps) == (23, 4)


@pytest.mark.parametrize(
    "series", [([], [], []), ([1, 1], [1.0, 1.0], [1.0, 1.0]), ([8], [NAN], [1.0])]
)
def test_nothing_usable_is_a_result(series):
    found = noise_scale(*series)
    assert math.isnan(found.value)
    assert (found.low, found.high, found.num_steps) == (0.0, INF, 0)
    assert found.num_skipped == len(series[0])
    assert "unknown: no variance, for no step had two samples" in str(found)


def test_all_zero_gradients_are_unknown():
    found = noise_scale([4] * 5, [0.0] * 5, [0.0] * 5)
    assert math.isnan(found.value)
    assert "neither |G|² nor tr Σ" in str(found)


numbers = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(st.integers(0, 100), numbers, numbers), max_size=30))
def test_any_numbers_give_a_result(steps):
    columns = list(zip(*steps, strict=True)) if steps else [(), (), ()]
    found = noise_scale(*columns)
    assert found.num_steps + found.num_skipped == len(steps)
    assert 0 <= found.low <= found.high
    assert math.isnan(found.value) or found.low <= found.value <= found.high
    assert str(found)
    json.dumps(found.to_dict(), allow_nan=False)
    assert repr(found) == repr(noise_scale(*columns))


# --- words ------------------------------------------------------------------------------------


def record(value=312.0, low=240.0, high=410.0, **changes):
    fields = {"confidence": 0.9, "num_samples": 6400, "num_steps": 200, "num_skipped": 0}
    fields |= {"tr_sigma": 3.0, "true_grad_sq_norm": 1.0} | changes
    return NoiseScale(value, low, high, **fields)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            record(),
            "noise scale 312 (90% interval 240 to 410), from 6,400 samples in 200 steps",
        ),
        (
            record(low=20.0, high=4100.0, num_steps=1),
            "noise scale 312 (90% interval 20 to 4,100), from 6,400 samples in 1 step; "
            "too uncertain to act on: measure more steps",
        ),
        (
            record(high=INF, num_skipped=1, coverage=0.875),
            "noise scale 312 (90% interval 240 up, no upper end), from 6,400 samples in 200 steps; "
            "too uncertain to act on: measure more steps; 1 step left out (not finite, or fewer "
            "than two samples); covers only 87.5% of the trainable parameters",
        ),
        (
            record(INF, 1234.5, INF),
            "noise scale not bounded above (90% interval 1,230 up, no upper end), from 6,400 "
            "samples in 200 steps; the mean gradient cannot be told from noise yet: measure more "
            "steps",
        ),
    ],
)
def test_sentence(found, sentence):
    assert str(found) == sentence


def test_to_dict_is_json():
    text = json.dumps(record(INF, 5.0, INF, tr_sigma=NAN).to_dict(), allow_nan=False)
    back = json.loads(text)
    assert back["value"] is back["high"] is back["tr_sigma"] is None
    assert (back["low"], back["num_samples"], back["coverage"]) == (5.0, 6400, 1.0)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (312.4, "312"),
        (0.01234, "0.0123"),
        (6400, "6,400"),
        (999.9, "1,000"),
        (1.2e16, "1.2e+16"),
        (INF, "inf"),
    ],
)
def test_readable(number, text):
    assert readable(number) == text


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"half_life": 0}, ["half_life=0", "above 0"]),
        ({"half_life": NAN}, ["half_life=nan", "above 0"]),
        ({"confidence": 1.0}, ["confidence=1.0", "between 0 and 1"]),
        ({"coverage": 1.5}, ["coverage=1.5", "fraction from 0 to 1"]),
        ({"decay": 1.0}, ["decay=1.0", "from 0 to below 1"]),
        ({"overlap": 0}, ["overlap=0", "at least 1"]),
    ],
)
def test_options_out_of_range(options, parts):
    with pytest.raises(InvalidArgumentError) as error:
        noise_scale([2], [1.0], [1.0], **options)
    assert all(part in str(error.value) for part in parts)
    assert isinstance(error.value, GradStatsError)
    assert isinstance(error.value, ValueError)


def test_lengths_that_differ():
    with pytest.raises(InvalidArgumentError, match=r"shapes \(2,\), \(1,\) and \(1,\); pass one"):
        noise_scale([2, 2], [1.0], [1.0])
    with pytest.raises(InvalidArgumentError, match=r"shapes \(\)"):
        noise_scale(2, 1.0, 1.0)


# --- steps against samples --------------------------------------------------------------------


@given(st.floats(1.0, 1e6), st.floats(1.0, 1e6))
def test_hyperbola(batch_size, noise):
    steps, samples = steps_ratio(batch_size, noise), samples_ratio(batch_size, noise)
    assert (steps - 1) * (samples - 1) == pytest.approx(1, rel=1e-9)


def test_both_are_twice_the_least_at_the_noise_scale():
    assert steps_ratio(300, 300) == samples_ratio(300, 300) == 2.0
    assert steps_ratio(8, 0) == 1.0
    assert samples_ratio(8, 0) == INF
