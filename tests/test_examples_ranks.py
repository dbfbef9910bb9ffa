"""examples/ddp.py and examples/fsdp.py with two processes, against one process with the whole batch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from integration_tools import require_same, rows_of
from torch import nn

import gradstats
from gradstats.loggers import read_lines

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]


def torchrun(script: str, *args: str) -> str:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [*command, str(ROOT / "examples" / script), *args],
        capture_output=True, text=True, cwd=ROOT, env=env, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_ddp(tmp_path, monkeypatch, capsys) -> None:
    """The same numbers as of one process, whose micro-batches are the ranks', until the batch size grows:

    to a multiple of 32 with two, of 16 with one.
    """
    said = torchrun("ddp.py", "--out", str(tmp_path / "two"), "--epochs", "2")
    monkeypatch.syspath_prepend(ROOT)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["ddp.py", "--out", str(tmp_path / "one"), "--epochs", "2"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from examples import ddp

    ddp.main()
    rows, spoilt = read_lines(tmp_path / "two" / "steps.jsonl")
    wanted, _ = read_lines(tmp_path / "one" / "steps.jsonl")
    assert spoilt == 0
    changed = int(re.match(r"step (\d+): \d+ samples a step\n", said)[1])
    assert capsys.readouterr().out.startswith(f"step {changed}: ")
    assert rows[-1]["batch_size"] % 32 == 0
    rows, wanted = ([r for r in part if r["step"] <= changed] for part in (rows, wanted))
    for row in (*rows, *wanted):
        del row["loss"]  # of the rank's last micro-batch, which are others
    require_same(rows, wanted, 1e-4)
    kept = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    assert len(kept) == 6
    with gradstats.attach(ddp_network()) as monitor:
        monitor.load_state_dict(kept[2])
        assert f"{monitor.noise_scale()}\n" == said.splitlines(keepends=True)[-1]


def ddp_network():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))


def test_fsdp(tmp_path, monkeypatch) -> None:
    said = torchrun("fsdp.py", "--out", str(tmp_path), "--steps", "20")
    monkeypatch.syspath_prepend(ROOT)
    from examples import fsdp

    torch.manual_seed(0)
    model = fsdp.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    monitor, wanted = gradstats.attach(model, optimizer=optimizer), []
    log = gradstats.Log(monitor, rows_of(wanted), every=10)
    ranks = [torch.Generator().manual_seed(rank) for rank in range(2)]
    for _ in range(20):
        parts = [fsdp.batch(16, rank) for rank in ranks]
        x, y = (torch.cat(both) for both in zip(*parts, strict=True))
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        stats = monitor.step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.step(stats)
    rows, spoilt = read_lines(tmp_path / "steps.jsonl")
    assert spoilt == 0
    for row in rows:
        del row["loss"]
    require_same(rows, wanted, 1e-3)
    assert rows[-1]["coverage"] == 1.0
    state = {"monitor": monitor.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
    monitor.load_state_dict(state["monitor"])
    assert str(monitor.noise_scale()) == said.splitlines()[0]
