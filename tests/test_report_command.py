"""`gradstats report`."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import report_files as files


@pytest.fixture
def run(command_line):
    return partial(command_line, "report")


def test_command(run, tmp_path) -> None:
    path, out = files.log(tmp_path / "run.jsonl"), tmp_path / "new" / "report.html"
    code, said, err = run(path, "--out", out, "--title", "My run")
    assert (code, err) == (0, "")
    assert "Change the batch size from 32" in said
    assert f"Written: {out}" in said
    assert "<title>gradstats report: My run</title>" in out.read_text()
    code, said, err = run(path, "--out", out, "--json")
    found = json.loads(said)
    assert (code, err) == (0, "")
    assert found["verdict"]["level"] == "good"
    assert found["bytes"] == out.stat().st_size
    assert found["sections"][0]["figures"][0] == "Noise scale over training"


def test_command_with_bad_input(run, tmp_path, monkeypatch) -> None:
    path = files.log(tmp_path / "run.jsonl")
    before = path.read_text()
    half = files.result(tmp_path, "sweep")
    half.write_text(half.read_text()[:400])
    out = tmp_path / "r.html"
    for args, message in (
        ((path, half, "--out", out), "sweep.json is not JSON from line"),
        ((tmp_path / "absent.jsonl", "--out", out), "absent.jsonl cannot be read (No such file"),
        ((path, "--out", path), "is one of the files that are read"),
        ((path, "--out", tmp_path), "cannot be written (it is a folder)"),
        ((path, "--out", path / "x.html"), "cannot be written (no file can be made in"),
        ((path, "--out", "."), "it is a folder"),
    ):
        code, said, err = run(*args)
        assert (code, said, err.count("\n")) == (2, "", 1), err
        assert message in err
    assert path.read_text() == before
    assert not out.exists()
    out.write_text("before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, _, err = run(path, "--out", out)
    assert (code, out.read_text()) == (2, "before")
    assert "cannot be written (No space left on device)" in err
    assert {p.name for p in tmp_path.iterdir()} == {"run.jsonl", "sweep.json", "r.html"}


def test_command_interrupted(run, tmp_path, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    path, out = files.log(tmp_path / "run.jsonl"), tmp_path / "r.html"
    monkeypatch.setattr("os.fsync", interrupted)
    code, _, err = run(path, "--out", out)
    assert (code, err) == (130, "interrupted\n")
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]


def test_command_says_how_far_it_is_with_much_to_read(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gradstats.commands.report.LARGE", 1e3)
    path, out = files.log(tmp_path / "run.jsonl"), tmp_path / "r.html"
    code, said, err = run(path, "--out", out, "--json")
    assert code == 0
    assert err == f"report: 0%, reading {path}\n"
    assert json.loads(said)["out"] == str(out)


def test_command_without_jinja2(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, _, err = run(files.log(tmp_path / "run.jsonl"), "--out", tmp_path / "r.html")
    assert code == 1
    assert "run `pip install 'gradstats[report]'`" in err
