"""Trainings whose largest stable and best learning rates are known."""

import torch
from torch import nn

import gradstats


class Quadratic(nn.Module):
    """½ Σ hᵢ wᵢ², whatever the batch: gradient descent is stable up to 2/max(h)."""

    def __init__(self, curvatures):
        super().__init__()
        self.register_buffer("curvatures", torch.tensor(curvatures))
        self.w = nn.Parameter(torch.ones(len(curvatures)))

    def forward(self, x):
        return (0.5 * self.curvatures * self.w.square()).sum() + 0 * x.sum()


def quadratic(curvatures=(0.1, 1.0, 8.0), **options):
    model = Quadratic(list(curvatures))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, **options)
    return gradstats.Workload(
        model, lambda model, batch: model(batch[0]), (torch.ones(4, 1),), optimizer
    )


DIM = 8


def regression(noise=1.0, size=20000):
    """y = x·w* + noise from w = 0, x ~ N(0, I): the Hessian is 2I.

    One step of SGD on a batch of B does best at 0.5/(1 + B_noise/B), where
    B_noise = ((d + 1)|w*|² + d·noise²)/|w*|².
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, DIM, generator=generator)
    w = torch.randn(DIM, 1, generator=generator)
    y = x @ w + noise * torch.randn(size, 1, generator=generator)
    model = nn.Linear(DIM, 1, bias=False)
    nn.init.zeros_(model.weight)
    made = gradstats.Workload(
        model, nn.MSELoss(), (x, y), torch.optim.SGD(model.parameters(), 0.05), batch_size=64
    )
    square = float(w.square().sum())
    made.noise_scale = ((DIM + 1) * square + DIM * noise**2) / square
    return made


class Everything(nn.Module):
    """Two dimensional weights alone, batch statistics, dropout, and a buffer outside of checkpoints."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6, bias=False)
        self.norm = nn.BatchNorm1d(6, affine=False)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(6, 1, bias=False)
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.calls = self.calls + 1
        return self.last(self.drop(self.norm(self.first(x)).tanh()))


def everything(make=torch.optim.SGD, **options):
    """In the middle of a training: a step taken, gradients there."""
    torch.manual_seed(0)
    model = Everything()
    x = torch.randn(40, 4)
    made = gradstats.Workload(
        model,
        nn.MSELoss(),
        (x, x[:, :1]),
        lambda params: make(params, **{"lr": 0.01, **options}),
        batch_size=8,
    )

    def closure():
        made.optimizer.zero_grad()
        loss = made.loss((x, x[:, :1]))
        loss.backward()
        return loss

    made.optimizer.step(closure)
    return made


def upwards():
    """A loss that no rate makes fall."""
    model = nn.Linear(1, 1)
    x = torch.randn(20, 1)
    return model, lambda model, batch: 0 * model(batch[0]).sum() + 1.0, (x,)


def not_finite():
    model = nn.Linear(1, 1)
    return model, lambda model, batch: model(batch[0]).sum() * float("nan"), (torch.ones(20, 1),)
