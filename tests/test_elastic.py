"""Ranks that die under torchrun and are started again do what undisturbed ones do, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

SCRIPT = Path(__file__).with_name("elastic_training.py")
WORLD = 2


def test_a_rank_that_dies_resumes_the_same_decisions(tmp_path):
    for name in ("disturbed", "whole"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORLD)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "2"]
    # Else ranks that come back may find addresses of those before in torchrun's own store
    # (pytorch/pytorch issue 135712).
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = subprocess.run(
        [*command, "--monitor-interval", "0.2", str(SCRIPT), str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]

    def log(name: str, rank: int) -> list[dict]:
        return [json.loads(x) for x in (tmp_path / name / f"log{rank}").read_text().splitlines()]

    decisions = []
    for rank in range(WORLD):
        assert (tmp_path / f"restarts{rank}").read_text() == "2"  # both deaths came about
        whole, found = log("whole", rank), log("disturbed", rank)
        expected = {seen["step"]: seen for seen in whole}
        assert sorted(expected) == list(range(1, len(whole) + 1))
        for seen in found:
            assert seen == expected[seen["step"]]
        assert {seen["step"] for seen in found} == set(expected)
        assert len(found) > len(whole)  # some were done again, from the checkpoint
        decisions.append([(s["batch_size"], s["rates"], s["noise"], s["weights"]) for s in whole])
    assert len({size for size, *_ in decisions[0]}) > 1
    assert decisions[0] == decisions[1]  # though the ranks saw different noise scales
    taken = [
        i
        for steps in zip(log("whole", 0), log("whole", 1), strict=True)
        for s in steps
        for i in s["samples"]
    ]
    assert len(taken) > 101
    assert sorted(taken[:101]) == list(range(101))  # an epoch with an uneven end, each sample once
