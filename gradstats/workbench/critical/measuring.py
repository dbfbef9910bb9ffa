"""Measures the critical batch size of a workload by branches from a checkpoint, and puts it back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gradstats.errors import InvalidArgumentError
from gradstats.estimators import NoiseScale, require
from gradstats.kept import kept
from gradstats.workbench import saved
from gradstats.workbench.critical.branches import (
    Evaluation,
    branch,
    noise_scale_at,
    optimizer_of,
    train,
)
from gradstats.workbench.critical.checkpoint import load_checkpoint, save_checkpoint
from gradstats.workbench.critical.decision import decide
from gradstats.workbench.critical.plan import Plan, Settings
from gradstats.workbench.critical.result import Critical, Run, Tolerance
from gradstats.workbench.workload import Workload

__all__ = ["measure_critical"]

KIND = "critical"


def measure_critical(
    workload: Workload,
    settings: Settings | None = None,
    *,
    checkpoint: Path | None = None,
    tolerance: Tolerance | None = None,
    smoothing: float = 0.5,
    confidence: float = 0.9,
    out: Path | None = None,
    target: str = "",
    progress: Callable[[str, float], object] = lambda what, done: None,
) -> tuple[Critical, dict[str, Any]]:
    """The critical batch size of `workload` at a checkpoint, and what its result file holds.

    From one checkpoint, branches train on with the batch multiplied by k and the learning rate by √k (or
    as `Settings.rule` says), all on as many samples in the same order (Merrill et al. 2025,
    arXiv:2505.23971). After every so many samples each is evaluated on the same fixed samples,
    the losses are smoothed, and the last ones compared with the unbranched run's by
    `gradstats.workbench.critical.decide`. Multipliers are tried in order and end with the first that is
    surely outside the tolerance. The noise scale is measured at the checkpoint, where the weights stay
    still.

    Args:
        checkpoint: a file of torch.save with the state_dicts of "model" and "optimizer", instead of
            `warm_up` steps.
        tolerance: how much higher the loss may be. Default: 0.01, the paper's for a language model's
            cross entropy; one in percent of what the loss falls by suits any loss.
        smoothing: weight of the newest evaluation in the exponential moving average, in (0, 1].
        out: the result file. It is written after every branch, with the checkpoint beside it (the same name,
            ending in .checkpoint.pt), and a later call with the same settings goes on from it.
        target: what the file says was measured.
        progress: called progress(what, done) with a text and the part done, from 0 to 1.

    The workload is left as it was, random numbers included.

    Raises InvalidArgumentError for settings out of range, a checkpoint or result file that does not fit,
    and an unbranched run that diverges.
    """
    asked = settings or Settings()
    tolerance = tolerance or Tolerance(0.01)
    require(0 < smoothing <= 1, "smoothing", smoothing, "pass a weight above 0, up to 1")
    require(0 < confidence < 1, "confidence", confidence, "pass a probability between 0 and 1")
    plan = Plan(workload, asked)
    put_back = kept((workload.model, optimizer_of(workload)))
    try:
        whole_runs = _Branches(workload, plan, out, target, checkpoint, progress)
        return whole_runs.measure(tolerance, smoothing, confidence)
    finally:
        put_back()


class _Branches:
    """The runs of a plan: those of the result file, and those still to be made."""

    def __init__(
        self,
        workload: Workload,
        plan: Plan,
        out: Path | None,
        target: str,
        checkpoint: Path | None,
        progress: Callable[[str, float], object],
    ) -> None:
        self.workload, self.plan, self.out, self.progress = workload, plan, out, progress
        self.content: dict[str, Any] = {
            "target": target,
            "environment": saved.environment(),
            "settings": {**plan.to_dict(), "checkpoint": checkpoint},
            "optimizer": type(workload.optimizer).__name__,
            "step": plan.asked.warm_up if checkpoint is None else None,
            "noise_scale": None,
            "noise_scale_missing": "",
            "runs": [],
        }
        self._begin(checkpoint)

    def _begin(self, checkpoint: Path | None) -> None:
        """Be at the checkpoint: that of the file being gone on from, a given one, or after warm-up."""
        out = self.out
        if out is not None:
            goes_on = out.exists()
            if goes_on:
                self._go_on(saved.read(out, KIND))
            saved.write(out, KIND, self.content)  # that it cannot be written is said now
            if goes_on and (self.content["runs"] or self.beside.exists()):
                checkpoint = self.beside
        if checkpoint is not None:
            load_checkpoint(checkpoint, self.workload)
        else:
            self._warm_up()
        if out is not None and checkpoint != self.beside:
            save_checkpoint(self.beside, self.workload)

    def _go_on(self, found: Mapping[str, Any]) -> None:
        ours, theirs = saved.plain(self.content["settings"]), found.get("settings") or {}
        differ = [k for k in ours if ours[k] != theirs.get(k)]
        if found.get("target") != self.content["target"] or differ:
            what = ", ".join(f"{k} {theirs.get(k)}" for k in differ)
            raise InvalidArgumentError(
                f"{self.out} holds branches of {found.get('target') or 'another workload'}"
                f"{' with ' + what if what else ''}, to which these cannot be added; name another file, or "
                "delete it"
            )
        for name in ("runs", "noise_scale", "noise_scale_missing"):
            self.content[name] = found[name]

    @property
    def beside(self) -> Path:
        assert self.out is not None
        return self.out.with_suffix(".checkpoint.pt")

    def _warm_up(self) -> None:
        asked = self.plan.asked
        torch.manual_seed(asked.seed)
        batches = self.workload.batches(self.plan.batch_size, seed=asked.seed)
        for step in range(asked.warm_up):
            train(self.workload, batches, 1)
            self.progress(f"warm-up, step {step + 1} of {asked.warm_up}", 0.0)

    def measure(
        self, tolerance: Tolerance, smoothing: float, confidence: float
    ) -> tuple[Critical, dict[str, Any]]:
        plan, optimizer = self.plan, optimizer_of(self.workload)
        back = kept((self.workload.model, optimizer))
        rate = float(optimizer.param_groups[0]["lr"])
        asked = plan.asked
        evaluate = Evaluation(
            self.workload, asked.evaluation_samples, plan.batch_size, held_out=asked.held_out
        )
        start_loss = evaluate()
        require(
            math.isfinite(start_loss), "checkpoint", start_loss, "its loss must be a finite number"
        )
        noise = _read_noise(self.content["noise_scale"])
        if noise is None:
            self.progress("noise scale at the checkpoint", 0.0)
            noise, why = noise_scale_at(
                self.workload, plan.batch_size, plan.samples // 2, asked.seed
            )
            self.content["noise_scale"] = None if noise is None else noise.to_dict()
            self.content["noise_scale_missing"] = why
            back()
        runs = [Run.from_dict(run) for run in self.content["runs"]]
        found: Critical | None = None
        for i, multiplier in enumerate(plan.multipliers):
            for j, seed in enumerate(plan.seeds):
                if any((run.multiplier, run.seed) == (multiplier, seed) for run in runs):
                    continue
                part = (i * len(plan.seeds) + j) / (len(plan.multipliers) * len(plan.seeds))
                runs.append(self._run(multiplier, seed, evaluate, start_loss, part))
                back()
                self.content["runs"] = [run.to_dict() for run in runs]
                if self.out is not None:
                    saved.write(self.out, KIND, self.content)
            tried = plan.multipliers[: i + 1]
            found = decide(
                [run for run in runs if run.multiplier in tried and run.seed in plan.seeds],
                batch_size=plan.batch_size,
                learning_rates={m: rate * plan.scale(m) for m in tried},
                tolerance=tolerance,
                smoothing=smoothing,
                confidence=confidence,
                noise=noise,
            )
            if found.high is not None and len(plan.seeds) > 1:
                break
        assert found is not None
        whole_result = {
            **self.content,
            **found.to_dict(),
            "evaluation": {"samples": evaluate.samples, "held_out": evaluate.held_out},
        }
        if self.out is not None:
            saved.write(self.out, KIND, whole_result)
        return found, whole_result

    def _run(
        self, multiplier: int, seed: int, evaluate: Evaluation, start_loss: float, part: float
    ) -> Run:
        plan = self.plan
        share = 1 / (len(plan.multipliers) * len(plan.seeds) * plan.evaluations)
        done = iter(range(1, plan.evaluations + 1))
        what = f"batch {multiplier * plan.batch_size:,} (×{multiplier}), seed {seed}"
        self.progress(what, part)
        return branch(
            self.workload,
            multiplier=multiplier,
            seed=seed,
            batch_size=plan.batch_size,
            every=plan.every,
            evaluations=plan.evaluations,
            scale=plan.scale(multiplier),
            evaluate=evaluate,
            start_loss=start_loss,
            advance=lambda: self.progress(what, part + share * next(done)),
        )


def _read_noise(numbers: Mapping[str, Any] | None) -> NoiseScale | None:
    """From a file, where what has no upper end is null."""
    if numbers is None:
        return None
    ends = {k: math.inf for k in ("value", "high") if numbers[k] is None}
    return NoiseScale(**{**numbers, **ends})
