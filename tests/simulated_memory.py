"""Memory by a formula in the place of processes, for the search of `gradstats.workbench.vram`."""

from __future__ import annotations

from gradstats.workbench.vram.process import Told
from gradstats.workbench.vram.result import Point


class Machine:
    """Stands for `try_sizes`: steps take `peak(size, fresh)` bytes and `seconds(size)`."""

    def __init__(self, peak, seconds=lambda size: 1e-4 * size, budget=1e9, device="cpu") -> None:
        self.peak, self.seconds, self.budget, self.device = peak, seconds, budget, device
        self.tried: list[tuple[int, bool]] = []

    def __call__(self, trial, sizes, told: Told, enough=float("inf"), report=lambda size: None):
        told.device, told.budget, told.model_bytes = self.device, trial.budget or self.budget, 1000
        limit, first, fresh = told.budget * trial.share, None, len(sizes) == 1
        for size in sizes:
            report(size)
            peak = int(self.peak(size, fresh))
            self.tried.append((size, fresh))
            if peak > limit:
                told.points.append(Point(size, None, None, False, "no memory", fresh))
                return
            seconds = self.seconds(size)
            told.points.append(Point(size, peak, seconds, True, "", fresh))
            first = peak if first is None else first
            if peak > first + enough * (limit - first) or seconds > trial.most_seconds:
                return
