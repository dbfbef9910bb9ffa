"""The operations as torch sees them, and random models of random shape against the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import loss
from oracle import assert_matches, per_sample_gradients
from torch import nn

import gradstats
from gradstats import backends, reference
from gradstats.ops import SCHEMAS, ops

B, T, D = 3, 5, 6


def _arguments(name: str):
    x, g = torch.randn(B, T, D), torch.randn(B, T, 4)
    same = torch.randn(B, T, D)
    if name == "linear_stats":
        return [(x, g, True, True, True), (x, g, True, False, False), (x, g, False, True, True)]
    if name == "layer_norm_stats":
        rows, scale = torch.rand(B, T) + 1, torch.randn(D)
        return [(same, x, rows, rows, scale, True, True, True, True),
                (same, x, None, rows, None, False, True, False, False)]  # fmt: skip
    if name == "group_norm_stats":
        rows, scale = torch.rand(B, 1) + 1, torch.randn(T)
        return [(same, x, rows, rows, scale, True, True, True, True),
                (same, x, rows, rows, None, True, False, True, False)]  # fmt: skip
    if name == "embedding_stats":
        ids = torch.randint(0, 9, (B, T))
        return [(ids, g, 9, -1, True), (ids, g, 9, 2, False)]
    if name == "tied_cross":
        ids, head = torch.randint(-1, 7, (B, T)), torch.randn(B, 4, 7)
        return [(ids, x, head, torch.randn(B, 4, D))]
    if name == "conv_stats":
        image, out = torch.randn(B, 4, 6, 5), torch.randn(B, 2, 6, 3)
        where = ([3, 3], [1, 1], [1, 0], [1, 1], 2)
        return [(image, out, *where, True, True, True), (image, out, *where, True, False, False)]
    return [([x, g, torch.randn(()), torch.randn(0, 3)],)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name: str, backend: str) -> None:
    torch.manual_seed(0)
    for arguments in _arguments(name):
        with backends.use(backend):
            torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_backend_agrees_with_the_reference(name: str) -> None:
    torch.manual_seed(1)
    for arguments in _arguments(name):
        op = getattr(ops, name).default
        with backends.use("reference"):
            wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                    for a in arguments]  # fmt: skip
            if name == "multi_sq_norm":
                wide = [[t.double() for t in arguments[0]]]
            true = op(*wide)
        for out, expected in zip(_list(op(*arguments)), _list(true), strict=True):
            assert out.shape == expected.shape
            torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=1e-5)


def _turned(argument):
    """The same values, the first two dimensions the other way round in memory."""
    if isinstance(argument, list) and argument and isinstance(argument[0], torch.Tensor):
        return [_turned(t) for t in argument]
    if not isinstance(argument, torch.Tensor) or argument.dim() < 2:
        return argument
    return argument.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_results_are_contiguous_whatever_the_strides(name: str, backend: str) -> None:
    """Compiled graphs rely on it: so the fake kernels say."""
    torch.manual_seed(2)
    for arguments in _arguments(name):
        with backends.use(backend):
            op = getattr(ops, name).default
            expected, found = _list(op(*arguments)), _list(op(*map(_turned, arguments)))
        for out, same in zip(found, expected, strict=True):
            assert out.is_contiguous()
            torch.testing.assert_close(out, same, rtol=1e-5, atol=1e-5)


def _list(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


def test_results_do_not_depend_on_what_memory_held() -> None:
    torch.manual_seed(0)
    for name in SCHEMAS:
        arguments = _arguments(name)[0]
        op = getattr(ops, name).default
        first = [t.clone() for t in _list(op(*arguments))]
        for size in (16, 64, 1 << 10, 1 << 14, 1 << 18):  # freed blocks, full of NaN
            poison = [torch.full((size,), torch.nan) for _ in range(8)]
            del poison
        for a, b in zip(first, _list(op(*arguments)), strict=True):
            assert torch.equal(a, b), name


LAYERS = st.sampled_from(["linear", "bias-free", "norm", "rms", "tanh", "scale", "conv"])


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.weight.new_ones(())


class OverTime(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


def _layer(kind: str, width: int) -> nn.Module:
    return {
        "linear": lambda: nn.Linear(width, width),
        "bias-free": lambda: nn.Linear(width, width, bias=False),
        "norm": lambda: nn.LayerNorm(width),
        "rms": lambda: nn.RMSNorm(width, eps=1e-5),  # the default makes rounding large at width 1
        "tanh": nn.Tanh,
        "scale": lambda: Scale(width),
        "conv": lambda: OverTime(width),
    }[kind]()


@settings(max_examples=150, deadline=None)
@example(["norm", "rms", "rms", "norm"], 1, 1, 1, False, 1, 0)
@given(
    kinds=st.lists(LAYERS, min_size=1, max_size=5),
    batch=st.integers(1, 7),
    positions=st.integers(1, 70),
    width=st.integers(1, 19),
    moments=st.booleans(),
    parts=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_random_models(kinds, batch, positions, width, moments, parts, seed) -> None:
    torch.manual_seed(seed)
    layers = [_layer(kind, width) for kind in kinds]
    for layer in layers:
        if isinstance(layer, nn.LayerNorm):
            nn.init.normal_(layer.bias)  # all that it gives at width 1
    model = nn.Sequential(nn.Linear(width, width), *layers).double()
    data = torch.randn(batch, positions, width, dtype=torch.float64)
    true = per_sample_gradients(model, loss, data)
    with gradstats.attach(model, moments=moments) as monitor:
        for part in data.split(-(-batch // parts)):
            (loss(model, part) * len(part) / batch).backward()
        assert_matches(monitor.step(), true, 1e-9)


def test_forwards_are_numbered() -> None:
    counter = torch.tensor(2**24 - 2)
    torch.library.opcheck(ops.next_number.default, (counter.clone(),))
    assert [int(ops.next_number(counter)) for _ in range(3)] == [2**24 - 1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_squared_norms_of_a_list_in_few_launches(dtype):
    """What the reference does on a card: the same numbers, empty tensors and strides included."""
    tensors = [
        torch.randn(30, 40).to(dtype).t(),
        torch.randn(0).to(dtype),
        torch.tensor(2).to(dtype),
    ]
    true = torch.stack([t.double().square().sum() for t in tensors])
    wide = reference.stats_dtype(dtype)
    found = reference.in_few_launches(tensors, wide)
    assert found.dtype == wide
    torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=0)
    torch.testing.assert_close(reference.multi_sq_norm(tensors).double(), true, rtol=1e-6, atol=0)
