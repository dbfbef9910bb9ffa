"""One run of a race: fixed batches, AdaScale, and batch sizes that follow the noise scale."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from race_tasks import Batch, Race, held_out_loss
from torch import nn

import gradstats
from gradstats import schedulers
from gradstats.step_time import fit_step_time

# The noise scale moves in these short trainings: a memory of few measured steps.
MEASURED: dict[str, Any] = {"every": gradstats.Budget(0.02), "half_life": 8.0}
ADASCALE_HALF_LIFE = 50.0
HYSTERESIS = 1.3
AHEAD = 1024  # samples that are drawn at once
WORSE = 2.0  # a held-out loss so many times the first is given up


def clock(race: Race) -> float:
    """Seconds: of this thread's CPU time, or of wall time once a GPU is done."""
    if race.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(race.device)
    return time.perf_counter()


@dataclass
class Outcome:
    """What it took to reach the target; infinite where it was not reached.

    `seconds` (see `clock`): of the training loop, statistics and decisions included, not of drawing samples
    nor of looks at the held-out loss. `path`: (samples, batch size) at every change. `noise`: the smoothed
    noise scale that each decision saw; `known`: what it is, where that is known.
    """

    samples: float = math.inf
    steps: float = math.inf
    seconds: float = math.inf
    path: list[tuple[int, int]] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    known: list[float] = field(default_factory=list)


class Draws:
    """What a scheduler sets: a step's batch comes at once, in multiples of `unit` samples.

    Samples are drawn ahead, as a loader's workers would, so that the time between two steps, by which a
    budget goes, is the training's own. Whatever the batch sizes are, a seed's samples are the same.
    """

    world_size, dataset_size = 1, None

    def __init__(self, race: Race, unit: int, batch_size: int, seed: int) -> None:
        self.race, self.micro_batch_size = race, unit
        self.accumulation_steps = batch_size // unit
        self.samples = 0
        self.noise: list[float] = []  # that decisions saw
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.ahead = race.draw(0, self.generator)

    @property
    def batch_size(self) -> int:
        return self.micro_batch_size * self.accumulation_steps

    def step(self) -> Batch:
        size = self.batch_size
        while len(self.ahead[0]) < size:
            drawn = self.race.draw(AHEAD, self.generator)
            x, y = (torch.cat(parts) for parts in zip(self.ahead, drawn, strict=True))
            self.ahead = x, y
        x, y = (part[:size].to(self.race.device) for part in self.ahead)
        self.ahead = self.ahead[0][size:], self.ahead[1][size:]
        self.samples += size
        return x, y


Attach = Callable[[Race, nn.Module, torch.optim.Optimizer, Draws], Any]


@dataclass(frozen=True)
class Method:
    """How a run goes: it starts at `batch_size` and `rate`; `attach` adds what changes them."""

    name: str
    batch_size: int
    rate: float
    attach: Attach | None = None
    adascale: int | None = None  # the base batch of AdaScale


def follow(policy: schedulers.Policy, largest: int) -> Attach:
    """A monitor and a scheduler that changes the batch, and with it the rate, by `policy`."""

    def attach(race: Race, model: nn.Module, optimizer: torch.optim.Optimizer, draws: Draws) -> Any:
        def noted(seen: schedulers.Seen) -> float:
            assert seen.noise is not None
            draws.noise.append(seen.noise.value)
            return policy(seen)

        monitor = gradstats.attach(model, optimizer=optimizer, **MEASURED)
        scaling = gradstats.BatchScaling(optimizer, batch_size=draws.batch_size, rule=race.rule)
        scheduler = gradstats.BatchSizeScheduler(
            noted, draws, monitor=monitor, scaling=scaling, max_batch_size=largest
        )
        draws.noise.clear()  # of the decision that is tried when a scheduler is made
        return monitor, scheduler

    return attach


def run(race: Race, method: Method, seed: int) -> Outcome:
    """Train until the held-out loss is at the target, in one thread."""
    model, optimizer = race.fresh(seed)
    for group in optimizer.param_groups:
        group["lr"] = method.rate
    if method.adascale is not None:
        options = {key: optimizer.defaults[key] for key in ("momentum", "weight_decay", "nesterov")}
        optimizer = gradstats.optim.AdaScale(
            model.parameters(), lr=method.rate, base_batch_size=method.adascale,
            half_life=ADASCALE_HALF_LIFE, **options,
        )  # fmt: skip
    draws = Draws(race, min(race.batches), method.batch_size, seed)
    monitor = scheduler = None
    if method.attach is not None:
        monitor, scheduler = method.attach(race, model, optimizer, draws)
    elif method.adascale is not None:
        monitor = gradstats.attach(model)
    found, steps, seconds, looked = Outcome(path=[(0, draws.batch_size)]), 0, 0.0, 0
    found.noise = draws.noise
    before = (held_out_loss(race, model), 0, 0, 0.0)
    first = before[0]
    while draws.samples < race.most:
        batch = draws.step()
        begin = clock(race)
        race.loss(model, batch).backward()
        stats = monitor.step() if monitor is not None else None
        if method.adascale is not None:
            optimizer.observe(stats)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        change = scheduler.step() if scheduler is not None else None
        seconds += clock(race) - begin
        if change is not None:
            found.path.append((draws.samples, change.batch_size))
        if len(found.noise) > len(found.known):
            found.known.append(race.noise_scale(model) if race.noise_scale else math.nan)
        if draws.samples // race.look == looked:
            continue
        looked = draws.samples // race.look
        now = (held_out_loss(race, model), draws.samples, steps, seconds)
        if not now[0] < WORSE * first:
            break
        if now[0] <= race.target:
            part = (before[0] - race.target) / (before[0] - now[0])
            found.samples, found.steps, found.seconds = (
                b + part * (n - b) for b, n in zip(before[1:], now[1:], strict=True)
            )
            break
        before = now
    if monitor is not None:
        monitor.detach()
    return found


def step_seconds(race: Race, rounds: int = 30) -> dict[int, float]:
    """Median seconds of a plain step at each of the fixed sizes, which take turns."""
    model, optimizer = race.fresh(0)
    generator = torch.Generator().manual_seed(0)
    found: dict[int, list[float]] = {size: [] for size in race.batches}
    for _ in range(rounds):
        for size in race.batches:
            batch = race.batch(size, generator)
            begin = clock(race)
            race.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            found[size].append(clock(race) - begin)
    return {size: sorted(times)[len(times) // 2] for size, times in found.items()}


def followers(race: Race, rate: float, seconds: dict[int, float]) -> list[Method]:
    """The methods that need no tuning: they start at the base batch and its `rate`."""
    largest = max(race.batches)
    fixed = fit_step_time({(size, 1): [took] for size, took in seconds.items()}).fixed_samples()
    policies: dict[str, schedulers.Policy] = {
        "noise scale": partial(schedulers.noise_scale, hysteresis=HYSTERESIS),
        "noise scale × time": partial(schedulers.soonest, fixed=fixed, hysteresis=HYSTERESIS),
        "norm test": schedulers.norm_test,
    }
    found = [Method(name, race.base, rate, follow(policy, largest))
             for name, policy in policies.items()]  # fmt: skip
    if race.sgd:
        found += [Method(f"AdaScale {n * race.base}", n * race.base, rate, None, race.base)
                  for n in (4, 16) if n * race.base <= largest]  # fmt: skip
    return found
