"""One parameter used several times in a forward: exact without forming any sample's gradient."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from layers import Tied, Twice
from models import loss
from oracle import assert_matches, per_sample_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradstats
from gradstats.fallback import FallbackWarning


class Loop(nn.Module):
    """One layer five times, then its weight once more the other way round, and through F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = torch.tanh(self.inner(x))
        x = torch.tanh(x @ self.inner.weight)
        return self.out(x) + F.linear(x.sum(1, keepdim=True), self.out.weight)


class TiedTwice(nn.Module):
    """An embedding with padding that is looked up twice and is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.inner = nn.Embedding(13, 6, padding_idx=3), nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.randn(13))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.tokens(ids.flip(1))
        return F.linear(torch.tanh(self.inner(x)), self.tokens.weight, self.bias)


class Checkpointed(Twice):
    def forward(self, x: Tensor) -> Tensor:
        once = checkpoint(self.inner, x, use_reentrant=False)
        return self.head(torch.tanh(self.inner(torch.tanh(once))))


def sequence() -> Tensor:
    return torch.randn(5, 7, 6)


def ids() -> Tensor:
    return torch.randint(0, 13, (5, 7))


@pytest.mark.parametrize(
    ("make", "data"),
    [(Twice, sequence), (Loop, sequence), (Tied, ids), (TiedTwice, ids), (Checkpointed, sequence)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_by_rules_alone(make, data, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, batch = make(), data()
    true = per_sample_gradients(model, loss, batch)
    model = model.to(dtype)
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        monitor = gradstats.attach(model)
        for _ in range(2):  # nothing of the first step is left in the second
            model.zero_grad()
            loss(model, batch).backward()
            stats = monitor.step()
    assert_matches(stats, true, 1e-5 if dtype == torch.float32 else 1e-10)


def test_backward_twice_through_shared_layers_is_found_out() -> None:
    torch.manual_seed(0)
    model = Twice()
    monitor = gradstats.attach(model)
    value = loss(model, sequence())
    value.backward(retain_graph=True)
    value.backward()
    missing = monitor.step().coverage.missing
    assert set(missing) == {"inner.weight", "inner.bias", "head.weight", "head.bias"}


def test_only_one_of_two_uses_in_the_backward() -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"inner": nn.Linear(6, 3)}), torch.randn(4, 6)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model["inner"]

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), self.inner(x.square())

    two = Two()
    monitor = gradstats.attach(two)
    used, _ = two(x)
    used.sin().sum(1).mean().backward()
    stats = monitor.step()
    g = used.detach().cos()
    torch.testing.assert_close(
        stats.layers["inner.weight"].per_sample_sq_norm,
        (g.square().sum(1) * x.square().sum(1)),
    )


class Cancelling(nn.Module):
    """Uses of one weight whose gradients cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split([4, 5], 1)
        together = F.linear(x, self.inner.weight).sum(1)
        return self.inner(a).sum(1) + F.linear(b, self.inner.weight).sum(1) - together


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uses_that_cancel_leave_no_negative_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Cancelling().to(dtype)
    monitor = gradstats.attach(model)
    for _ in range(20):
        model.zero_grad()
        (model(torch.randn(50, 9, 16, dtype=dtype)) * torch.randn(16, dtype=dtype)).sum(
            1
        ).mean().backward()
        sq_norm = monitor.step().layers["inner.weight"].per_sample_sq_norm
        assert sq_norm.min() >= 0
        assert sq_norm.max() < 1e-2  # of terms near 1e4


def test_tied_head_never_forms_a_gradient_of_a_sample() -> None:
    """At B × V × D this would take 8 GB."""
    torch.manual_seed(0)
    vocabulary, width, batch = 50_000, 40, 1000

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(vocabulary, width)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.tokens(ids[:, 0]), self.tokens.weight)[:, :50]

    model = Head()
    monitor = gradstats.attach(model)
    with torch.profiler.profile(profile_memory=True) as profiled:
        model(torch.randint(0, vocabulary, (batch, 1))).square().mean().backward()
        stats = monitor.step()
    assert stats.coverage.fraction == 1.0
    largest = max(e.self_cpu_memory_usage for e in profiled.events())
    assert largest < 4 * batch * vocabulary * 4  # a few times the logits


def test_nothing_is_kept_after_the_step() -> None:
    """Activations and gradients of shared layers go with the graph, without the garbage collector."""
    model, batch = Loop(), sequence()
    monitor = gradstats.attach(model)
    gc.collect()
    gc.disable()
    try:
        alive = []
        for _ in range(4):
            loss(model, batch).backward()
            monitor.step()
            monitor.noise_scale()  # two scalars of every step wait for it
            model.zero_grad()
            alive.append(sum(isinstance(o, Tensor) for o in gc.get_objects()))
    finally:
        gc.enable()
    assert alive[1] == alive[2] == alive[3]


def test_a_first_try_that_turned_to_the_fallback_is_not_counted() -> None:
    """The loop runs again after its module asked for the fallback: its uses start again too."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.gain = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.shared(torch.tanh(self.shared(x)))
            return x * (1 + self.gain)

    torch.manual_seed(0)
    model, batch = nn.Sequential(Both(), nn.Linear(6, 3)), sequence()
    true = per_sample_gradients(model, loss, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        monitor = gradstats.attach(model)
        for _ in range(2):
            model.zero_grad()
            loss(model, batch).backward()
            assert_matches(monitor.step(), true, 1e-5)
