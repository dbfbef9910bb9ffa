"""Where the samples are in what a layer sees: found from the shapes, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import Positions, loss
from oracle import assert_matches, per_sample_gradients
from torch import nn

import gradstats


def test_samples_in_the_second_dimension() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.norm = nn.Embedding(13, 6), nn.LayerNorm(6)
            self.positions, self.head = nn.Parameter(torch.randn(7, 1, 6)), nn.Linear(6, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.tokens(ids) + self.positions))

    def swapped(m: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return m(ids.t()).square().sum((0, 2)).mean()

    model, ids = SequenceFirst(), torch.randint(0, 13, (5, 7))
    true = per_sample_gradients(model, swapped, ids)
    monitor = gradstats.attach(model, batch_dim=1, moments=True)
    swapped(model, ids).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_positions_given_as_long_as_the_batch_are_not_guessed() -> None:
    class Given(Positions):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            at = (ids[0] * 0).cumsum(0)  # made from the input, one entry per position
            return self.head(torch.tanh(self.tokens(ids) + self.positions(at)))

    model, ids = Given(), torch.randint(0, 13, (7, 7))
    gradstats.attach(model)
    with pytest.raises(gradstats.UnsupportedLayerError, match="one id per sample or one per"):
        model(ids)


@pytest.mark.parametrize("compiled", ["nothing", "whole", "part"])
def test_positions_of_which_no_input_tells(compiled: str) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.reshape(len(x), -1, 2, 6).mean(2)  # 4 positions and 4 samples from here on
            return self.head(torch.tanh(x + self.positions(torch.arange(x.shape[1]))))

    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(6, 6), Pooled()), torch.randn(4, 8, 6)
    true = per_sample_gradients(model, loss, x)
    monitor = gradstats.attach(model, moments=True)
    if compiled == "part":
        model[1].compile(backend="aot_eager", fullgraph=True)
    elif compiled == "whole":
        model.compile(backend="aot_eager", fullgraph=True)
    loss(model, x).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_class_labels_one_per_sample() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.labels, self.head = nn.Embedding(13, 6), nn.Linear(6, 3)

        def forward(self, labels: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.labels(labels)))

    model, labels = Labelled(), torch.randint(0, 13, (6,))
    true = per_sample_gradients(model, loss, labels)
    monitor = gradstats.attach(model, moments=True)
    loss(model, labels).backward()
    assert_matches(monitor.step(), true, 1e-5)


def test_cross_entropy_of_a_language_model() -> None:
    def next_token(m: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        out = m(ids)
        return F.cross_entropy(out.flatten(0, 1), (ids % 4).flatten())

    model, ids = Positions(), torch.randint(0, 13, (5, 7))
    true = per_sample_gradients(model, next_token, ids)
    monitor = gradstats.attach(model, moments=True)
    next_token(model, ids).backward()
    assert_matches(monitor.step(), true, 1e-5)
