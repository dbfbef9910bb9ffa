"""DistributedDataParallel with gradstats: `torchrun --nproc-per-node 2 examples/ddp.py`.

Every rank measures its own samples, and all of them know the noise scale of the whole batch. The batch size
follows it by accumulation, on all ranks alike; the checkpoint holds all that a resumed run needs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import gradstats
from gradstats.schedulers import noise_scale


def training_data(size: int = 2048) -> TensorDataset:
    """Points and noisy labels; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 16, generator=generator)
    return TensorDataset(x, (x[:, 0] * x[:, 1] + torch.randn(size, generator=generator) > 0).long())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ddp"), help="folder for log and checkpoint"
    )
    settings = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    first = dist.get_rank() == 0

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2)).to(device)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    loader = gradstats.StepLoader(training_data(), micro_batch_size=16, batch_size=32)
    monitor = gradstats.attach(model, optimizer=optimizer)
    scaling = gradstats.BatchScaling(optimizer, batch_size=32, rule="linear", warm_up=512)
    scheduler = gradstats.BatchSizeScheduler(
        noise_scale, loader, monitor=monitor, scaling=scaling, max_batch_size=512, every=20
    )
    sinks = (
        [gradstats.loggers.JsonLines(settings.out / "steps.jsonl")] if first else []
    )  # one file, not one per rank
    log = gradstats.Log(monitor, *sinks, every=10)

    while loader.epoch < settings.epochs:
        for step in loader:
            for i, ((x, y), weight) in enumerate(step):
                model.require_backward_grad_sync = i == len(step) - 1  # ranks meet once per step
                loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
                (weight * loss).backward()
            stats = monitor.step()  # after the last backward, before clipping and optimizer.step()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            log.step(stats, loss=loss)
            change = scheduler.step()
            if change and first:
                print(f"step {change.step}: {change.batch_size} samples a step")

    if first:
        print(monitor.noise_scale())
        parts = [network, optimizer, monitor, loader, scheduler, log]
        torch.save([part.state_dict() for part in parts], settings.out / "checkpoint.pt")
    log.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # gloo's threads may outlive the group. One that asks for the GIL in a dying interpreter, to let go of a
    # tensor, aborts the process ("terminate called without an active exception"): with plain torch too
    # (pytorch/pytorch issue 190489). All is written, so the process ends here.
    sys.stdout.flush()
    os._exit(0)
