"""Plans from known numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from advise_inputs import KNOWN, NOISE

import gradstats
from gradstats.advice import scale_learning_rate
from gradstats.errors import InvalidArgumentError
from gradstats.step_time import fit_step_time
from gradstats.workbench.advise import STARTING_POINTS, Evidence, RatePoint, advise, with_present


def test_the_batch_is_that_of_recommend_and_steps_follow_from_epochs():
    found = advise(KNOWN, epochs=10)
    plan = found.plan
    given = gradstats.recommend(NOISE, batch_size=64, learning_rate=0.1, optimizer="SGD")
    assert plan.batch_size == given.batch_size == 512
    assert plan.learning_rate == given.learning_rate
    now = math.ceil(10 * 50_000 / 64)
    # S(B) ∝ 1 + N/B: from 9 to 2 of the fewest steps
    assert plan.steps == math.ceil(now * 2 / 9)
    assert plan.samples == plan.steps * 512
    assert plan.epochs == pytest.approx(10 * 2 / 9 * 8, rel=1e-3)
    assert plan.warmup_steps == round(0.1 * plan.steps) < math.ceil(5 * 50_000 / 512)
    assert any("cut to a tenth of the training" in reason for reason in found.reasons)
    assert found.advice.curve
    assert plan.measured == 1


def test_memory_and_time_shape_the_plan():
    times = {(m, k): [0.01 + k * (0.02 + 0.001 * m)] for m in (16, 32, 64) for k in (1, 2)}
    timed = replace(KNOWN, timing=fit_step_time(times), largest=40)
    plan = advise(timed, steps_left=1000, device_hour_price=3.0).plan
    assert plan.micro_batch_size <= 40
    assert plan.micro_batch_size * plan.accumulation_steps * plan.world_size == plan.batch_size
    seconds = plan.steps * timed.timing.seconds(plan.micro_batch_size, plan.accumulation_steps)
    assert plan.hours == pytest.approx(seconds / 3600, rel=0.01)
    assert plan.price == pytest.approx(3 * plan.hours, rel=0.01)
    several = advise(timed, ranks=4)
    assert several.plan.world_size == 4
    assert any("taken to cost no time" in str(remark) for remark in several.remarks)
    alone = advise(timed, ranks=4, collective_seconds=10.0)
    assert alone.plan.world_size == 1


def test_a_critical_batch_multiplies_the_noise_scale():
    assert advise(replace(KNOWN, critical=4.0)).plan.batch_size == 2048


def test_an_uncertain_noise_scale_changes_nothing():
    wide = replace(NOISE, low=10.0, high=math.inf)
    plan = advise(replace(KNOWN, noise=wide), epochs=1).plan
    assert (plan.batch_size, plan.learning_rate, plan.warmup_steps) == (64, 0.1, 0)
    assert plan.steps == math.ceil(50_000 / 64)


def test_learning_rates_come_from_range_tests_first():
    at = RatePoint(128, 0.2, 0.1, 0.4)
    by_rule = advise(replace(KNOWN, rates=(at,))).plan
    factor = scale_learning_rate(1.0, 128, 512, rule="noise", noise=512.0)
    assert by_rule.learning_rate == pytest.approx(0.2 * factor)
    fitted = advise(replace(KNOWN, rates=(at,), exponent=0.7)).plan
    assert fitted.learning_rate == pytest.approx(0.2 * 4**0.7)
    assert fitted.learning_rate_low == pytest.approx(0.1 * 4**0.7)
    assert fitted.learning_rate_high == pytest.approx(0.4 * 4**0.7)
    saturating = advise(replace(KNOWN, rates=(at,), rate_noise=128.0)).plan
    assert saturating.learning_rate == pytest.approx(0.2 * 2 / 1.25)
    here = advise(replace(KNOWN, rates=(at, RatePoint(512, 0.33, 0.2, 0.5)), exponent=0.7)).plan
    assert (here.learning_rate, here.learning_rate_low) == (0.33, 0.2)
    unknown = advise(replace(KNOWN, rates=(at,), optimizer="Lion"))
    assert unknown.plan.learning_rate is None
    assert any("no rule is known" in reason for reason in unknown.reasons)


def test_adam_is_warmed_up_by_its_memory():
    adam = replace(KNOWN, optimizer="AdamW", betas=(0.9, 0.95))
    assert advise(adam).plan.warmup_steps == 40
    assert advise(replace(adam, betas=None)).plan.warmup_steps == 2000
    assert advise(replace(KNOWN, data_samples=None)).plan.warmup_steps is None
    assert advise(KNOWN).plan.warmup_steps == math.ceil(5 * 50_000 / 512)


def topics(found):
    return [remark.topic for remark in found.remarks]


def test_batch_norm_is_warned_of_below_32_samples_a_device():
    small = replace(KNOWN, largest=16)
    assert "BatchNorm" not in topics(advise(small))
    named = advise(replace(small, batch_norm=("bn1", "bn2", "bn3", "bn4", "bn5")))
    text = " ".join(map(str, named.remarks))
    for words in (
        "bn1, bn2, bn3 and 2 more",
        "the 16 samples",
        "GroupNorm",
        "LayerNorm",
        "1803.08494",
    ):
        assert words in text
    assert "SyncBatchNorm" not in text
    ranks = advise(replace(small, batch_norm=("bn1",)), ranks=4)
    assert "statistics are then of 64 samples, for" in " ".join(map(str, ranks.remarks))
    assert "BatchNorm" in topics(advise(small, batch_norm=True))
    assert "BatchNorm" not in topics(advise(replace(small, batch_norm=("bn1",)), batch_norm=False))
    assert "BatchNorm" not in topics(advise(replace(KNOWN, batch_norm=("bn1",))))


def test_large_batches_are_told_why_and_what_helps():
    assert "large batch" not in topics(advise(KNOWN))
    part = " ".join(map(str, advise(replace(KNOWN, data_samples=2000)).remarks))
    for words in ("26% of the data", "LARS", "label_smoothing=0.1", "swa_utils", "Nado", "warm-up"):
        assert words in part
    adam = replace(KNOWN, optimizer="Adam", data_samples=2000)
    assert "LAMB" in " ".join(map(str, advise(adam).remarks))
    huge = replace(NOISE, value=40_000.0, low=36_000.0, high=44_000.0)
    assert "8,192" in " ".join(map(str, advise(replace(KNOWN, noise=huge)).remarks))
    above = replace(KNOWN, batch_size=4096, noise=replace(NOISE, low=1.0, high=600.0))
    found = advise(above)  # too uncertain to go down
    said = " ".join(map(str, found.remarks))
    assert "above the noise scale's interval: a target takes 7.83 × the fewest samples" in said
    assert "large batch" not in topics(found)


@pytest.mark.parametrize("task", STARTING_POINTS)
def test_starting_points_are_plans_and_say_what_they_are(task):
    point = STARTING_POINTS[task]
    assert point.low <= point.batch_size <= point.high
    assert "arXiv:" in point.source
    found = advise(Evidence(largest=6, data_samples=100_000), task=task, ranks=2)
    plan = found.plan
    assert (plan.measured, plan.learning_rate, plan.unit) == (0, point.learning_rate, point.unit)
    assert "not a measurement" in found.reasons[0]
    if point.unit != "tokens":
        assert plan.micro_batch_size <= 6
        assert plan.micro_batch_size * plan.accumulation_steps * 2 == plan.batch_size
    if point.tiny:
        assert "BatchNorm" in topics(found)


@pytest.mark.parametrize(
    ("evidence", "options", "message"),
    [
        (Evidence(), {}, "no noise scale to go by"),
        (Evidence(noise=NOISE), {}, "present batch size is not known"),
        (
            Evidence(),
            {"task": "poetry"},
            "task='poetry' is not known here; use vision-classification",
        ),
        (KNOWN, {"ranks": 0}, "ranks=0"),
        (KNOWN, {"epochs": 1.0, "steps_left": 5}, "pass one of them"),
        (replace(KNOWN, data_samples=None), {"epochs": 1.0}, "how many samples the data holds"),
        (KNOWN, {"goal": "fun"}, "goal='fun'"),
        (KNOWN, {"device_hour_price": 1.0}, "pass one of at least 0, and steps_left"),
    ],
)
def test_what_cannot_be_planned_is_refused(evidence, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        advise(evidence, **options)


def test_present_settings_can_be_given():
    other = with_present(KNOWN, batch_size=256, largest=64)
    assert (other.batch_size, other.largest, other.learning_rate) == (256, 64, 0.1)
    with pytest.raises(InvalidArgumentError, match="batch_size=0"):
        with_present(KNOWN, batch_size=0)
