"""Small trainings that the commands are pointed at by the tests."""

import os
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradstats


def regression(size=512, dim=8, noise=1.0, seed=0):
    """x, and y = x·w + noise: a known answer."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, dim, generator=generator)
    w = torch.randn(dim, 1, generator=torch.Generator().manual_seed(99))
    return TensorDataset(x, x @ w + noise * torch.randn(size, 1, generator=generator))


def tensors():
    """(model, loss_fn, batch), as `check` takes it."""
    return nn.Linear(8, 1), nn.MSELoss(), regression(64).tensors


def dataset():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    return model, nn.MSELoss(), regression(), torch.optim.SGD(model.parameters(), 0.05)


def loader():
    model = nn.Linear(8, 1)
    return model, nn.MSELoss(), DataLoader(regression(), batch_size=32, shuffle=True)


def whole():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    return gradstats.Workload(
        model,
        nn.MSELoss(),
        regression(),
        lambda params: torch.optim.SGD(params, 0.05, momentum=0.9),
        validation=regression(128, seed=1),
        batch_size=32,
    )


def no_data():
    return nn.Linear(8, 1), nn.MSELoss(), iter([])


def no_scalar():
    return nn.Linear(8, 1), nn.MSELoss(reduction="none"), regression()


def wrong_optimizer():
    return nn.Linear(8, 1), nn.MSELoss(), regression(), lambda params: "sgd"


def optimizer_of_another_model():
    optimizer = torch.optim.SGD(nn.Linear(8, 1).parameters(), 0.1)
    return nn.Linear(8, 1), nn.MSELoss(), regression(), optimizer


def dropout():
    """Everything that a trial that goes on has to put back: dropout, momentum, other random numbers."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 1))
    return gradstats.Workload(
        model,
        lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        regression(256),
        lambda params: torch.optim.SGD(params, 0.02, momentum=0.9),
        validation=regression(64, seed=1),
        batch_size=16,
    )


def dies():
    """A trial of seed 1 ends its process the first time, where DIES names a file; then it trains."""
    made = dropout()
    mark = Path(os.environ["DIES"])
    if torch.initial_seed() == 1 and not mark.exists():
        mark.write_text("")
        os._exit(7)
    return made


def fails():
    """A trial of seed 1 fails, every time."""
    made = dropout()
    if torch.initial_seed() == 1:
        made.loss = lambda batch: [][0]
    return made


def diverges():
    made = dropout()
    made.optimizer = torch.optim.SGD(made.model.parameters(), 1e6)
    return made


def normalised():
    """Without per-sample gradients: BatchNorm."""
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 1))
    return model, nn.MSELoss(), regression(256), torch.optim.SGD(model.parameters(), 0.02)
