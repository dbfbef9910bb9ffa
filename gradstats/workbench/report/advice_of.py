"""What the noise scale of a log or of a measurement advises, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradstats.advice import scale_learning_rate
from gradstats.estimators import NoiseScale
from gradstats.loggers import Logged
from gradstats.loggers.reading import number
from gradstats.workbench.report.inputs import Input, Run

__all__ = ["Basis", "basis_of_measure", "basis_of_run", "memory_cap", "runs_of"]

# What the advice is spoken of by.
NEEDED = (
    *("batch_size", "steps", "samples", "low"),
    *("micro_batch_size", "accumulation_steps", "world_size"),
)
FIELDS = set(NoiseScale.__dataclass_fields__)


@dataclass(frozen=True)
class Basis:
    """A noise scale, the advice that follows from it (of BatchSizeAdvice.to_dict()), and its source.

    `factors`: what the present learning rate is multiplied by at the advised size, by kind of optimizer.
    """

    name: str
    noise: NoiseScale
    advice: Mapping[str, Any]
    factors: Mapping[str, float]

    @property
    def present(self) -> int:
        return int(self.advice["present"]["batch_size"])

    @property
    def size(self) -> int:
        return int(self.advice["batch_size"])


def runs_of(inputs: Sequence[Input]) -> list[Run]:
    """The trainings whose rows are at hand: logs, or else measurements, which are short ones."""
    logs = [Run(g.name, g.rows, g.about) for g in inputs if g.kind == "log"]
    return logs or [
        Run(given.name, given.content["rows"])
        for given in inputs
        if given.kind == "measure" and given.content["rows"]
    ]


def memory_cap(inputs: Sequence[Input]) -> int | None:
    """The micro-batch that a memory measurement recommends, the smallest of several."""
    caps = [number(given.content.get("recommended")) for given in inputs if given.kind == "vram"]
    caps = [cap for cap in caps if cap >= 1]
    return int(min(caps)) if caps else None


def basis_of_run(run: Run, cap: int | None) -> Basis | None:
    """None where no row holds a batch size and a noise scale."""
    log = Logged(run.rows, run.about)
    noise, advice = log.noise_scale(), log.recommend(max_micro_batch_size=cap)
    return None if noise is None or advice is None else _basis(run.name, noise, advice.to_dict())


def basis_of_measure(given: Input) -> Basis | None:
    """None where the measurement came to no advice."""
    noise, advice = given.content.get("noise_scale"), given.content.get("advice")
    if not isinstance(noise, dict) or not isinstance(advice, dict):
        return None
    needed = [advice.get(key) for key in NEEDED] + [noise.get("low"), noise.get("confidence")]
    optional = [advice.get("high"), advice.get("seconds"), advice.get("learning_rate")]
    needed += [value for value in optional if value is not None]
    if not all(math.isfinite(number(value)) for value in needed):
        return None
    known = {key: noise[key] for key in FIELDS & noise.keys()}
    ends = {
        "value": math.nan,
        "high": math.inf,
        "tr_sigma": math.nan,
        "true_grad_sq_norm": math.nan,
    }
    for key, missing in ends.items():  # what JSON could not hold
        known[key] = missing if known.get(key) is None else known[key]
    return _basis(given.name, NoiseScale(**known), advice)


def _basis(name: str, noise: NoiseScale, advice: Mapping[str, Any]) -> Basis:
    now, then = int(advice["present"]["batch_size"]), int(advice["batch_size"])
    factors = {}
    if noise.actionable:
        factors = {
            "SGD": scale_learning_rate(1.0, now, then, rule="noise", noise=noise.value),
            "Adam": scale_learning_rate(1.0, now, then, rule="sqrt"),
        }
    return Basis(name, noise, advice, factors)
