"""The extension's autograd node of linear layers: where it is taken, and that it does what Python's does, as
far as test_layer_nodes.py does not ask that of all nodes."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from models import loss
from oracle import assert_matches, per_sample_gradients
from torch import nn

import gradstats
from gradstats import backends, ops

pytest.importorskip("gradstats._C", reason="gradstats._C is not built")


def names(out) -> set[str]:
    """Of the nodes of a graph."""
    found, open_ = set(), [out.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None:
            found.add(node.name())
            open_ += [f for f, _ in node.next_functions]
    return found


NODE, PYTHON = "gradstats::cpu::", "LinearBackward"


def is_native(out) -> bool:
    return any(NODE in name for name in names(out))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3, bias=False))


def test_the_node_is_taken_where_the_extension_serves(model) -> None:
    with gradstats.attach(model):
        assert is_native(model(torch.randn(4, 5)))
        assert is_native(model(torch.randn(4, 2, 5)))
        with backends.use("reference"):
            out = model(torch.randn(4, 5))
            assert not is_native(out)
            assert PYTHON in names(out)
        ops.observers.append(lambda *_: None)
        try:
            assert not is_native(model(torch.randn(4, 5)))
        finally:
            ops.observers.pop()
    model.half()
    with gradstats.attach(model):
        assert not is_native(model(torch.randn(4, 5).half()))


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5), (6, 2, 3, 5)])
def test_as_pythons(model, shape, moments) -> None:
    x = torch.randn(shape, requires_grad=True)
    found = []
    for backend in ("auto", "reference"):
        model.zero_grad()
        x.grad = None
        with backends.use(backend), gradstats.attach(model, moments=moments) as monitor:
            model(x).square().mean().backward()
            stats = monitor.step()
        assert stats.coverage.fraction == 1
        grads = [p.grad for p in model.parameters()]
        found.append([x.grad, *grads, stats.layer_sq_norm, *stats.grad_var.values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_frozen_parts(model) -> None:
    model[0].weight.requires_grad_(False)
    x = torch.randn(6, 5)
    with gradstats.attach(model) as monitor:
        loss(model, x).backward()
        stats = monitor.step()
    model[0].weight.requires_grad_(True)
    truth = per_sample_gradients(model, loss, x)
    for name in ("0.bias", "2.weight"):
        want = truth[name].flatten(1).square().sum(1)
        torch.testing.assert_close(
            stats.layers[name].per_sample_sq_norm.double(), want, rtol=1e-5, atol=0
        )


def test_a_graph_that_was_used_up(model) -> None:
    with gradstats.attach(model):
        out = model(torch.randn(6, 5)).sum()
        out.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            out.backward()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def test_several_uses_are_joined() -> None:
    torch.manual_seed(1)
    model, x = Twice(), torch.randn(6, 4, 5)
    with gradstats.attach(model) as monitor:
        assert is_native(model(x))
        loss(model, x).backward()
        stats = monitor.step()
    assert_matches(stats, per_sample_gradients(model, loss, x), 1e-5)


def test_nothing_outlives_the_graph() -> None:
    model, x = Twice(), torch.randn(6, 5)
    with gradstats.attach(model) as monitor:
        out = model(x)
        held = weakref.ref(monitor._source.interposer._passes[-1].joints["layer.weight"])
        loss(model, x).backward()
        monitor.step()
        del out
        gc.collect()
        assert held() is None


def test_backward_in_another_thread(model) -> None:
    x = torch.randn(6, 5)
    with gradstats.attach(model) as monitor:
        out = model(x).square().mean()
        thread = threading.Thread(target=out.backward)
        del out
        thread.start()
        thread.join()
        stats = monitor.step()
    assert stats.coverage.fraction == 1


def test_outputs_may_be_changed_in_place() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 5))

        def forward(self, x):
            return F.linear(x, self.weight).add_(1).mul_(2)

    model, x = Adds(), torch.randn(6, 3, 5)
    with gradstats.attach(model) as monitor:
        loss(model, x).backward()
        stats = monitor.step()
    assert_matches(stats, per_sample_gradients(model, loss, x), 1e-5)
