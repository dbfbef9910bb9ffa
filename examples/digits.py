"""A small training to try the commands on: `gradstats check examples.digits:training`.

Handwritten digits from scikit-learn (`pip install 'gradstats[demo]'`), a few copies of each with noise of its
own, and a convolutional network. Write such a function for your own training, and name it the same way.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import gradstats

PIXEL_NOISE = 0.3  # standard deviation, beside pixels from 0 to 1
COPIES = 4  # of each image, each with other noise
HELD_OUT = 360  # of 1,797 images


def images() -> tuple[TensorDataset, TensorDataset]:
    """Images (1, 8, 8) with their digits, to train on and held out; the same in every call."""
    data = load_digits()
    generator = torch.Generator().manual_seed(0)
    clean = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=generator)
    held_out, train = order[:HELD_OUT], order[HELD_OUT:].repeat(COPIES)

    def noisy(rows: torch.Tensor) -> TensorDataset:
        noise = torch.randn(len(rows), 1, 8, 8, generator=generator)
        return TensorDataset(clean[rows] + PIXEL_NOISE * noise, labels[rows])

    return noisy(train), noisy(held_out)


def network() -> nn.Module:
    """(B, 1, 8, 8) images to (B, 10) logits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def training() -> gradstats.Workload:
    """What the commands need to know of a training."""
    train, held_out = images()
    return gradstats.Workload(
        network(),
        nn.CrossEntropyLoss(),
        train,
        lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
        validation=held_out,
        batch_size=32,
    )
