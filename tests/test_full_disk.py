"""Where a result cannot be written: it has been shown, one line says so, and nothing else is replaced."""

from __future__ import annotations

import json
import os
import stat
import threading
import warnings
from pathlib import Path

import pytest
import report_files as files
from simulated_memory import Machine

from gradstats.demo import train as demo
from gradstats.errors import InvalidArgumentError
from gradstats.workbench import saved
from gradstats.workbench.vram import search

FULL = Path("/dev/full")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not FULL.is_char_device(), reason="no device here that is always full"),
]
SHORT = {
    "measure": ("workloads:dataset", "--steps", 4, "--no-timing", "--no-overhead"),
    "lr-range": ("workloads:dataset", "--batch-sizes", 32, "--steps", 2, "--loss-samples", 64),
    "vram": ("somewhere:training",),
    "bench": ("--ops", "group_norm", "--models", "none", "--rounds", 1, "--quick", "--threads", 1),
    "advise": (),
}


@pytest.mark.parametrize("command", SHORT)
def test_the_result_is_shown_before_it_is_written(
    command_line, tmp_path, monkeypatch, command
) -> None:
    monkeypatch.setattr(search, "try_sizes", Machine(lambda size, fresh: 300 + size, budget=1000))
    given = (files.result(tmp_path, "measure"),) if command == "advise" else SHORT[command]
    code, said, err = command_line(command, *given, "--out", FULL, "--json")
    assert (code, isinstance(json.loads(said), dict)) == (2, True)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line == (
        f"error: {FULL} cannot be written (No space left on device); name another file, or make room"
    )
    assert FULL.is_char_device()


def test_a_demo_whose_folder_fills_up(command_line, tmp_path, monkeypatch) -> None:
    def full(path, text):
        raise InvalidArgumentError(f"{path} cannot be written (No space left on device)")

    monkeypatch.setattr(saved, "write_text", full)
    monkeypatch.setattr(demo, "TIMED_STEPS", 1)
    code, said, err = command_line("demo", "--task", "digits", "--steps", 4, "--out", tmp_path)
    assert code == 2
    assert "Recommendation" in said
    assert "Written" not in said
    assert (
        err == f"error: {tmp_path / 'summary.json'} cannot be written (No space left on device)\n"
    )


def test_a_log_that_was_lost_is_not_named_as_written(command_line) -> None:
    with pytest.warns(UserWarning, match="takes no more rows since step 1 .No space left") as told:
        code, said, _ = command_line("measure", *SHORT["measure"], "--log", FULL)
    assert code == 0
    assert "Written" not in said
    (own,) = [each for each in told if "takes no more rows" in str(each.message)]
    assert warnings.formatwarning(own.message, own.category, own.filename, own.lineno) == (
        f"warning: {FULL} takes no more rows since step 1 (No space left on device); the training goes on\n"
    )
    assert "user.py:3: UserWarning: x" in warnings.formatwarning("x", UserWarning, "user.py", 3)


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    saved.require_writable(pipe)
    saved.write_text(pipe, "all of it\n")
    reader.join(10)
    assert read == ["all of it\n"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]
