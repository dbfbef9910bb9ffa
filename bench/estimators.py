"""How many steps each way to see the noise takes until the noise scale is known to ±10%.

    python bench/estimators.py [--batch 32] [--dim 32] [--runs 40] [--steps 24576] [--json FILE]

Gradients are drawn with known G and Σ = (tr Σ/d)·I, constant over a run, at several ratios of noise scale
to batch size. For each estimator, tr Σ and |G|² are averaged over a run's steps and divided; shown is the
number of steps from which on at least 90% of the runs are within 10% of the truth. The gradient stands
still here: in a training it moves, which limits how long an average may be.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import checkout
import numpy as np
import torch

from gradstats.momentum import MomentumStep, momentum_grad_sq_norm
from gradstats.parts import estimate
from gradstats.workbench.bench.timing import table
from gradstats.workbench.saved import environment

RATIOS = (1.0, 10.0, 100.0)
DECAYS = (0.9, 0.99)
PARTS = (2, 8)
EXACT = "every sample"

Array = np.ndarray[Any, Any]
Series = dict[str, tuple[Array, Array]]


def run_of(rng: np.random.Generator, steps: int, batch: int, dim: int, ratio: float) -> Series:
    """Per estimator, (tr Σ, |G|²) of each step; the truth is tr Σ = ratio·batch, |G|² = 1."""
    tr_sigma = ratio * batch
    parts = max(PARTS)
    means = rng.standard_normal((steps, parts, dim)) * np.sqrt(tr_sigma / dim / (batch / parts))
    means[..., 0] += 1.0
    # Within the parts: dim·(batch − parts) independent squares.
    within = rng.chisquare(dim * (batch - parts), steps) * tr_sigma / dim
    grad = means.mean(1)
    grad_sq = (grad**2).sum(-1)
    between = ((means - grad[:, None]) ** 2).sum((1, 2)) * (batch / parts)
    exact = (within + between) / (batch - 1)
    single = grad_sq - exact / batch
    found = {EXACT: (exact, single)}
    for m in PARTS:
        coarse = means.reshape(steps, m, parts // m, dim).mean(2) / m
        found[f"{m} parts"] = tuple(
            t.numpy()
            for t in estimate(
                torch.full((m,), batch / m, dtype=torch.float64),
                torch.from_numpy((coarse**2).sum(-1)),
                torch.from_numpy(grad_sq),
                True,
            )
        )
    for decay in DECAYS:
        own, cross = buffered(grad, grad_sq, exact, batch, decay)
        found[f"{EXACT}, |G|² from a buffer of {decay}"] = (exact, own)
        found[f"{EXACT}, |G|² from buffer × gradient, {decay}"] = (exact, cross)
    return found


def buffered(
    grad: Array, grad_sq: Array, tr_sigma: Array, batch: int, decay: float
) -> tuple[Array, Array]:
    """|G|² by a momentum buffer and by its product with the gradient, (K,) each."""
    buffer, steps = None, []
    for g, sq, tr in zip(grad, grad_sq, tr_sigma, strict=True):
        before = None if buffer is None else float(buffer @ buffer)
        inner = 0.0 if buffer is None else float(buffer @ g)
        steps.append(MomentumStep(batch, float(tr), float(sq), before, inner, decay, 1 - decay))
        buffer = (1 - decay) * g + (0.0 if buffer is None else decay * buffer)
    own, cross = momentum_grad_sq_norm(steps)
    return np.array(own), np.array(cross)


def needed(errors: Array, within: float = 0.1, share: float = 0.9) -> int | None:
    """Steps from which on a `share` of the runs (R, K) stays within; None where that is not reached."""
    sizes = np.where(np.isfinite(errors), np.abs(errors), 1e9)
    off = np.quantile(sizes, share, axis=0) > within
    last = np.flatnonzero(off)
    first = 0 if not len(last) else int(last[-1]) + 1
    return None if first > 0.9 * errors.shape[1] else first + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=24576)
    parser.add_argument("--json", type=Path, default=checkout.RESULTS / "estimators.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, int | None]] = {}
    for ratio in RATIOS:
        errors: dict[str, list[Array]] = {}
        for _ in range(args.runs):
            for name, (tr, sq) in run_of(rng, args.steps, args.batch, args.dim, ratio).items():
                known = np.isfinite(sq)  # a buffer has to fill first
                with np.errstate(divide="ignore", invalid="ignore"):
                    sums = (np.where(known, column, 0.0).cumsum() for column in (tr, sq))
                    value = next(sums) / np.maximum(next(sums), 0.0)
                errors.setdefault(name, []).append(value / (ratio * args.batch) - 1)
        for name, rows in errors.items():
            found.setdefault(name, {})[f"{ratio:g}"] = needed(np.stack(rows))
    head = ["estimator", *(f"B_noise/B = {ratio:g}" for ratio in RATIOS)]
    rows = [
        [name, *(f"> {0.9 * args.steps:,.0f}" if n is None else f"{n:,}" for n in by.values())]
        for name, by in found.items()
    ]
    print(f"steps to ±10% in 90% of {args.runs} runs, batches of {args.batch}, d = {args.dim}")
    print(table(head, rows))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    report = {"environment": environment("gradstats"), **settings, "steps_needed": found}
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
