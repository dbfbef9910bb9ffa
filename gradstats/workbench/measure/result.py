"""What a measurement found. Numbers and words only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gradstats.batch_advice import BatchSizeAdvice
from gradstats.estimators import NoiseScale
from gradstats.loggers import Row
from gradstats.step_time import StepTime
from gradstats.workbench.measure.overhead import Overhead

__all__ = ["LayerNoise", "Measurement", "Settings"]

Stopped = Literal["steps", "precision", "interrupted"]


@dataclass(frozen=True)
class LayerNoise:
    """A parameter's noise scale, and its share of the whole model's tr Σ (None where that is not known)."""

    name: str
    share: float | None
    noise: NoiseScale

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON can hold them: what is not finite becomes None."""
        known = self.noise.to_dict()
        ends = {f"noise_scale_{end}": known[end] for end in ("low", "high")}
        kept = {key: known[key] for key in ("tr_sigma", "true_grad_sq_norm")}
        return {
            "name": self.name,
            "share": self.share,
            "noise_scale": known["value"],
            **ends,
            **kept,
        }


@dataclass(frozen=True)
class Settings:
    """What was measured, and how. Batch sizes are in samples of the data.

    `sample`: what the noise scale counts, "example" or "token"; `data_samples`: samples in the data;
    `betas`: those of Adam and its kin; `batch_norm`: names of the BatchNorm layers in training mode.
    """

    batch_size: int
    micro_batch_size: int
    method: str
    sample: str
    frozen: bool
    every: int
    seed: int
    data_samples: int
    optimizer: str
    learning_rate: float
    betas: tuple[float, ...] | None
    device: str
    batch_norm: tuple[str, ...]


@dataclass(frozen=True)
class Measurement:
    """The result of `measure`.

    `noise`: the noise scale, in samples or tokens as `settings.sample` says; `geometries`: as the
    optimizer sees it, where asked for. `steps` taken in `seconds`; `stopped` says what ended them.
    `layers`: of each measured parameter, the largest share of tr Σ first. `coverage`: measured fraction
    of the trainable parameters' entries; `missing`: those that were not, each with the reason;
    `fallbacks`: those measured sample by sample, each with its bytes and the reason.
    `rows`: of `gradstats.Log`. `overhead`, `timing`, `advice`: None where not asked for or interrupted.
    `notes`: what else is to be said.
    """

    settings: Settings
    noise: NoiseScale
    steps: int
    seconds: float
    stopped: Stopped
    tokens_per_sample: float | None
    layers: tuple[LayerNoise, ...]
    coverage: float
    missing: Mapping[str, str]
    fallbacks: Mapping[str, tuple[int, str]]
    rows: tuple[Row, ...]
    geometries: Mapping[str, NoiseScale]
    overhead: Overhead | None
    timing: StepTime | None
    advice: BatchSizeAdvice | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it: the content of a result file of kind "measure"."""
        return {
            **asdict(self.settings),
            "steps": self.steps,
            "seconds": self.seconds,
            "stopped": self.stopped,
            "noise_scale": self.noise.to_dict(),
            "sentence": str(self.noise),
            "geometries": {kind: noise.to_dict() for kind, noise in self.geometries.items()},
            "tokens_per_sample": self.tokens_per_sample,
            "layers": [layer.to_dict() for layer in self.layers],
            "coverage": self.coverage,
            "missing": dict(self.missing),
            "fallbacks": {
                name: {"bytes": size, "why": why} for name, (size, why) in self.fallbacks.items()
            },
            "step_seconds": None if self.overhead is None else self.overhead.to_dict(),
            "timing": None if self.timing is None else self.timing.to_dict(),
            "advice": None if self.advice is None else self.advice.to_dict(),
            "advice_sentence": None if self.advice is None else str(self.advice),
            "notes": list(self.notes),
            "rows": [dict(row) for row in self.rows],
        }
