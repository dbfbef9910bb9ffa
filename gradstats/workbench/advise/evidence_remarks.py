"""What the evidence for a plan says besides: what was not measured, and what trainings so far show."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradstats.workbench.advise.evidence import Evidence
from gradstats.workbench.advise.overfitting import Trend
from gradstats.workbench.advise.remark import Remark

__all__ = ["so_far", "unmeasured"]


def unmeasured(evidence: Evidence, ranks: int, seconds: float, compared: bool) -> list[Remark]:
    """What the plan could not weigh. `compared`: with `seconds` of the collectives of `ranks`."""
    found = []
    if compared and not seconds:
        found.append(
            Remark(
                "ranks",
                f"the collectives of {ranks:,} ranks were taken to cost no time; measure on them, or "
                "give their seconds (gradstats.collective_cost has formulas)",
            )
        )
    if evidence.timing is None:
        found.append(
            Remark(
                "time", "steps were not timed, so the plan counts samples and steps, not seconds"
            )
        )
    if evidence.largest is None and evidence.timing is None:
        found.append(Remark("memory", "what fits a device was not measured: `gradstats vram` does"))
    if evidence.noise is not None and evidence.noise.coverage < 1:
        found.append(
            Remark(
                "coverage",
                f"the noise scale speaks for {evidence.noise.coverage:.1%} of the trainable parameters",
            )
        )
    return found


def so_far(evidence: Evidence, trends: Sequence[Trend]) -> list[Remark]:
    """What trainings so far say."""
    found = [Remark("curves", str(trend)) for trend in trends]
    if any(trend.kind == "overfitting" for trend in trends):
        found.append(
            Remark(
                "overfitting",
                "stop at the lowest validation loss, or regularise more: weight decay, augmentation, "
                "dropout, label smoothing. Smaller batches regularise too",
                "Keskar et al. 2017, arXiv:1609.04836",
            )
        )
    return found + _swept(evidence)


def _swept(evidence: Evidence) -> list[Remark]:
    """The plan of a sweep with the lowest validation loss, and whether it is surely the best."""
    known = {k: list(v) for k, v in evidence.sweep.items() if all(map(math.isfinite, v))}
    if len(known) < 2:
        return []
    from scipy.stats import ttest_ind

    order = sorted(known, key=lambda plan: sum(known[plan]) / len(known[plan]))
    (size, rate), second = order[0], order[1]
    best, next_ = known[order[0]], known[second]
    text = (
        f"of the plans swept, batches of {size:,} at {rate:.3g} end with the lowest validation loss"
    )
    seeds = min(len(best), len(next_))
    if seeds < 2:
        return [Remark("sweep", f"{text}, in one training each: other seeds may end otherwise")]
    sure = ttest_ind(best, next_, equal_var=False, alternative="less").pvalue < 0.05
    runner_up = f"batches of {second[0]:,} at {second[1]:.3g}"
    text += f", surely below {runner_up}" if sure else f", not surely below {runner_up}"
    return [Remark("sweep", f"{text} ({seeds} seeds or more, Welch's test at 5%)")]
