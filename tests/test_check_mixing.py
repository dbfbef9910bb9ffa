"""`gradstats.check` names what lets samples influence each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradstats


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def squares(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().flatten(1).sum(1).mean()


class Centred(nn.Module):
    """Mixes samples in plain code between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.b(x - x.mean(0))


@pytest.mark.parametrize(
    ("make", "path", "kind"),
    [
        (lambda: nn.BatchNorm1d(6), "1", "BatchNorm1d"),
        (Centred, "1", "Centred"),
        (lambda: nn.Sequential(nn.Tanh(), Centred()), "1.1", "Centred"),
    ],
)
def test_a_module_that_mixes_samples_is_named(make, path: str, kind: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), make(), nn.LazyLinear(2))
    with torch.no_grad():
        model(torch.randn(3, 6))
    report = gradstats.check(model, squares, torch.randn(6, 6))
    assert not report.ok
    assert (report.mixing, report.loss_reduction) == (path, None)
    assert f"layer '{path}' ({kind}) lets samples influence each other" in report.problems[0]
    assert "nothing could be compared" in report.sentence


def test_attention_over_the_batch_is_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(6, 2), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.attention(x, x, x)[0])

    def per_label(model: nn.Module, batch) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]).mean(1), batch[1])

    batch = torch.randn(6, 5, 6), torch.randint(0, 3, (6,))
    report = gradstats.check(Block(), per_label, batch)
    assert report.mixing == "attention"
    assert "batch_first" in report.problems[0]
    # Without the labels, nothing says that the samples are not in dimension 1: there it is exact.
    report = gradstats.check(Block(), lambda m, x: m(x).square().mean(), batch[0])
    assert (report.ok, report.batch_dim) == (True, 1)
    assert "layer 'attention' mixes those of dimension 0" in report.notes[0]
    given = gradstats.check(Block(), lambda m, x: m(x).square().mean(), batch[0], batch_dim=0)
    assert (given.ok, given.mixing) == (False, "attention")
