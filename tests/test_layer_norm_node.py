"""The extension's autograd node of LayerNorm: where it is taken, and that it does what Python's does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import loss
from oracle import assert_matches, per_sample_gradients
from test_linear_node import names
from torch import nn

import gradstats
from gradstats import backends

pytest.importorskip("gradstats._C", reason="gradstats._C is not built")


def is_native(out) -> bool:
    return any("gradstats::cpu::" in name and "LayerNorm" in name for name in names(out))


class Normed(nn.Module):
    """x → norm(x)·(fixed weights): the statistics are the norm's alone."""

    def __init__(self, shape, **options) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape, **options)
        for p in self.norm.parameters():
            nn.init.normal_(p)

    def forward(self, x):
        return torch.tanh(self.norm(x)).cumsum(-1)


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize(
    ("shape", "over"),
    [((6, 5), 5), ((6, 4, 5), 5), ((6, 2, 3, 5), (3, 5)), ((6, 300, 5), 5), ((1, 4, 33), 33)],
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_against_the_oracle(shape, over, bias, moments) -> None:
    torch.manual_seed(0)
    model, x = Normed(over, bias=bias), torch.randn(shape)
    plain = copy.deepcopy(model)
    with gradstats.attach(model, moments=moments) as monitor:
        out = model(x)
        assert is_native(out)
        torch.testing.assert_close(out, plain(x), rtol=0, atol=0)
        loss(model, x).backward()
        stats = monitor.step()
    loss(plain, x).backward()
    truth = per_sample_gradients(plain, loss, x)
    assert_matches(stats, truth, 1e-5)
    for name, param in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, param.grad)
        if moments and len(x) > 1:
            want = truth[name].var(0)
            got = stats.grad_var[name].double()
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * want.max().item())


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.bfloat16, 2e-2)])
def test_as_pythons_in_other_dtypes(dtype, rtol) -> None:
    torch.manual_seed(1)
    model = Normed(16).to(dtype)
    x = torch.randn(6, 3, 16, dtype=dtype, requires_grad=True)
    found = []
    for backend in ("auto", "reference"):
        model.zero_grad()
        x.grad = None
        with backends.use(backend), gradstats.attach(model) as monitor:
            out = model(x)
            assert is_native(out) == (backend == "auto")
            out.square().mean().backward()
            stats = monitor.step()
        assert stats.coverage.fraction == 1
        found.append([x.grad, *(p.grad for p in model.parameters()), stats.layer_sq_norm])
    for ours, theirs in zip(*found, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * scale)


def test_samples_from_elsewhere_and_strided() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(Normed(7), nn.Flatten(), nn.Linear(21, 2))
    x = torch.randn(3, 5, 14)[..., ::2].transpose(0, 1)
    plain = copy.deepcopy(model)
    with gradstats.attach(model) as monitor:
        loss(model, x).backward()
        assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)


def test_what_is_not_plain_is_left_to_python() -> None:
    x = torch.randn(6, 3, 5)
    frozen = Normed(5)
    frozen.norm.bias.requires_grad_(False)
    odd = Normed(5)
    odd.norm.eps = 1  # no float
    for model in (frozen, odd):
        plain = copy.deepcopy(model)
        with gradstats.attach(model) as monitor:
            assert not is_native(model(x))
            loss(model, x).backward()
            assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)
    bare = nn.Sequential(nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 2))
    with gradstats.attach(bare) as monitor:
        assert not is_native(bare(x))
        loss(bare, x).backward()
        assert monitor.step().coverage.fraction == 1
    whole = nn.Sequential(nn.LayerNorm((6, 5)), nn.Linear(5, 2))  # over the samples too
    with gradstats.attach(whole) as monitor:
        assert not is_native(whole(torch.randn(6, 5)))


def test_what_the_module_says_now_counts() -> None:
    """Its eps, and whether its shape is still that of its weight."""
    torch.manual_seed(3)
    model, x = Normed(5), torch.randn(6, 5) * 1e-2
    with gradstats.attach(model) as monitor:
        model(x)
        model.norm.eps = 0.5
        plain = copy.deepcopy(model)
        loss(model, x).backward()
        assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)
        model.norm.normalized_shape = (4,)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            model(x)


class Twice(nn.Module):
    """A norm that runs twice, or whose weight is used by hand as well."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.how = nn.LayerNorm(5), how
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        norm = self.norm
        first = torch.tanh(norm(x))
        if self.how == "module":
            return norm(first)
        if self.how == "function":
            return F.layer_norm(first, (5,), norm.weight, norm.bias)
        if self.how == "product":
            return F.linear(first, norm.weight[None])
        return first * norm.weight


@pytest.mark.parametrize("how", ["module", "function", "product", "scale"])
def test_several_uses(how) -> None:
    torch.manual_seed(4)
    model, x = Twice(how), torch.randn(6, 5)
    plain = copy.deepcopy(model)
    with gradstats.attach(model) as monitor:
        for _ in range(2):  # the first forward finds out
            model.zero_grad()
            loss(model, x).backward()
            assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)
