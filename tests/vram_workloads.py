"""Trainings that take much memory, or end in other ways."""

import os
import signal

import torch
from torch import nn

import gradstats


def wide(features=20000):
    model = nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, features))
    x = torch.randn(16, features)
    return model, nn.MSELoss(), (x, x), torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)


class Ends(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4), how

    def forward(self, x):
        if len(x) >= 4:
            self.how()
        return self.layer(x)


def _ends(how):
    x = torch.randn(8, 4)
    return gradstats.Workload(Ends(how), nn.MSELoss(), (x, x), lambda p: torch.optim.SGD(p, 0.1))


def killed():
    return _ends(lambda: os.kill(os.getpid(), signal.SIGKILL))


def wrong():
    return _ends(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
