"""The class that carries out what a policy of batch sizes decides.

Several processes: `rank_cases_schedulers.py`, run by `test_distributed.py`.
"""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import INF, NAN, measured, seen
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.utils.data import TensorDataset

import gradstats
from gradstats import BatchScaling, GroupedLoader, InvalidArgumentError, NoiseScale, StepLoader
from gradstats.schedulers import (
    BatchSizeChange,
    BatchSizeScheduler,
    decide_on_first_rank,
    instead_of_decay,
    milestones,
    noise_scale,
    norm_test,
    ramp,
)


class Scripted:
    """A monitor that finds one noise scale after another."""

    def __init__(self, *values):
        self.values, self.asked = list(values), 0

    def noise_scale(self):
        self.asked += 1
        value = self.values[min(self.asked - 1, len(self.values) - 1)]
        return value if isinstance(value, NoiseScale) else measured(value)


def loader(n=4096, micro=4, batch=64):
    return StepLoader(TensorDataset(torch.arange(n)), micro_batch_size=micro, batch_size=batch)


def sgd(lr=0.1):
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    return torch.optim.SGD([weight], lr)


def run(scheduler, loader, steps, after=lambda: None):
    """Batch sizes of the steps."""
    sizes = []
    while len(sizes) < steps:
        for step in loader:
            sizes.append(sum(len(batch) for (batch,), _ in step))
            assert sizes[-1] == step.num_samples
            after()
            scheduler.step()
            if len(sizes) == steps:
                break
    return sizes


def test_sizes_follow_the_noise_scale_in_whole_micro_batches_within_bounds():
    data = loader()
    monitor = Scripted(64, 64, 201, 202, 900, 900, 3)
    scheduler = BatchSizeScheduler(
        noise_scale, data, monitor=monitor, every=2, min_batch_size=18, max_batch_size=511
    )
    assert run(scheduler, data, 12) == [64, 64, 64, 64, 200, 200, 200, 200, 508, 508, 508, 508]
    assert data.accumulation_steps == 5  # 20: whole micro-batches of at least 18
    assert scheduler.changes[0] == BatchSizeChange(4, 256, 200, 50)
    assert monitor.asked == 7


def test_a_noise_scale_is_read_ever_more_seldom_and_other_policies_at_every_step():
    monitor, data = Scripted(64), loader(n=80_000)
    scheduler = BatchSizeScheduler(noise_scale, data, monitor=monitor)
    read = []
    for step in range(1, 1000):
        before = monitor.asked
        scheduler.step()
        read += [step] * (monitor.asked - before)
    assert read[:9] == [16, 18, 20, 22, 24, 26, 28, 30, 32]
    assert read[9:18] == [36, 40, 44, 48, 52, 56, 60, 64, 72]
    assert [b - a for a, b in pairwise(read)][-7:] == [64] * 7
    sizes = partial(ramp, start=8, end=80, over=100)
    assert run(BatchSizeScheduler(sizes, other := loader(batch=8)), other, 4) == [8, 12, 24, 40]


def test_cooldown():
    data = loader()
    scheduler = BatchSizeScheduler(
        noise_scale, data, monitor=Scripted(64, 128, 256, 512), every=1, cooldown=3
    )
    assert run(scheduler, data, 6) == [64, 128, 128, 128, 512, 512]


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.floats(0.01, 1e6), st.just(NAN), st.just(INF)), min_size=1, max_size=20)
)
def test_no_noise_scale_brings_it_out_of_bounds_or_to_a_stop(values):
    data = loader(n=500)
    scaling = BatchScaling(sgd(), batch_size=64, rule="noise", warm_up=100)
    scheduler = BatchSizeScheduler(
        noise_scale, data, monitor=Scripted(1.0, *values), scaling=scaling, every=1, min_batch_size=8,
        max_batch_size=300,
    )  # fmt: skip
    for _ in values:
        scheduler.step()
        assert 8 <= scheduler.batch_size <= 300
        assert scheduler.batch_size % 4 == 0
        assert scaling.batch_size == scheduler.batch_size
        assert 0 < scaling.factor <= 300 / 64


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lrs.ExponentialLR(o, 0.8),
        lambda o: lrs.StepLR(o, 4, 0.5),
        lambda o: lrs.CosineAnnealingLR(o, 20),
        lambda o: lrs.OneCycleLR(o, 0.4, total_steps=21),
        lambda o: lrs.LambdaLR(o, lambda t: t / 5 if t < 5 else 0.8 ** (t - 5)),
        lambda o: lrs.SequentialLR(
            o, [lrs.LinearLR(o, 0.1, total_iters=5), lrs.CosineAnnealingLR(o, 15)], [5]
        ),
    ],
)
def test_the_batch_grows_instead_of_the_rate_decaying_until_it_may_not(make):
    data, optimizer = loader(n=20_000, micro=1), sgd()
    schedule = make(optimizer)
    scaling = BatchScaling(optimizer, batch_size=64, rule="linear")
    scheduler = BatchSizeScheduler(
        instead_of_decay, data, scaling=scaling, every=1, max_batch_size=640
    )
    rates, peak = [], 0.0

    def after():
        rates.append((optimizer.param_groups[0]["lr"], scaling.learning_rates()[0]))
        optimizer.step()
        schedule.step()

    sizes = run(scheduler, data, 20, after)
    bounded = False
    for size, (plain, scaled) in zip(sizes, rates, strict=True):
        peak = max(peak, plain)
        assert scaled == pytest.approx(
            plain * size / 64
        )  # as much rate per sample as the schedule's
        if 64 * peak <= 640 * plain:
            assert scaled == pytest.approx(peak, rel=0.6 / size)  # but for the batch's rounding
        else:
            bounded = True
            assert size == 640
            assert scaled < peak
    assert bounded


def test_a_resumed_run_remembers_the_largest_rate():
    def make(rate=0.1):
        data, optimizer = loader(n=20_000), sgd(rate)
        schedule = lrs.ExponentialLR(optimizer, 0.5)
        scaling = BatchScaling(optimizer, batch_size=64, rule="linear")
        return optimizer, schedule, BatchSizeScheduler(instead_of_decay, data, scaling=scaling)

    optimizer, schedule, scheduler = make()
    for _ in range(2):
        optimizer.step()
        schedule.step()
        scheduler.step()
    assert scheduler.batch_size == 256
    fresh = make(0.001)  # at first below the rate that the checkpoint brings back
    for part, held in zip(fresh, (optimizer, schedule, scheduler), strict=True):
        part.load_state_dict(held.state_dict())
    for part in fresh:
        part.step()
    assert fresh[2].batch_size == 512


def test_a_schedule_in_samples():
    data = loader(n=1024)
    scheduler = BatchSizeScheduler(
        partial(milestones, sizes={0: 64, 256: 128, 512: 96}), data, every=1
    )
    counts = []
    run(scheduler, data, 9, lambda: counts.append(scheduler.base_steps()))
    # 64 64 64 64 128 128 96 96 …: what was handed out, in units of 64
    assert [sum(counts[: i + 1]) for i in range(9)] == [1, 2, 3, 4, 6, 8, 9, 11, 12]


def test_state_goes_on_exactly_and_elsewhere():
    def make(micro=4):
        data = loader(micro=micro)
        scaling = BatchScaling(sgd(), batch_size=64, rule="noise", warm_up=500)
        monitor = Scripted(64, *(64 + 40 * i for i in range(30)))
        return (
            data,
            monitor,
            scaling,
            BatchSizeScheduler(
                noise_scale, data, monitor=monitor, scaling=scaling, every=2, cooldown=3
            ),
        )

    def train(run_, steps):
        data, _, scaling, scheduler = run_
        found = []

        def after():
            found.append((scaling.factor, scaling.learning_rates(), scheduler.base_steps()))
            scaling.optimizer.step()

        sizes = run(scheduler, data, steps, after)
        return list(zip(sizes, found, strict=True))

    whole = make()
    expected = train(whole, 12)
    half = make()
    first = train(half, 5)
    states = json.loads(json.dumps([part.state_dict() for part in (half[0], half[3])]))
    fresh = make()
    fresh[1].asked = half[1].asked
    for part, state in zip((fresh[0], fresh[3]), states, strict=True):
        part.load_state_dict(state)
    assert first + train(fresh, 7) == expected
    assert fresh[3].changes == whole[3].changes
    other = make(micro=16)  # other micro-batches: the nearest batch size, and its learning rate
    other[3].load_state_dict(states[1])
    assert other[3].batch_size == 16 * round(states[1]["batch_size"] / 16)
    assert other[2].batch_size == other[3].batch_size


@pytest.mark.parametrize("what", [None, [1, 2]])
def test_what_is_no_loader_is_refused(what):
    said = rf"loader={re.escape(repr(what))} has no micro_batch_size, accumulation_steps, .* pass a"
    with pytest.raises(InvalidArgumentError, match=said):
        BatchSizeScheduler(noise_scale, what)


def test_any_loader_with_accumulation_steps():
    data = GroupedLoader(torch.utils.data.DataLoader(TensorDataset(torch.arange(64)), batch_size=4))
    scheduler = BatchSizeScheduler(partial(ramp, start=4, end=16, over=24), data, every=1)
    assert run(scheduler, data, 6) == [4, 8, 8, 16, 16, 12]  # the last are what is left


def test_a_policy_without_an_upper_end_stays_where_there_is_no_bound():
    data = GroupedLoader([torch.arange(4)] * 8, micro_batch_size=4)
    scheduler = BatchSizeScheduler(lambda s: INF, data, every=1)
    assert scheduler.step() is None
    assert data.accumulation_steps == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"min_batch_size": 128, "max_batch_size": 100}, "must lie between"),
        ({"min_batch_size": 65, "max_batch_size": 67}, "must lie between"),
        ({"max_batch_size": 3}, "must lie between"),
        ({"max_batch_size": 32}, "64 is outside"),
        ({"max_batch_size": 10_000}, "the dataset has 4096"),
        ({"min_batch_size": -1}, "min_batch_size=-1"),
        ({"max_batch_size": 512.5}, "max_batch_size=512.5 cannot be used; pass a whole number"),
        ({"every": 0}, "every=0"),
        ({"every": 1.5}, "every=1.5"),
        ({"cooldown": -1}, "cooldown=-1"),
        ({"monitor": None}, "pass monitor=gradstats.attach"),
        ({"policy": instead_of_decay}, "pass scaling=BatchScaling"),
        ({"policy": lambda s: -1}, "it must return a batch size above 0"),
        ({"policy": lambda s: None}, "policy=None cannot be used; it must return a batch size"),
    ],
)
def test_what_contradicts_itself_is_refused_at_once(change, words):
    arguments = {"policy": noise_scale, "monitor": Scripted(64), **change}
    with pytest.raises(InvalidArgumentError, match=words):
        BatchSizeScheduler(arguments.pop("policy"), loader(), **arguments)


def test_a_noise_scale_in_tokens_is_brought_to_samples():
    data, monitor = loader(), Scripted(measured(2560, tr=2560, sq=1.0))
    monitor.sample = "token"
    scaling = BatchScaling(sgd(), batch_size=64, rule="noise")
    scheduler = BatchSizeScheduler(
        noise_scale, data, monitor=monitor, scaling=scaling, every=1, tokens_per_sample=10
    )
    assert scheduler.step().batch_size == 256
    assert scaling.factor == pytest.approx((1 + 256 / 64) / (1 + 256 / 256))
    tested = BatchSizeScheduler(norm_test, loader(), monitor=monitor, every=1, tokens_per_sample=10)
    wanted = norm_test(seen(measured(256, tr=256, sq=1.0)))
    assert tested.step().batch_size == 4 * round(wanted / 4)
    with pytest.raises(InvalidArgumentError, match="a monitor that counts tokens"):
        BatchSizeScheduler(noise_scale, loader(), monitor=monitor)
    with pytest.raises(InvalidArgumentError, match="a monitor that counts examples"):
        BatchSizeScheduler(noise_scale, loader(), monitor=Scripted(64), tokens_per_sample=10)


def test_a_real_monitor_says_what_it_counts():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    monitor = gradstats.attach(model, sample="token")
    with pytest.raises(InvalidArgumentError, match="a monitor that counts tokens"):
        BatchSizeScheduler(noise_scale, loader(), monitor=monitor)


def test_scaling_by_noise_needs_a_monitor():
    scaling = BatchScaling(sgd(), batch_size=64, rule="noise")
    with pytest.raises(InvalidArgumentError, match="pass monitor= as well"):
        BatchSizeScheduler(partial(ramp, start=64, end=128, over=9), loader(), scaling=scaling)


def test_state_of_another_run_is_refused():
    state = BatchSizeScheduler(noise_scale, loader(), monitor=Scripted(64)).state_dict()
    other = BatchSizeScheduler(noise_scale, loader(batch=32), monitor=Scripted(64))
    with pytest.raises(InvalidArgumentError, match="arguments of the run that is resumed"):
        other.load_state_dict(state)


def test_with_a_real_monitor_it_grows_to_the_known_noise_scale():
    """Linear regression away from its optimum: the noise scale is known in closed form."""
    torch.manual_seed(0)
    d, sigma = 8, 1.0
    w = torch.randn(d, dtype=torch.float64)
    x = torch.randn(40_000, d, dtype=torch.float64)
    y = x @ w + sigma * torch.randn(len(x), dtype=torch.float64)
    model = nn.Linear(d, 1, bias=False).double()
    delta = torch.full((d,), 0.05, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(w + delta)
    sq = float(delta.square().sum())
    known = ((d + 1) * sq + d * sigma**2) / sq
    monitor = gradstats.attach(model)
    data = StepLoader(TensorDataset(x, y), micro_batch_size=16, batch_size=16)
    scheduler = BatchSizeScheduler(noise_scale, data, monitor=monitor, every=20)
    for step in data:
        for (a, b), weight in step:
            (weight * (model(a).squeeze(1) - b).square().mean()).backward()
        monitor.step()
        model.zero_grad()
        scheduler.step()
    assert known == pytest.approx(409)
    assert known / 1.6 < scheduler.batch_size < 1.6 * known  # as near as its hysteresis
    assert len(scheduler.changes) <= 4


def test_one_process_decides_for_itself():
    assert decide_on_first_rank(lambda: 7) == 7
