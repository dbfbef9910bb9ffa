"""What a policy sees, and noise scales as a monitor would find them."""

from __future__ import annotations

import math

from gradstats import NoiseScale
from gradstats.schedulers import Seen

NAN, INF = math.nan, math.inf


def measured(value, low=None, high=None, tr=None, sq=1.0):
    low, high = low or value / 1.2, high or value * 1.2
    return NoiseScale(value, low, high, 0.9, 6400, 200, 0, value if tr is None else tr, sq)


def seen(noise=None, now=64, **more):
    return Seen(batch_size=now, base_batch_size=64, noise=noise, **more)
