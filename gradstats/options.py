"""What `attach` was told, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from gradstats import estimators
from gradstats.cadence import Budget, Every
from gradstats.errors import InvalidArgumentError
from gradstats.loss_scale import LossScale

Method = Literal["per_sample", "norm_layers", "micro_batch", "ranks"]
Sample = Literal["example", "token"]
Weighting = Literal["samples", "parts"]


@dataclass(frozen=True)
class Options:
    """The arguments of `attach`, which describes them."""

    optimizer: torch.optim.Optimizer | None
    method: str
    loss_reduction: str
    grad_scaler: Any
    every: Every
    moments: bool
    per_layer: bool
    batch_dim: int
    sample: str
    half_life: float
    confidence: float
    fallback_bytes: int
    self_check: int | None
    process_group: Any
    weighting: str | None
    calibration: float | None
    tokens_per_sample: float | None
    from_momentum: bool
    geometry: tuple[str, ...]

    def __post_init__(self) -> None:
        _one_of("method", self.method, get_args(Method))
        _one_of("loss_reduction", self.loss_reduction, ("mean", "sum"))
        if isinstance(self.every, str):
            _one_of("every", self.every, ("sparse",))
        elif not isinstance(self.every, Budget):
            at_least("every", self.every, 1)
        at_least("batch_dim", self.batch_dim, 0)
        _one_of("sample", self.sample, get_args(Sample))
        if self.sample == "token" and self.batch_dim != 0:
            raise InvalidArgumentError(
                f'batch_dim={self.batch_dim} cannot be used with sample="token", which reads (batch, '
                "positions, …) inputs. Transpose the model's input, or leave batch_dim out."
            )
        at_least("fallback_bytes", self.fallback_bytes, 1)
        at_least("self_check", 1 if self.self_check is None else self.self_check, 1)
        estimators.noise_scale([], [], [], half_life=self.half_life, confidence=self.confidence)
        self._check_method()
        for kind in self.geometry:
            _one_of("geometry", kind, ("plain", "adam", "sign"))
        tokens = self.tokens_per_sample
        if tokens is not None and (self.sample == "token" or not 0 < tokens < math.inf):
            raise InvalidArgumentError(
                f"tokens_per_sample={tokens!r} must be a number above 0, and left out where tokens are "
                'the samples (sample="token")'
            )
        if self.optimizer is not None and not hasattr(self.optimizer, "param_groups"):
            raise InvalidArgumentError(
                f"optimizer={self.optimizer!r} has no param_groups; pass a torch.optim.Optimizer, or leave "
                "it out"
            )

    def _check_method(self) -> None:
        by_parts = self.method in ("micro_batch", "ranks")
        if self.weighting is not None:
            _one_of("weighting", self.weighting, get_args(Weighting))
            if not by_parts:
                raise InvalidArgumentError(
                    f"weighting={self.weighting!r} is for methods that compare parts of a batch; "
                    f"method={self.method!r} sees what weight each sample has. Leave it out."
                )
            if self.weighting == "parts" and self.loss_reduction == "sum":
                raise InvalidArgumentError(
                    'weighting="parts" contradicts loss_reduction="sum", under which every sample '
                    "weighs alike"
                )
        factor = self.calibration
        if factor is not None and (self.method != "norm_layers" or not 0 < factor < math.inf):
            raise InvalidArgumentError(
                f"calibration={factor!r} must be a number above 0, the model's noise scale over that of "
                'its normalisation layers, and is for method="norm_layers" alone'
            )
        asked = {
            "moments=True": self.moments,
            'sample="token"': self.sample == "token",
            "self_check=": self.self_check is not None,
        }
        for what in (name for name, yes in asked.items() if yes and by_parts):
            raise InvalidArgumentError(
                f"{what} needs each sample's gradient, which method={self.method!r} does not look at; "
                'use method="per_sample", or leave it out'
            )

    @property
    def summed(self) -> bool:
        return self.loss_reduction == "sum"

    def loss_scale(self) -> LossScale | None:
        """What reads the scaler, where there is one."""
        return None if self.grad_scaler is None else LossScale(self.grad_scaler, self.optimizer)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidArgumentError(
            f"{name}={value!r} is not known here; use {' or '.join(map(repr, known))}"
        )


def at_least(name: str, value: int, least: int) -> None:
    """Raises InvalidArgumentError for anything but a whole number of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise InvalidArgumentError(f"{name}={value!r} must be a whole number of at least {least}")
