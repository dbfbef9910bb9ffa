"""The whole sweep: plans × seeds trained, the gradient's variance at common weights, the verdict."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.workbench import saved
from gradstats.workbench.sweep import summary as summaries
from gradstats.workbench.sweep.first import First, look_over
from gradstats.workbench.sweep.plans import Plan, scaled_rate
from gradstats.workbench.sweep.remarks import remarks
from gradstats.workbench.sweep.runners import (
    Report,
    Setup,
    here,
    in_processes,
    interruptible,
    undisturbed,
)
from gradstats.workbench.sweep.settings import Settings
from gradstats.workbench.sweep.state import load_seeded, unpacked, write_weights
from gradstats.workbench.sweep.store import Store
from gradstats.workbench.sweep.trial import Trial
from gradstats.workbench.sweep.variance import gradient_variance

__all__ = ["Sweep", "sweep"]


@dataclass(frozen=True)
class Sweep:
    """What a sweep found. `trials`: plain dicts, by seed, then in the order of the plans.

    `variance`: of the mean gradient against 1/B at common weights, `GradientVariance.to_dict()` and
    where it was taken; `steps_to_target`: see `summary.steps_to_target`; None where not measured.
    `interrupted`: it was stopped, and goes on from its folder.
    """

    target: str
    settings: dict[str, Any]
    trials: list[dict[str, Any]]
    variance: dict[str, Any] | None
    steps_to_target: dict[str, Any] | None
    remarks: list[str]
    interrupted: bool = False

    @property
    def summary(self) -> list[dict[str, Any]]:
        """A row for each plan: means and 90% intervals over its trials."""
        return summaries.rows(self.trials)

    @property
    def verdicts(self) -> list[summaries.Verdict]:
        """Which plan won by samples, by steps and by time."""
        return summaries.verdicts(self.trials)

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [trial for trial in self.trials if not trial["ok"]]

    def to_dict(self) -> dict[str, Any]:
        """As a result file of kind "sweep" holds it."""
        own = (
            "target",
            "settings",
            "trials",
            "variance",
            "steps_to_target",
            "remarks",
            "interrupted",
        )
        return {
            "environment": saved.environment(),
            **{name: getattr(self, name) for name in own},
            "summary": self.summary,
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
        }


def sweep(
    settings: Settings,
    *,
    folder: Path | None = None,
    jobs: int = 1,
    ray: str | None = None,
    checkpoint_seconds: float = 10.0,
    report: Report = lambda trial, news: None,
) -> Sweep:
    """Train every plan from every seed, and compare them.

    Trials of one seed begin with the same weights and see the same samples in the same order, whatever
    their batch size. Everything but seconds is the same to the bit, on one machine and with the same
    number of threads, however often the sweep was stopped or killed, and in however many processes.
    Data that draws numbers from a generator of its own (not torch's, numpy's or Python's) is outside of that.

    Args:
        folder: where trials and checkpoints are kept, for a sweep that goes on. Default: a temporary one.
        jobs: trials at a time. 1 trains in this process; more in processes of their own, which import
            the script that calls this (so guard it by ``if __name__ == "__main__"``).
        ray: the address of a Ray cluster to train on, or "local" for one on this machine.
        checkpoint_seconds: between two checkpoints of a trial, at least.
        report: told of every point of a curve, every trial that ended or failed.

    Ctrl-C stops it after the step under way, with a checkpoint of each trial; a second one at once.

    Raises:
        InvalidArgumentError: an argument cannot be used; the folder is of another sweep.
        GradStatsError: the noise scale could not be measured, or the cluster not reached.
    """
    if jobs < 1 or (jobs > 1 and ray is not None):
        raise InvalidArgumentError(
            f"jobs={jobs} must be at least 1, and 1 with ray, which runs as many as the cluster has room for"
        )
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = Store(folder)
        stack.enter_context(store.locked())
        first = look_over(settings)
        before = store.settings() or {}
        threads = settings.threads or before.get("threads") or max(1, (os.cpu_count() or 1) // jobs)
        base = settings.base_plan(first.batch_size, before.get("base"))
        rate = settings.learning_rate or first.learning_rate
        fixed = {**settings.fixed(), "learning_rate": rate, "threads": threads}
        fixed["base"] = None if settings.rule == "same" else base.name
        store.begin({**fixed, "fingerprint": first.fingerprint})
        stop = stack.enter_context(interruptible())
        setup = Setup(store, stop, report, checkpoint_seconds)
        run = _Run(settings, first, setup, base, rate, threads, jobs, ray)
        run.train_all()
        variance = run.variance() if settings.variance else None
        trials = run.results()
        missing = len(trials) < len(settings.plans) * settings.seeds
        interrupted = stop() and (missing or (settings.variance and variance is None))
        steps = summaries.steps_to_target(trials, settings.target_loss)
        notes = remarks(settings, first, trials, variance, steps, jobs)
        return Sweep(
            settings.target, {**settings.fixed(), **fixed, "seeds": settings.seeds}, trials, variance, steps,
            notes, interrupted,
        )  # fmt: skip


@dataclass
class _Run:
    """A sweep under way."""

    settings: Settings
    first: First
    setup: Setup
    base: Plan
    rate: float
    threads: int
    jobs: int
    ray: str | None

    def trial(self, plan: Plan, seed: int, rate: float) -> Trial:
        s = self.settings
        return Trial(
            s.target, plan, rate, seed, s.looks, s.evaluation, s.warm_up, s.decay, s.micro_batch_size,
            self.threads, self.first.unmeasured is None, s.sharpness,
            keep_half=seed == 0 and plan == s.plans[0],
        )  # fmt: skip

    def train_all(self) -> None:
        noise = self.settings.noise_scale
        if self._needs_noise():
            self._train([self.trial(self.base, 0, self.rate)])
            result = self.setup.store.result(f"{self.base.name}-seed0")
            if result is None:  # stopped, or failed
                return
            noise = summaries.median_noise([result])
            if noise is None:
                raise GradStatsError(
                    f"rule noise needs the noise scale, which {self.base.name} did not show (its |G|² cannot "
                    "be told from zero, or it diverged); pass noise_scale, or another rule"
                )
        rule = self.settings.rule
        rates = [scaled_rate(self.rate, self.base, p, rule, noise) for p in self.settings.plans]
        self._train(
            [
                self.trial(plan, seed, rate)
                for seed in range(self.settings.seeds)
                for plan, rate in zip(self.settings.plans, rates, strict=True)
            ]
        )

    def _needs_noise(self) -> bool:
        asked = self.settings
        others = [p for p in asked.plans if p != self.base and p.learning_rate is None]
        needed = asked.rule == "noise" and asked.noise_scale is None and bool(others)
        if needed and self.first.unmeasured:
            raise GradStatsError(
                f"rule noise needs the noise scale, which cannot be measured here ({self.first.unmeasured}); "
                "pass noise_scale, or another rule"
            )
        return needed

    def _train(self, trials: Sequence[Trial]) -> None:
        todo = []
        for trial in trials:
            known = self.setup.store.result(trial.name)
            if known is None:
                todo.append(trial)
            else:
                self.setup.report(trial, known)
        if not todo or self.setup.stop():
            return
        if self.ray is not None:
            from gradstats.workbench.sweep.on_ray import on_ray

            on_ray(todo, self.setup, self.ray, gpus=int(self.first.on_gpu))
        elif self.jobs > 1:
            in_processes(todo, self.setup, self.jobs)
        else:
            here(todo, self.setup)

    def results(self) -> list[dict[str, Any]]:
        """Of the trials that ended, and of those that failed."""
        found = []
        for seed in range(self.settings.seeds):
            for plan in self.settings.plans:
                name = f"{plan.name}-seed{seed}"
                result = self.setup.store.result(name)
                if result is None and name in self.setup.failed:
                    result = summaries.failed_trial(plan, seed, self.setup.failed[name])
                found += [] if result is None else [result]
        return found

    def variance(self) -> dict[str, Any] | None:
        """At the weights that were kept half-way; None where there are none, or it was stopped."""
        store, asked = self.setup.store, self.settings
        half = store.half()
        if half is None or self.setup.stop():
            return None
        state = unpacked(half)
        sizes = sorted({plan.batch_size for plan in asked.plans})
        about = {"at": state["at"], "batch_sizes": sizes, "precision": asked.precision}
        known = store.variance(about)
        if known is not None:
            return known
        with undisturbed(self.threads):
            workload = load_seeded(asked.target, 0)
            write_weights(workload.model, state["model"])
            found = gradient_variance(
                workload,
                sizes,
                precision=asked.precision,
                micro_batch_size=asked.micro_batch_size,
                measured=self.first.unmeasured is None,
                stop=self.setup.stop,
            )
        if found is None:
            return None
        store.keep_variance(about, {**found.to_dict(), "at": state["at"]})
        return store.variance(about)
