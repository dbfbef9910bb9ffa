"""Everyday situations, eagerly and inside torch.compile(fullgraph=True), on each backend of the CPU.

Each step of a model is measured on one backend after the other, so that nothing of a step before is
left in the next. What needs no more than a model and a batch is a problem of models.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from everyday import CHECKPOINTS, SITUATIONS, ids, looked_up, plain_sum, sequence, two
from models import PROBLEMS, loss
from oracle import assert_matches, per_sample_gradients, relative
from torch import Tensor, nn

import gradstats
from gradstats import tracing

BACKENDS = ("auto", "reference")
S, Linear = nn.Sequential, nn.Linear


RUNS = [(n, eager) for n, s in SITUATIONS.items() for eager in (True, False) if eager or s.compiles]


@contextlib.contextmanager
def compiling(model: nn.Module, eager: bool) -> Iterator[Any]:
    torch._dynamo.reset()
    yield model if eager else torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(("name", "eager"), RUNS)
def test_situations_are_exact(name: str, eager: bool) -> None:
    situation = SITUATIONS[name]
    torch.manual_seed(0)
    model, batch = situation.make().to(situation.dtype), situation.data(situation.batch)
    batch = batch.to(situation.dtype) if batch.is_floating_point() else batch
    true = situation.true(model, batch)
    monitor = gradstats.attach(model, batch_dim=situation.batch_dim)
    if hasattr(model, "told"):
        model.told = monitor.samples
    with compiling(model, eager) as run:
        for backend in BACKENDS:
            model.zero_grad()
            said = monitor.samples(situation.rows(batch)) if situation.rows else None
            with gradstats.backends.use(backend), said or contextlib.nullcontext():
                with situation.context():
                    value = situation.loss(run, batch)
                value.backward()
                stats = monitor.step()
            assert_matches(stats, true, situation.tolerance)
            assert stats.per_sample_sq_norm.min() >= 0
            if situation.dtype == torch.float16:
                assert stats.per_sample_sq_norm.min() > torch.finfo(torch.float16).max


def test_norms_are_of_sums_before_they_are_rounded() -> None:
    torch.manual_seed(0)
    model, batch = Linear(2, 1, bias=False).bfloat16(), torch.randn(4, 16, 2).bfloat16()
    sums = per_sample_gradients(model, plain_sum, batch)["weight"]
    true = sums.flatten(1).square().sum(1)
    rounded = sums.bfloat16().double().flatten(1).square().sum(1)
    assert relative(rounded, true) > 1e-3  # what this can tell apart
    monitor = gradstats.attach(model)
    for backend in BACKENDS:
        with gradstats.backends.use(backend):
            plain_sum(model, batch).backward()
            assert relative(monitor.step().per_sample_sq_norm, true) < 1e-5


# ---- ways to train -----------------------------------------------------------------------------


class LongOnly(nn.Module):
    """A layer that only long sequences go through."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = Linear(6, 6), Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x) if x.shape[1] > 7 else torch.tanh(x))


Step = Callable[[Any, nn.Module, Tensor], Tensor]  # the samples that it is about


def first_of_two(run: Any, model: nn.Module, batch: Tensor) -> Tensor:
    first, second = loss(run, batch[:4]), loss(run, batch[2:])
    first.backward()
    del second  # alive until here
    return batch[:4]


def forward_without_backward(run: Any, model: nn.Module, batch: Tensor) -> Tensor:
    loss(run, batch[:3])
    loss(run, batch).backward()
    return batch


def retained_graph(run: Any, model: nn.Module, batch: Tensor) -> Tensor:
    loss(run, batch).backward(retain_graph=True)
    return batch


def uneven_micro_batches(run: Any, model: nn.Module, batch: Tensor) -> Tensor:
    for part in batch.split(4):
        (loss(run, part) * len(part) / len(batch)).backward()
    return batch


def frozen_and_thawed(run: Any, model: nn.Module, batch: Tensor) -> Tensor:
    weight = model.get_parameter("head.weight")
    weight.requires_grad_(not weight.requires_grad)
    loss(run, batch).backward()
    return batch


def longer_and_shorter(run: Any, model: nn.Module, batch: Tensor) -> Tensor:
    """Every other step skips a layer."""
    model.turn = not getattr(model, "turn", False)
    batch = torch.cat((batch, batch), 1) if model.turn else batch
    loss(run, batch).backward()
    return batch


EXACT = [first_of_two, forward_without_backward, retained_graph, uneven_micro_batches,
         frozen_and_thawed, longer_and_shorter]  # fmt: skip


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("train", EXACT, ids=lambda f: f.__name__)
def test_ways_to_train_are_exact(train: Step, eager: bool) -> None:
    torch.manual_seed(0)
    model, batch = LongOnly(), sequence(6)
    monitor = gradstats.attach(model)
    with compiling(model, eager) as run:
        for backend in (*BACKENDS, *BACKENDS):
            model.zero_grad()
            with gradstats.backends.use(backend):
                seen = train(run, model, batch)
                true = per_sample_gradients(model, loss, seen)
                assert_matches(monitor.step(), true, 1e-5)


def test_two_backwards_through_one_forward_are_not_covered() -> None:
    torch.manual_seed(0)
    model, batch = two(), sequence(5)
    monitor = gradstats.attach(model)
    out = model(batch).square().flatten(1).sum(1) / len(batch)
    out[:2].sum().backward(retain_graph=True)
    out[2:].sum().backward()
    assert monitor.step().coverage.fraction == 0
    model.zero_grad()
    true = per_sample_gradients(model, loss, batch)
    loss(model, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)


EMPTY = [n for n, p in PROBLEMS.items() if n != "instance_norm"]  # torch's own fails


@pytest.mark.parametrize("name", EMPTY)
def test_a_batch_of_none(name: str) -> None:
    torch.manual_seed(0)
    problem = PROBLEMS[name]
    model, batch = problem.make(), problem.data(problem.batch)
    monitor = gradstats.attach(model)
    for backend in BACKENDS:
        with gradstats.backends.use(backend):
            model(batch[:0]).sum().backward()
            stats = monitor.step()
        assert stats.coverage.fraction == 1, stats.coverage.missing
        assert stats.per_sample_sq_norm.shape == (0,)
        assert torch.isnan(stats.noise_scale)
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    true = per_sample_gradients(model, loss, batch)
    loss(model, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)


REFUSED = {
    "BatchNorm in training mode": (
        lambda: S(nn.Conv1d(7, 4, 3), nn.BatchNorm1d(4)), sequence, "layer '1': BatchNorm in training"
    ),
    "sparse gradients": (lambda: looked_up(sparse=True), ids, "sparse=True has sparse gradients"),
    "scale_grad_by_freq": (
        lambda: looked_up(scale_grad_by_freq=True), ids, "divides by counts over the whole batch"
    ),
}  # fmt: skip


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_gradients_of_samples_is_refused(name: str, eager: bool) -> None:
    make, data, words = REFUSED[name]
    model = make()
    gradstats.attach(model)
    with compiling(model, eager) as run, pytest.raises(Exception, match=words) as refused:
        run(data(5))
    assert eager <= isinstance(refused.value, gradstats.UnsupportedLayerError)


@pytest.mark.skipif(not CHECKPOINTS, reason="the compiler has no such option")
@pytest.mark.parametrize("fails", [False, True])
def test_the_option_of_the_compiler_is_put_back(fails: bool) -> None:
    model = S(Linear(6, 6), nn.BatchNorm1d(6)) if fails else two()
    gradstats.attach(model)
    before = getattr(torch._dynamo.config, tracing.CHECKPOINTS)
    refused = pytest.raises(Exception, match="BatchNorm") if fails else contextlib.nullcontext()
    with compiling(model, False) as run, refused:
        run(torch.randn(5, 6))
    assert getattr(torch._dynamo.config, tracing.CHECKPOINTS) is before is False
