"""Losses that weigh samples unequally: c_i is whatever sample i adds to the gradient, weight included."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from layers import Positions
from oracle import assert_matches
from torch import Tensor, nn

import gradstats

IDS = torch.randint(0, 13, (6, 7), generator=torch.Generator().manual_seed(0))
COUNTS = torch.tensor([7, 1, 4, 0, 2, 6])  # tokens of each sample that the loss sees
LABELS = torch.where(torch.arange(7) < COUNTS[:, None], IDS % 4, -100)
WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0, 0.25])
CLASSES = torch.tensor([1.0, 0.2, 3.0, 0.7])

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits (…, tokens, classes) and labels


def contributions(model: nn.Module, loss: Callable[[nn.Module, int], Tensor]) -> dict[str, Tensor]:
    """(N, *shape): the gradient of each sample's own term of the loss, divisors included; float64."""
    wide = copy.deepcopy(model).double()
    found: dict[str, list[Tensor]] = {}
    for i in range(len(IDS)):
        wide.zero_grad()
        loss(wide, i).backward()
        for name, p in wide.named_parameters():
            found.setdefault(name, []).append(p.grad.clone())
    return {n: torch.stack(g) for n, g in found.items()}


def _summed(m: nn.Module, rows: slice | Sequence[int], **options) -> Tensor:
    out, labels = m(IDS[rows]).flatten(0, 1), LABELS[rows].flatten()
    classes = options.pop("weight", None)
    classes = None if classes is None else classes.to(out.dtype)
    return F.cross_entropy(out, labels, weight=classes, reduction="sum", **options)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Positions()


def _check(model, loss, true, **options) -> gradstats.GradStats:
    with gradstats.attach(model, moments=True, **options) as monitor:
        for value in loss(model):
            value.backward()
        stats = monitor.step()
    assert_matches(stats, true, 1e-5)
    return stats


def test_mean_over_tokens_with_uneven_counts(model) -> None:
    def loss(m: nn.Module):
        yield F.cross_entropy(m(IDS).flatten(0, 1), LABELS.flatten())

    true = contributions(model, lambda m, i: 6 * _summed(m, [i]) / COUNTS.sum())
    stats = _check(model, loss, true)
    assert stats.per_sample_sq_norm[3] == 0  # a sample without tokens is one of zero gradient
    assert stats.num_samples == 6


def test_a_sample_without_tokens_can_be_left_out(model) -> None:
    true = contributions(model, lambda m, i: 5 * _summed(m, [i]) / COUNTS.sum())
    monitor = gradstats.attach(model)
    with monitor.samples(mask=COUNTS > 0):
        F.cross_entropy(model(IDS).flatten(0, 1), LABELS.flatten()).backward()
    assert_matches(monitor.step(), {n: g[COUNTS > 0] for n, g in true.items()}, 1e-5)


def test_sum_over_tokens(model) -> None:
    def loss(m: nn.Module):
        yield _summed(m, slice(None))

    true = contributions(model, lambda m, i: _summed(m, [i]))
    summed = _check(model, loss, true, loss_reduction="sum")
    model.zero_grad()
    scaled = _check(model, loss, {n: 6 * g for n, g in true.items()}, loss_reduction="mean")
    torch.testing.assert_close(summed.noise_scale, scaled.noise_scale)


def test_class_weights_and_label_smoothing(model) -> None:
    options = {"weight": CLASSES, "label_smoothing": 0.1}

    def loss(m: nn.Module):
        yield F.cross_entropy(m(IDS).flatten(0, 1), LABELS.flatten(), **options)

    total = CLASSES[LABELS[LABELS >= 0]].sum().double()
    true = contributions(model, lambda m, i: 6 * _summed(m, [i], **options) / total)
    _check(model, loss, true)


def test_weights_of_samples(model) -> None:
    def loss(m: nn.Module):
        each = F.cross_entropy(m(IDS).transpose(1, 2), LABELS, reduction="none").sum(1)
        yield (WEIGHTS * each).sum() / WEIGHTS.sum()

    share = WEIGHTS.double() / WEIGHTS.sum()
    _check(model, loss, contributions(model, lambda m, i: 6 * share[i] * _summed(m, [i])))


PARTS = (slice(0, 3), slice(3, 4), slice(4, 6))  # the second has no token at all


def test_micro_batches_divided_by_the_tokens_of_all(model) -> None:
    def loss(m: nn.Module):
        for part in PARTS:
            yield _summed(m, part) / COUNTS.sum()

    true = contributions(model, lambda m, i: 6 * _summed(m, [i]) / COUNTS.sum())
    _check(model, loss, true)


def test_micro_batches_with_means_of_their_own(model) -> None:
    """A token of a short micro-batch weighs more; that is the gradient that is stepped with."""

    def loss(m: nn.Module):
        for part in PARTS:
            yield _summed(m, part) / COUNTS[part].sum().clamp_min(1) / len(PARTS)

    tokens = torch.cat([COUNTS[p].sum().clamp_min(1).expand(len(COUNTS[p])) for p in PARTS])
    true = contributions(model, lambda m, i: 6 * _summed(m, [i]) / tokens[i] / len(PARTS))
    _check(model, loss, true)


def test_equal_tokens_in_unequal_numbers_scatter_by_their_numbers() -> None:
    """tr Σ of a mean over tokens holds cv²·|G|², cv of the counts: B_noise has cv² samples more."""
    torch.manual_seed(0)
    model, counts = nn.Linear(4, 3), torch.tensor([1, 2, 3, 6])
    x = torch.randn(4).expand(4, 6, 4)
    labels = torch.where(torch.arange(6) < counts[:, None], 1, -100)
    with gradstats.attach(model) as monitor:
        F.cross_entropy(model(x).flatten(0, 1), labels.flatten()).backward()
        stats = monitor.step()
    cv_sq = (counts / counts.float().mean()).var()
    torch.testing.assert_close(stats.tr_sigma, cv_sq * stats.grad_sq_norm)
    torch.testing.assert_close(stats.noise_scale, cv_sq / (1 - cv_sq / 4))
