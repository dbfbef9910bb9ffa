"""Several processes that train together: every rank finds what one process with all samples would.

The ranks run `ranks.py`, all cases in one start for each number of ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gradstats

if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from ranks import CASES

RANKS = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """By number of ranks: what each rank wrote. Started when first asked for."""
    kept: dict[int, list[dict]] = {}

    def of(world: int) -> list[dict]:
        if world not in kept:
            place = tmp_path_factory.mktemp(f"ranks{world}")
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            runs = []
            for rank in range(world):
                command = [sys.executable, str(RANKS), str(rank), str(world), str(place)]
                with (place / f"{rank}.log").open("w") as log:
                    runs.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))
            try:
                for rank, run in enumerate(runs):
                    assert run.wait(timeout=900) == 0, (place / f"{rank}.log").read_text()[-2000:]
            finally:
                for run in runs:
                    run.kill()
            kept[world] = [json.loads((place / f"{r}.json").read_text()) for r in range(world)]
        return kept[world]

    return of


EVERY = [(w, name) for w in (2, 4) for name, (wanted, _) in CASES.items() if wanted in (0, w)]


@pytest.mark.parametrize(("world", "name"), EVERY)
def test_ranks(results, world: int, name: str) -> None:
    for rank, found in enumerate(results(world)):
        assert "error" not in found[name], f"rank {rank}: {found[name].get('error')}"


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_of_a_step(results, world: int) -> None:
    for found in results(world):
        sent = found["one_collective_of_a_few_numbers_per_parameter"]["figures"]
        params = sent["parameters"]
        assert sent["bytes"]["moments=False"] == [24 * params + 16]
        assert sent["bytes"]["moments=True"][0] == 24 * params + 16
        assert len(sent["bytes"]["moments=True"]) == 2


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("tensor parallel", ["'0.weight'", "tensor or sequence", "fully_shard"]),
        ("tensor parallel later", ["'0.weight'", "do not add", "measure on one device"]),
        ("unlike models", ["2 processes", "different models", "process_group="]),
        ("fsdp1", ["FullyShardedDataParallel", "fully_shard"]),
        ("ddp", ["[0, 1]", "Leave process_group out"]),
        ("divisor", ["divides its gradients by 1.0", "2 ranks", "Scale the loss"]),
        ("shards", ["sharded over several processes", "process_group="]),
    ],
)
def test_what_is_refused_says_why(results, what: str, words: list[str]) -> None:
    for found in results(2):
        text = found["refusals"]["figures"][what]
        assert all(word in text for word in words), text


def test_a_hook_that_is_not_known_to_give_the_mean_is_refused(results) -> None:
    for found in results(2):
        text = found["ddp_communication_hooks"]["figures"]["text"]
        assert "communication hook '_scaled'" in text
        assert "not known to be the mean" in text
        assert "fp16_compress_hook" in text


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("not wrapped", ["the model is a Sequential", "attach to the wrapper"]),
        ("micro_batch", ["is for one process", 'method="ranks"']),
        ("unlike", ["2 processes", "different arguments"]),
        ("no backward", ["found no backward pass", "on every rank"]),
        ("averaged twice", ["more than one backward of a step", "no_sync()"]),
        ("not averaged", ["not the mean over the ranks"]),
        ("unequal", ["ranks' batches of unequal size", "(3, 4 samples)", 'weighting="parts"']),
    ],
)
def test_comparing_ranks_refuses_misuse(results, what: str, words: list[str]) -> None:
    for found in results(2):
        text = found["ranks_misused"]["figures"][what]
        assert all(word in text for word in words), text


def test_a_rank_that_clipped_too_early_tells_the_others(results) -> None:
    texts = [found["ranks_misused"]["figures"]["clipped"] for found in results(2)]
    assert "was changed, replaced or cleared between backward and monitor.step()" in texts[0]
    assert "raised an error on another rank (1 of 2)" in texts[1]


def test_a_group_without_processes_is_refused() -> None:
    with pytest.raises(gradstats.AttachError, match="init_process_group"):
        gradstats.attach(nn.Linear(2, 2), process_group=object())


def test_processes_that_come_after_attach_are_noticed(monkeypatch) -> None:
    model = nn.Linear(3, 2)
    monitor = gradstats.attach(model)
    model(torch.randn(4, 3)).sum().backward()
    monkeypatch.setattr("gradstats.ranks.initialised", lambda: True)
    with pytest.raises(gradstats.GradStatsError, match="initialised after attach"):
        monitor.step()


def test_one_process_has_no_hooks() -> None:
    model = nn.Linear(3, 2)
    monitor = gradstats.attach(model, moments=True)
    assert monitor._source.ranks is None
    assert not model.weight._backward_hooks
    assert not model.weight._post_accumulate_grad_hooks
