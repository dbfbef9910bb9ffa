"""Standard deviations from averaged variances: unbiased where those of single steps are not."""

from __future__ import annotations

import json
import math

import pytest
import torch
from biases import assert_unbiased
from torch import Tensor

from gradstats.roots import AveragedRoots, shortness

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES, STEPS = 8, 24


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def product(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of two normal numbers: a kurtosis of 9."""
    return normal(shape, generator) * normal(shape, generator)


def rare(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Nothing in four of five samples, as of a word's embedding: a kurtosis of 15."""
    seen = torch.rand(shape, dtype=torch.float64, generator=generator) < 0.2
    return normal(shape, generator) * seen * math.sqrt(5)


@pytest.mark.parametrize(("draw", "shortfall"), [(normal, 0.0), (product, 0.06), (rare, 0.2)])
def test_unbiased_whatever_the_tails(draw, shortfall) -> None:
    generator = torch.Generator().manual_seed(0)
    single, found = [], []
    for _ in range(80):
        var = draw((STEPS, SAMPLES, 200), generator).var(1)
        roots = AveragedRoots(math.inf)
        for step in var:
            roots.add([step], [200], SAMPLES)
        norm = float(var.sqrt().mean()) / shortness(SAMPLES)
        single.append(norm)
        found.append(norm * roots.factors()[0])
    assert_unbiased(found, 1.0, known_to=0.003)
    assert 1 - sum(single) / len(single) == pytest.approx(shortfall, abs=0.015)


def test_shortness_is_that_of_normal_samples_and_alike_on_a_device() -> None:
    generator = torch.Generator().manual_seed(1)
    for n in (2, 3, 16):
        assert_unbiased(normal((40_000, n), generator).std(1), shortness(n), known_to=0.01)
        assert float(shortness(torch.tensor(n))) == pytest.approx(shortness(n))
    assert math.isnan(shortness(1))
    assert math.isnan(float(shortness(torch.tensor(1))))


def test_steps_fade_with_the_half_life() -> None:
    """The weights of three steps with a half-life of one: 1, 2 and 4."""
    roots = AveragedRoots(1.0)
    variances = (4.0, 1.0, 9.0)
    for v in variances:
        roots.add([torch.full((5,), v)], [5], SAMPLES)
    weights = torch.tensor([1.0, 2.0, 4.0]) / 7
    root = float(weights @ torch.tensor(variances)) ** 0.5
    mean = float(weights @ torch.tensor(variances).sqrt())
    steps = 1 / float(weights @ weights)
    wanted = (steps * root - mean) / (steps - 1) / mean * shortness(SAMPLES)
    assert roots.factors() == [pytest.approx(wanted)]


def test_what_is_not_there_or_not_finite_is_left_out() -> None:
    with_gaps, plain = AveragedRoots(math.inf), AveragedRoots(math.inf)
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        var = normal((SAMPLES, 6), generator).var(0)
        with_gaps.add([var, None], [6, 3], SAMPLES)
        plain.add([var], [6], SAMPLES)
        with_gaps.add([torch.full((6,), math.inf), None], [6, 3], SAMPLES)
        with_gaps.add([torch.full((6,), math.nan), None], [6, 3], 1)
        with_gaps.add([None, None], [6, 3], SAMPLES)
    assert with_gaps.factors() == [pytest.approx(plain.factors()[0]), 1.0]
    assert AveragedRoots(math.inf).factors() == []
    one = AveragedRoots(math.inf)
    one.add([torch.rand(4), torch.zeros(3)], [4, 3], SAMPLES)
    assert one.factors() == [pytest.approx(1.0), 1.0]


@pytest.mark.parametrize("shape", [(7,), (300,), (64, 64), (96, 3, 3, 3), (1000, 256), (1, 2048)])
def test_weights_of_all_rows_and_columns_are_followed(shape: tuple[int, ...]) -> None:
    """Each weight's variance says where it is; what is averaged has seen rows and columns alike."""
    size = math.prod(shape)
    roots = AveragedRoots(math.inf)
    roots.add([torch.arange(size, dtype=torch.float64).view(shape)], [size], SAMPLES)
    places = torch.tensor(roots.state_dict()["sums"][2]).long()
    assert min(size, 128) <= len(places) <= 512
    for dim, index in zip(shape, torch.unravel_index(places, shape), strict=True):
        counts = torch.bincount(index, minlength=dim).double()
        assert counts.max() - counts.min() <= max(2, 0.35 * counts.mean()), (dim, counts)


def test_resuming_is_exact() -> None:
    generator = torch.Generator().manual_seed(3)
    steps = [normal((SAMPLES, 400), generator).var(0) for _ in range(20)]
    first, second = AveragedRoots(50.0), AveragedRoots(50.0)
    second.load_state_dict(first.state_dict())  # before a step
    for step in steps[:10]:
        first.add([step[:100], step[100:]], [100, 300], SAMPLES)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in steps[10:]:
        for roots in (first, second):
            roots.add([step[:100], step[100:]], [100, 300], SAMPLES)
    assert first.factors() == second.factors()
    second.load_state_dict(None)  # of an earlier version
    assert second.factors() == []
