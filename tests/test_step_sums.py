"""The totals of a step in one call of the extension, against those of the reference."""

from __future__ import annotations

import pytest
import torch
from models import loss, plain_layers
from torch import nn

import gradstats

C = pytest.importorskip("gradstats._C", reason="gradstats._C is not built")


@pytest.fixture
def model() -> nn.Module:
    return plain_layers()


def test_totals_of_a_step_equal_those_of_the_reference(model) -> None:
    x = torch.randn(6, 5)
    records = []
    totals = (
        "mean_sq_norm",
        "grad_sq_norm",
        "per_sample_sq_norm",
        "layer_sq_norm",
        "layer_grad_sq_norm",
    )
    for reduction in ("mean", "sum"):
        for backend in ("auto", "reference"):
            model.zero_grad()
            with (
                gradstats.attach(model, loss_reduction=reduction) as monitor,
                gradstats.backends.use(backend),
            ):
                (loss(model, x) * (len(x) if reduction == "sum" else 1)).backward()
                records.append(monitor.step())
    for got, want in zip(records[::2], records[1::2], strict=True):
        for key in totals:
            torch.testing.assert_close(getattr(got, key), getattr(want, key), rtol=1e-5, atol=0)
        assert got.coverage.measured == want.coverage.measured


def test_totals_where_nothing_was_delivered(model) -> None:
    x = torch.randn(6, 5)
    with gradstats.attach(model) as monitor:
        value = loss(model, x)
        value.backward(retain_graph=True)
        value.backward()
        stats = monitor.step()
    assert stats.coverage.fraction == 0
    assert stats.mean_sq_norm.isnan()
    assert stats.grad_sq_norm.isnan()


def test_step_sums_leaves_special_steps_alone() -> None:
    w = torch.randn(3, requires_grad=True)
    rows = torch.ones(1, 5)
    assert C.step_sums(rows, [w], [3], 1.0, 1.0) is None  # no gradient
    w.grad = torch.ones(3)
    assert C.step_sums(rows, [w], [4], 1.0, 1.0) is None  # another size
    assert C.step_sums(rows.half(), [w], [3], 1.0, 1.0) is None
    sq_norm, ok, grad_sq, total, mean, grad_total = C.step_sums(rows, [w], [3], 4.0, 2.0)
    assert ok.tolist() == [True]
    assert sq_norm.tolist() == [[4.0] * 4]
    assert (grad_sq.tolist(), total.tolist(), mean.item(), grad_total.item()) == (
        [6.0],
        [4.0] * 4,
        4.0,
        6.0,
    )
    w.grad = torch.ones(3).to_sparse()
    assert C.step_sums(rows, [w], [3], 1.0, 1.0) is None
