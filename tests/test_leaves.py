"""A pass's leaf for statistics: used again once its graph is gone, and not before."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from models import loss, plain_layers
from oracle import assert_matches, per_sample_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradstats

C = pytest.importorskip("gradstats._C", reason="gradstats._C is not built")


@pytest.fixture
def model() -> nn.Module:
    return plain_layers()


def test_two_forwards_live_at_once(model) -> None:
    a, b = torch.randn(6, 5), torch.randn(6, 5)
    plain = copy.deepcopy(model)
    with gradstats.attach(model) as monitor:
        for _ in range(3):
            model.zero_grad()
            first, second = loss(model, a), loss(model, b)
            first.backward()
            second.backward()
            stats = monitor.step()
    truth = per_sample_gradients(plain, lambda m, x: 2 * loss(m, x), torch.cat([a, b]))
    assert stats.num_samples == 12
    assert_matches(stats, {k: v for k, v in truth.items()}, 1e-5)


def test_a_leaf_is_used_again_once_its_graph_is_gone(model) -> None:
    x = torch.randn(6, 5)
    with gradstats.attach(model) as monitor:
        leaves = []
        for _ in range(4):
            model.zero_grad()
            value = loss(model, x)
            leaves.append(monitor._source.interposer._passes[-1].leaf)
            value.backward()
            del value
            monitor.step()
        assert all(leaf is leaves[0] for leaf in leaves)
        held = model(x)  # its graph is alive, with or without a backward
        assert monitor._source.interposer._passes[-1].leaf is leaves[0]
        loss(model, x).backward()
        assert monitor._source.interposer._passes[-1].leaf is not leaves[0]
        assert monitor.step().coverage.fraction == 1
        held.sum().backward()
        assert monitor.step().coverage.fraction == 1


def test_forwards_without_a_backward_are_forgotten(model) -> None:
    with gradstats.attach(model) as monitor:
        for _ in range(20):
            model(torch.randn(6, 5))
        assert len(monitor._source.interposer._passes) == 1


def test_a_leaf_waits_for_a_checkpoint_that_recomputes(model) -> None:
    """Nothing of the first forward holds its rows before the backward."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x):
            return checkpoint(self.parts, x, use_reentrant=True)

    x = torch.randn(6, 5, requires_grad=True)
    outer = Checkpointed()
    with gradstats.attach(outer) as monitor:
        first = outer(x)
        leaf = monitor._source.interposer._passes[-1].leaf
        second = outer(torch.randn(4, 5, requires_grad=True))
        third = outer(x)
        assert all(p.leaf is not leaf for p in monitor._source.interposer._passes[1:])
        del third
        with pytest.raises(gradstats.UnsupportedLayerError, match="could be the one it belongs to"):
            first.sum().backward()
        del first
        second.sum().backward()
        assert monitor.step().num_samples == 4


def test_a_graph_that_runs_twice_is_not_taken_for_the_next_one(model) -> None:
    x = torch.randn(6, 5)
    with gradstats.attach(model) as monitor:
        value = loss(model, x)
        value.backward(retain_graph=True)
        monitor.step()
        model.zero_grad()
        loss(model, x).backward()
        value.backward()
        stats = monitor.step()
        assert stats.num_samples == 12  # those of the first graph again, and those of the second
        assert stats.coverage.fraction == 1


def test_nothing_is_kept_alive() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    held = weakref.ref(model[0].weight)
    monitor = gradstats.attach(model)
    loss(model, torch.randn(6, 5)).backward()
    monitor.step()
    del model, monitor  # without detach()
    gc.collect()
    assert held() is None


def rows_of(leaf, told):
    return C.Shortcuts.rows_of_leaf(leaf, told.append)


def test_rows_are_stacked_and_added_up() -> None:
    leaf = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    told: list[torch.Tensor] = []
    rows = rows_of(leaf, told)
    assert all(row.requires_grad and row.shape == (4,) for row in rows)
    weight = torch.randn(3, 4, dtype=torch.float64)
    (rows[0] * weight[0] + rows[2] * weight[2]).sum().backward()
    assert [t is leaf for t in told] == [True]
    want = weight * torch.tensor([[1.0], [0.0], [1.0]])
    torch.testing.assert_close(leaf.grad, want, rtol=0, atol=0)
    (rows[1] * 2 + rows[2]).sum().backward(create_graph=True)  # of a graph of its own
    assert len(told) == 2
    assert not leaf.grad.requires_grad
    want = want + torch.tensor([[0.0], [2.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(leaf.grad, want, rtol=0, atol=0)
    leaf.grad = None
    stacked = torch.stack(rows).sum()
    torch.autograd.grad(stacked, rows)  # no more than what was asked for
    assert leaf.grad is None
    assert len(told) == 2


def test_what_is_told_of_rows_may_fail() -> None:
    def fails(leaf):
        raise gradstats.BatchDimError("of this type")

    rows = C.Shortcuts.rows_of_leaf(torch.zeros(2, 3, requires_grad=True), fails)
    with pytest.raises(gradstats.BatchDimError, match="of this type"):
        rows[0].sum().backward()


def test_rows_let_go_of_their_leaf() -> None:
    leaf = torch.zeros(2, 3, requires_grad=True)

    class Told:
        def __call__(self, leaf):
            pass

    told = Told()
    rows, held = C.Shortcuts.rows_of_leaf(leaf, told), weakref.ref(told)
    leaf.register_post_accumulate_grad_hook(lambda _: None)
    del told, leaf
    gc.collect()
    assert held() is not None
    del rows
    gc.collect()
    assert held() is None
