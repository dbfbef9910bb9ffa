"""CUDA graphs, without a card: a captured step is refused, and one that is left out is not touched."""

from __future__ import annotations

import pytest
import torch
from models import loss
from oracle import assert_matches, per_sample_gradients
from torch import nn

import gradstats


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class Capture:
    """Stands in for torch.cuda.graph(...)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = False
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.on)

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *exc: object) -> None:
        self.on = False


@pytest.fixture
def capture(monkeypatch) -> Capture:
    return Capture(monkeypatch)


def test_a_measured_step_is_not_captured(model, capture) -> None:
    batch = torch.randn(5, 6)
    true = per_sample_gradients(model, loss, batch)
    monitor = gradstats.attach(model)
    refused = pytest.raises(gradstats.CaptureError, match=r"is being captured.*attach\(every=k\)")
    with refused, capture:
        model(batch)
    loss(model, batch).backward()
    with refused, capture:
        monitor.step()
    assert_matches(monitor.step(), true, 1e-5)


def test_steps_that_are_left_out_can_be_captured_and_replayed(model, capture) -> None:
    monitor = gradstats.attach(model, every=3)
    batch = torch.randn(5, 6)
    for step in range(7):
        model.zero_grad()
        if step % 3 == 0:
            true = per_sample_gradients(model, loss, batch)
            loss(model, batch).backward()
            assert_matches(monitor.step(), true, 1e-5)
        elif step == 1:
            with capture:
                loss(model, batch).backward()
            assert monitor.step() is None
        else:  # a replay: nothing of the model runs in Python
            assert monitor.step() is None
    assert monitor.noise_scale().num_steps == 3


def test_a_replayed_step_is_not_taken_for_a_measured_one(model) -> None:
    monitor = gradstats.attach(model)
    with pytest.raises(gradstats.NoStatisticsError, match="found no backward"):
        monitor.step()


def test_capture_before_attaching_or_after_detaching_is_not_touched(model, capture) -> None:
    batch = torch.randn(5, 6)
    with capture:
        loss(model, batch).backward()
    monitor = gradstats.attach(model)
    monitor.detach()
    with capture:
        loss(model, batch).backward()
