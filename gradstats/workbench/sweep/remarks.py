"""What is to be known beside a sweep's numbers, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradstats.workbench.sweep.first import First
from gradstats.workbench.sweep.settings import Settings

__all__ = ["remarks"]

LARGE = 0.1  # of the data: a batch that large misses much of the noise


def remarks(
    settings: Settings,
    first: First,
    trials: Sequence[Mapping[str, Any]],
    variance: Mapping[str, Any] | None,
    steps: Mapping[str, Any] | None,
    jobs: int,
) -> list[str]:
    """In the order of their weight."""
    plans, found = settings.plans, []
    failed = [t for t in trials if not t["ok"]]
    found += [f"{t['plan']} from seed {t['seed']} is left out: {t['why']}" for t in failed]
    samples = {p.samples for p in plans}
    if len(samples) > 1:
        each = ", ".join(f"{p.name} {p.samples:,}" for p in plans)
        found.append(
            f"the plans are not of equal samples ({each}): compare them by samples at the fewest"
        )
    sizes = {p.batch_size for p in plans}
    if settings.rule == "same" and len(sizes) > 1 and all(p.learning_rate is None for p in plans):
        found.append(
            "all plans ran at one learning rate; larger batches usually stand a higher one (rule)"
        )
    if settings.seeds == 1:
        found.append("one seed: differences may be chance, and no interval can be given")
    if not first.num_validation:
        found.append("the workload holds no samples out, so nothing is known of generalisation")
    if first.unmeasured:
        found.append(f"per-sample gradients cannot be measured here: {first.unmeasured}")
    elif first.coverage < 1:
        share = f"{100 * first.coverage:.3g}%"
        found.append(f"noise scales and the monitor's variances cover {share} of the parameters")
    large = max(sizes)
    if large > LARGE * first.num_samples:
        share = f"{100 * large / first.num_samples:.3g}%"
        found.append(
            f"a batch of {large:,} is {share} of the data: drawn without replacement, it has less noise than "
            "tr Σ/B"
        )
    if settings.variance and variance is None:
        found.append(
            "the gradient's variance was not measured: it was stopped, or the first plan's first trial did "
            "not get half-way"
        )
    if settings.target_loss is not None and steps is None:
        found.append(
            f"steps to a loss of {settings.target_loss:g} are not shown: fewer than three batch sizes "
            "reach it in every trial"
        )
    if jobs > 1:
        found.append(f"seconds are those of up to {jobs} trials at a time on one machine")
    return found
