"""What the noise scale of a log or of a measurement advises, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradstats.advice import recommend, scale_learning_rate
from gradstats.estimators import NoiseScale
from gradstats.workbench.report.inputs import Input, Run, number

__all__ = ["Basis", "basis_of_measure", "basis_of_run", "memory_cap", "runs_of"]

CONFIDENCE = 0.9  # of the intervals that Log writes
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
    logs = [Run(given.name, given.rows) for given in inputs if given.kind == "log"]
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
    size = run.last("batch_size")
    noise = _noise(run)
    if not (size >= 1) or noise is None:
        return None
    advice = recommend(noise, batch_size=round(size), max_micro_batch_size=cap).to_dict()
    return _basis(run.name, noise, advice)


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


def _noise(run: Run) -> NoiseScale | None:
    """The noise scale of the last row, as the monitor had it."""
    rows = [row for row in run.rows if "noise_scale" in row]
    if not rows:
        return None
    last = rows[-1]
    tr_sigma, square = (number(last.get(key)) for key in ("tr_sigma", "true_grad_sq_norm"))
    value = number(last.get("noise_scale"))
    if math.isnan(value) and tr_sigma > 0 >= square:  # null stands for infinite, too
        value = math.inf
    low, high = (number(last.get(f"noise_scale_{end}")) for end in ("low", "high"))
    skipped, coverage = number(last.get("num_skipped")), number(last.get("coverage"))
    skipped = skipped if 0 <= skipped < math.inf else 0.0
    return NoiseScale(
        value=value,
        low=low if low >= 0 else 0.0,
        high=math.inf if math.isnan(high) else high,
        confidence=CONFIDENCE,
        num_samples=_count(last.get("samples")),
        num_steps=_count(number(last.get("step")) - skipped),
        num_skipped=_count(skipped),
        tr_sigma=tr_sigma,
        true_grad_sq_norm=square,
        coverage=coverage if 0 <= coverage <= 1 else 1.0,
    )


def _count(value: Any) -> int:
    """A whole number of at least 0; 0 where it is not known."""
    value = number(value)
    return round(max(0.0, value)) if math.isfinite(value) else 0
