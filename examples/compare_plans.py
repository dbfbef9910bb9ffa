"""Two plans of as many samples, from the same start: what the noise scale says of them, and what comes out.

    python examples/compare_plans.py
    python examples/compare_plans.py --first 8x400 --second 64x50

A plan is BATCHxSTEPS. The noise scale is measured on the way to where both begin; each plan then runs at the
learning rate that the measurement gives its batch size. FOLDER gets a log of each and a report of both.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from pathlib import Path

import torch
from digits import training

import gradstats
from gradstats.advice import scale_learning_rate
from gradstats.workbench import report

Plan = tuple[int, int]


def plan(text: str) -> Plan:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form BATCHxSTEPS, as in 64x100")
    return int(found[1]), int(found[2])


def losses(made: gradstats.Workload) -> tuple[float, float]:
    """Of all samples to train on, and of those held out."""
    with torch.no_grad():
        (held_out,) = made.validation_batches(made.num_validation)
        return float(made.loss(made.take(range(made.num_samples)))), float(made.loss(held_out))


def timed(made: gradstats.Workload, sizes: set[int]) -> gradstats.StepTime:
    """How long a step takes at these batch sizes; leaves everything as it was."""
    batches = {size: made.take(range(size)) for size in sizes}

    def step(size: int, _: int) -> None:
        made.loss(batches[size]).backward()
        made.optimizer.step()
        made.optimizer.zero_grad()

    return gradstats.measure_step(
        step,
        sorted(sizes),
        restore=(made.model, made.optimizer),
        accumulation_steps=(1,),
        memory=False,
    )


def steps(made: gradstats.Workload, batch: int, count: int, log: gradstats.Log, seed: int) -> None:
    """`count` ordinary steps, with the statistics of each in the log."""
    draw = made.batches(batch, seed=seed)
    for _ in range(count):
        loss = made.loss(next(draw))
        loss.backward()
        stats = log.monitor.step()
        made.optimizer.step()
        made.optimizer.zero_grad()
        log.step(stats, loss=loss)


def run(made: gradstats.Workload, chosen: Plan, rate: float, file: Path, seed: int) -> None:
    """Train by a plan, and print what came out."""
    batch, count = chosen
    for group in made.optimizer.param_groups:
        group["lr"] = rate
    with gradstats.attach(made.model, optimizer=made.optimizer) as monitor:
        log = gradstats.Log(monitor, gradstats.loggers.JsonLines(file), every=max(count // 20, 1))
        start = time.perf_counter()
        steps(made, batch, count, log, seed)
        seconds = time.perf_counter() - start
        log.close()
    trained, held_out = losses(made)
    print(
        f"  {batch} × {count} at rate {rate:.3g}: loss {trained:.3f}, held out {held_out:.3f}, "
        f"in {seconds:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=plan, default=(16, 320), metavar="BATCHxSTEPS")
    parser.add_argument("--second", type=plan, default=(128, 40), metavar="BATCHxSTEPS")
    parser.add_argument("--warm-up", type=int, default=100, help="steps before both")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare_plans"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    made = training()
    base, rate = made.batch_size, made.optimizer.param_groups[0]["lr"]
    with gradstats.attach(made.model, optimizer=made.optimizer, half_life=30) as monitor:
        steps(made, base, args.warm_up, gradstats.Log(monitor), args.seed)
        noise = monitor.noise_scale()
    seconds = timed(made, {args.first[0], args.second[0], base})
    print(gradstats.compare(noise, args.first, args.second, step_seconds=seconds))

    print("What comes out (the noise scale grows meanwhile, in favour of the larger batch):")
    start = copy.deepcopy((made.model.state_dict(), made.optimizer.state_dict()))
    for name, chosen in (("first", args.first), ("second", args.second)):
        made.model.load_state_dict(start[0])
        made.optimizer.load_state_dict(copy.deepcopy(start[1]))
        suits = scale_learning_rate(rate, base, chosen[0], rule="noise", noise=noise.value)
        run(made, chosen, suits, args.folder / f"{name}.jsonl", args.seed + 1)

    logs = [args.folder / f"{name}.jsonl" for name in ("first", "second")]
    page = args.folder / "report.html"
    page.write_text(report.render(report.build(report.read(logs))), "utf-8")
    print(f"Both side by side: {page}")


if __name__ == "__main__":
    main()
