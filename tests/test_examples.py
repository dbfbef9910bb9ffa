"""The scripts of examples/, run as a user would."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gradstats.loggers import read_lines

EXAMPLES = Path(__file__).parent.parent / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch, capsys, one_thread) -> Run:
    """What a script prints, in this process: importing torch anew takes longer than the scripts."""

    def run(name: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    monkeypatch.syspath_prepend(EXAMPLES)
    return run


def test_a_stopped_training_goes_on_bit_for_bit(run: Run, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = ("--epochs", 1, "--max-batch-size", 64)
    uninterrupted = run("adaptive_batch.py", *settings, "--folder", whole).splitlines()
    assert any(line.startswith("step 40: batch size 16 to ") for line in uninterrupted)
    first = run("adaptive_batch.py", *settings, "--folder", parts, "--stop-after", 60)
    second = run("adaptive_batch.py", *settings, "--folder", parts, "--resume")
    assert "goes on after step 60, at batch size " in second
    assert second.splitlines()[-3:] == uninterrupted[-3:]  # steps, noise scale, held-out loss
    assert first.splitlines()[-1] != uninterrupted[-1]
    logs = [read_lines(folder / "steps.jsonl") for folder in (whole, parts)]
    kept = [[(r["step"], r["batch_size"], r["loss"]) for r in rows] for rows, _ in logs]
    assert kept[0] == kept[1]
    assert [spoilt for _, spoilt in logs] == [0, 0]


def test_adapters_alone_are_measured(run: Run) -> None:
    out = run("lora.py", "--pretraining-steps", 20, "--steps", 15)
    assert "adapters of rank 4, 8,192 of 127,872 parameters" in out
    assert out.count("noise scale ") >= 3
    losses = [line.split("loss ")[1].split(" to ") for line in out.splitlines() if "loss " in line]
    assert len(losses) == 3
    assert all(float(last) < float(first) for first, last in losses[:2])


def test_two_plans(run: Run, tmp_path: Path) -> None:
    plans = ("--first", "16x80", "--second", "64x20", "--warm-up", 60)
    out = run("compare_plans.py", *plans, "--folder", tmp_path)
    assert "80 steps of 16 (1,280 samples) get " in out
    assert "× as far per second" in out
    for name, batch in (("first", 16), ("second", 64)):
        rows, _ = read_lines(tmp_path / f"{name}.jsonl")
        assert rows[-1]["samples"] == 1280
        assert {row["batch_size"] for row in rows} == {batch}
        assert f"  {batch} × {1280 // batch} at rate {rows[0]['learning_rate']:.3g}: loss " in out
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "first.jsonl" in page
    assert "second.jsonl" in page


def test_a_plan_that_is_none_is_refused(run: Run, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        run("compare_plans.py", "--first", "fast")
    assert exit_.value.code == 2
    assert "'fast' is not of the form BATCHxSTEPS" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["adaptive_batch.py", "compare_plans.py", "lora.py"])
def test_scripts_explain_themselves(run: Run, capsys, script: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(script, "--help")
    assert exit_.value.code == 0
    assert "--seed" in capsys.readouterr().out
