"""What plans are made of in tests: a noise scale, what is known of a training, curves of its loss."""

from __future__ import annotations

import math

import numpy as np

from gradstats.estimators import NoiseScale
from gradstats.workbench.advise import Curve, Evidence

NOISE = NoiseScale(512.0, 450.0, 600.0, 0.9, 64_000, 1000, 0, 512.0, 1.0)
KNOWN = Evidence(
    noise=NOISE, batch_size=64, learning_rate=0.1, optimizer="SGD", data_samples=50_000
)


def curve(count, *, turn=None, rise=0.0, noise=0.03, rho=0.3, train=None, seed=0):
    """A loss that falls to 1, and from the part `turn` of the training on rises by `rise`."""
    draw = np.random.default_rng(seed).standard_normal(count + 50)
    scatter = np.zeros(count + 50)
    for i in range(1, count + 50):
        scatter[i] = rho * scatter[i - 1] + draw[i]
    t = np.arange(count) / count
    true = 1 + np.exp(-8 * t)
    if turn is not None:
        true += rise * np.clip(t - turn, 0, None) / (1 - turn)
    held = true + noise * math.sqrt(1 - rho**2) * scatter[50:]
    falls = np.exp(-3 * t) if train is None else train(t)
    return Curve("run", list(range(count)), falls.tolist(), held.tolist())
