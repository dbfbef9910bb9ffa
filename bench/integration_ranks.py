"""The adapters to trainers with two processes, against one process with the whole batch.

    torchrun --nproc-per-node 2 bench/integration_ranks.py

Lightning's "ddp", Accelerate and the Trainer of transformers, each with accumulation that grows from 2 to 3
micro-batches on the way. Raises where a row differs by more than rounding.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import test_accelerate
import test_lightning
import test_transformers
import torch
import torch.distributed as dist
from integration_tools import data, loader, net, plain, require_same, rows_of
from torch.utils.data import DataLoader, DistributedSampler

from gradstats.integrations.lightning import GradStatsCallback
from gradstats.integrations.schedule import Schedule
from gradstats.schedulers import milestones

SAMPLES = 192  # of which a micro-batch takes 8 on each process


def growing(unit: int) -> Schedule:
    """From 2 to 3 micro-batches of `unit` samples, asked for after step 2 and taken up after step 3."""
    sizes = {0: 2 * unit, 4 * unit: 3 * unit}
    policy = functools.partial(milestones, sizes=sizes)
    return Schedule(policy, rule="linear", every=1, micro_batch_size=unit // 2)


def by_hand() -> list[dict]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    return plain(model, loader(SAMPLES, 16), 2, optimizer, change={3: 3})


def of_lightning(place: str) -> list[dict]:
    rows: list[dict] = []
    dataset = data(SAMPLES)
    sampler = DistributedSampler(dataset, 2, int(os.environ["RANK"]), shuffle=False)
    batches = DataLoader(dataset, batch_size=8, sampler=sampler)
    callback = GradStatsCallback(sinks=[rows_of(rows)], schedule=growing(16))
    test_lightning.fit(
        test_lightning.Module(), callback, place, batches=batches, accumulate_grad_batches=2,
        strategy="ddp", devices=2, use_distributed_sampler=False,
    )  # fmt: skip
    return rows


def of_accelerate(place: str) -> list[dict]:
    test_accelerate.loader = lambda: loader(SAMPLES, 8)
    training = test_accelerate.Training(2, schedule=growing(16))
    training.run()
    training.watch.close()
    return training.rows


def of_transformers(place: str) -> list[dict]:
    rows: list[dict] = []
    options = {"sinks": [rows_of(rows)], "schedule": growing(8)}
    test_transformers.train(
        test_transformers.gpt2(), test_transformers.texts(96), place, options,
        gradient_accumulation_steps=2, ddp_backend="gloo",
    )  # fmt: skip
    return rows


def main() -> None:
    torch.set_num_threads(1)
    wanted = by_hand()  # before the processes know each other
    texts = test_transformers.texts(96)
    # By hand, micro-batches are of 4, and the two processes' count as one.
    tokens = test_transformers.by_hand(
        test_transformers.gpt2(), texts, 4, tokens=True, change={3: 6}
    )
    runs = {of_lightning: wanted, of_accelerate: wanted, of_transformers: tokens}
    for run, other in runs.items():
        with tempfile.TemporaryDirectory() as place:
            rows = run(place)
        if not dist.is_initialized() or dist.get_rank() == 0:
            for row in (*rows, *other):
                row.pop("loss", None)  # a process logs the mean of its own losses
            require_same(rows, other, 1e-4)
            sizes = [row["batch_size"] for row in rows]
            print(f"{run.__name__}: {len(rows)} rows as by hand, batch sizes {sizes}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
