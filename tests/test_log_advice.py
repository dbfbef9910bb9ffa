"""A log read back says what its monitor said: the same noise scale, the same advice, in every command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gradstats
from gradstats.demo import train as demo
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale
from gradstats.loggers import About, JsonLines, read_log
from gradstats.step_time import fit_step_time
from gradstats.workbench import advise, report
from gradstats.workbench.measure import measure
from gradstats.workbench.report.advice_of import basis_of_run, runs_of
from gradstats.workbench.watch import Follower, state_of
from gradstats.workbench.workload import load

pytestmark = pytest.mark.usefixtures("one_thread")
NOISE = NoiseScale(400.0, 280.0, 640.0, 0.8, 9600, 300, 5, 8.0, 0.02)
# Steps that take nearly as long as their samples: small batches are soonest.
TIMING = fit_step_time({(m, k): [1e-3 * (1 + m * k)] for m in (16, 64) for k in (1, 2)})


def said(path):
    """The advice in each command's words: (batch size, low, high, learning rate)."""
    follower = Follower(path)
    follower.read()
    watched = state_of(follower.rows, about=follower.about).advice
    (basis,) = [basis_of_run(run, None) for run in runs_of(report.read([path]))]
    evidence = advise.gather([path])
    plan = advise.advise(evidence)
    found = [
        tuple(each[key] for key in ("batch_size", "low", "high", "learning_rate"))
        for each in (watched, basis.advice, plan.advice.to_dict())
    ]
    assert (plan.plan.batch_size, plan.plan.learning_rate) == (found[0][0], found[0][3])
    return found


def monitor_of(noise, optimizer="AdamW", sample="example", world_size=1):
    optimizer = type(optimizer, (), {"param_groups": [{"lr": 0.01}]})()
    return SimpleNamespace(
        noise_scale=lambda: noise, optimizer=optimizer, sample=sample, world_size=world_size
    )


def written(path, noise, *, size=32, timing=None, tokens=None, **of):
    """A log of a step of `size`."""
    log = gradstats.Log(monitor_of(noise, **of), JsonLines(path))
    log.step(SimpleNamespace(samples=size, layer_tr_sigma=None), loss=1.0)
    if timing is not None:
        log.timed(timing, tokens_per_sample=tokens)
    log.close()
    return path


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("timing", [None, TIMING])
def test_every_command_says_what_recommend_says(tmp_path, timing, ranks, optimizer) -> None:
    timing = timing and replace(timing, world_size=ranks)
    advice = gradstats.recommend(
        NOISE, batch_size=48, learning_rate=0.01, optimizer=optimizer, step_seconds=timing,
        world_size=ranks,
    )  # fmt: skip
    about = {"optimizer": optimizer, "world_size": ranks}
    path = written(tmp_path / "a.jsonl", NOISE, size=48, timing=timing, **about)
    wanted = advice.batch_size, advice.low, advice.high, advice.learning_rate
    assert said(path) == 3 * [wanted]
    assert read_log(path).recommend() == advice
    assert str(read_log(path).noise_scale()) == str(NOISE)


def test_a_log_tells_on_how_many_processes_it_rests(tmp_path) -> None:
    path = written(tmp_path / "a.jsonl", NOISE, size=100, timing=TIMING)
    assert (read_log(path).world_size, read_log(path).timing) == (1, TIMING)
    # Resumed on three processes, of whose steps the times of one say nothing.
    log = gradstats.Log(monitor_of(NOISE, world_size=3), JsonLines(path, resume=True))
    log.step(SimpleNamespace(samples=100, layer_tr_sigma=None), loss=1.0)
    with pytest.raises(
        InvalidArgumentError, match=r"timing\.world_size=1 cannot be used; .* the 3"
    ):
        log.timed(TIMING)
    log.close()
    log, alone = read_log(path), gradstats.recommend(NOISE, batch_size=102, world_size=3)
    assert (log.world_size, log.batch_size) == (3, 102)  # the next that gives each as many
    assert (log.about.timing, log.timing) == (TIMING, None)
    advice = log.recommend()
    assert (advice.batch_size, advice.low) == (alone.batch_size, alone.low)
    assert (advice.world_size, advice.present.world_size) == (3, 3)
    plan = advise.advise(advise.gather([path])).plan
    assert (plan.batch_size, plan.world_size) == (alone.batch_size, 3)
    assert advise.advise(advise.gather([path]), ranks=2).plan.world_size == 2
    old = tmp_path / "old.jsonl"  # of a version that did not say
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.get("about", {}).pop("world_size", None)
    old.write_text("\n".join(map(json.dumps, lines)))
    assert (read_log(old).world_size, read_log(old).timing) == (1, TIMING)


def test_step_times_weigh() -> None:
    plain, timed = (
        gradstats.recommend(NOISE, batch_size=48, step_seconds=t).batch_size for t in (None, TIMING)
    )
    assert timed < plain


def test_the_demo_and_its_log_agree(tmp_path, monkeypatch, command_line) -> None:
    monkeypatch.setattr(demo, "TIMED_STEPS", 1)
    code, _, _ = command_line("demo", "--task", "digits", "--steps", 60, "--out", tmp_path)
    assert code == 0
    advice = json.loads((tmp_path / "summary.json").read_text())["recommendation"]
    keys = ("batch_size", "low", "high", "learning_rate")
    assert said(tmp_path / "steps.jsonl") == 3 * [tuple(advice[key] for key in keys)]
    assert advice["curve"][0]["seconds"] > 0
    assert read_log(tmp_path / "steps.jsonl").recommend().reason == advice["reason"]


@pytest.mark.parametrize("every", [1, 3])
def test_a_measurement_and_its_log_agree(tmp_path, every) -> None:
    path = tmp_path / "log.jsonl"
    found = measure(
        load("examples.digits:training"),
        steps=31,
        every=every,
        overhead=False,
        sinks=[JsonLines(path)],
    )
    log = read_log(path)
    assert log.noise_scale() == found.noise
    assert log.recommend() == found.advice
    assert log.about.timing == found.timing


def test_tokens_are_brought_to_samples(tmp_path) -> None:
    path = written(
        tmp_path / "a.jsonl", NOISE, size=320, timing=TIMING, tokens=10.0, sample="token"
    )
    advice = gradstats.recommend(
        NOISE, batch_size=320, learning_rate=0.01, optimizer="AdamW", step_seconds=TIMING,
        tokens_per_sample=10.0,
    )  # fmt: skip
    assert said(path)[0][:3] == (advice.batch_size, advice.low, advice.high)
    assert len(set(said(path))) == 1
    with pytest.raises(InvalidArgumentError, match="pass tokens_per_sample="):
        gradstats.Log(monitor_of(NOISE, sample="token")).timed(TIMING)


def test_a_proxy_without_calibration_is_none_in_its_log(tmp_path) -> None:
    path = written(tmp_path / "a.jsonl", replace(NOISE, method="norm_layers"))
    assert not read_log(path).noise_scale().actionable
    known = replace(NOISE, method="norm_layers", calibration=1.5, note="and so on")
    assert read_log(written(tmp_path / "b.jsonl", known)).noise_scale() == known


def test_a_log_of_rows_alone_is_read(tmp_path) -> None:
    path = written(tmp_path / "a.jsonl", replace(NOISE, confidence=0.9))
    rows = [line for line in path.read_text().splitlines() if "about" not in line]
    old = tmp_path / "old.jsonl"
    old.write_text("\n".join(rows) + "\n")
    assert read_log(old).about == About()
    assert read_log(old).noise_scale() == read_log(path).noise_scale()
    advice = gradstats.recommend(NOISE, batch_size=32)
    assert said(old) == 3 * [(advice.batch_size, advice.low, advice.high, None)]


def test_a_batch_size_that_is_none_advises_nothing(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    for size in ("0", "1e300", "null", '"many"'):
        path.write_text(f'{{"step": 1, "noise_scale": 4.0, "batch_size": {size}}}\n')
        assert read_log(path).recommend() is None, size


def test_what_was_timed_outlasts_a_resumed_run(tmp_path) -> None:
    path = written(tmp_path / "a.jsonl", NOISE, timing=TIMING)
    log = gradstats.Log(monitor_of(NOISE), JsonLines(path, resume=True))
    log.load_state_dict({"steps": 1, "samples": 32, "seconds": 1.0})
    log.step(SimpleNamespace(samples=32, layer_tr_sigma=None), loss=1.0)
    log.close()
    assert read_log(path).about.timing == TIMING
    assert read_log(path).spoilt == 0


POINT = '{"micro_batch_size": 1, "accumulation_steps": 1, "seconds": 1, "low": 1, "high": 1}'
EMPTY = '"update": 0, "launch": 0, "per_sample": %s, "covariance": [], "misfit": 0, "points": [%s]'


@pytest.mark.parametrize(
    "about",
    [
        '{"timing": {}}',
        '{"timing": 3}',
        '{"confidence": "x"}',
        '{"world_size": 0}',
        '{"world_size": 2.0}',
        '{"timing": {"points": [{}]}}',
        f'{{"timing": {{{EMPTY % (1, "")}}}}}',
        f'{{"timing": {{{EMPTY % (0, POINT)}}}}}',
        f'{{"timing": {{{EMPTY % (chr(34) * 2, POINT)}}}}}',
    ],
)
def test_a_spoilt_line_about_the_rows_is_passed_over(tmp_path, about) -> None:
    path = written(tmp_path / "a.jsonl", NOISE, timing=TIMING)
    with path.open("a") as file:
        file.write(f'{{"about": {about}}}\n')
    log = read_log(path)
    assert (log.spoilt, log.about.timing) == (1, TIMING)


def test_the_noise_scale_of_a_real_run(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    log_file = tmp_path / "a.jsonl"
    with gradstats.attach(model, optimizer=optimizer, every=2, confidence=0.7) as monitor:
        log = gradstats.Log(monitor, JsonLines(log_file), every=5)
        for _ in range(41):
            x = torch.randn(16, 4)
            loss = (model(x) - x[:, :2] - torch.randn(16, 2)).square().mean()
            loss.backward()
            stats = monitor.step()
            optimizer.step()
            optimizer.zero_grad()
            log.step(stats, loss=loss)
        log.close()
    assert read_log(log_file).noise_scale() == monitor.noise_scale()
    assert monitor.noise_scale().num_steps < 41
    assert read_log(log_file).recommend() == monitor.recommend()
    assert math.isfinite(monitor.noise_scale().value)


# ---- sinks that fail -----------------------------------------------------------------------------


class Broken:
    """A tracker whose server is away for a while."""

    def __init__(self, error: BaseException, until: int = 3) -> None:
        self.error, self.until, self.rows = error, until, []

    def __call__(self, row, step):
        if step < self.until:
            raise self.error
        self.rows.append(step)

    def close(self):
        raise ConnectionError("gone again")


def steps(log, count):
    for _ in range(count):
        log.step(SimpleNamespace(samples=32, layer_tr_sigma=None), loss=1.0)


def test_a_sink_that_fails_ends_no_training(recwarn) -> None:
    kept = []
    broken = Broken(ConnectionError("no route to host"))
    log = gradstats.Log(monitor_of(NOISE), broken, lambda row, step: kept.append(step), every=1)
    steps(log, 4)
    log.close()
    assert (kept, broken.rows) == ([1, 2, 3, 4], [3, 4])
    (warning,) = [str(w.message) for w in recwarn]
    assert "the sink Broken failed at step 1 (ConnectionError: no route to host)" in warning
    assert "The training goes on" in warning


def test_a_sink_without_a_name_is_told_by_its_place() -> None:
    def named(row, step, why="gone"):
        raise ConnectionError(why)

    log = gradstats.Log(
        monitor_of(NOISE), named, lambda row, step: 1 / 0, partial(named, why="away"), every=1
    )
    with pytest.warns(UserWarning, match="failed at step 1") as told:
        steps(log, 1)
    said = [str(warning.message) for warning in told]
    assert "named failed at step 1 (ConnectionError: gone)" in said[0]
    assert "the sink log.sinks[1] failed at step 1 (ZeroDivisionError" in said[1]
    assert "the sink log.sinks[2] failed at step 1 (ConnectionError: away)" in said[2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_program_passes(error) -> None:
    log = gradstats.Log(monitor_of(NOISE), Broken(error()), every=1)
    with pytest.raises(error):
        steps(log, 1)
