"""Does it pay? Trainings to a target loss: fixed batches, AdaScale, batches by the noise scale.

    python bench/time_to_target.py [--races regression digits text] [--seeds 5] [--json FILE] [--tuned FILE]
    python bench/time_to_target.py --races text-large --device cuda

Every fixed batch gets the learning rate that is fastest for it, found with seeds of its own: the smallest
from a grid around the race's rate, each further one from a grid around the rate of the one before. The
others start from the base batch and its rate, as somebody who has a run of small batches, and get nothing
tuned.
Shown are samples, steps and seconds (on a CPU: of one thread, and its own) to the target: means over
seeds with 90% intervals (Student's t). Below, two checks of the theory (McCandlish et al.,
arXiv:1812.06162): tuned fixed batches against (S/S_min − 1)(E/E_min − 1) = 1, and their critical batch
E_min/S_min against the noise scale.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import checkout
import torch
from race_runs import MEASURED, Method, Outcome, followers, run, step_seconds
from race_tasks import RACES, Race

from gradstats.estimators import critical_value
from gradstats.workbench.bench.timing import table
from gradstats.workbench.saved import environment
from gradstats.workbench.sweep.steps_to_target import fit_steps

FIRST_RATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the race's
RATES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)  # times that of the next smaller batch
COSTS = ("samples", "steps", "seconds")


def mean(values: list[float]) -> tuple[float, float]:
    """Mean and the half-width of its 90% interval; infinite where a run did not arrive."""
    if not all(math.isfinite(v) for v in values):
        return math.inf, math.nan
    n = len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.fmean(values), critical_value(n - 1, 0.9) * error


def tuned(race: Race, size: int, rates: list[float], seeds: range) -> float:
    """The rate with which this batch takes the fewest samples, over some seeds.

    A best rate at an end of `rates` is not known to be the best: from there they go on.
    """
    taken: dict[float, float] = {}
    for rate in rates:
        taken[rate] = samples_taken(race, size, rate, seeds, min(taken.values(), default=math.inf))
    while True:
        tried = sorted(taken)
        best = min(tried, key=lambda rate: taken[rate])
        if math.isinf(taken[best]):
            return rates[len(rates) // 2]
        if len(tried) == 1 or best not in (tried[0], tried[-1]):
            return best
        end, next_to = (tried[0], tried[1]) if best == tried[0] else (tried[-1], tried[-2])
        further = end * end / next_to
        taken[further] = samples_taken(race, size, further, seeds, taken[best])


def samples_taken(race: Race, size: int, rate: float, seeds: range, best: float) -> float:
    """Mean over the seeds. A rate that takes twice as long as the `best` is not looked at to its end."""
    limit = race.most if math.isinf(best) else min(race.most, math.ceil(2 * best))
    found = []
    for seed in seeds:
        found.append(run(race.changed(most=limit), Method("", size, rate), seed).samples)
        if math.isinf(found[-1]):
            return math.inf
    return statistics.fmean(found)


def measure(
    race: Race,
    seeds: range,
    tuning: int,
    rates: tuple[float, ...],
    known: dict[str, Any],
) -> dict[str, Any]:
    """`known`: methods of an earlier run, whose rates are taken where they are."""

    def say(text: str) -> None:
        print(f"{race.name}: {text}", file=sys.stderr, flush=True)

    seconds = step_seconds(race)
    outcomes: dict[str, list[Outcome]] = {}
    fixed: dict[int, Method] = {}
    candidates = [factor * race.rate for factor in FIRST_RATES]
    for size in race.batches:
        earlier = known.get(f"fixed {size}")
        rate = (
            earlier["rate"] if earlier else tuned(race, size, candidates, range(100, 100 + tuning))
        )
        candidates = [factor * rate for factor in rates]
        fixed[size] = Method(f"fixed {size}", size, rate)
    methods = (*fixed.values(), *followers(race, fixed[race.base].rate, seconds))
    for method in methods:  # what it imports is not timed
        run(race.changed(most=40 * method.batch_size), method, seeds[0])
        outcomes[method.name] = []
    for seed in seeds:  # in turns, so that a slow spell of the machine is everybody's
        say(f"seed {seed}")
        for method in methods:
            outcomes[method.name].append(run(race, method, seed))
    seen = [n for o in outcomes["noise scale"] for n in o.noise if math.isfinite(n)]
    noise = statistics.median(seen) if seen else math.nan
    rows = {}
    for method in methods:
        found = outcomes[method.name]
        costs = {cost: mean([getattr(o, cost) for o in found]) for cost in COSTS}
        rows[method.name] = {
            "rate": method.rate, "first_batch": method.batch_size,
            "last_batch": statistics.fmean(o.path[-1][1] for o in found),
            **{cost: {"mean": m, "half_width": h} for cost, (m, h) in costs.items()},
            "runs": [asdict(o) for o in found],
        }  # fmt: skip
    steps = {size: rows[m.name]["steps"]["mean"] for size, m in fixed.items()}
    pairs = [(n, k) for o in outcomes["noise scale"] for n, k in zip(o.noise, o.known, strict=True)
             if math.isfinite(n) and math.isfinite(k)]  # fmt: skip
    return {
        "seeds": len(seeds), "target": race.target, "base": race.base, "step_seconds": seconds,
        "methods": rows,
        "noise_scale": noise, "theory": fit_steps(steps).to_dict(),
        "measured_over_known": statistics.median(n / k for n, k in pairs) if pairs else None,
    }  # fmt: skip


def shown(value: dict[str, float], digits: int) -> str:
    if not math.isfinite(value["mean"]):
        return "not reached"
    return f"{value['mean']:,.{digits}f} ± {value['half_width']:,.{digits}f}"


def report(name: str, found: dict[str, Any]) -> str:
    rows, base = found["methods"], found["methods"][f"fixed {found['base']}"]
    fixed = {n: r for n, r in rows.items() if n.startswith("fixed")}
    quickest = min(r["seconds"]["mean"] for r in fixed.values())
    cells = []
    for method, row in rows.items():
        by_time = row["seconds"]["mean"] / quickest
        by_steps = row["steps"]["mean"] / base["steps"]["mean"]
        cells.append([
            name, method, f"{row['rate']:.3g}", f"{row['first_batch']} → {row['last_batch']:.0f}",
            shown(row["samples"], 0), shown(row["steps"], 0), shown(row["seconds"], 2),
            f"{by_time:.2f}", f"{by_steps:.2f}",
        ])  # fmt: skip
    head = ["race", "method", "rate", "batch", "samples", "steps", "seconds", "time / best fixed",
            f"steps / fixed {found['base']}"]  # fmt: skip
    fit = found["theory"]
    lines = [
        table(head, cells),
        f"{name}: S_min {fit['steps_min']:,.0f} steps, E_min {fit['samples_min']:,.0f} samples, critical "
        f"batch {fit['critical_batch']:,.0f} against a noise scale of {found['noise_scale']:,.0f} (median "
        f"of the run that follows it); (S/S_min − 1)(E/E_min − 1): median {fit['product_median']:.2f}; "
        f"farthest point {fit['worst_relative']:.0%} off",
    ]
    if found["measured_over_known"] is not None:
        lines.append(f"{name}: measured noise scale over the known one, median "
                     f"{found['measured_over_known']:.2f}")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--races", nargs="+", default=list(RACES)[:3], choices=list(RACES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--first-seed", type=int, default=1000, help="others than settings were tried on"
    )
    parser.add_argument("--tuning-seeds", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="*", help="instead of each race's own")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--tuned", type=Path, help="an earlier --json: take its learning rates")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--target", type=float, help="instead of each race's own")
    parser.add_argument("--json", type=Path, default=checkout.RESULTS / "time_to_target_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    earlier = json.loads(args.tuned.read_text())["races"] if args.tuned else {}
    results = {}
    for name in args.races:
        changed = {"batches": args.batches and tuple(args.batches), "target": args.target}
        given = {k: v for k, v in changed.items() if v is not None}
        race = RACES[name]().changed(device=args.device, **given)
        known = earlier.get(name, {}).get("methods", {})
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        results[name] = measure(race, seeds, args.tuning_seeds, tuple(args.rates), known)
        print(report(name, results[name]), flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    settings = {"first_seed": args.first_seed, "measured": MEASURED}
    found = {"environment": environment("gradstats"), **settings, "races": results}
    args.json.write_text(json.dumps(found, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
