"""Norms that came with the products of a backward: used where the gradient is still what was made."""

from __future__ import annotations

import pytest
import torch
from models import loss
from threads import num_threads
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import gradstats

pytest.importorskip("gradstats._C", reason="gradstats._C is not built")

WIDE = 1030  # rows of a weight: enough for two threads to have a share each, of unlike sizes


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, WIDE), nn.Tanh(), nn.Linear(WIDE, 3, bias=False))


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


def require_norms_of_gradients(stats, model) -> None:
    """Those of the record are those of `p.grad`."""
    for name, p in model.named_parameters():
        want = p.grad.detach().double().square().sum().float()
        torch.testing.assert_close(
            stats.layers[name].grad_sq_norm,
            want,
            rtol=1e-6,
            atol=0,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def once(model) -> None:
    loss(model, X).backward()


def accumulated(model) -> None:
    once(model)
    once(model)


def into_zeros(model) -> None:
    once(model)
    model.zero_grad(set_to_none=False)
    once(model)


def differentiable(model) -> None:
    loss(model, X).backward(create_graph=True)


def not_accumulated(model) -> None:
    once(model)
    torch.autograd.grad(loss(model, 2 * X), list(model.parameters()))


def scaled(model) -> None:
    once(model)
    model[0].weight.grad.mul_(3)


def replaced(model) -> None:
    once(model)
    model[0].weight.grad = model[0].weight.grad * 3


def a_part_of_it(model) -> None:
    once(model)
    grad = model[0].weight.grad
    grad.set_(grad.untyped_storage(), 0, (WIDE, 5), (0, 1))


def scaled_by_a_hook(model) -> None:
    model[0].weight.register_hook(lambda g: g * 3)
    once(model)


def scaled_in_place_by_a_hook(model) -> None:
    model[0].weight.register_hook(lambda g: g.mul_(3))
    once(model)


def scaled_once_accumulated(model) -> None:
    def hook(p) -> None:
        p.grad.mul_(3)

    model[0].weight.register_post_accumulate_grad_hook(hook)
    once(model)


def clipped(model) -> None:
    once(model)
    nn.utils.clip_grad_norm_(model[0].weight, 1e-3)


@pytest.mark.parametrize(
    "backward",
    [once, accumulated, into_zeros, differentiable, not_accumulated, scaled, replaced, a_part_of_it,
     scaled_by_a_hook, scaled_in_place_by_a_hook, scaled_once_accumulated, clipped],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("threads", [1, 2])
def test_norms_are_of_the_gradients_that_there_are(model, backward, threads) -> None:
    with num_threads(threads), gradstats.attach(model) as monitor:
        once(model)  # what was made in another step
        monitor.step()
        model.zero_grad()
        backward(model)
        require_norms_of_gradients(monitor.step(), model)


def test_a_weight_used_twice(model) -> None:
    model.append(nn.Linear(3, 5, bias=False)).append(nn.Linear(5, WIDE, bias=False))
    model[-1].weight = model[0].weight
    with gradstats.attach(model) as monitor:
        for _ in range(2):
            once(model)
            require_norms_of_gradients(monitor.step(), model)
            model.zero_grad()


def test_a_norm_is_had_with_the_product(model) -> None:
    """Nothing reads the gradient again, so that what leaves no trace on it is not seen, which the samples'
    norms would not show either."""
    with gradstats.attach(model) as monitor:
        once(model)
        want = model[0].weight.grad.double().square().sum().float()
        model[0].weight.grad.data.mul_(3)
        got = monitor.step().layers["0.weight"].grad_sq_norm
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_a_norm_does_not_depend_on_the_number_of_threads(model) -> None:
    found = []
    for threads in (1, 2):
        with num_threads(threads), gradstats.attach(model) as monitor:
            once(model)
            found.append(monitor.step().layers["0.weight"].grad_sq_norm)
            model.zero_grad()
    assert torch.equal(*found)


def test_memory_of_gradients_is_let_go_of(model) -> None:
    """A kept norm holds no gradient."""
    with gradstats.attach(model) as monitor:
        once(model)
        monitor.step()
        memory = StorageWeakRef(model[0].weight.grad.untyped_storage())
        assert not memory.expired()
        model.zero_grad()
        assert memory.expired()
