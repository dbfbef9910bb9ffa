"""Modules that are measured sample by sample: what comes out, and what they leave behind."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import loss
from oracle import assert_matches, per_sample_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradstats
from gradstats.fallback import FallbackWarning


class Gain(nn.Module):
    """(1 + weight): no rule, so the fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) * (1 + self.weight)


def measured(model: nn.Module, batch: Tensor, **options: object) -> gradstats.Monitor:
    """Attached, after one backward of the batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        monitor = gradstats.attach(model, **options)
        loss(model, batch).backward()
    return monitor


def test_a_module_at_two_paths_is_put_back() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Gain()
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    torch.manual_seed(0)
    model, batch = Both(), torch.randn(4, 3, 6)
    true = per_sample_gradients(model, loss, batch)
    before = dict(model.named_parameters())
    monitor = measured(model, batch)
    assert_matches(monitor.step(), true, 1e-5)
    assert all(p is before[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (1, 3)])
def test_where_the_samples_come_out_does_not_depend_on_the_first_batch(sizes) -> None:
    """The state is (layers, B, H): of one sample, in one layer, both dimensions are 1 long."""

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(6, 5, proj_size=4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out, (state, _) = self.inner(x)
            return out + state.mean((0, 2))[:, None, None]

    torch.manual_seed(0)
    model, batch = Projected(), torch.randn(sum(sizes), 4, 6)
    true = per_sample_gradients(model, loss, batch)
    plain = copy.deepcopy(model)
    expected = [plain(part) for part in batch.split(sizes)]
    monitor = gradstats.attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for part, want in zip(batch.split(sizes), expected, strict=True):
            torch.testing.assert_close(model(part), want, rtol=1e-5, atol=1e-6)
            (loss(model, part) * len(part) / len(batch)).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_an_argument_as_long_as_a_later_batch_is_not_taken_for_samples() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return mask @ (x * (1 + self.gain))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.mask = Masked(), torch.randn(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, self.mask.to(x.dtype))

    torch.manual_seed(0)
    model, batch = Model(), torch.randn(5, 5, 6)
    expected, true = model(batch), per_sample_gradients(model, loss, batch)
    monitor = measured(model, batch[:3])
    monitor.step()
    model.zero_grad()
    torch.testing.assert_close(model(batch), expected)
    loss(model, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)


class Recomputed(nn.Module):
    """A checkpoint inside a module that the fallback runs."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.gain, self.inner = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x * (1 + self.gain)
        if x.dtype == torch.float64:  # the oracle
            return torch.tanh(self.inner(x))
        return torch.tanh(checkpoint(self.inner, x, use_reentrant=self.reentrant))


def test_a_checkpoint_inside_is_exact() -> None:
    torch.manual_seed(0)
    model, batch = Recomputed(False), torch.randn(4, 3, 6)
    true = per_sample_gradients(model, loss, batch)
    monitor = measured(model, batch)
    assert_matches(monitor.step(), true, 1e-5)
    model.zero_grad()
    loss(model, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_a_reentrant_checkpoint_inside_is_said_to_be_unmeasured() -> None:
    torch.manual_seed(0)
    model, batch = Recomputed(True), torch.randn(4, 3, 6)
    plain = copy.deepcopy(model)
    loss(plain, batch).backward()
    missing = measured(model, batch).step().coverage.missing
    assert list(missing) == ["gain"]
    assert "use_reentrant=False" in missing["gain"]
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_rounding_of_autocast_is_not_taken_for_samples_that_mix() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 6), Gain())
    outer = nn.Sequential(model, model)  # used twice, with moments: all of it sample by sample
    batch = torch.randn(7, 5, 6)
    monitor = gradstats.attach(outer, moments=True)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("ignore", FallbackWarning)
        out = outer(batch)
    out.float().square().sum().backward()
    assert monitor.step().coverage.fraction == 1.0
