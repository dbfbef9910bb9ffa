"""`gradstats sweep`: what it prints, what it writes, how it exits."""

from __future__ import annotations

import json

import pytest

from gradstats.workbench import saved

QUICK = ["--looks", "4", "--precision", "0.5", "--threads", "1"]


@pytest.fixture
def run(command_line):
    return lambda *args: command_line("sweep", *args, *QUICK)


def test_what_it_says_and_writes(run, tmp_path) -> None:
    out, picture = tmp_path / "s.json", tmp_path / "s.png"
    args = ["workloads:dropout", "--plans", "16x8,32x4,64x2", "--seeds", "2", "--out", str(out)]
    code, text, err = run(*args, "--sharpness", "--picture", str(picture))
    assert code == 0, err
    for words in (
        "top eigenvalue",
        "By samples, after 128 samples each:",
        "By steps, after 2 steps each:",
        "By time, after",
        "Variance of the mean gradient, at the weights of 16x8 after 4 steps",
        "Steps to a validation loss of",
        "Note: all plans ran at one learning rate",
    ):
        assert words in " ".join(text.split())
    assert "0 of 6 trials, 16x8-seed0 validation loss" in err
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = saved.read(out, "sweep")
    assert [row["plan"] for row in found["summary"]] == ["16x8", "32x4", "64x2"]
    assert len(found["steps_to_target"]["points"]) == 3
    code, text, _ = run(*args, "--sharpness", "--json")  # from what is kept
    again = json.loads(text)
    assert code == 0
    assert again["trials"] == found["trials"]
    code, text, err = run(*args, "--learning-rate", "0.5", "--sharpness")
    assert (code, text, err.count("\n")) == (2, "", 1)
    assert "holds a sweep with other settings (learning_rate was 0.02 and is 0.5)" in err


def test_trials_that_diverge_exit_with_one(run, tmp_path) -> None:
    args = [
        "workloads:diverges",
        "--plans",
        "16x8",
        "--seeds",
        "1",
        "--out",
        str(tmp_path / "s.json"),
    ]
    code, text, _ = run(*args)
    assert code == 1
    assert "16x8 from seed 0 is left out: it diverged" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["workloads:absent", "--plans", "16x8"], "'absent' in module 'workloads' is not there"),
        (["workloads:no_scalar", "--plans", "16x8"], "it must give the mean loss, a scalar"),
        (["workloads:dropout", "--plans", "16"], "'16' is no plan"),
        (["workloads:dropout", "--plans", "16x8", "--jobs", "0"], "jobs=0 must be at least 1"),
        (["workloads:dropout", "--plans", "16x8", "--subspace", "3"], "belongs to --sharpness"),
        (
            ["workloads:dropout", "--plans", "16x8", "--picture", "x.doc"],
            "no picture can be written as",
        ),
    ],
)
def test_what_cannot_be_used_exits_with_two(run, tmp_path, args, message) -> None:
    code, out, err = run(*args, "--out", str(tmp_path / "s.json"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_folder_is_no_result_file(run, tmp_path) -> None:
    code, out, err = run("workloads:dropout", "--plans", "16x8", "--out", str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is a folder; name a file" in err
