"""The extension's way past the interposer: where it is taken, where it is not, and that nobody can tell."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import loss, plain_layers
from oracle import assert_matches, per_sample_gradients
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import gradstats

pytest.importorskip("gradstats._C", reason="gradstats._C is not built")


@pytest.fixture
def model() -> nn.Module:
    return plain_layers()


def measured(model, x, context=None, tolerance: float = 1e-5, loss=loss):
    """A measured step, held against the oracle."""
    plain = copy.deepcopy(model)
    with gradstats.attach(model) as monitor:
        with context or torch.enable_grad():
            value = loss(model, x)
        value.backward()
        stats = monitor.step()
    assert_matches(stats, per_sample_gradients(plain, loss, x), tolerance)


def test_plain_layers_take_it(model, entered) -> None:
    measured(model, torch.randn(6, 5))
    assert entered == [""]


def test_any_number_of_positions_and_moments(model, entered) -> None:
    x = torch.randn(6, 3, 2, 5)
    plain = copy.deepcopy(model)
    with gradstats.attach(model, moments=True) as monitor:
        loss(model, x).backward()
        stats = monitor.step()
    assert entered == [""]
    truth = per_sample_gradients(plain, loss, x)
    assert_matches(stats, truth, 1e-5)
    for name, each in truth.items():
        want = each.var(0)
        got = stats.grad_var[name].double()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * want.max().item())


def test_float64_and_bfloat16(entered) -> None:
    torch.manual_seed(1)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.bfloat16, 3e-2)):
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)
        measured(model, torch.randn(6, 5, dtype=dtype), tolerance=tolerance)
    assert entered == ["", ""]


def test_what_is_not_plain_does_not(model, entered) -> None:
    """Every one of these is left to Python, and exact there."""
    x = torch.randn(6, 5)

    class Watching(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[object] = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watching() as mode:
        measured(model, x, loss=loss)
    assert mode.seen.count(F.linear) >= 3  # also those of the forward that is measured
    assert "0" in entered

    entered.clear()

    class Owner(nn.Module):
        def forward(self, x):
            return self.parts[2](F.relu(self.parts[0](input=x)))

    owner = Owner()
    owner.parts = nn.ModuleList([nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)])
    measured(owner, x)
    assert entered == ["", "parts.0"]

    entered.clear()
    other = type("Other", (nn.Linear,), {"forward": lambda self, x: F.linear(x, self.weight) * 2})
    measured(nn.Sequential(other(5, 3, bias=False), nn.Linear(3, 2)), x)
    assert entered == ["", "0"]

    entered.clear()
    frozen = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    frozen[0].bias.requires_grad_(False)
    with gradstats.attach(frozen) as monitor:
        loss(frozen, x).backward()
        assert monitor.step().coverage.fraction == 1
    assert entered == ["", "0"]


def test_autocast_is_left_to_python(model, entered) -> None:
    with gradstats.attach(model) as monitor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(torch.randn(6, 5))
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
        assert monitor.step().coverage.fraction == 1
    assert "0" in entered


def test_other_dtypes_are_left_to_python(entered) -> None:
    for dtype in (torch.float16, torch.complex64):
        entered.clear()
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).to(dtype)
        with gradstats.attach(model):
            model(torch.randn(6, 5, dtype=dtype))
        assert "0" in entered


def test_another_backend_is_left_to_python(model, entered) -> None:
    with gradstats.backends.use("reference"):
        measured(model, torch.randn(6, 5))
    assert "0" in entered


def test_rows_that_are_told_inside_a_forward_are_left_to_python(entered) -> None:
    """As many rows as samples, and not in their order."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            ids = torch.arange(len(x)).flip(0)
            rows = torch.tanh(self.first(x)).flip(0)
            with self.told(ids) if self.told else torch.enable_grad():
                rows = self.second(rows)
            return rows.flip(0)

    torch.manual_seed(4)
    model, x = Turned(), torch.randn(6, 5)
    model.told = None
    truth = per_sample_gradients(model, loss, x)
    with gradstats.attach(model) as monitor:
        model.told = monitor.samples
        model(x)  # the first forward is looked at more closely
        entered.clear()
        loss(model, x).backward()
        assert entered == ["", "second"]
        total = sum(
            truth[name].flatten(1).square().sum(1) for name in ("second.weight", "second.bias")
        )
        stats = monitor.step()
        got = sum(stats.layers[f"second.{key}"].per_sample_sq_norm for key in ("weight", "bias"))
    torch.testing.assert_close(got.double(), total, rtol=1e-5, atol=0)


class Uses(nn.Module):
    """Of one layer: as it is, through its weight, and behind a mark."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(5, 5), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.randn(5))
        self.order = order

    def forward(self, x):
        for kind in self.order:
            if kind == "m":
                x = torch.tanh(self.layer(x))
            elif kind == "f":
                x = torch.sin(F.linear(x, self.layer.weight, self.layer.bias))
            elif kind == "c":
                x = checkpoint(self.layer, x, use_reentrant=False)
            else:
                x = x * self.layer(self.scale.expand(len(x), 5))
        return self.out(x)


@pytest.mark.parametrize(
    "order", ["m", "mm", "mf", "fm", "mfm", "ffm", "mmm", "mc", "cm", "s", "sm", "ms"]
)
def test_uses_of_either_kind_are_joined(order) -> None:
    torch.manual_seed(2)
    measured(Uses(order), torch.randn(6, 5))


def test_an_exception_inside_leaves_nothing_open(model, entered) -> None:
    model[1].register_forward_hook(lambda *_: 1 / 0)
    x = torch.randn(6, 5)
    with gradstats.attach(model) as monitor:
        with pytest.raises(ZeroDivisionError):
            model(x)
        model[1]._forward_hooks.clear()
        loss(model, x).backward()
        assert monitor.step().coverage.fraction == 1
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), gradstats.attach(model):
        model(torch.randn(6, 4))


def test_a_wrong_batch_is_refused_as_ever(model) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts(x[1:])

    cut = Cut()
    with gradstats.attach(cut), pytest.raises(gradstats.BatchDimError, match=r"'parts\.0'"):
        cut(torch.randn(6, 5))


def test_copies_pickles_and_detached_models_know_nothing(model) -> None:
    x = torch.randn(6, 5)
    want = model(x)
    with gradstats.attach(model):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(x), want)
    assert "forward" not in model[1].__dict__
    assert type(model(x).grad_fn).__name__ == "AddmmBackward0"


def test_inplace_activations_and_hooks(entered) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Linear(7, 3))
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    x = torch.randn(6, 5)
    with gradstats.attach(model) as monitor:
        loss(model, x).backward()
        stats = monitor.step()
    assert calls == ["before", "after"]
    assert entered == [""]
    model[0]._forward_hooks.clear()
    model[0]._forward_pre_hooks.clear()
    assert_matches(stats, per_sample_gradients(model, loss, x), 1e-5)
