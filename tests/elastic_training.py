"""Training under torchrun with ranks that die: `elastic_training.py DIRECTORY`, for test_elastic.py.

The first time rank 1 kills itself between backward and step(), the second time rank 0 while it writes a
checkpoint; torchrun starts all ranks again, which go on from the last one. When the training has ended,
the same ranks do it once more, undisturbed. Each rank logs every step. Ranks other than the first see
another noise scale than was measured, so that decisions of their own would differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rank_end import leave
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import gradstats
from gradstats.schedulers import noise_scale

STEPS, EVERY = 30, 3
DEATHS = {0: (1, 8, "backward"), 1: (0, 15, "checkpoint")}  # by restarts: rank, step, where


class Skewed:
    """The monitor's noise scale on the first rank, a tenth of it on the others."""

    def __init__(self, monitor: gradstats.Monitor, rank: int) -> None:
        self._monitor, self._factor = monitor, 0.1 if rank else 1.0
        self.sample = monitor.sample

    def noise_scale(self) -> gradstats.NoiseScale:
        noise, factor = self._monitor.noise_scale(), self._factor
        ends = {key: factor * getattr(noise, key) for key in ("value", "low", "high")}
        return dataclasses.replace(noise, **ends)


def train(place: Path, rank: int, death: tuple[int, int, str] | None) -> None:
    """From the checkpoint, if there is one, to step `STEPS`, or to this rank's death."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(101, 6, generator=generator)
    data = TensorDataset(torch.arange(101), x, x[:, :3] + torch.randn(101, 3, generator=generator))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    run = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    monitor = gradstats.attach(run, optimizer=optimizer, half_life=10)
    loader = gradstats.StepLoader(data, micro_batch_size=3, batch_size=6)
    scaling = gradstats.BatchScaling(optimizer, batch_size=6, rule="noise")
    scheduler = gradstats.BatchSizeScheduler(
        noise_scale,
        loader,
        monitor=Skewed(monitor, rank),
        scaling=scaling,
        every=2,
        max_batch_size=48,
    )
    parts = {"model": model, "optimizer": optimizer, "monitor": monitor, "loader": loader}
    parts["scheduler"] = scheduler
    done, saved = 0, place / "checkpoint"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done = state["done"]

    def dies(where: str) -> None:
        if death == (rank, done + 1, where):
            os.kill(os.getpid(), signal.SIGKILL)

    with (place / f"log{rank}").open("a", buffering=1) as log:
        while done < STEPS:
            for step in loader:
                numbers = []
                for (index, a, b), weight in step:
                    numbers += index.tolist()
                    (weight * (run(a) - b).square().sum(1).mean()).backward()
                dies("backward")
                monitor.step()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
                seen = {
                    "step": done + 1,
                    "samples": numbers,
                    "batch_size": scheduler.batch_size,
                    "rates": [rate.hex() for rate in scaling.learning_rates()],
                    "noise": monitor.noise_scale().value.hex(),
                    "weights": hashlib.sha256(weights).hexdigest(),
                }
                log.write(json.dumps(seen) + "\n")
                if (done + 1) % EVERY == 0 and rank == 0:
                    state = {name: part.state_dict() for name, part in parts.items()}
                    torch.save({**state, "done": done + 1}, place / "new")
                    dies("checkpoint")
                    os.replace(place / "new", saved)
                done += 1
                if done == STEPS:
                    break
    monitor.detach()


def main() -> None:
    place = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, restarts = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    train(place / "disturbed", rank, DEATHS.get(restarts))
    train(place / "whole", rank, None)
    (place / f"restarts{rank}").write_text(str(restarts))
    leave()


if __name__ == "__main__":
    main()
