"""A training that is killed at random times and resumed goes on bit by bit as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_training.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trainings are forked")
@pytest.mark.parametrize(("kills", "workers"), [(20, 0), (5, 1)])
def test_killed_trainings_do_what_an_undisturbed_one_does(tmp_path, kills, workers):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(kills), str(workers)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kills"] == kills
    assert len(result["batch_sizes"]) > 1  # decisions were made, and all of them again
