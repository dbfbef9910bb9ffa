"""A model that is known by an earlier forward is entered without Python, and nobody can tell."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import loss, plain_layers
from oracle import assert_matches, per_sample_gradients
from torch import nn

import gradstats
from gradstats import interpose, tracing

pytest.importorskip("gradstats._C", reason="gradstats._C is not built")


entries = pytest.mark.skipif(
    tracing.HIDES_CONSTRUCTORS,
    reason="for a compiler that hides constructors from modes, Python enters every module",
)


@pytest.fixture
def model() -> nn.Module:
    return plain_layers()


class Block(nn.Module):
    """Modules in modules, one of which has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))
        self.inner = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5), nn.Sequential(nn.GELU()))

    def forward(self, x):
        return x * self.scale + self.inner(x)


@entries
def test_after_its_first_forward_a_model_is_entered_without_python(entered) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv1d(3, 3, 1), Block(), Block())
    plain = copy.deepcopy(model)
    with gradstats.attach(model) as monitor:
        for batch, first in ((6, True), (6, False), (4, True), (4, False), (6, False)):
            x = torch.randn(batch, 3, 5)
            model.zero_grad()
            entered.clear()
            loss(model, x).backward()
            # The first of a size makes its leaf, and the first of all is looked at in every module.
            assert bool(entered) == first
            assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)
        # Two forwards before a backward, then the other one: Python opens those.
        one, two = torch.randn(6, 3, 5), torch.randn(6, 3, 5)
        model.zero_grad()
        values = loss(model, one), loss(model, two)
        (values[0] + values[1]).backward()
        assert monitor.step().num_samples == 6


@entries
@pytest.mark.parametrize(
    ("model", "shape"),
    [(nn.Linear(5, 3), (5,)), (nn.LayerNorm(5), (4, 5)), (nn.GroupNorm(2, 4), (4, 3)),
     (nn.Conv1d(4, 2, 3), (4, 7))],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_a_model_that_is_a_plain_layer_itself_is_entered_without_python(
    model, shape, entered, monkeypatch
) -> None:
    plain = copy.deepcopy(model)
    by_function: list[object] = []  # what the mode sees, as Python rules do

    def see(self, func, types, args=(), kwargs=None):
        by_function.append(func)
        return handle(self, func, types, args, kwargs)

    handle = interpose.Interposer.__torch_function__
    monkeypatch.setattr(interpose.Interposer, "__torch_function__", see)
    with gradstats.attach(model) as monitor:
        for first in (True, False, False):
            x = torch.randn(6, *shape)
            model.zero_grad()
            entered.clear()
            out = model(x)
            if not first:
                assert not entered
                assert not by_function
            loss(nn.Identity(), out).backward()
            del out  # whose graph has the leaf that the next forward takes
            by_function.clear()
            assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(copied(x), model(x))


@entries
def test_a_module_that_gives_nothing_runs_once(entered) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.runs = 0

        def forward(self, x):
            self.runs += 1

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counts, self.layer = Counts(), nn.Linear(5, 2)

        def forward(self, x):
            self.counts(x)
            return self.layer(x)

    model = Holds()
    with gradstats.attach(model) as monitor:
        for n in range(3):
            loss(model, torch.randn(6, 5)).backward()
            monitor.step()
            assert model.counts.runs == n + 1
        assert entered == ["", "counts"]


def test_an_exception_in_a_known_model_leaves_nothing_open(model, entered) -> None:
    x = torch.randn(6, 5)
    with gradstats.attach(model) as monitor:
        loss(model, x).backward()
        monitor.step()
        for _ in range(2):
            handle = model[1].register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(x)
            handle.remove()
            interposer = monitor._source.interposer
            assert (interposer.current, interposer.stack) == (None, [])
            assert torch.overrides._get_current_function_mode_stack() == []
            model.zero_grad()
            loss(model, x).backward()
            assert monitor.step().coverage.fraction == 1


def test_flattened_rows_in_a_later_forward_are_found() -> None:
    """The first forward had one position, and there was nothing to find out."""

    class Flattens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            rows = torch.tanh(self.first(x)).flatten(0, 1)
            return self.second(rows).unflatten(0, x.shape[:2])

    torch.manual_seed(6)
    model = Flattens()
    plain = copy.deepcopy(model)
    with gradstats.attach(model) as monitor:
        for positions in (1, 3, 3):
            x = torch.randn(6, positions, 5)
            model.zero_grad()
            loss(model, x).backward()
            assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)


@entries
def test_parameters_that_were_replaced_are_known(entered) -> None:
    torch.manual_seed(7)
    model, x = nn.Sequential(Block(), nn.Linear(5, 2)), torch.randn(6, 5)
    with gradstats.attach(model) as monitor:
        loss(model, x).backward()
        monitor.step()
        entered.clear()
        model.zero_grad()
        model[0].scale = nn.Parameter(torch.randn(5))
        plain = copy.deepcopy(model)
        loss(model, x).backward()
        assert entered == ["0"]
        assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)
