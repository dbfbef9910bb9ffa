"""What the trials of a sweep say together: means with intervals, and which plan won. Numbers only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradstats.estimators import critical_value, readable
from gradstats.workbench.sweep.plans import Plan
from gradstats.workbench.sweep.steps_to_target import crossing, fit_steps

__all__ = [
    "MEASURES",
    "Verdict",
    "by_plan",
    "failed_trial",
    "mean_interval",
    "measure_of",
    "median_noise",
    "rows",
    "steps_to_target",
    "verdicts",
]

CONFIDENCE = 0.9
MEASURES = ("final_loss", "validation_loss", "gap", "gradient_variance", "seconds")
UNITS = {"samples": "samples", "steps": "steps", "seconds": "s"}
POINT = {
    "samples": "samples",
    "steps": "step",
    "seconds": "seconds",
}  # their keys in a point of a curve
Trials = Sequence[Mapping[str, Any]]


def mean_interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and the ends of its 90% interval (Student's t); None where there are not enough values."""
    if not values:
        return {"mean": None, "low": None, "high": None}
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = critical_value(len(values) - 1, CONFIDENCE) * statistics.stdev(values)
    half /= math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def by_plan(trials: Trials) -> dict[str, list[Mapping[str, Any]]]:
    """The trials of each plan, by its name, in order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for trial in trials:
        found.setdefault(trial["plan"], []).append(trial)
    return found


def rows(trials: Trials) -> list[dict[str, Any]]:
    """A row for each plan: what it is, and means with intervals over its finished trials."""
    found = []
    for name, runs in by_plan(trials).items():
        done = [run for run in runs if run["ok"]]
        row: dict[str, Any] = {
            "plan": name,
            "batch_size": runs[0]["batch_size"],
            "learning_rate": runs[0]["learning_rate"],
            "steps": max(run["steps"] for run in runs),
            "samples": max(run["samples"] for run in runs),
            "trials": len(done),
            "failed": len(runs) - len(done),
        }
        for key in MEASURES:
            row[key] = mean_interval([run[key] for run in done if run[key] is not None])
        row["noise_scale"] = median_noise(done)
        for key in ("full", "subspace", "top_eigenvalue"):
            seen = [run["sharpness"][key] for run in done if run["sharpness"]]
            if any(value is not None for value in seen):
                row[f"sharpness_{key}" if key != "top_eigenvalue" else key] = mean_interval(seen)
        found.append(row)
    return found


def median_noise(runs: Trials) -> float | None:
    """The median noise scale along the second halves of some trials; None where none is known."""
    halves = [run["curve"][len(run["curve"]) // 2 :] for run in runs]
    known = [
        p["noise_scale"] for points in halves for p in points if p.get("noise_scale") is not None
    ]
    return statistics.median(known) if known else None


def failed_trial(plan: Plan, seed: int, why: str) -> dict[str, Any]:
    """A row for a trial that could not be trained."""
    about = {"plan": plan.name, "batch_size": plan.batch_size, "learning_rate": plan.learning_rate}
    return {**about, "seed": seed, "steps": 0, "samples": 0, "ok": False, "why": why, "curve": [],
            "final_loss": None, "validation_loss": None, "gap": None, "gradient_variance": None,
            "sharpness": None, "seconds": None, "remarks": []}  # fmt: skip


def measure_of(trials: Trials) -> str:
    """What curves are compared by: the validation loss where every trial has one, else the loss."""
    points = [p for t in trials for p in t["curve"]]
    known = all(p["validation_loss"] is not None for p in points if p["loss"] is not None)
    return "validation_loss" if points and known else "loss"


@dataclass(frozen=True)
class Verdict:
    """The plans after `budget` samples, steps or seconds each: the most that all of them had.

    `means`: loss there by plan, the best first. `behind`: how far each of the others is behind the best,
    {mean, low, high} of the differences between trials of the same seed. `tied`: those whose interval
    holds 0, or of which nothing can be said.
    """

    by: str
    budget: float
    measure: str
    means: dict[str, float]
    behind: dict[str, dict[str, float | None]]
    tied: tuple[str, ...]

    @property
    def best(self) -> str:
        return next(iter(self.means))

    def to_dict(self) -> dict[str, Any]:
        return {
            "by": self.by, "budget": self.budget, "measure": self.measure, "best": self.best,
            "tied": list(self.tied), "means": self.means, "behind": self.behind, "sentence": str(self),
        }  # fmt: skip

    def __str__(self) -> str:
        what = self.measure.replace("_", " ")
        budget = readable(self.budget) if self.by == "seconds" else f"{self.budget:,.0f}"
        after = f"after {budget} {UNITS[self.by]} each"
        text = f"By {'time' if self.by == 'seconds' else self.by}, {after}: "
        text += f"{self.best} has the lowest {what}, {readable(self.means[self.best])}"
        for name, behind in self.behind.items():
            mean, low, high = (behind[k] for k in ("mean", "low", "high"))
            assert mean is not None
            if low is None or high is None:
                text += f"; {name} is {readable(mean)} above it in one trial, which may be chance"
                continue
            range_ = f"(90% interval {readable(low)} to {readable(high)})"
            if name in self.tied:
                text += f"; {name} cannot be told from it: {readable(mean)} above {range_}"
            else:
                text += f"; {name} is {readable(mean)} above {range_}"
        return text + "."


def verdicts(trials: Trials) -> list[Verdict]:
    """By samples, by steps and by time; of plans with a finished trial, where there are two."""
    done = by_plan([t for t in trials if t["ok"]])
    if len(done) < 2:
        return []
    measure = measure_of([t for runs in done.values() for t in runs])
    return [_verdict(done, by, measure) for by in UNITS]


def _verdict(done: Mapping[str, Trials], by: str, measure: str) -> Verdict:
    key = POINT[by]
    budget = min(statistics.fmean(t["curve"][-1][key] for t in runs) for runs in done.values())
    losses = {
        name: {t["seed"]: _loss_at(t, key, budget, measure) for t in runs}
        for name, runs in done.items()
    }
    means = {name: statistics.fmean(found.values()) for name, found in losses.items()}
    means = dict(sorted(means.items(), key=lambda item: item[1]))
    best, *others = means
    behind, tied = {}, []
    for name in others:
        seeds = losses[name].keys() & losses[best].keys()
        pairs = [losses[name][s] - losses[best][s] for s in sorted(seeds)]
        behind[name] = mean_interval(pairs or [means[name] - means[best]])
        low = behind[name]["low"]
        if low is None or low <= 0:
            tied.append(name)
    return Verdict(by, budget, measure, means, behind, tuple(tied))


def _loss_at(trial: Mapping[str, Any], key: str, budget: float, measure: str) -> float:
    points = [p for p in trial["curve"] if p[measure] is not None]
    return float(np.interp(budget, [p[key] for p in points], [p[measure] for p in points]))


def steps_to_target(trials: Trials, target: float | None = None) -> dict[str, Any] | None:
    """Steps to a loss that all trials reach (or to `target`), and the curve through their means.

    With several rates for one batch size, the quickest counts. None where fewer than three batch sizes
    arrive in every trial.
    """
    done = by_plan([t for t in trials if t["ok"]])
    if len({runs[0]["batch_size"] for runs in done.values()}) < 3:
        return None
    measure = measure_of([t for runs in done.values() for t in runs])
    curves = {
        name: [
            [(p["step"], p[measure]) for p in t["curve"] if p[measure] is not None] for t in runs
        ]
        for name, runs in done.items()
    }
    every = [curve for found in curves.values() for curve in found]
    if target is None:
        target = max(min(loss for _, loss in curve) for curve in every)
    means: dict[int, float] = {}
    for name, found in curves.items():
        size = done[name][0]["batch_size"]
        taken = [crossing(curve, target) for curve in found]
        means[size] = min(means.get(size, math.inf), statistics.fmean(taken))
    means = {size: steps for size, steps in means.items() if steps > 0}
    if sum(map(math.isfinite, means.values())) < 3:
        return None
    points = [{"batch_size": b, "steps": s} for b, s in sorted(means.items())]
    fit = fit_steps(means)
    for point in points:
        point["fitted"] = fit.steps(point["batch_size"])
    return {"target": target, "measure": measure, "points": points, **fit.to_dict()}
