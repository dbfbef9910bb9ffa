"""`gradstats watch`: a log that grows, breaks and begins anew; what it says; how it looks."""

from __future__ import annotations

import json
import math
import os
import time
from functools import partial

import pytest

from gradstats.commands import watch as command
from gradstats.errors import InvalidArgumentError
from gradstats.workbench.watch import Band, Follower, Line, chart, state_of

ROW = {
    "step": 10, "samples": 320, "seconds": 2.0, "batch_size": 32, "loss": 1.5, "learning_rate": 0.1,
    "noise_scale": 40.0, "noise_scale_low": 30.0, "noise_scale_high": 50.0, "num_skipped": 0,
    "coverage": 1.0, "layer_share/a.weight": 0.25, "layer_share/b.weight": 0.75,
}  # fmt: skip


def rows(*steps, **more):
    return [{**ROW, "step": s, "samples": 32 * s, "seconds": 0.2 * s, **more} for s in steps]


def text(found):
    return "".join(json.dumps(row) + "\n" for row in found)


# ---- following -----------------------------------------------------------------------------------


def test_a_line_is_read_once_it_is_whole(tmp_path):
    path = tmp_path / "run.jsonl"
    follower = Follower(path)
    assert follower.read() == 0
    assert (follower.exists, follower.age) == (False, None)
    whole = text(rows(1, 2, 3, loss=2.5)).encode()
    seen = []
    for size in range(0, len(whole) + 1, 7):  # as a writer's buffer may cut it
        path.write_bytes(whole[:size])
        follower.read()
        seen.append(len(follower.rows))
    path.write_bytes(whole)
    follower.read()
    assert [row["step"] for row in follower.rows] == [1, 2, 3]
    assert seen == sorted(seen)
    assert (follower.spoilt, follower.restarts) == (0, 0)
    assert follower.read() == 0


def test_spoilt_lines_are_counted_and_passed_over(tmp_path):
    path = tmp_path / "run.jsonl"
    spoilt = '{"step": 2, "lo\n\x00\xff\n[1]\n{"loss": 1}\n{"step": true}\n{"step": NaN}\n\n'
    path.write_bytes(text(rows(1)).encode() + spoilt.encode("latin-1") + text(rows(3)).encode())
    follower = Follower(path)
    assert follower.read() == 2
    assert [row["step"] for row in follower.rows] == [1, 3]
    assert follower.spoilt == 6


def test_a_file_that_is_emptied_or_replaced_is_read_anew(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(text(rows(1, 2, 3)))
    follower = Follower(path)
    follower.read()
    path.write_text(text(rows(7)))  # shorter
    follower.read()
    assert ([row["step"] for row in follower.rows], follower.restarts) == ([7], 1)
    other = tmp_path / "other.jsonl"
    other.write_text(text(rows(8, 9)))
    os.replace(other, path)  # longer, and another file
    follower.read()
    assert ([row["step"] for row in follower.rows], follower.restarts) == ([8, 9], 2)
    path.write_text(text(rows(4, 5, 6)))  # the same file, longer, with another beginning
    follower.read()
    assert ([row["step"] for row in follower.rows], follower.restarts) == ([4, 5, 6], 3)
    path.unlink()
    assert follower.read() == 0
    assert len(follower.rows) == 3
    assert not follower.exists


def test_a_resumed_training_writes_steps_again(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(text(rows(10, 20, 30)) + text(rows(20, 30, 40, loss=9.0)))
    follower = Follower(path)
    follower.read()
    assert [(row["step"], row["loss"]) for row in follower.rows] == [
        (10, 1.5), (20, 9.0), (30, 9.0), (40, 9.0),
    ]  # fmt: skip
    assert follower.resumed == 1


def test_a_folder_cannot_be_followed(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"cannot be read \(Is a directory\)"):
        Follower(tmp_path).read()


# ---- what it says --------------------------------------------------------------------------------


def test_state():
    state = state_of(rows(10, 20, 30), age=1.0)
    assert state.rows == 3
    assert state.last["step"] == 30
    assert state.samples_per_second == pytest.approx(160)
    assert list(state.layers.items()) == [("b.weight", 0.75), ("a.weight", 0.25)]
    assert state.warnings == {}
    assert state_of([]).warnings == {}


@pytest.mark.parametrize(
    ("changed", "options", "words"),
    [
        ({"noise_scale_high": 301.0}, {}, "too wide to act on"),
        ({"noise_scale_high": None}, {}, "too wide to act on"),
        ({"batch_size": 20}, {}, "the batch of 20 is below what the noise scale's interval advises, 32 to"),
        ({"batch_size": 64}, {}, "the batch of 64 is above what the noise scale's interval advises, 32 to"),
        ({"coverage": 0.5}, {}, "speaks for 50% of the trainable parameters only"),
        ({"num_skipped": 3}, {}, "3 steps left out of the noise scale"),
        ({"loss": None}, {}, "the training has diverged"),
        ({}, {"age": 45.0}, "no new row for 45 s (rows came every 2 s): the training has ended, or hangs"),
        ({}, {"spoilt": 1}, "1 line of the file hold no row"),
        ({}, {"restarts": 2}, "the file began anew 2 times"),
        ({}, {"resumed": 1}, "went back to an earlier step 1 time"),
    ],
)  # fmt: skip
def test_warnings(changed, options, words):
    (warning,) = state_of(rows(10, 20, 30, **changed), **options).warnings.values()
    assert words in warning


def test_a_slow_log_is_not_taken_for_a_stalled_one():
    slow = [{**ROW, "step": s, "seconds": 100.0 * s} for s in (1, 2, 3)]
    assert state_of(slow, age=400.0).warnings == {}
    assert "ended, or hangs" in state_of(slow, age=600.0).warnings["stalled"]


def test_a_log_without_noise_scales_is_told():
    warnings = state_of([{"step": 1, "loss": 2.0}]).warnings
    assert "this log holds no noise scale" in warnings["noise"]


# ---- charts --------------------------------------------------------------------------------------


def drawn(*args, **kwargs):
    return ["".join(letter for letter, _ in row) for row in chart(*args, **kwargs)]


def test_a_line_goes_where_its_points_are():
    found = drawn([Line([(0, 0.0), (9, 9.0)])], width=16, height=5, plain=True)
    body = [row.partition("|")[2] for row in found]
    assert [row.find("*") for row in body] == sorted((row.find("*") for row in body), reverse=True)
    assert body[0].rstrip().endswith("*")
    assert body[-1].startswith("*")
    assert all(len(row) == len(found[0]) <= 16 for row in found)
    dots = drawn([Line([(0, 0.0), (9, 9.0)])], width=16, height=5)
    assert any("⠀" < letter <= "⣿" for letter in dots[0])


def test_the_axis_may_be_logarithmic_and_passes_over_what_has_no_place():
    points = [(0, 1.0), (1, 10.0), (2, 100.0), (3, math.nan), (4, -1.0)]
    found = drawn([Line(points)], width=24, height=9, log=True, plain=True)
    assert float(found[4].split("|")[0]) == pytest.approx(10, rel=0.01)
    assert drawn([Line([(0, math.inf)])], width=24, height=9) == []
    assert len(drawn([Line([(5, 3.0)])], width=24, height=4)) == 4


def test_bands_are_held_until_the_next_point():
    line = Line([(0, 0.0), (10, 10.0)])
    found = drawn(
        [line], [Band([(0, 4.0, 6.0), (5, 0.0, math.inf)])], width=30, height=9, plain=True
    )
    body = [row.partition("|")[2] for row in found]
    half = len(body[0]) // 2
    assert "." not in body[0][: half - 1]
    assert set(body[4][: half - 3]) == {"."}
    assert {letter for row in body for letter in row[half + 1 :]} == {".", "*"}


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def run(command_line, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    return partial(command_line, "watch")


def test_one_view(run, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(text(rows(10, 20, 30, coverage=0.5)) + '{"step": 31, "lo')
    code, out, err = run(path, "--once")
    assert (code, err) == (0, "")
    for words in ("step 30", "noise scale 40", "30 to 50", "batch used 32", "160 samples/s", "75.0%",
                  "loss by samples", "50% of the trainable"):  # fmt: skip
        assert words in out
    assert "hold no row" not in out
    code, out, _ = run(path, "--json")
    found = json.loads(out)
    assert (code, found["rows"], found["last"]["step"], found["spoilt"]) == (0, 3, 30, 0)


def test_nothing_to_see(run, tmp_path):
    path = tmp_path / "run.jsonl"
    code, out, err = run(path, "--once")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is not there; name another, or --wait" in err
    path.write_text("")
    assert run(path, "--once")[0] == 1
    assert run(path, "--json")[0] == 1
    code, _, err = run(path, "--interval", "0")
    assert (code, "--interval 0.0 must be above 0" in err) == (2, True)


def test_it_waits_and_prints_rows_as_they_come(run, tmp_path, monkeypatch):
    path, looks = tmp_path / "run.jsonl", []

    def sleep(seconds):
        assert seconds == 0.25
        looks.append(1)
        if len(looks) == 2:
            path.write_text(text(rows(10)))
        if len(looks) == 4:
            with path.open("a") as file:
                file.write(text(rows(20, 30, noise_scale_high=None)))
        if len(looks) == 6:
            path.write_text(text(rows(1)))
        if len(looks) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", sleep)
    code, out, err = run(path, "--wait", "--interval", "0.25")
    assert (code, err) == (130, "interrupted\n")
    lines = out.splitlines()
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    assert steps == ["10", "20", "30", "1"]
    assert "noise scale 40 (30 up)" in lines[1]
    assert sum("too wide" in line for line in lines) == 1
    assert sum("began anew" in line for line in lines) == 1


def test_a_live_view_is_left_on_the_screen(monkeypatch, tmp_path):
    from rich.console import Console

    path = tmp_path / "run.jsonl"
    path.write_text(text(rows(10, 20)))
    console = Console(force_terminal=True, width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    monkeypatch.setattr("gradstats.terminal.console_and_table", lambda: (console, None))
    follower, looks = Follower(path), []
    follower.read()

    def sleep(_):
        looks.append(1)
        if len(looks) == 2:
            raise KeyboardInterrupt
        with path.open("a") as file:
            file.write(text(rows(30)))

    monkeypatch.setattr(command.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        command._follow(follower, 1.0)
    assert "step 30" in console.export_text()


def test_the_age_is_that_of_the_file(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(text(rows(10)))
    then = time.time() - 500
    os.utime(path, (then, then))
    follower = Follower(path)
    follower.read()
    assert follower.age == pytest.approx(500, abs=5)
