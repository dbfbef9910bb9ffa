"""Small trainings that the commands are pointed at by the tests."""

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
