"""Calls of the training loop that come too late or not at all; and attach(self_check=k)."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import PROBLEMS, loss
from oracle import assert_matches, per_sample_gradients
from torch import nn

import gradstats
from gradstats import backends, ops, reference
from gradstats.order import MissingStepWarning


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def _good_step(monitor, model) -> None:
    batch = torch.randn(5, 6)
    model.zero_grad()
    true = per_sample_gradients(model, loss, batch)
    loss(model, batch).backward()
    assert_matches(monitor.step(), true, 1e-5)


def _clip(model, optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def _scale(model, optimizer) -> None:
    for p in model.parameters():
        p.grad /= 4


def _zero_in_place(model, optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)


def _zero(model, optimizer) -> None:
    optimizer.zero_grad()


def _replace(model, optimizer) -> None:
    for p in model.parameters():
        p.grad = p.grad * 2


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_clip, "changed in place"),
        (_scale, "changed in place"),
        (_zero_in_place, "changed in place"),
        (_zero, "cleared"),
        (_replace, "replaced"),
    ],
)
def test_gradients_changed_before_reading_are_refused(model, change, what: str, moments) -> None:
    monitor = gradstats.attach(model, moments=moments)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss(model, torch.randn(5, 6)).backward()
    change(model, optimizer)
    with pytest.raises(
        gradstats.OrderError, match=rf"'3\.bias' was {what}.*before clipping.*zero_grad"
    ):
        monitor.step()
    _good_step(monitor, model)


def test_unscaling_before_reading_is_refused(model) -> None:
    monitor = gradstats.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    batch = torch.randn(5, 6)
    scaler.scale(loss(model, batch)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(gradstats.OrderError, match=r"before .*scaler\.unscale_"):
        monitor.step()
    scaler.update()
    model.zero_grad()
    true = per_sample_gradients(model, loss, batch)
    scaler.scale(loss(model, batch)).backward()
    stats = monitor.step()
    scaled = {n: 8 * g for n, g in true.items()}
    assert_matches(stats, scaled, 1e-5)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_missing_step_is_warned_of_and_its_measurements_dropped(
    model, set_to_none: bool, compiled: bool
) -> None:
    torch._dynamo.reset()
    monitor = gradstats.attach(model, moments=True)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train() -> None:
        for _ in range(10):
            loss(run, torch.randn(5, 6)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)

    with pytest.warns(MissingStepWarning, match=r"step\(\) was not called.*every=k") as seen:
        train()
    assert len([w for w in seen if w.category is MissingStepWarning]) == 1
    assert len(monitor._source.interposer.ledger.deliveries) == 1
    loss(run, torch.randn(5, 6)).backward()
    with pytest.raises(gradstats.OrderError, match="used by the optimizer or cleared between two"):
        monitor.step()
    _good_step(monitor, model)


def test_accumulation_and_an_optimizer_step_before_reading_are_fine(model) -> None:
    monitor = gradstats.attach(model, moments=True)
    optimizer = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            batch = torch.randn(6, 6)
            true = per_sample_gradients(model, loss, batch)
            for part in batch.split([3, 2, 1]):
                (loss(model, part) * len(part) / len(batch)).backward()
            optimizer.step()  # it reads the gradients and leaves them alone
            assert_matches(monitor.step(), true, 1e-5)
            optimizer.zero_grad()


def test_steps_left_out_by_every_are_not_watched(model) -> None:
    monitor = gradstats.attach(model, every=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(6):
            loss(model, torch.randn(4, 6)).backward()
            assert (monitor.step() is None) == bool(i % 2)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()


# ---- attach(self_check=k) ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_self_check_passes_where_all_is_right(name: str) -> None:
    torch.manual_seed(0)
    problem = PROBLEMS[name]
    model, batch = problem.make(), problem.data(problem.batch)
    with gradstats.attach(model, self_check=1) as monitor:
        for _ in range(4):
            model.zero_grad()
            loss(model, batch).backward()
            assert monitor.step().coverage.fraction == 1
    assert ops.observers == []


@pytest.fixture
def wrong_kernel(monkeypatch):
    """The second layer's squared norms come out 5% too large."""
    right = backends.implementation

    def implementation(operation, like):
        found = right(operation, like)
        if operation != "linear_stats":
            return found

        def wrong(x, g, *rest):
            results = list(found(x, g, *rest))
            if x.shape[-1] == 8:
                results[2] = results[2] * 1.05
            return tuple(results)

        return wrong

    monkeypatch.setattr(backends, "implementation", implementation)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_self_check_finds_a_wrong_kernel(model, wrong_kernel, compiled: bool) -> None:
    torch._dynamo.reset()
    monitor = gradstats.attach(model, self_check=2)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    caught = []
    for i in range(40):
        model.zero_grad()
        loss(run, torch.randn(5, 6)).backward()
        try:
            monitor.step()
        except gradstats.GradStatsError as error:
            caught.append(i)
            text = str(error)
    assert len(caught) in range(2, 16)  # one layer in three, one step in two
    assert all(i % 2 == 0 for i in caught)
    assert "linear_stats in torch.float32: the squared norms of samples [" in text
    assert (
        "a layer with a gradient of shape (3, 8)" if compiled else "parameter '3.weight'"
    ) in text
    assert "backends.use('reference')" in text
    monitor.detach()
    assert ops.observers == []


def test_the_self_check_ignores_what_is_not_finite(model) -> None:
    monitor = gradstats.attach(model, self_check=1)
    for _ in range(4):
        batch = torch.randn(5, 6)
        batch[2, 3] = torch.inf
        model.zero_grad()
        loss(model, batch).backward()
        monitor.step()
    monitor.detach()


def test_the_self_check_covers_every_operation_of_one_layer() -> None:
    from gradstats.self_check import _OPERATIONS

    assert set(_OPERATIONS) | {"tied_cross", "multi_sq_norm"} == set(ops.SCHEMAS)
    assert all(hasattr(reference, name) for name in _OPERATIONS)


def test_the_self_check_takes_whole_numbers(model) -> None:
    with pytest.raises(gradstats.InvalidArgumentError, match="self_check=0"):
        gradstats.attach(model, self_check=0)
