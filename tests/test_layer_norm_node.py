"""What is LayerNorm's alone of what test_layer_nodes.py asks of the extension's autograd nodes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import loss
from oracle import assert_matches, per_sample_gradients
from test_layer_nodes import LAYER_NORMS, Only, is_native
from torch import nn

import gradstats

pytest.importorskip("gradstats._C", reason="gradstats._C is not built")
CASE = LAYER_NORMS["rows"]


def test_without_parameters_and_over_the_samples_it_is_left_to_python() -> None:
    bare, x = (
        nn.Sequential(nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 2)),
        torch.randn(6, 5),
    )
    with gradstats.attach(bare) as monitor:
        assert not is_native(bare(x), CASE)
        loss(bare, x).backward()
        assert monitor.step().coverage.fraction == 1
    whole = nn.Sequential(nn.LayerNorm((6, 5)), nn.Linear(5, 2))
    with gradstats.attach(whole):
        assert not is_native(whole(x), CASE)


def test_what_the_module_says_now_counts() -> None:
    """Its eps, and whether its shape is still that of its weight."""
    torch.manual_seed(3)
    model, x = Only(nn.LayerNorm(5)), torch.randn(6, 5) * 1e-2
    with gradstats.attach(model) as monitor:
        model(x)
        model.layer.eps = 0.5
        plain = copy.deepcopy(model)
        loss(model, x).backward()
        assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)
        model.layer.normalized_shape = (4,)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            model(x)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [(3, 0), (0, 5)])
def test_rows_of_nothing_and_no_rows(sizes) -> None:
    model, x = (
        nn.Sequential(nn.LayerNorm(sizes[1]), nn.Flatten(), nn.Linear(0, 2)),
        torch.randn(4, *sizes),
    )
    with gradstats.attach(model) as monitor:
        assert is_native(model(x), CASE)
        loss(model, x).backward()
        assert_matches(monitor.step(), per_sample_gradients(model, loss, x), 1e-5)


class WithProduct(nn.Module):
    """A norm whose weight is that of a product as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return F.linear(torch.tanh(self.norm(x)), self.norm.weight[None])


def test_a_weight_that_is_used_in_a_product_too() -> None:
    torch.manual_seed(4)
    model, x = WithProduct(), torch.randn(6, 5)
    plain = copy.deepcopy(model)
    with gradstats.attach(model) as monitor:
        for _ in range(2):  # the first forward finds out
            model.zero_grad()
            loss(model, x).backward()
            assert_matches(monitor.step(), per_sample_gradients(plain, loss, x), 1e-5)
