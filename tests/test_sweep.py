"""Sweeps: what they measure, and that they go on bit by bit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.workbench.sweep import Plan, Settings, Sharpness, parse, sweep
from gradstats.workbench.sweep.plans import rate_factor, scaled_rate

QUICK = {"looks": 6, "precision": 0.5}


def settings(target: str = "dropout", plans: str = "16x12,32x6,64x3", **more) -> Settings:
    return Settings(
        f"workloads:{target}", parse(plans), **{"seeds": 2, "threads": 1, **QUICK, **more}
    )


def without_seconds(value):
    """Everything that must be the same from run to run."""
    if isinstance(value, dict):
        timed = ("seconds", "environment", "verdicts", "summary")
        return {k: without_seconds(v) for k, v in value.items() if k not in timed}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole():
    """An undisturbed sweep."""
    return sweep(settings())


# ---- plans -----------------------------------------------------------------------------------------


def test_plans_are_read() -> None:
    assert parse("16x2000, 64X500,256×125@0.5") == (
        Plan(16, 2000), Plan(64, 500), Plan(256, 125, 0.5),
    )  # fmt: skip
    assert [p.name for p in parse("16x20,8x40@1e-3")] == ["16x20", "8x40@0.001"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("16", "'16' is no plan; write batch size x steps"),
        ("16x20@1e", "'16x20@1e' is no plan"),
        ("0x20", "needs at least one sample and one step"),
        ("16x20@0", "needs a learning rate above 0"),
        ("16x20,16x20", "plans=16x20 twice"),
    ],
)
def test_other_plans_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"rule": "cubic"}, "rule='cubic' must be one of same, linear, sqrt, noise"),
        ({"decay": "step"}, "decay='step' must be one of none, cosine, linear"),
        ({"base": "4x4"}, "base=4x4 is not one of the plans 16x12, 32x6, 64x3"),
        (
            {"micro_batch_size": 12},
            "micro_batch_size=12 does not divide the batches of 16x12, 32x6",
        ),
        ({"warm_up": 1.0}, "warm_up=1.0 must be a share"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be above 0"),
        ({"precision": 0.0}, "precision=0.0 must be a relative error"),
    ],
)
def test_settings_out_of_range_are_refused(more, message) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        settings(**more)


def test_rates() -> None:
    base, large = Plan(16, 100), Plan(64, 25)
    assert scaled_rate(0.1, base, large, "same") == 0.1
    assert scaled_rate(0.1, base, large, "linear") == pytest.approx(0.4)
    assert scaled_rate(0.1, base, large, "sqrt") == pytest.approx(0.2)
    assert scaled_rate(0.1, base, large, "noise", 48.0) == pytest.approx(0.1 * 4 / 1.75)
    assert scaled_rate(0.1, base, Plan(64, 25, 0.7), "linear") == 0.7
    shape = [rate_factor(p, 0.2, "cosine") for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert shape == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert rate_factor(0.75, 0.0, "linear") == 0.25


# ---- what a sweep gives ----------------------------------------------------------------------------


SAMPLES = {
    "16x12": [0, 32, 64, 96, 128, 160, 192],
    "32x6": [0, 32, 64, 96, 128, 160, 192],
    "64x3": [0, 64, 128, 192],
}


def test_a_sweep_trains_every_plan_from_every_seed(whole) -> None:
    assert [(t["plan"], t["seed"]) for t in whole.trials] == [
        (plan, seed) for seed in (0, 1) for plan in ("16x12", "32x6", "64x3")
    ]
    for trial in whole.trials:
        assert trial["ok"]
        assert (trial["samples"], trial["learning_rate"]) == (192, 0.02)
        assert [p["samples"] for p in trial["curve"]] == SAMPLES[trial["plan"]]
        assert trial["gap"] == trial["validation_loss"] - trial["final_loss"]
        assert trial["curve"][-1]["validation_loss"] == trial["validation_loss"]
        assert trial["gradient_variance"] > 0
        assert trial["seconds"] > 0
    starts = [t["curve"][0]["validation_loss"] for t in whole.trials]
    assert starts[0] == starts[1] == starts[2] != starts[3] == starts[5]  # one seed, one model
    rows = {row["plan"]: row for row in whole.summary}
    losses = [t["validation_loss"] for t in whole.trials if t["plan"] == "16x12"]
    assert rows["16x12"]["validation_loss"]["mean"] == pytest.approx(sum(losses) / 2)
    half = 6.3138 * abs(losses[0] - losses[1]) / 2  # Student's t with one degree of freedom
    assert rows["16x12"]["validation_loss"]["high"] == pytest.approx(sum(losses) / 2 + half, 1e-4)
    assert not whole.interrupted
    assert json.dumps(whole.to_dict())


def test_trials_are_plain_training(whole) -> None:
    """The 16x12 trial of seed 1, written out."""
    from gradstats.workbench.workload import load

    made = load("workloads:dropout", seed=1)
    draw = made.batches(16, seed=1)
    made.model.train()
    for _ in range(12):
        made.loss(next(draw)).backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
    made.model.eval()
    with torch.no_grad():
        loss = made.loss(next(made.validation_batches(64))).item()
    trial = next(t for t in whole.trials if (t["plan"], t["seed"]) == ("16x12", 1))
    assert trial["validation_loss"] == pytest.approx(loss, rel=1e-6)


def test_accumulated_batches_train_alike() -> None:
    """Without dropout: micro-batches of 4 give what whole batches give."""
    parts = settings("whole", "16x10", seeds=1, variance=False)
    one, other = (
        sweep(parts),
        sweep(settings("whole", "16x10", seeds=1, variance=False, micro_batch_size=4)),
    )
    assert other.trials[0]["validation_loss"] == pytest.approx(
        one.trials[0]["validation_loss"], rel=1e-4
    )
    assert other.trials[0]["curve"][-1]["loss"] == pytest.approx(
        one.trials[0]["curve"][-1]["loss"], rel=1e-4
    )


def test_the_noise_rule_follows_the_base_plans_noise_scale() -> None:
    found = sweep(settings("dataset", "16x60,64x15", seeds=1, rule="noise", variance=False))
    noise = found.summary[0]["noise_scale"]
    rates = [t["learning_rate"] for t in found.trials]
    assert rates == [0.05, pytest.approx(0.05 * (1 + noise / 16) / (1 + noise / 64))]


def test_plans_of_unequal_samples_and_one_seed_are_told() -> None:
    found = sweep(settings("tensors", "8x4,16x4", seeds=1, variance=False))
    remarks = "; ".join(found.remarks)
    for text in (
        "not of equal samples (8x4 32, 16x4 64)",
        "one seed: differences may be chance",
        "at one learning rate",
        "holds no samples out",
        "a batch of 16 is 25% of the data",
    ):
        assert text in remarks
    assert found.verdicts[0].budget == 32
    assert found.verdicts[0].measure == "loss"
    assert "in one trial, which may be chance" in str(found.verdicts[0])


def test_models_without_per_sample_gradients_are_swept_and_told() -> None:
    found = sweep(settings("normalised", "8x12,16x6", seeds=1))
    assert all(t["ok"] and t["gradient_variance"] is None for t in found.trials)
    assert any("per-sample gradients cannot be measured here" in r for r in found.remarks)
    assert [p["by_monitor"] for p in found.variance["points"]] == [None, None]
    with pytest.raises(GradStatsError, match="rule noise needs the noise scale"):
        sweep(settings("normalised", rule="noise"))


def test_a_trial_that_diverges_is_left_out() -> None:
    found = sweep(settings("diverges", "8x24,16x12", seeds=1, variance=False))
    assert [t["ok"] for t in found.trials] == [False, False]
    assert "it diverged: the loss was no longer finite at step" in found.trials[0]["why"]
    assert found.verdicts == []
    assert found.summary[0]["final_loss"]["mean"] is None


# ---- going on --------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sweeps are forked")
def test_a_sweep_that_is_killed_goes_on_bit_by_bit(tmp_path) -> None:
    script = Path(__file__).with_name("killed_sweep.py")
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "6"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) > 2
    whole, killed = (
        without_seconds(json.loads((tmp_path / f"{name}.json").read_text()))
        for name in ("whole", "killed")
    )
    assert len(whole["trials"]) == 6
    assert killed == whole
    assert not list((tmp_path / "killed").glob("*-seed*.pt"))


def test_ctrl_c_keeps_a_checkpoint(whole, tmp_path) -> None:
    seen = []

    def press(trial, news) -> None:
        if "ok" in news:
            return
        seen.append((trial.name, news["step"]))
        if seen[-1] == ("32x6-seed0", 3):
            os.kill(os.getpid(), signal.SIGINT)

    found = sweep(settings(), folder=tmp_path, report=press, checkpoint_seconds=1e9)
    assert found.interrupted
    assert [t["plan"] for t in found.trials] == ["16x12"]
    assert (tmp_path / "32x6-seed0.pt").exists()
    seen.clear()
    rest = sweep(settings(), folder=tmp_path, report=press)
    assert seen[0] == ("32x6-seed0", 4)
    assert without_seconds(rest.to_dict()) == without_seconds(whole.to_dict())


def test_processes_give_the_same_bits_and_outlive_a_death(whole, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DIES", str(tmp_path / "died"))
    news = []
    found = sweep(
        settings("dies"),
        folder=tmp_path / "sweep",
        jobs=2,
        report=lambda trial, seen: news.append((trial.name, seen.get("why"))),
    )
    assert [why for _, why in news if why] == ["its process ended with exit code 7"]
    same = without_seconds(found.to_dict())["trials"]
    assert same == without_seconds(whole.to_dict())["trials"]


def test_a_trial_that_fails_is_tried_twice_and_the_others_go_on() -> None:
    found = sweep(settings("fails", "8x6,16x3", variance=False))
    assert [t["ok"] for t in found.trials] == [True, True, False, False]
    assert found.trials[2]["why"] == "IndexError: list index out of range"
    assert found.summary[0]["failed"] == 1


def test_other_settings_are_refused_and_more_seeds_and_plans_go_on(tmp_path) -> None:
    sweep(settings(plans="8x6", seeds=1, variance=False), folder=tmp_path)
    trained = []
    found = sweep(
        settings(plans="8x6,16x3", seeds=2, variance=False),
        folder=tmp_path,
        report=lambda trial, news: trained.append(trial.name) if "ok" not in news else None,
    )
    assert len(found.trials) == 4
    assert "8x6-seed0" not in trained
    for more, message in [
        ({"learning_rate": 0.5}, r"learning_rate was 0.02 and is 0.5"),
        ({"looks": 3}, "looks was 6 and is 3"),
        ({"target": "whole"}, "fingerprint was"),
    ]:
        with pytest.raises(InvalidArgumentError, match=message):
            sweep(settings(plans="8x6", seeds=1, variance=False, **more), folder=tmp_path)


def test_two_sweeps_do_not_share_a_folder(tmp_path) -> None:
    from gradstats.workbench.sweep.store import Store

    with (
        Store(tmp_path).locked(),
        pytest.raises(InvalidArgumentError, match="another sweep is at work"),
    ):
        sweep(settings(), folder=tmp_path)


def test_sharpness_is_measured_of_each_minimum() -> None:
    asked = Sharpness(subspace=3, samples=64)
    found = sweep(settings(plans="16x12", seeds=1, variance=False, sharpness=asked))
    sharp = found.trials[0]["sharpness"]
    assert sharp["full"] > sharp["subspace"] > 0
    assert sharp["top_eigenvalue"] > 0
    assert math.isfinite(sharp["top_eigenvalue"])


def test_ray_trains_the_same_bits(whole, tmp_path) -> None:
    pytest.importorskip("ray")
    news = []
    found = sweep(
        settings("dropout"),
        folder=tmp_path,
        ray="local",
        report=lambda trial, seen: news.append(seen),
    )
    same = without_seconds(found.to_dict())
    assert same["trials"] == without_seconds(whole.to_dict())["trials"]
    assert same["variance"] == without_seconds(whole.to_dict())["variance"]
    assert sum("ok" in seen for seen in news) == 6


def test_ray_that_is_missing_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(GradStatsError, match=r"pip install 'gradstats\[ray\]'"):
        sweep(settings(), folder=tmp_path, ray="local")
