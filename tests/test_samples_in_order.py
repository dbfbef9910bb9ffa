"""Forwards that put samples into another order: found, and refused unless told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from models import loss
from oracle import assert_matches, per_sample_gradients
from torch import Tensor, nn

import gradstats


class Ordered(nn.Module):
    """Its second layer sees the samples in an order of its own, of which it may speak."""

    def __init__(self, put: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.put, self.order = put, put(torch.arange(5))
        self.monitor: gradstats.Monitor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).tanh()
        if len(x) == 1:  # the oracle's
            return self.head(x)
        told = self.monitor.samples(ids=self.order) if self.monitor else contextlib.nullcontext()
        with told:
            out = self.head(self.put(x))
        return out[self.order.argsort()]


@pytest.mark.parametrize(
    "put",
    [
        lambda x: x[torch.tensor([0, 2, 1, 4, 3])],
        lambda x: x[[4, 0, 1, 2, 3]],
        lambda x: x.index_select(0, torch.tensor([0, 1, 2, 4, 3])),
        lambda x: x.flip(0),
        lambda x: torch.roll(x, 2, 0),
    ],
)
def test_samples_in_another_order_are_refused_unless_told(put: Callable[[Tensor], Tensor]) -> None:
    """Sums over the samples would be right, and a sample's norm made of those of two."""
    torch.manual_seed(0)
    model, batch = Ordered(put), torch.randn(5, 6)
    true = per_sample_gradients(model, loss, batch)
    monitor = gradstats.attach(model)
    with pytest.raises(
        gradstats.UnsupportedLayerError, match=r"'head'.*another order.*samples\(ids="
    ):
        model(batch)
    model.monitor = monitor
    loss(model, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x[torch.arange(4), torch.tensor([2, 0, 1, 2])],  # each sequence's last state
        lambda x: x[torch.tensor([1, 0, 3, 2])].tanh()[torch.tensor([1, 0, 3, 2])],  # put back
        lambda x: x.flip(1).roll(1, 1)[:, torch.tensor([2, 0, 1])],
    ],
)
def test_samples_that_keep_their_order_are_exact(use: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(use(self.inner(x)))

    torch.manual_seed(0)
    model, batch = Model(), torch.randn(4, 3, 6)
    own = [out.square().mean() for out in model(batch)]
    grads = [torch.autograd.grad(one, model.parameters(), retain_graph=True) for one in own]
    names = [name for name, _ in model.named_parameters()]
    true = {name: torch.stack(g) for name, g in zip(names, zip(*grads, strict=True), strict=True)}
    monitor = gradstats.attach(model)
    model(batch).square().mean().backward()
    assert_matches(monitor.step(), true, 1e-5)
