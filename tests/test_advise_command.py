"""`gradstats advise`: files of each kind, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from advise_inputs import NOISE, curve
from torch import nn

import gradstats
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale
from gradstats.step_time import StepTime, fit_step_time
from gradstats.workbench import saved
from gradstats.workbench.advise import STARTING_POINTS, RatePoint, advise, gather

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
def run(command_line):
    return partial(command_line, "advise")


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
    code, text, _ = run(log, "--target", "test_advise_command:normalised", "--epochs", 2, "--json")
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


def test_lines_of_a_log_that_hold_no_row_are_told(tmp_path) -> None:
    path = tmp_path / "run.jsonl"
    row = '{"step": 4, "noise_scale": 64.0, "noise_scale_low": 50, "noise_scale_high": 80, "batch_size": 8}'
    path.write_text(f'{{"step": 1, "lo\n{row}\n\x00\x00\n{row[:20]}')
    with pytest.warns(
        UserWarning, match="run.jsonl: 3 lines without a row .cut short, or no JSON. passed"
    ):
        evidence = gather([path])
    assert (evidence.batch_size, evidence.noise.value) == (8, 64.0)
    for text, words in (
        ("", "run.jsonl is empty"),
        ("{]\n", "1 line without a row .*, and no other"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidArgumentError, match=f"{words}; is it a log of gradstats.Log"):
            gather([path])
