"""A trial under way: a plan trained from one seed, which can be stopped and goes on bit by bit."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gradstats
from gradstats.errors import GradStatsError, InvalidArgumentError
from gradstats.workbench.sweep.evaluation import mean_losses
from gradstats.workbench.sweep.plans import rate_factor
from gradstats.workbench.sweep.sharpness import sharpness
from gradstats.workbench.sweep.state import (
    fingerprint,
    load_optimizer,
    load_seeded,
    packed,
    unpacked,
    weights,
    write_weights,
)
from gradstats.workbench.sweep.trial import Event, Trial
from gradstats.workbench.sweep.variance import mean_tr_sigma

__all__ = ["Training", "train"]

MEASURED = 200  # steps of a trial that are measured, about; never more than every second
PROBE = 1024  # samples for tr Σ at the end


def train(
    trial: Trial, state: bytes | None, stop: Callable[[], bool], seconds: float
) -> Iterator[Event]:
    """Train from the beginning, or from a checkpoint's bytes, and say what happens.

    A checkpoint comes at points of the curve, at most every `seconds`, and when `stop` says so, after
    which the trial ends without a result; else the result comes last.
    """
    training = Training(trial, state)
    kept = time.monotonic()
    while training.step < trial.plan.steps and training.why is None:
        point = training.advance()
        if point is not None:
            yield Event("point", point)
            if training.half is not None:
                yield Event("half", training.half)
                training.half = None
        stopping = stop()
        if stopping or (point is not None and time.monotonic() - kept >= seconds):
            yield Event("checkpoint", training.state())
            kept = time.monotonic()
        if stopping:
            return
    yield Event("checkpoint", training.state())  # what follows is not repeated lightly
    yield Event("result", training.result())


class Training:
    """A trial under way."""

    def __init__(self, trial: Trial, state: bytes | None = None) -> None:
        torch.set_num_threads(trial.threads)
        self.trial = trial
        self.workload = load_seeded(trial.target, trial.seed)
        self.print = fingerprint(self.workload)
        self.model = self.workload.model
        assert isinstance(self.workload.optimizer, torch.optim.Optimizer)
        self.optimizer = self.workload.optimizer
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        plan = trial.plan
        size = min(trial.micro_batch_size or plan.batch_size, plan.batch_size)
        if plan.batch_size % size:
            raise InvalidArgumentError(
                f"plan {plan.name} cannot be accumulated from micro-batches of {size}: pass a divisor of "
                "every batch size"
            )
        self._micro, self._parts = size, plan.batch_size // size
        self._looks = {round(k * plan.steps / trial.looks) for k in range(1, trial.looks + 1)}
        self._every = max(2, plan.steps // MEASURED)
        self.monitor: gradstats.Monitor | None = None
        if trial.measured:
            life = max(10.0, plan.steps / self._every / 8)
            self.monitor = gradstats.attach(
                self.model, optimizer=self.optimizer, every=self._every, half_life=life
            )
        self.step = 0
        self.why: str | None = None  # it goes on no further
        self.half: bytes | None = None
        self.curve: list[dict[str, Any]] = []
        self._loss: Tensor = torch.zeros((), dtype=torch.float64, device=self.workload.device)
        self._losses = 0
        self._plain, self._timed = 0.0, 0  # seconds of steps that were not measured, and how many
        self.model.train()
        if state is not None:
            self._load(state)
        else:
            self._add_point(first=True)
        self._batches = self.workload.batches(
            size, seed=trial.seed, start=self.step * plan.batch_size
        )

    # ---- training ------------------------------------------------------------------------------

    def advance(self) -> dict[str, Any] | None:
        """Take a step; the point of the curve where one is due."""
        self._set_rate()
        self._synchronize()
        begin = time.perf_counter()
        for _ in range(self._parts):
            loss = self.workload.loss(next(self._batches))
            (loss / self._parts).backward()
            self._loss += loss.detach()
        stats = None if self.monitor is None else self.monitor.step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._synchronize()
        self._losses += self._parts
        if stats is None and self.step > 0:
            self._plain += time.perf_counter() - begin
            self._timed += 1
        self.step += 1
        return self._add_point() if self.step in self._looks else None

    @property
    def seconds(self) -> float:
        """Of the steps so far, data included; those that measure, and the first, count as the others."""
        return self._plain / max(self._timed, 1) * self.step

    def _set_rate(self) -> None:
        trial = self.trial
        middle = (self.step + 0.5) / trial.plan.steps  # of the step's share of the samples
        factor = rate_factor(middle, trial.warm_up, trial.decay)
        scale = trial.learning_rate / self._rates[0] * factor
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * scale)
            else:
                group["lr"] = rate * scale

    def _add_point(self, *, first: bool = False) -> dict[str, Any]:
        train_loss, validation_loss = mean_losses(self.workload, self.trial.evaluation, train=first)
        loss = train_loss if first else float(self._loss) / self._losses
        point: dict[str, Any] = {
            "step": self.step,
            "samples": self.step * self.trial.plan.batch_size,
            "seconds": self.seconds,
            "loss": loss,
            "validation_loss": validation_loss,
        }
        if self.monitor is not None and not first:
            noise = self.monitor.noise_scale()
            point |= {
                "noise_scale": noise.value,
                "noise_scale_low": noise.low,
                "noise_scale_high": noise.high,
                "tr_sigma": noise.tr_sigma,
                "true_grad_sq_norm": noise.true_grad_sq_norm,
            }
        self._loss.zero_()
        self._losses = 0
        self.curve.append(point)
        if loss is None or not math.isfinite(loss):
            self.why = f"it diverged: the loss was no longer finite at step {self.step}"
        elif self.trial.keep_half and 2 * (self.step - 1) < self.trial.plan.steps <= 2 * self.step:
            at = {"plan": self.trial.plan.name, "seed": self.trial.seed, "step": self.step}
            self.half = packed({"at": at, "model": weights(self.model)})
        return point

    def _synchronize(self) -> None:
        if self.workload.device.type == "cuda":
            torch.cuda.synchronize(self.workload.device)

    # ---- ending --------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """The finished trial, plain."""
        if self.monitor is not None:
            self.monitor.detach()
        trial, plan = self.trial, self.trial.plan
        found: dict[str, Any] = {
            "plan": plan.name,
            "batch_size": plan.batch_size,
            "learning_rate": trial.learning_rate,
            "seed": trial.seed,
            "steps": self.step,
            "samples": self.step * plan.batch_size,
            "seconds": self.seconds,
            "ok": self.why is None,
            "why": self.why,
            "curve": self.curve,
            "final_loss": None,
            "validation_loss": None,
            "gap": None,
            "gradient_variance": None,
            "sharpness": None,
            "remarks": [],
        }
        if self.why is not None:
            return found
        loss, held_out = mean_losses(self.workload, trial.evaluation, train=True)
        found |= {"final_loss": loss, "validation_loss": held_out}
        found["gap"] = None if held_out is None or loss is None else held_out - loss
        if self.monitor is not None:
            tr_sigma = mean_tr_sigma(self.workload, self._micro, PROBE, trial.seed)
            found["gradient_variance"] = tr_sigma / plan.batch_size
        if trial.sharpness is not None:
            try:
                found["sharpness"] = sharpness(self.workload, trial.sharpness, seed=trial.seed)
            except GradStatsError as error:
                found["remarks"].append(f"sharpness was not measured: {error}")
        return found

    # ---- stopping and going on -----------------------------------------------------------------

    def state(self) -> bytes:
        """Everything that the rest of the trial depends on."""
        python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002
        return packed(
            {
                "fingerprint": self.print,
                "step": self.step,
                "why": self.why,
                "curve": self.curve,
                "model": weights(self.model),
                "optimizer": self.optimizer.state_dict(),
                "monitor": None if self.monitor is None else self.monitor.state_dict(),
                "loss": (self._loss, self._losses),
                "clock": (self._plain, self._timed),
                "random": (python, (numbers[0], numbers[1].tolist(), *numbers[2:])),  # type: ignore[index]
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            }
        )

    def _load(self, data: bytes) -> None:
        state = unpacked(data)
        if state["fingerprint"] != self.print:
            raise GradStatsError(
                f"{self.trial.target} gives another model, optimizer or number of samples than when this "
                "sweep began; start it anew with another --out"
            )
        self.step, self.why, self.curve = state["step"], state["why"], state["curve"]
        write_weights(self.model, state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.monitor is not None:
            self.monitor.load_state_dict(state["monitor"])
        self._loss.copy_(state["loss"][0])
        self._losses = state["loss"][1]
        self._plain, self._timed = state["clock"]
        python, numbers = state["random"]
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
