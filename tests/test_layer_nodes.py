"""The extension's autograd nodes: where they are taken, and that they do what Python's do. What is one kind's
alone is in test_layer_norm_node.py and test_linear_node.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from models import loss
from oracle import assert_matches, per_sample_gradients
from test_linear_node import names
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradstats
from gradstats import backends, ops

pytest.importorskip("gradstats._C", reason="gradstats._C is not built")


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    node: str = "GroupNormNode"
    op: str = "group_norm_stats"


def conv(make: Callable[[], nn.Module], *shape: int) -> Case:
    return Case(make, shape, "ConvNode", "conv_stats")


def layer_norm(make: Callable[[], nn.Module], *shape: int) -> Case:
    return Case(make, shape, "LayerNormNode", "layer_norm_stats")


LAYER_NORMS = {
    "rows": layer_norm(lambda: nn.LayerNorm(5), 6, 4, 3, 5),
    "vectors": layer_norm(lambda: nn.LayerNorm(5, bias=False), 6, 5),
    "many rows, no bias": layer_norm(lambda: nn.LayerNorm(5, bias=False), 6, 300, 5),
    "two dimensions": layer_norm(lambda: nn.LayerNorm((3, 5)), 6, 2, 3, 5),
    "one sample": layer_norm(lambda: nn.LayerNorm(33), 1, 4, 33),
}
NORMS = {
    "pictures": Case(lambda: nn.GroupNorm(2, 6), (5, 6, 4, 3)),
    "no bias": Case(lambda: biasless(nn.GroupNorm(3, 6)), (5, 6, 7)),
    "vectors": Case(lambda: nn.GroupNorm(2, 8), (5, 8)),
    "volumes, a group each": Case(lambda: nn.GroupNorm(4, 4), (2, 4, 3, 2, 3)),
    "one group of many positions": Case(lambda: nn.GroupNorm(1, 3), (3, 3, 70, 70)),
    "one sample": Case(lambda: nn.GroupNorm(2, 4), (1, 4, 5)),
}
CONVS = {
    "1d": conv(lambda: nn.Conv1d(4, 6, 3, padding=1), 5, 4, 9),
    "2d": conv(lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), 5, 3, 7, 6),
    "2d, dilated, no bias": conv(lambda: nn.Conv2d(8, 9, 3, dilation=2, bias=False), 4, 8, 8, 9),
    "2d, grouped": conv(lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), 5, 4, 5, 5),
    "2d, depthwise": conv(lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), 5, 4, 7, 7),
    "2d, one wide": conv(lambda: nn.Conv2d(6, 8, 1, stride=2), 5, 6, 6, 6),
    "3d": conv(lambda: nn.Conv3d(2, 4, (2, 3, 3), padding=(1, 1, 0)), 3, 2, 4, 5, 5),
    "one sample": conv(lambda: nn.Conv2d(3, 4, 3), 1, 3, 5, 5),
}
CASES = {
    **{f"layer norm: {k}": v for k, v in LAYER_NORMS.items()},
    **{f"norm: {k}": v for k, v in NORMS.items()},
    **{f"conv: {k}": v for k, v in CONVS.items()},
}
LINEAR = Case(lambda: nn.Linear(5, 7), (6, 4, 3, 5), "LinearNode", "linear_stats")
FEW = [NORMS["pictures"], CONVS["2d"], LAYER_NORMS["rows"], LINEAR]
each = pytest.mark.parametrize("case", FEW, ids=lambda case: case.node)


def biasless(norm: nn.Module) -> nn.Module:
    norm.register_parameter("bias", None)
    return norm


class Only(nn.Module):
    """One layer with parameters: the statistics are its alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        for p in layer.parameters():
            nn.init.normal_(p)

    def forward(self, x):
        return torch.tanh(self.layer(x)).cumsum(-1)


def a_model(case: Case, seed: int = 0) -> tuple[Only, torch.Tensor]:
    torch.manual_seed(seed)
    return Only(case.make()), torch.randn(case.shape)


def is_native(out, case: Case) -> bool:
    return any("gradstats::cpu::" in name and case.node in name for name in names(out))


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_the_oracle(case, moments) -> None:
    model, x = a_model(case)
    plain = copy.deepcopy(model)
    with gradstats.attach(model, moments=moments) as monitor:
        out = model(x)
        assert is_native(out, case)
        torch.testing.assert_close(out, plain(x), rtol=0, atol=0)
        loss(model, x).backward()
        stats = monitor.step()
    loss(plain, x).backward()
    assert_matches(stats, per_sample_gradients(plain, loss, x), 1e-5)
    assert bool(stats.grad_var) == (moments and len(x) > 1)
    for name, param in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, param.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.bfloat16, 2e-2)])
@each
def test_as_the_reference_in_other_dtypes(case, dtype, rtol) -> None:
    model, x = a_model(case, 1)
    model, x = model.to(dtype), x.to(dtype).requires_grad_()
    found = []
    for backend in ("auto", "reference"):
        model.zero_grad()
        x.grad = None
        with backends.use(backend), gradstats.attach(model) as monitor:
            out = model(x)
            assert is_native(out, case) == (backend == "auto")
            out.square().mean().backward()
            stats = monitor.step()
        assert stats.coverage.fraction == 1
        found.append([x.grad, *(p.grad for p in model.parameters()), stats.layer_sq_norm])
    for ours, theirs in zip(*found, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * scale)


@each
def test_strided_and_channels_last(case) -> None:
    model, x = a_model(case, 2)
    strided = torch.randn(*reversed(case.shape)).permute(3, 2, 1, 0)
    plain = copy.deepcopy(model)
    with gradstats.attach(model) as monitor:
        for batch in (x.to(memory_format=torch.channels_last), strided):
            model.zero_grad()
            assert is_native(model(batch), case)
            loss(model, batch).backward()
            # torch's own backward of a GroupNorm has died of channels that come last.
            truth = per_sample_gradients(plain, loss, batch.contiguous())
            assert_matches(monitor.step(), truth, 1e-5)


def left_to_python() -> dict[str, tuple[nn.Module, Case]]:
    picture, norm, rows = CONVS["2d"], NORMS["pictures"], LAYER_NORMS["rows"]

    def changed(case: Case, change: Callable[[nn.Module], object]) -> tuple[nn.Module, Case]:
        layer = case.make()
        change(layer)
        return layer, case

    class Other(nn.Conv2d):
        pass

    def call(layer: nn.Module) -> None:
        layer._conv_forward = lambda x, w, b: F.conv2d(x, w * 2, b)

    return {
        "frozen bias of a GroupNorm": changed(norm, lambda m: m.bias.requires_grad_(False)),
        "frozen bias of a LayerNorm": changed(rows, lambda m: m.bias.requires_grad_(False)),
        "frozen weight of a convolution": changed(picture, lambda m: m.weight.requires_grad_(False)),
        "an eps that is no float": changed(norm, lambda m: setattr(m, "eps", 1)),
        "a LayerNorm's eps that is no float": changed(rows, lambda m: setattr(m, "eps", 1)),
        "padding by name": (nn.Conv2d(3, 4, 3, padding="same"), picture),
        "another padding": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), picture),
        "a stride that is one number": changed(picture, lambda m: setattr(m, "stride", 2)),
        "transposed": (nn.ConvTranspose2d(3, 4, 3), picture),
        "a class of somebody's own": (Other(3, 4, 3), picture),
        "a method of its own": changed(picture, call),
    }  # fmt: skip


@pytest.mark.parametrize("what", left_to_python())
def test_what_is_not_plain_is_left_to_python(what) -> None:
    torch.manual_seed(3)
    layer, case = left_to_python()[what]
    model = nn.Sequential(layer, nn.Tanh())
    plain, x = copy.deepcopy(model), torch.randn(case.shape)
    with gradstats.attach(model) as monitor:
        assert not is_native(model(x), case)
        loss(model, x).backward()
        stats = monitor.step()
    truth = per_sample_gradients(plain, loss, x)
    for name, layer_stats in stats.layers.items():
        want = truth[name].flatten(1).square().sum(1)
        torch.testing.assert_close(layer_stats.per_sample_sq_norm.double(), want, rtol=1e-4, atol=0)
    assert set(stats.layers) == set(truth)


def test_what_the_module_says_now_counts() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4))
    x = torch.randn(5, 3, 6, 6)
    with gradstats.attach(model) as monitor:
        model(x)
        model[0].stride, model[0].padding, model[1].num_groups = (2, 1), (0, 2), 1
        model[1].eps = 0.5
        plain = copy.deepcopy(model)
        out = model(x)
        assert is_native(out, FEW[0])
        assert is_native(out, FEW[1])
        torch.testing.assert_close(out, plain(x))
        loss(model, x).backward()
        assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)
        model[1].num_groups = 3
        with pytest.raises(RuntimeError, match="divisible by"):
            model(x)
        model[0].groups = 2
        with pytest.raises(RuntimeError, match="groups=2"):
            model(x)


class Again(nn.Module):
    """A layer that runs twice, or whose weight is used by hand as well."""

    def __init__(self, how: str, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, x):
        first = torch.tanh(self.layer(x))
        if self.how == "module":
            return self.layer(first)
        if self.how == "checkpoint":
            return checkpoint(self.layer, first, use_reentrant=False)
        if self.how == "scale":
            return first * self.layer.weight.flatten()[0]
        parameters = self.layer.weight, self.layer.bias
        if isinstance(self.layer, nn.GroupNorm):
            return F.group_norm(first, 1, *parameters)
        if isinstance(self.layer, nn.LayerNorm):
            return F.layer_norm(first, (3,), *parameters)
        return F.conv2d(first, *parameters)


@pytest.mark.parametrize("how", ["module", "function", "scale", "checkpoint"])
@pytest.mark.parametrize(
    "make",
    [lambda: nn.GroupNorm(2, 4), lambda: nn.LayerNorm(3), lambda: nn.Conv2d(4, 4, 3, padding=1)],
)
def test_several_uses(how, make) -> None:
    torch.manual_seed(5)
    model, x = Again(how, make()), torch.randn(5, 4, 4, 3)
    plain = copy.deepcopy(model)
    with gradstats.attach(model) as monitor:
        for _ in range(2):  # the first forward finds out
            model.zero_grad()
            loss(model, x).backward()
            assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)


def test_in_checkpoints_of_either_kind() -> None:
    torch.manual_seed(6)

    class Parts(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.first, self.reentrant = nn.Conv2d(3, 4, 3, padding=1), reentrant
            self.part = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3))

        def forward(self, x):
            return checkpoint(self.part, self.first(x), use_reentrant=self.reentrant)

    x = torch.randn(5, 3, 6, 6)
    for reentrant in (False, True):
        model = Parts(reentrant)
        plain = copy.deepcopy(model)
        with gradstats.attach(model) as monitor:
            for _ in range(2):
                model.zero_grad()
                loss(model, x).backward()
                assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)


@each
def test_autocast_is_left_to_python(case) -> None:
    model, x = a_model(case)
    with gradstats.attach(model) as monitor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        assert is_native(out, case) == (case is LINEAR)  # whose node Python takes too
        out.float().square().mean().backward()
        assert monitor.step().coverage.fraction == 1


@each
def test_a_backend_named_for_the_backward_alone(case) -> None:
    model, x = a_model(case)
    with gradstats.attach(model) as monitor:
        out = loss(model, x)
        seen: list[str] = []
        with backends.use("reference"):
            ops.observers.append(lambda op, args, results: seen.append(op))
            out.backward()
            ops.observers.pop()
        assert seen == [case.op]
        assert_matches(monitor.step(), per_sample_gradients(model, loss, x), 1e-5)


@each
def test_only_what_is_asked_for(case) -> None:
    model, x = a_model(case)
    x.requires_grad_()
    with gradstats.attach(model):
        (ours,) = torch.autograd.grad(model(x).square().sum(), x)
        (weight,) = torch.autograd.grad(model(x).square().sum(), model.layer.weight)
        (bias,) = torch.autograd.grad(model(x).square().sum(), model.layer.bias)
    plain = torch.autograd.grad(model(x).square().sum(), [x, model.layer.weight, model.layer.bias])
    torch.testing.assert_close([ours, weight, bias], list(plain))


@each
def test_second_derivatives_are_refused(case) -> None:
    model, x = a_model(case)
    x.requires_grad_()
    with gradstats.attach(model):
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(
            RuntimeError, match=r"differentiate twice.*backward of a (Group|Layer|conv|lin)"
        ):
            g.square().sum().backward()


@each
def test_an_input_changed_in_place_is_found(case) -> None:
    model, x = a_model(case)
    with gradstats.attach(model):
        out = model(x).sum()
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


@each
def test_outputs_may_be_changed_in_place(case) -> None:
    torch.manual_seed(7)
    model, x = nn.Sequential(case.make(), nn.ReLU(inplace=True)), torch.randn(case.shape)
    with gradstats.attach(model) as monitor:
        assert is_native(model(x), case)
        loss(model, x).backward()
        assert_matches(monitor.step(), per_sample_gradients(model, loss, x), 1e-5)


@each
def test_a_batch_of_none(case) -> None:
    model, x = a_model(case)
    with gradstats.attach(model) as monitor:
        loss(model, x).backward()
        monitor.step()
        model.zero_grad()
        model(x[:0]).sum().backward()
        assert monitor.step().num_samples == 0
