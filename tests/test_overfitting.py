"""Overfitting is told from scatter."""

from __future__ import annotations

import math

from advise_inputs import curve

from gradstats.workbench.advise import overfitting


def test_a_certain_rise_is_overfitting():
    found = overfitting([curve(60, turn=0.4, rise=0.5)])
    assert found.kind == "overfitting"
    assert 0.15 < found.low < found.rise < 0.6
    assert 10 < found.since < 45
    assert "it overfits" in str(found)
    diverging = overfitting([curve(60, turn=0.4, rise=0.5, train=lambda t: 1 + t)])
    assert diverging.kind == "diverging"
    assert "does not overfit" in str(diverging)


def test_a_rise_within_the_margin_is_none():
    steady = curve(200, turn=0.2, rise=0.03, noise=0.001)
    assert overfitting([steady], margin=0.0).kind == "overfitting"
    assert overfitting([steady], margin=0.05).kind == "none"


def test_scatter_is_not_taken_for_overfitting():
    """At most 5% of the trainings that only scatter, however much neighbours have in common."""
    for count, rho in ((16, 0.0), (40, 0.6), (120, 0.8)):
        flagged = [
            overfitting([curve(count, rho=rho, seed=s)], margin=0.0).kind != "none"
            for s in range(200)
        ]
        assert sum(flagged) <= 0.05 * 200 + 2 * math.sqrt(200 * 0.05 * 0.95)


def test_several_seeds_are_tested_together():
    few = [curve(8, turn=0.3, rise=0.4, seed=s) for s in range(4)]
    assert overfitting(few).kind == "overfitting"
    assert overfitting(few[:2]).kind == "unknown"
    assert "too few" in str(overfitting(few[:2]))
    alike = [curve(8, rho=0.9, seed=100 + s) for s in range(5)]
    assert overfitting(alike).kind == "none"
