"""The demo with very few steps: its files, its result, and what Ctrl-C leaves."""

import json
import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from gradstats.demo import picture, tasks, train
from gradstats.demo.screen import Screen
from gradstats.loggers import read_lines

pytestmark = pytest.mark.usefixtures("one_thread")
KEYS = {
    "step", "samples", "seconds", "batch_size", "loss", "learning_rate", "coverage", "num_skipped",
    "tr_sigma", "true_grad_sq_norm", "noise_scale", "noise_scale_low", "noise_scale_high",
}  # fmt: skip


@pytest.fixture
def demo(command_line, tmp_path):
    return partial(command_line, "demo", "--out", tmp_path / "run")


def check_files(folder, steps, batch_size):
    """All three files are there and agree; the lines and the summary."""
    rows, spoilt = read_lines(folder / "steps.jsonl")
    assert spoilt == 0
    expected = {1, *range(10, steps + 1, 10), steps} if steps else set()
    assert [row["step"] for row in rows] == sorted(expected)
    for row in rows:
        assert set(row) >= KEYS
        assert row["samples"] == row["step"] * batch_size
        assert row["batch_size"] == batch_size
        assert math.isfinite(row["loss"])
    for row, later in pairwise(rows):
        assert row["seconds"] < later["seconds"]
    summary = json.loads((folder / "summary.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert summary["steps"] == steps
    image = (folder / "noise_scale.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n")
    assert len(image) > 10_000
    return rows, summary


@pytest.mark.parametrize("task", ["text", "digits"])
def test_it_trains_measures_and_recommends(demo, tmp_path, monkeypatch, task):
    monkeypatch.setattr(train, "TIMED_STEPS", 1)
    code, out, err = demo("--task", task, "--steps", "12", "--batch-size", "4", "--json")
    assert code == 0
    assert "step 12/12" in err
    rows, summary = check_files(tmp_path / "run", 12, 4)
    assert json.loads(out) == summary  # and nothing beside it
    assert [row["step"] for row in rows if row["noise_scale"]] == [1, 10, 12]
    assert all(row["tr_sigma"] > 0 for row in rows)
    shares = [v for k, v in rows[-1].items() if k.startswith("layer_share/")]
    assert sum(shares) == pytest.approx(1)
    assert rows[-1]["noise_scale"] == summary["noise_scale"]["value"]
    assert summary["noise_scale"]["coverage"] == 1
    assert sum(summary["tr_sigma_shares"].values()) == pytest.approx(1)
    assert list(summary["step_seconds"]) == ["1", "2", "4", "8", "16"]
    assert summary["recommendation"]["present_batch_size"] == 4


def test_people_read_the_recommendation(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TIMED_STEPS", 1)
    code, out, err = demo("--task", "digits", "--steps", "30", "--batch-size", "16")
    assert (code, err) == (0, "")
    _, summary = check_files(tmp_path / "run", 30, 16)
    assert summary["last_loss"] < summary["first_loss"]
    for words in ("step 30/30", "Recommendation", "learning rate", "share of tr Σ", "steps.jsonl"):
        assert words in out


def test_a_batch_of_one_sample_has_no_noise_scale_and_is_no_error(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TIMED_STEPS", 1)
    code, out, _ = demo("--task", "digits", "--steps", "3", "--batch-size", "1")
    assert code == 0
    assert "noise scale unknown" in out
    rows, summary = check_files(tmp_path / "run", 3, 1)
    assert {row["tr_sigma"] for row in rows} == {None}
    assert summary["noise_scale"]["value"] is None
    assert summary["tr_sigma_shares"] == {}


def test_ctrl_c_keeps_what_was_measured(demo, tmp_path, monkeypatch):
    draw, drawn = tasks.digits().draw, []

    def interrupted(size, generator):
        drawn.append(size)
        if len(drawn) == 15:
            raise KeyboardInterrupt
        return draw(size, generator)

    made = tasks.digits()
    object.__setattr__(made, "draw", interrupted)
    monkeypatch.setattr(tasks, "make", lambda _: made)
    code, out, _ = demo("--task", "digits", "--batch-size", "8", "--json")
    assert code == 130
    rows, summary = check_files(tmp_path / "run", 14, 8)
    assert summary["interrupted"] is True
    assert json.loads(out) == summary
    assert rows[-1]["noise_scale"]
    assert summary["recommendation"] is not None
    assert "forward" not in made.model.__dict__  # the monitor was detached


@pytest.mark.parametrize("at", [1, 10])
def test_ctrl_c_while_it_reports(demo, tmp_path, monkeypatch, at):
    def interrupted(_, reached):
        if reached.step == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "__call__", interrupted)
    code, _, _ = demo("--task", "digits", "--batch-size", "8")
    assert code == 130
    check_files(tmp_path / "run", at, 8)


def test_ctrl_c_before_the_first_step(demo, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "loss_of", interrupted)
    code, out, _ = demo("--task", "digits", "--json")
    assert code == 130
    assert json.loads(out)["recommendation"] is None
    check_files(tmp_path / "run", 0, 64)


def test_ctrl_c_while_timing_leaves_a_recommendation(demo, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "time_steps", interrupted)
    code, out, _ = demo("--task", "digits", "--steps", "12", "--json")
    assert code == 130
    assert json.loads(out)["recommendation"] is not None
    check_files(tmp_path / "run", 12, 64)


def test_timing_disturbs_nothing(monkeypatch):
    monkeypatch.setattr(train, "TIMED_STEPS", 1)
    torch.manual_seed(0)
    task = tasks.digits()
    tasks.loss_of(task.model, task.draw(4, torch.Generator())).backward()
    task.optimizer.step()
    before = [p.detach().clone() for p in task.model.parameters()]
    momentum = [s["momentum_buffer"].clone() for s in task.optimizer.state.values()]
    drawn = torch.get_rng_state()
    timing = train.time_steps(task, 6)
    assert [point.micro_batch_size for point in timing.points] == [1, 3, 6, 12, 24]
    assert all(point.seconds > 0 for point in timing.points)
    assert all(map(torch.equal, before, task.model.parameters()))
    after = [s["momentum_buffer"] for s in task.optimizer.state.values()]
    assert all(map(torch.equal, momentum, after))
    assert torch.equal(drawn, torch.get_rng_state())


def test_the_picture_takes_readings_without_ends(tmp_path):
    ends = [
        (math.nan, 0.0, math.inf),
        (3.0, 0.0, math.inf),
        (math.inf, 2.0, math.inf),
        (5.0, 2.0, 9.0),
    ]
    rows = []
    for step, (value, low, high) in enumerate(ends, 1):
        reading = {"noise_scale": value, "noise_scale_low": low, "noise_scale_high": high}
        rows.append({"step": step, "samples": 8 * step, "loss": 1.0, **reading})
    picture.draw(rows, 8, "title", "images", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
