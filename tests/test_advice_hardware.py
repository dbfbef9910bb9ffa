"""Advice from a measured step: the layout, the times and prices, several numbers of ranks."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradstats
from gradstats.advice import recommend
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale, steps_ratio
from gradstats.step_time import fit_step_time

INF = math.inf


def measured(value=312.0, low=240.0, high=410.0):
    return NoiseScale(value, low, high, 0.9, 6400, 200, 0, value, 1.0)


def timing(update=0.02, launch=0.003, each=1e-4, sizes=(8, 16, 32, 64), **options):
    times = {(m, k): [update + k * (launch + each * m)] for m in sizes for k in (1, 2)}
    return fit_step_time(times, **options)


@pytest.mark.parametrize("noise", [30.0, 300.0, 30000.0])
@pytest.mark.parametrize("costs", [(0.02, 0.003, 1e-4), (0.0, 0.02, 1e-5), (1.0, 0.0, 1e-3)])
def test_within_5_percent_of_the_best_layout_there_is(noise, costs):
    """Against every micro-batch size timed and any number of them, a finer grid than the advice's."""
    update, launch, each = costs

    def time(m, k):
        return steps_ratio(m * k, noise) * (update + k * (launch + each * m))

    best = min(time(m, k) for m in range(8, 65) for k in range(1, 1500))
    advice = recommend(
        measured(noise, noise / 2, noise * 2), batch_size=64, step_seconds=timing(*costs)
    )
    found = time(advice.micro_batch_size, advice.accumulation_steps)
    assert found <= 1.05 * 1.05 * best  # counted as equal, and sizes are round
    assert advice.seconds == pytest.approx(found / time(64, 1))
    assert 8 <= advice.micro_batch_size <= 64


def test_costs_that_come_once_per_step_ask_for_accumulation():
    """The same whole time at (64, 1): in the update it is spread over micro-batches, in the launch not."""
    found = measured(1000, 800, 1200)
    spread = recommend(found, batch_size=64, step_seconds=timing(update=0.1, launch=0.0))
    repeated = recommend(found, batch_size=64, step_seconds=timing(update=0.0, launch=0.1))
    assert spread.accumulation_steps > repeated.accumulation_steps
    assert spread.seconds < repeated.seconds


def test_hours_and_prices():
    advice = recommend(
        measured(),
        batch_size=64,
        world_size=2,
        step_seconds=timing(world_size=2),
        steps_left=36_000,
        device_hour_price=2.5,
    )
    now = advice.present
    assert (now.batch_size, now.micro_batch_size, now.steps, now.cost) == (64, 32, 1, 1)
    assert now.hours == pytest.approx(36_000 * (0.02 + 0.003 + 0.0032) / 3600)
    assert now.price == pytest.approx(now.hours * 2 * 2.5)
    assert (advice.batch_size, advice.micro_batch_size, advice.accumulation_steps) == (256, 64, 2)
    steps = 36_000 * steps_ratio(256, 312) / steps_ratio(64, 312)
    assert advice.hours == pytest.approx(steps * (0.02 + 2 * (0.003 + 64 * 1e-4)) / 3600)
    assert advice.price == pytest.approx(advice.hours * 5)
    assert (
        "; 13,600 steps, 0.147 hours, price 0.733 to go instead of 36,000 steps, 0.262 hours, price 1.31."
        in str(advice)
    )


def test_the_rest_of_the_training_without_times_is_in_steps():
    advice = recommend(measured(), batch_size=64, steps_left=1000)
    steps = 1000 * steps_ratio(256, 312) / steps_ratio(64, 312)
    assert f"; {steps:.0f} steps to go instead of 1,000 steps. Why" in str(advice)
    assert advice.hours is None


def test_words():
    advice = recommend(
        measured(2000, 1800, 2200), batch_size=64, step_seconds=timing(), max_micro_batch_size=32
    )
    assert (
        "a step takes 0.02 s plus 0.003 s per micro-batch plus 0.0001 s per sample of a rank, so a target"
        in advice.reason
    )
    assert "micro-batches are of 32, the largest that was timed or allowed" in advice.reason
    alone = fit_step_time({(8, 1): [0.2], (16, 1): [0.3]})
    reason = recommend(measured(), batch_size=64, step_seconds=alone).reason
    assert "a step takes 0.1 s plus 0.0125 s per sample of a rank" in reason


# --- several numbers of ranks -----------------------------------------------------------------


def test_ranks_that_cost_nothing_to_join_are_all_taken_for_time_and_one_for_cost():
    found, step = measured(5000, 4000, 6000), timing()
    worlds = {1: 0.0, 2: 0.0, 4: 0.0}
    soon = recommend(found, batch_size=64, step_seconds=step, world_sizes=worlds)
    cheap = recommend(found, batch_size=64, step_seconds=step, world_sizes=worlds, goal="cost")
    assert (soon.world_size, cheap.world_size) == (4, 1)
    assert soon.seconds < cheap.seconds
    assert soon.cost > cheap.cost
    assert "of [1, 2, 4] ranks, 4 reach it soonest, within 5%" in soon.reason
    assert "of [1, 2, 4] ranks, 1 reach it with the least device time, within 5%" in cheap.reason
    assert {p.world_size for p in soon.curve} == {1, 2, 4}


def test_seconds_with_other_ranks_hold_their_collectives():
    """Each point of the curve against its own formula, with what the timed steps held taken out."""
    step = timing(world_size=2)
    worlds = {1: 0.0, 2: 0.004, 8: 0.009}
    advice = recommend(
        measured(), batch_size=64, world_size=2, step_seconds=step, world_sizes=worlds
    )
    now = 0.02 + 0.003 + 32 * 1e-4
    for p in advice.curve:
        own = 0.02 + p.accumulation_steps * (0.003 + 1e-4 * p.micro_batch_size)
        ratio = (own - 0.004 + worlds[p.world_size]) / now
        assert p.seconds == pytest.approx(p.steps * ratio)
        assert p.cost == pytest.approx(p.seconds * p.world_size / 2)


def test_ranks_that_are_slow_to_join_are_left_alone():
    worlds = {1: 0.0, 2: 10.0}
    advice = recommend(measured(), batch_size=64, step_seconds=timing(), world_sizes=worlds)
    assert advice.world_size == 1


# --- properties -------------------------------------------------------------------------------


@st.composite
def calls(draw):
    low, value, high = sorted(draw(st.tuples(*[st.floats(0, 1e12)] * 3)))
    noise = draw(
        st.sampled_from([(value, low, high), (value, value / 2, value * 2), (INF, low, INF)])
    )
    world = draw(st.sampled_from([1, 2, 3, 8]))
    costs = draw(st.tuples(st.floats(0, 10), st.floats(1e-6, 10), st.floats(1e-9, 1)))
    sizes = draw(st.sets(st.integers(1, 300), min_size=2, max_size=4))
    step = timing(*costs, sizes=sizes, world_size=world)
    options = {"batch_size": world * draw(st.integers(1, 3000)), "world_size": world}
    if draw(st.booleans()):
        options["max_batch_size"] = options["batch_size"] + draw(st.integers(0, 10**5))
    if draw(st.booleans()):
        options["max_micro_batch_size"] = draw(st.integers(1, 300))
    if draw(st.booleans()):
        options["world_sizes"] = {world: 0.0, 2 * world: draw(st.floats(0, 1))}
        options["goal"] = draw(st.sampled_from(["time", "cost"]))
    if draw(st.booleans()):
        options |= {"steps_left": draw(st.integers(1, 10**9)), "device_hour_price": 1.0}
    return measured(*noise), {**options, "step_seconds": step}


@settings(deadline=None)
@given(calls())
def test_every_plan_is_valid(call):
    found, options = call
    advice, step = recommend(found, **options), options["step_seconds"]
    now, world = options["batch_size"], options["world_size"]
    for p in (advice, *advice.curve):
        assert p.micro_batch_size * p.accumulation_steps * p.world_size == p.batch_size
        assert p.world_size in options.get("world_sizes", {world: 0})
        assert p.batch_size <= options.get("max_batch_size", INF)
        room = min(options.get("max_micro_batch_size", INF), step.max_micro_batch_size)
        assert 1 <= p.micro_batch_size <= room
        if (p.batch_size, p.world_size) != (now, world):
            assert p.micro_batch_size >= min(step.min_micro_batch_size, room)
        assert 0 < p.seconds < INF
        assert p.cost == pytest.approx(p.seconds * p.world_size / world)
        if "steps_left" in options:
            assert p.price == pytest.approx(p.hours * p.world_size)
    if found.actionable:
        assert advice.low <= advice.batch_size <= advice.high
        soonest = min(p.seconds for p in advice.curve)
        cheapest = min(p.cost for p in advice.curve)
        if options.get("goal") == "cost":
            assert advice.cost <= 1.05 * cheapest * (1 + 1e-9)
        else:
            assert advice.seconds <= 1.05 * soonest * (1 + 1e-9)
    else:
        assert (advice.batch_size, advice.world_size) == (now, world)
    assert advice == recommend(found, **options)
    json.dumps(advice.to_dict(), allow_nan=False)
    assert str(advice).endswith(".")


@settings(deadline=None)
@given(st.floats(10, 1e5), st.floats(1, 10), st.floats(1, 10))
def test_more_noise_and_costlier_updates_never_ask_for_a_smaller_batch(noise, louder, slower):
    def size(n, update):
        found = measured(n, n / 2, n * 2)
        return recommend(found, batch_size=64, step_seconds=timing(update)).batch_size

    base = size(noise, 0.02)
    # Round sizes within 5% of the best count as equal, and the smallest of them may move by one.
    assert size(noise * louder, 0.02) * 2 >= base
    assert size(noise, 0.02 * slower) * 2 >= base
    assert size(noise * 100, 0.02) > base


@settings(deadline=None)
@given(st.floats(1e-3, 1e3))
def test_the_unit_of_time_and_of_money_does_not_matter(unit):
    def ask(scale, price):
        costs = (0.02 * scale, 0.003 * scale, 1e-4 * scale)
        return recommend(
            measured(), batch_size=64, step_seconds=timing(*costs), steps_left=100,
            device_hour_price=price,
        )  # fmt: skip

    one, other = ask(1.0, 1.0), ask(unit, 3.0)
    assert one.batch_size == other.batch_size
    assert other.hours == pytest.approx(unit * one.hours)
    assert other.price == pytest.approx(3 * unit * one.price)
    assert other.seconds == pytest.approx(one.seconds)


# --- a whole training, and refusals -----------------------------------------------------------


def test_a_monitor_recommends_from_its_own_step():
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    monitor = gradstats.attach(model, optimizer=optimizer)
    data = torch.randn(64, 8)

    def step(micro: int, count: int) -> None:
        for _ in range(count):
            rows = data[torch.randint(64, (micro,))]
            (model(rows) - 3 + rows[:, :1]).square().mean().div(count).backward()
        monitor.step()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(60):
        step(16, 1)
    before = monitor.noise_scale()
    found = gradstats.measure_step(step, (4, 16, 64), restore=(model, optimizer, monitor), rounds=3)
    assert monitor.noise_scale() == before
    advice = monitor.recommend(step_seconds=found, steps_left=1000, device_hour_price=1.0)
    assert advice.present_batch_size == 16
    assert advice.micro_batch_size <= 64
    assert advice.present.hours == pytest.approx(1000 * found.seconds(16) / 3600)
    assert advice.price == pytest.approx(advice.hours)


def test_a_noise_scale_in_tokens_is_brought_to_the_samples_that_were_timed():
    """312 samples of 50 tokens are 15,600 tokens: the same advice."""
    tokens = recommend(
        measured(15_600, 12_000, 20_500),
        batch_size=3200,
        step_seconds=timing(),
        tokens_per_sample=50,
    )
    samples = recommend(measured(), batch_size=64, step_seconds=timing())
    layout = ("batch_size", "micro_batch_size", "accumulation_steps", "low", "high", "present")
    assert [getattr(tokens, key) for key in layout] == [getattr(samples, key) for key in layout]
    assert tokens.seconds == pytest.approx(samples.seconds)
    few = recommend(measured(), batch_size=3, tokens_per_sample=50, world_size=1)
    assert few.present_batch_size == 1


def test_monitors_of_tokens_are_told_how_many_a_sample_has():
    torch.manual_seed(0)
    model, options = nn.Linear(3, 2), {"step_seconds": timing()}
    with gradstats.attach(model, sample="token") as monitor:
        model(torch.randn(16, 5, 3)).square().mean().backward()
        monitor.step()
        assert monitor.recommend().present_batch_size == 80
        assert monitor.recommend(**options, tokens_per_sample=5).present_batch_size == 16
        with pytest.raises(InvalidArgumentError, match=r"counts tokens.*pass tokens_per_sample="):
            monitor.recommend(**options)
    with gradstats.attach(model) as monitor:
        model(torch.randn(16, 5, 3)).square().mean().backward()
        monitor.step()
        with pytest.raises(InvalidArgumentError, match=r"tokens_per_sample=5.*counts examples"):
            monitor.recommend(**options, tokens_per_sample=5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens_per_sample": 0}, "tokens_per_sample=0 cannot be used"),
        ({"step_seconds": timing(world_size=2)}, r"measured with 2 ranks.*world sizes \[1\]"),
        ({"goal": "fame"}, r"goal='fame' cannot be used; pass one of \('time', 'cost'\)"),
        ({"steps_left": 0}, "steps_left=0.*at least 1"),
        ({"device_hour_price": 2.0}, "device_hour_price=2.0.*steps_left"),
        ({"device_hour_price": -1.0, "steps_left": 5}, "device_hour_price=-1.0.*at least 0"),
        ({"world_sizes": {1: 0.0}}, "world_sizes=.*what measure_step found"),
        ({"world_sizes": {2: 0.0}, "step_seconds": timing()}, "world_sizes=.*the present 1 among"),
        (
            {"world_sizes": {1: -1.0}, "step_seconds": timing()},
            "world_sizes=.*seconds of at least 0",
        ),
        ({"world_sizes": {1: 1.0}, "step_seconds": timing()}, "whole steps took 0.0238 s"),
        ({"world_sizes": {1: 0.0, 0: 1.0}, "step_seconds": timing()}, "world_sizes=0"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        recommend(measured(), **({"batch_size": 64} | options))
