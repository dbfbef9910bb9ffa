"""`gradstats advise`: plans from known numbers, files of each kind, signs of overfitting, the command."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import gradstats
from gradstats.advice import scale_learning_rate
from gradstats.cli import main
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale
from gradstats.step_time import StepTime, fit_step_time
from gradstats.workbench import saved
from gradstats.workbench.advise import (
    STARTING_POINTS,
    Curve,
    Evidence,
    RatePoint,
    advise,
    gather,
    overfitting,
    with_present,
)

NOISE = NoiseScale(512.0, 450.0, 600.0, 0.9, 64_000, 1000, 0, 512.0, 1.0)
KNOWN = Evidence(
    noise=NOISE, batch_size=64, learning_rate=0.1, optimizer="SGD", data_samples=50_000
)


# ---- the plan ------------------------------------------------------------------------------------


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


# ---- overfitting ---------------------------------------------------------------------------------


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


def test_a_certain_rise_is_overfitting():
    found = overfitting([curve(60, turn=0.4, rise=0.5)])
    assert found.kind == "overfitting"
    assert 0.15 < found.low < found.rise < 0.6
    assert 10 < found.since < 45
    assert "it overfits" in str(found)
    diverging = overfitting([curve(60, turn=0.4, rise=0.5, train=lambda t: 1 + t)])
    assert diverging.kind == "diverging"
    assert "does not overfit" in str(diverging)


def test_a_rise_within_the_margin_is_none():
    steady = curve(200, turn=0.2, rise=0.03, noise=0.001)
    assert overfitting([steady], margin=0.0).kind == "overfitting"
    assert overfitting([steady], margin=0.05).kind == "none"


def test_scatter_is_not_taken_for_overfitting():
    """At most 5% of the trainings that only scatter, however much neighbours have in common."""
    for count, rho in ((16, 0.0), (40, 0.6), (120, 0.8)):
        flagged = [
            overfitting([curve(count, rho=rho, seed=s)], margin=0.0).kind != "none"
            for s in range(200)
        ]
        assert sum(flagged) <= 0.05 * 200 + 2 * math.sqrt(200 * 0.05 * 0.95)


def test_several_seeds_are_tested_together():
    few = [curve(8, turn=0.3, rise=0.4, seed=s) for s in range(4)]
    assert overfitting(few).kind == "overfitting"
    assert overfitting(few[:2]).kind == "unknown"
    assert "too few" in str(overfitting(few[:2]))
    alike = [curve(8, rho=0.9, seed=100 + s) for s in range(5)]
    assert overfitting(alike).kind == "none"


# ---- files ---------------------------------------------------------------------------------------


def write(folder, kind, content):
    path = folder / f"{kind}.json"
    saved.write(path, kind, content)
    return path


def trials(size, ends, curves=None):
    return [
        {
            "batch_size": size, "learning_rate": 0.1, "seed": s, "validation_loss": end,
            "curve": (curves or {}).get(s, []),
        }
        for s, end in enumerate(ends)
    ]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """One of each kind."""
    timing = fit_step_time({(m, 1): [0.02 + 0.001 * m] for m in (16, 64, 256)})
    held = curve(60, turn=0.4, rise=0.5)
    log = tmp_path / "run.jsonl"
    rows = [
        {"step": 10 * i, "loss": t, "validation_loss": v}
        for i, (t, v) in enumerate(zip(held.train, held.validation, strict=True))
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": ')
    return {
        "measure": write(tmp_path, "measure", {
            "noise_scale": NOISE.to_dict(), "batch_size": 64, "learning_rate": 0.1, "betas": None,
            "optimizer": "SGD", "data_samples": 50_000, "timing": timing.to_dict(),
            "batch_norm": ["bn"], "tokens_per_sample": None,
        }),
        "vram": write(tmp_path, "vram", {"recommended": 24, "largest": 30}),
        "lr_range": write(tmp_path, "lr_range", {
            "curves": [{"batch_size": 64, "suggested": 0.2, "low": 0.1, "high": 0.4}],
            "scaling": {"rule": "linear", "exponent": 0.9},
        }),
        "critical": write(tmp_path, "critical", {
            "batch_size": 64, "critical_batch_size": 2048.0, "low": 1500.0, "high": 2500.0,
            "noise_scale": NOISE.to_dict(), "calibration": {"value": 4.0, "low": 3.0, "high": 5.0},
        }),
        "sweep": write(tmp_path, "sweep", {
            "trials": trials(64, [0.30, 0.31, 0.29]) + trials(256, [0.40, 0.41, 0.42]),
        }),
        "log": log,
    }  # fmt: skip


def test_files_of_every_kind_make_one_plan(files):
    evidence = gather(
        [files[kind] for kind in ("critical", "measure", "vram", "lr_range", "sweep", "log")]
    )
    assert evidence.noise == NOISE
    assert (evidence.largest, evidence.critical, evidence.exponent) == (24, 4.0, 0.9)
    assert isinstance(evidence.timing, StepTime)
    assert len(evidence.sources) == 6
    found = advise(evidence, epochs=3)
    assert found.plan.micro_batch_size <= 24
    ratio = found.plan.batch_size / 64
    assert found.plan.learning_rate == pytest.approx(0.2 * ratio**0.9)
    said = " ".join(map(str, found.remarks))
    assert "it overfits" in said
    assert "batches of 64 at 0.1 end with the lowest validation loss, surely below" in said
    assert "the 24 samples" in said or found.plan.micro_batch_size < 24
    assert json.dumps(saved.plain(found.to_dict()), allow_nan=False)


def test_a_sweeps_seeds_are_tested_together(tmp_path):
    curves = {}
    for seed in range(3):
        found = curve(10, turn=0.3, rise=0.4, seed=seed)
        pairs = zip(found.train, found.validation, strict=True)
        curves[seed] = [
            {"step": 5 * i, "samples": 80 * i, "loss": t, "validation_loss": v}
            for i, (t, v) in enumerate(pairs)
        ]
    failed = trials(16, [None])
    content = {"trials": trials(16, [1.2, 1.3, 1.25], curves) + failed}
    evidence = gather([write(tmp_path, "sweep", content)])
    assert [len(group) for group in evidence.curves] == [3]
    (trend,) = advise(replace(evidence, noise=NOISE, batch_size=64)).trends
    assert trend.kind == "overfitting"
    assert trend.name == "batches of 16 at 0.1"


def test_numbers_survive_the_file(files):
    timing = fit_step_time({(m, k): [0.02 + 0.001 * m * k] for m in (16, 64) for k in (1, 2)})
    again = StepTime.from_dict(json.loads(json.dumps(timing.to_dict())))
    assert again == timing
    for noise in (
        NOISE,
        replace(NOISE, high=math.inf),
        replace(NOISE, value=math.inf, high=math.inf, true_grad_sq_norm=-1.0),
    ):
        assert NoiseScale.from_dict(json.loads(json.dumps(noise.to_dict()))) == noise
    nothing = NoiseScale.from_dict({**NOISE.to_dict(), "value": None})
    assert math.isnan(nothing.value)
    with pytest.raises(InvalidArgumentError, match="this is no noise scale"):
        NoiseScale.from_dict({"value": 3.0})


def test_branches_alone_stand_for_the_noise_scale(tmp_path):
    path = write(tmp_path, "critical", {
        "batch_size": 64, "critical_batch_size": 1024.0, "low": 900.0, "high": 1100.0,
        "noise_scale": None, "calibration": None,
    })  # fmt: skip
    found = advise(gather([path]))
    assert found.plan.batch_size == 1024
    assert "by branches" in found.reasons[0]


def test_tokens_become_samples(tmp_path):
    path = write(tmp_path, "measure", {
        "noise_scale": NOISE.to_dict(), "batch_size": 16, "tokens_per_sample": 16.0,
    })  # fmt: skip
    assert gather([path]).noise.value == 32


def test_a_log_alone_is_enough(tmp_path):
    path = tmp_path / "run.jsonl"
    row = {
        "step": 500, "samples": 32_000, "batch_size": 64, "loss": 1.0, "learning_rate": 0.1,
        "noise_scale": 512.0, "noise_scale_low": 450.0, "noise_scale_high": 600.0,
        "tr_sigma": 1.0, "true_grad_sq_norm": 0.002, "num_skipped": 3, "coverage": 1.0,
    }  # fmt: skip
    path.write_text(json.dumps(row) + "\n")
    evidence = gather([path])
    assert evidence.noise.num_steps == 497
    assert advise(evidence).plan.batch_size == 512


def test_scaling_rules_of_range_tests(tmp_path):
    def read(scaling):
        curves = [{"batch_size": 64, "suggested": 0.2}, {"batch_size": 128, "suggested": None}]
        return gather([write(tmp_path, "lr_range", {"curves": curves, "scaling": scaling})])

    assert read(None).rates == (RatePoint(64, 0.2, None, None),)
    assert read({"rule": None, "exponent": 0.7}).exponent is None  # the data cannot tell
    assert read({"rule": "sqrt", "exponent": 0.55}).exponent == 0.55
    found = read({"rule": "saturating", "exponent": 0.55, "noise_scale": 90.0})
    assert (found.exponent, found.rate_noise) == (None, 90.0)


def test_files_that_lack_something_are_refused(tmp_path):
    with pytest.raises(
        InvalidArgumentError,
        match=r"lacks what a result of gradstats measure holds \(KeyError: 'no",
    ):
        gather([write(tmp_path, "measure", {"batch_size": 3})])
    with pytest.raises(InvalidArgumentError, match="holds gradstats bench; what is needed"):
        gather([write(tmp_path, "bench", {})])
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        gather([tmp_path / "absent.json"])


# ---- the command ---------------------------------------------------------------------------------


def normalised():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    data = torch.randn(100, 8), torch.randn(100, 1)
    return gradstats.Workload(model, nn.MSELoss(), data, batch_size=64)


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["gradstats", "advise", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


def test_people_read_the_plan(run, files, tmp_path):
    out = tmp_path / "plan.json"
    code, text, err = run(
        files["measure"], files["vram"], files["log"], "--epochs", 3, "--out", out
    )
    assert (code, err) == (0, "")
    for words in (
        "Plan",
        "batch size",
        "(now 64)",
        "warm-up",
        "Why",
        "Besides",
        "GroupNorm",
        "it overfits",
    ):
        assert words in text
    content = saved.read(out, "advise")
    assert content["plan"]["batch_size"] == content["advice"]["batch_size"]
    assert content["plan"]["measured"] == 1
    assert all(isinstance(text, str) for text in content["reasons"] + content["remarks"])
    code, text, _ = run(files["measure"], "--json")
    assert json.loads(text)["plan"]["optimizer"] == "SGD"


def test_a_target_says_what_files_do_not(run, files):
    log = files["log"].with_name("log.jsonl")
    row = {"step": 500, "noise_scale": 16.0, "noise_scale_low": 14.0, "noise_scale_high": 18.0}
    log.write_text(json.dumps(row) + "\n")
    code, text, _ = run(log, "--target", "test_advise:normalised", "--epochs", 2, "--json")
    found = json.loads(text)
    assert code == 0
    assert (found["plan"]["batch_size"], found["plan"]["optimizer"]) == (16, "AdamW")
    assert "(1)" in found["remarks"][0]  # the name of its BatchNorm layer


def test_tasks_are_listed(run):
    code, text, _ = run("--tasks")
    assert code == 0
    assert "vision-classification" in text
    assert set(json.loads(run("--tasks", "--json")[1])) == set(STARTING_POINTS)
    assert "not a measurement" in run("--task", "tabular")[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no noise scale to go by"),
        (["absent.json"], "absent.json cannot be read"),
        (["--task", "poetry"], "task='poetry'"),
        (["--target", "nowhere:f"], "cannot be imported"),
        (["--task", "rl", "--out", "/dev/null/plan.json"], "/dev/null/plan.json cannot be written"),
    ],
)
def test_bad_arguments_exit_with_two(run, args, message):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
