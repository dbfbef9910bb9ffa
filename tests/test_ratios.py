"""Ratios of noisy averages: unbiased where the plain ratio is not, and by an independent correction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from biases import assert_unbiased

from gradstats.estimators import noise_scale
from gradstats.ratios import fieller, ratio, unbiased_ratio

DRAWS = 100_000


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("correlation", [-0.6, 0.0, 0.6])
def test_unbiased_for_normal_averages(squared, correlation):
    """At a denominator known to 20%, where the plain ratio is too large by 4% and its square by more."""
    rng = np.random.default_rng(0)
    mean, deviation = np.array([3.0, 1.0]), np.array([0.3, 0.2])
    covariance = np.diag(deviation**2)
    covariance[0, 1] = covariance[1, 0] = correlation * deviation.prod()
    tops, bottoms = rng.multivariate_normal(mean, covariance, DRAWS).T
    found = [unbiased_ratio(a, b, covariance, squared) for a, b in zip(tops, bottoms, strict=True)]
    power = 2 if squared else 1
    assert_unbiased(found, 3.0**power)
    plain = (tops / bottoms) ** power
    assert plain.mean() / 3.0**power - 1 > 0.025


@pytest.mark.parametrize("squared", [False, True])
def test_far_from_zero_it_is_one_function(squared):
    """The series takes over where it is as exact, and where nothing scatters the ratio is as it is."""
    found = []
    for distance in (50 * (1 - 1e-9), 50 * (1 + 1e-9)):
        scatter = np.array([[0.1, 0.05], [0.05, 1.0]]) / distance**2
        found.append(unbiased_ratio(2.0, 1.0, scatter, squared))
    assert found[0] == pytest.approx(found[1], rel=1e-10)
    # To second order: less Var b/b² − Cov/(ab), and for the square 3 Var b/b² + Var a/a² − 4 Cov/(ab).
    top, shared, power = 0.1 / 4, 0.05 / 2, 2.0 ** (2 if squared else 1)
    excess = 3 + top - 4 * shared if squared else 1 - shared
    assert found[0] == pytest.approx(power * (1 - excess / 2500), rel=1e-5)
    assert unbiased_ratio(2.0, 1.0, np.zeros((2, 2)), squared) == power


def test_at_the_edge_of_what_is_known_it_stays_finite_and_in_order():
    covariance = np.diag([0.0, 1.0])
    for bottom in (1e-300, 1e-9, 0.1, 1.0, 3.0):
        low, high = fieller(1.0, bottom, covariance, 1.7)
        found = unbiased_ratio(1.0, bottom, covariance)
        assert low <= found <= min(high, 1.26)  # at zero, √(π/2) standard deviations of 1/b
    assert unbiased_ratio(1.0, 1e-320, np.full((2, 2), 1e-320)) >= 0
    assert unbiased_ratio(0.0, 1.0, np.array([[1.0, -0.5], [-0.5, 1.0]])) == 0.0


def test_over_zero():
    assert (ratio(1.0, 0.0), ratio(3.0, 2.0)) == (math.inf, 1.5)
    assert math.isnan(ratio(0.0, 0.0))


@pytest.mark.parametrize("squared", [False, True])
def test_the_noise_scale_agrees_with_a_jackknife(squared):
    """Of steps left out one at a time: another way to the same correction, of second order."""
    rng = np.random.default_rng(1)
    steps, power, corrections = 100, 2 if squared else 1, []
    for _ in range(200):
        sq = rng.gamma(1.0, 1.0, steps)
        tr = 5 + 2 * sq + rng.normal(0, 1, steps)
        found = noise_scale(np.full(steps, 8), tr, sq, half_life=math.inf, squared=squared)
        whole = (tr.mean() / sq.mean()) ** power
        without = ((tr.sum() - tr) / (sq.sum() - sq)) ** power
        assert found.value == pytest.approx(whole)
        assert found.low < found.unbiased < found.high
        corrections.append([found.unbiased - whole, (steps - 1) * (whole - without.mean())])
    ours, jackknife = np.mean(corrections, axis=0)
    assert jackknife < -0.006 * 7**power
    assert ours == pytest.approx(jackknife, rel=0.1)


@pytest.mark.parametrize(("steps", "squared"), [(30, False), (60, True)])
def test_noise_scales_of_short_runs_are_unbiased(steps, squared):
    rng = np.random.default_rng(2)
    shape, counts = (4000, steps), np.full(steps, 16)
    sq = rng.normal(1.0, 0.8, shape)
    tr = rng.normal(6.0, 0.5, shape) - 0.5 * (sq - 1)
    found = [
        noise_scale(counts, a, b, half_life=math.inf, squared=squared)
        for a, b in zip(tr, sq, strict=True)
    ]
    truth = 36.0 if squared else 6.0
    assert_unbiased([f.unbiased for f in found], truth)
    assert np.mean([f.value for f in found]) / truth - 1 > 0.02
    # The plain one is as often too large as too small.
    assert np.mean([f.value > truth for f in found]) == pytest.approx(0.5, abs=0.03)
    assert noise_scale(counts[:8], tr[0, :8], sq[0, :8]).unbiased is None
