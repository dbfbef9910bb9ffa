"""A budget of time for measuring: kept, followed, resumed, and alike on all ranks."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from torch import nn

import gradstats
from gradstats.cadence import FIRST, THEN, Budget, Paid, Stopwatch, stopwatch
from gradstats.errors import InvalidArgumentError


class Training:
    """Steps of given seconds; a measured one takes `cost` times as long on top."""

    def __init__(self, share: float = 0.02, agree=None, late: bool = False) -> None:
        self.now, self.late = 0.0, late
        watch = Stopwatch(lambda: self.now, self.seconds)
        self.cadence = Paid(Budget(share), watch, agree)
        self.step, self.due = 0, True
        self.measured: list[int] = []

    def seconds(self, a: float, b: float) -> float | None:
        return None if self.late and self.now < b + 5.0 else b - a

    def run(self, steps: int, plain=lambda step: 1.0, cost: float = 0.45) -> float:
        """Share of the plain steps' time that measuring took."""
        spent = total = 0.0
        for _ in range(steps):
            seconds = plain(self.step)
            extra = cost * seconds if self.due else 0.0
            self.now += seconds + extra
            spent, total = spent + extra, total + seconds
            if self.due:
                self.measured.append(self.step)
            self.due = self.cadence.after(self.step, self.due)
            self.step += 1
        return spent / total


@pytest.mark.parametrize("share", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("cost", [0.03, 0.45, 5.0])
def test_the_budget_is_spent_and_not_more(share: float, cost: float) -> None:
    training = Training(share)
    training.run(round(2 * FIRST * cost / share) + 400, cost=cost)  # while the first steps go first
    found = training.run(20_000, cost=cost)
    assert found <= 1.001 * share
    assert found >= min(0.9 * share, 0.499 * cost)  # at most every other step is measured


def test_the_first_steps_are_measured_and_then_as_many_in_each_doubling() -> None:
    training = Training(share=1e-6)
    training.run(4096)
    seen = training.measured
    assert seen[:FIRST] == list(range(FIRST))
    counts = [sum(n <= s < 2 * n for s in seen) for n in (64, 128, 256, 512, 1024, 2048)]
    assert all(THEN * 0.6 < count < THEN for count in counts)  # ln 2 times as many, rounded
    assert all(b - a >= 2 for a, b in pairwise(seen[FIRST:]))


def test_it_follows_costs_and_leaves_pauses_out() -> None:
    training = Training()
    training.run(5000)
    assert training.run(5000, cost=0.09) <= 0.0201
    gaps = {b - a for a, b in pairwise(training.measured[-20:])}
    assert gaps == {5}  # 0.09/0.02, rounded up
    held_out = Training()  # a look at held-out data takes as long as 30 steps
    held_out.run(20_000, plain=lambda step: 31.0 if step % 100 == 7 else 1.0)
    last = held_out.measured[-40:]
    assert {b - a for a, b in pairwise(last)} == {23}  # 0.45/0.02


def test_times_that_come_late_are_read_late() -> None:
    training = Training(late=True)
    training.run(1000)
    assert training.run(10_000) <= 0.0201


def test_a_resumed_run_goes_on_with_the_costs_it_knew() -> None:
    one, other = Training(), Training()
    one.run(3000)
    other.run(1500)
    state = json.loads(json.dumps(other.cadence.state_dict()))
    fresh = Training()
    fresh.step, fresh.now, fresh.measured = other.step, other.now, other.measured
    fresh.due = fresh.cadence.load_state_dict(other.step, state)
    fresh.run(1500)
    assert fresh.measured == one.measured
    anew = Training()  # from a state of another cadence
    assert anew.cadence.load_state_dict(700, None)


def test_all_ranks_measure_the_steps_of_the_first() -> None:
    sent: list[int] = []

    def first(decide):
        sent.append(decide())
        return sent[-1]

    ranks = Training(agree=first), Training(agree=lambda decide: sent[-1])
    for _ in range(3000):
        for cost, rank in zip((0.4, 4.0), ranks, strict=True):
            rank.run(1, cost=cost)
    assert ranks[0].measured == ranks[1].measured
    assert len(set(sent)) > 3


def test_a_gpu_is_timed_by_events_that_nobody_waits_for(monkeypatch) -> None:
    done, recorded = set(), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda:1"
            recorded.append(self)
            self.at = 250.0 * len(recorded)  # milliseconds

        def query(self) -> bool:
            return self in done

        def elapsed_time(self, other: Event) -> float:
            assert {self, other} <= done
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    watch = stopwatch(torch.device("cuda", 1))
    a, b = watch.mark(), watch.mark()
    assert watch.seconds(a, b) is None
    done |= {a, b}
    assert watch.seconds(a, b) == 0.25


def squared(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.randn(4, 3)).square().mean().backward()


def test_a_monitor_keeps_to_it_and_resumes() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    monitor = gradstats.attach(model, every=Budget(1e-9))  # what is paid for never comes
    measured = []
    for step in range(400):
        if step in (40, 333):
            state = json.loads(json.dumps(monitor.state_dict()))
            monitor.detach()
            monitor = gradstats.attach(model, every=Budget(1e-9))
            monitor.load_state_dict(state)
        squared(model)
        if monitor.step() is not None:
            measured.append(step)
    wanted, step = [], 0
    while step < 400:
        wanted.append(step)
        step += 1 if step + 1 < FIRST else max(2, (step + 1) // THEN)
    assert measured == wanted
    assert monitor.noise_scale().num_steps == len(wanted)
    costs = monitor.state_dict()["cadence"]["costs"]
    assert costs
    assert all(-1 < cost < 1e4 for cost in costs)  # timed on the way


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_a_share_that_cannot_be_kept(share: float) -> None:
    with pytest.raises(InvalidArgumentError, match=r"Budget\(share=.*above 0, at most 1"):
        Budget(share)
