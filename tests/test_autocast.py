"""Under autocast and in narrow types: what comes out is what comes out without gradstats."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from oracle import relative
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import gradstats


class Turned(nn.Module):
    """Channels in dimension 1."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class First(nn.Module):
    """The outputs of a recurrent layer, and its states."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.inner(x)
        last = state[0] + state[1] if isinstance(state, tuple) else state
        return out + last.mean((0, 2))[:, None, None]


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(6, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.sin())


LAYERS = {
    "layer norm": lambda: nn.LayerNorm(6), "rms norm": lambda: nn.RMSNorm(6),
    "group norm": lambda: Turned(nn.GroupNorm(2, 6)),
    "instance norm": lambda: Turned(nn.InstanceNorm1d(6, affine=True)),
    "batch norm": lambda: Turned(nn.BatchNorm1d(6).eval()),
    "prelu": lambda: Turned(nn.PReLU(6)), "one prelu": lambda: nn.PReLU(), "bilinear": Pairs,
    "conv": lambda: Turned(nn.Conv1d(6, 6, 3)), "weight norm": lambda: weight_norm(nn.Linear(6, 6)),
    "lstm": lambda: First(nn.LSTM(6, 6, batch_first=True)),
    "gru": lambda: First(nn.GRU(6, 6, batch_first=True)),
    "rnn": lambda: First(nn.RNN(6, 6, batch_first=True)),
    "encoder": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
}  # fmt: skip


@pytest.mark.parametrize("before", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_keep_their_type(name: str, before: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), LAYERS[name]()), torch.randn(4, 5, 6)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    model = model if before == "bfloat16" else model[1]
    plain = copy.deepcopy(model)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("ignore")
        try:
            expected = plain(x)
        except RuntimeError as error:
            pytest.skip(f"torch itself: {error}")
        monitor = gradstats.attach(model)
        out = model(x)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    weights = torch.randn(out.shape[1:])
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert monitor.step().coverage.fraction == 1.0
    largest = max(float(q.grad.abs().max()) for q in plain.parameters())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=5e-2, atol=5e-2 * largest)


@pytest.mark.parametrize("size", [1.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_of_narrow_types_is_torch_own(dtype: torch.dtype, size: float) -> None:
    """Its default eps is that of float32, in which it computes."""
    torch.manual_seed(0)
    model, x = nn.RMSNorm(6).to(dtype), (size * torch.randn(4, 5, 6)).to(dtype)
    torch.nn.init.uniform_(model.weight, 0.5, 1.5)
    expected = model(x)
    with gradstats.attach(model):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_statistics_are_of_float32_and_gradients_those_without_gradstats() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    batch = torch.randn(6, 6)
    monitor = gradstats.attach(model, moments=True)
    plain = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(batch), plain(batch)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.float().square().sum(1).mean().backward()
    stats = monitor.step()
    assert stats.coverage.fraction == 1
    assert all(layer.per_sample_sq_norm.dtype == torch.float32 for layer in stats.layers.values())
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(batch)
    expected.float().square().sum(1).mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=1e-3)
    assert set(stats.layers) == {name for name, _ in model.named_parameters()}


def test_bfloat16_model_against_its_own_backward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 8)).bfloat16()
    batch = torch.randn(5, 9, 32).bfloat16()
    single = []
    for i in range(5):  # the same bfloat16 forward and backward, statistics from float64 products
        model.zero_grad()
        model(batch[i : i + 1]).float().square().sum().backward()
        single.append(sum(p.grad.double().square().sum() for p in model.parameters()))
    monitor = gradstats.attach(model, loss_reduction="sum")
    model.zero_grad()
    model(batch).float().square().sum().backward()
    assert relative(monitor.step().per_sample_sq_norm, torch.stack(single)) < 1e-2
