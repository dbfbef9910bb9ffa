"""A batch size that follows the noise scale, in a training that goes on where it was stopped.

    python examples/adaptive_batch.py
    python examples/adaptive_batch.py --stop-after 100    # as if it were killed there
    python examples/adaptive_batch.py --resume            # the rest, bit for bit the same

The log in FOLDER/steps.jsonl is read by `gradstats watch` and `gradstats report`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from digits import images, network
from torch import nn

import gradstats
from gradstats.schedulers import noise_scale


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="to begin with")
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=0.01, help="at --batch-size")
    parser.add_argument("--stop-after", type=int, help="optimizer steps, in all")
    parser.add_argument("--resume", action="store_true", help="from the checkpoint in --folder")
    parser.add_argument("--folder", type=Path, default=Path("runs/adaptive_batch"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = args.folder / "checkpoint.pt"

    train, held_out = images()
    model = network()
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate, momentum=0.9)

    # Micro-batches of 16: a batch of 64 is four of them, which could also be on four devices.
    loader = gradstats.StepLoader(
        train, micro_batch_size=16, batch_size=args.batch_size, seed=args.seed
    )
    monitor = gradstats.attach(model, optimizer=optimizer, half_life=30)
    scaling = gradstats.BatchScaling(optimizer, batch_size=args.batch_size, rule="noise")
    scheduler = gradstats.BatchSizeScheduler(
        partial(noise_scale, hysteresis=1.3),
        loader,
        monitor=monitor,
        scaling=scaling,
        max_batch_size=args.max_batch_size,
        every=20,
    )
    lines = gradstats.loggers.JsonLines(args.folder / "steps.jsonl", resume=args.resume)
    log = gradstats.Log(monitor, lines, every=20)

    parts = {
        "model": model,
        "optimizer": optimizer,
        "loader": loader,
        "monitor": monitor,
        "scheduler": scheduler,
        "log": log,
    }
    if args.resume:
        for name, state in torch.load(checkpoint, weights_only=True).items():
            parts[name].load_state_dict(state)
        print(f"goes on after step {log.steps}, at batch size {loader.batch_size}")

    while loader.epoch < args.epochs and log.steps != args.stop_after:
        for step in loader:
            loss = torch.zeros(())
            for (x, y), weight in step:
                part = weight * loss_fn(model(x), y)
                part.backward()
                loss += part.detach()
            stats = monitor.step()
            optimizer.step()
            optimizer.zero_grad()
            before = loader.batch_size
            scheduler.step()
            log.step(stats, loss=loss)
            if loader.batch_size != before:
                print(f"step {log.steps}: batch size {before} to {loader.batch_size}")
            if log.steps == args.stop_after:
                break
    log.close()

    draft = checkpoint.with_suffix(".new")  # a checkpoint is whole, or the one before
    torch.save({name: part.state_dict() for name, part in parts.items()}, draft)
    draft.replace(checkpoint)

    x, y = held_out.tensors
    with torch.no_grad():
        outputs = model(x)
    right = (outputs.argmax(1) == y).float().mean()
    print(f"{log.steps} steps, {loader.samples} samples, batch size {loader.batch_size}")
    print(monitor.noise_scale())
    print(f"held out: loss {loss_fn(outputs, y):.6f}, {100 * right:.1f}% right")


if __name__ == "__main__":
    main()
