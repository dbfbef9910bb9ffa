"""The trainings that time_to_target.py races: a model, its data, and the loss that ends a race."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradstats.demo.tasks import CharTransformer, Task, digits, text

Batch = tuple[Tensor, Tensor]
Make = Callable[[int], tuple[nn.Module, torch.optim.Optimizer]]


@dataclass(frozen=True)
class Race:
    """`make(seed)` gives a fresh model and its optimizer at `rate`, which suits `base` samples.

    `draw(size, generator)` gives samples with replacement, `held_out` are others. A race is won when
    the mean loss of those falls to `target`, and lost after `most` samples. `batches` are the fixed
    sizes that compete; `rule` says how rates grow with them. `noise_scale(model)`: where it is known.
    """

    name: str
    make: Make
    draw: Callable[[int, torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    held_out: Batch
    target: float
    rate: float
    base: int
    batches: tuple[int, ...]
    most: int
    rule: str
    look: int  # samples from one look at the held-out loss to the next
    noise_scale: Callable[[nn.Module], float] | None = field(default=None)
    device: str = "cpu"

    def fresh(self, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        """`make` on the device: a module moves its parameters in place."""
        model, optimizer = self.make(seed)
        return model.to(self.device), optimizer

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        x, y = self.draw(size, generator)
        return x.to(self.device), y.to(self.device)

    def changed(self, **values: Any) -> Race:
        return replace(self, **values)

    @property
    def sgd(self) -> bool:
        return self.rule == "noise"


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


# ---- regression: the noise scale is known --------------------------------------------------------

FEATURES, OUTPUTS, NOISE = 512, 512, 1.0


def regression() -> Race:
    """y = W*x + ε with x ~ N(0, diag(h)); loss ½‖Wx − y‖², mean over outputs. Eigenvalues h fall as 1/k."""
    h = 1 / torch.arange(1, FEATURES + 1, dtype=torch.float32)
    root = h.sqrt()
    truth = torch.randn(OUTPUTS, FEATURES, generator=torch.Generator().manual_seed(1))

    def draw(size: int, generator: torch.Generator) -> Batch:
        x = root * torch.randn(size, FEATURES, generator=generator)
        return x, x @ truth.T + NOISE * torch.randn(size, OUTPUTS, generator=generator)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return 0.5 * (model(batch[0]) - batch[1]).square().mean()

    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(FEATURES, OUTPUTS, bias=False)
        nn.init.zeros_(model.weight)
        return model, torch.optim.SGD(model.parameters(), lr=0.02 * OUTPUTS)

    def noise_scale(model: nn.Module) -> float:
        """tr Σ/|G|² of Gaussian x, with δ = W − W*, G = δH (both but for the loss' 1/outputs):
        E‖g‖² = tr H·(tr δHδᵀ + outputs·σ²) + 2‖δH‖²."""
        delta = next(model.parameters()).detach() - truth
        energy, signal = float((h * delta**2).sum()), float((h * delta).square().sum())
        return (float(h.sum()) * (energy + OUTPUTS * NOISE**2) + signal) / signal

    held_out = draw(1024, torch.Generator().manual_seed(2))
    return Race(
        "regression", make, draw, loss, held_out, target=0.55 * NOISE**2, rate=0.02 * OUTPUTS, base=8,
        batches=(8, 16, 32, 64, 128, 256, 512), most=400_000, rule="noise", look=512,
        noise_scale=noise_scale,
    )  # fmt: skip


# ---- the demo's tasks ----------------------------------------------------------------------------


def _of_demo(task: Task, build: Callable[[], Any], size: int, **rest: Any) -> Race:
    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        fresh = build()
        return fresh.model, fresh.optimizer

    held_out = task.draw(size, torch.Generator().manual_seed(2))
    return Race(task.name, make, task.draw, cross_entropy, held_out, **rest)


def digits_race() -> Race:
    return _of_demo(
        digits(), digits, 2048, target=0.5, rate=0.02, base=16,
        batches=(8, 16, 32, 64, 128, 256, 512), most=400_000, rule="noise", look=512,
    )  # fmt: skip


def _text(width: int, heads: int, layers: int, rate: float) -> Callable[[], Task]:
    def build() -> Task:
        task = text()
        vocabulary = task.model.head.out_features
        model = CharTransformer(vocabulary, width, heads, layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
        return replace(task, model=model, optimizer=optimizer)

    return build


def text_race() -> Race:
    """The demo's text with a smaller transformer, or a race takes minutes."""
    return _of_demo(
        text(), _text(64, 2, 2, 1e-3), 256, target=2.5, rate=1e-3, base=4,
        batches=(4, 8, 16, 32, 64, 128), most=20_000, rule="sqrt", look=128,
    )  # fmt: skip


def text_large_race() -> Race:
    """The same text for a GPU."""
    return _of_demo(
        text(), _text(512, 8, 8, 3e-4), 1024, target=1.6, rate=3e-4, base=16,
        batches=(16, 32, 64, 128, 256, 512, 1024), most=2_000_000, rule="sqrt", look=1024,
    )  # fmt: skip


RACES: dict[str, Callable[[], Race]] = {
    "regression": regression, "digits": digits_race, "text": text_race, "text-large": text_large_race,
}  # fmt: skip


def held_out_loss(race: Race, model: nn.Module) -> float:
    with torch.no_grad():
        x, y = race.held_out
        found = float(race.loss(model, (x.to(race.device), y.to(race.device))))
    return found if math.isfinite(found) else math.inf
