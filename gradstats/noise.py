"""The gradient noise scale as a record, and as a sentence that a person can act on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from gradstats.errors import InvalidArgumentError
from gradstats.words import counted, readable

__all__ = ["NoiseScale"]

WIDEST_USEFUL = 10.0  # an interval whose ends differ by more than this factor decides nothing
# What a method needs of a step, and what it compares.
_NEEDS = {
    "per_sample": "two samples",
    "norm_layers": "two samples",
    "micro_batch": "two micro-batches of known weight",
    "ranks": "two ranks of known weight",
}
_COMPARED = {"micro_batch": ", by comparing micro-batches", "ranks": ", by comparing ranks"}
_GEOMETRY = {
    "plain": "",
    "adam": " under Adam's preconditioner",
    "sign": " of steps by sign",
    "hessian": " by curvature",
}


@dataclass(frozen=True)
class NoiseScale:
    """Gradient noise scale ``tr_sigma / true_grad_sq_norm``, in samples, and how far to trust it.

    ``value`` is the ratio of the two averages, as often above the true one as below; ``unbiased`` is right in
    the mean (see `gradstats.ratios`), and what to average over runs; None where it is not known.
    ``low`` and ``high`` hold the true value with probability ``confidence``; ``high`` is ``inf``
    where the data set no upper end. ``value`` is ``inf`` where the smoothed ``|G|²`` is not above
    zero, ``nan`` where nothing usable was measured. ``num_samples`` counts the samples of the
    ``num_steps`` used steps; ``num_skipped`` steps were left out (not finite, or fewer than two
    samples). ``coverage`` is the fraction of the trainable parameters that was measured. ``method`` is
    that of ``attach``; ``calibration`` the factor that a proxy's noise scale was multiplied by, ``None``
    where it was not, and ``calibration_usable`` whether that is known well enough to act on.
    ``tokens_per_sample``: tokens that a sample holds on average, where known.
    ``note``: what else is to be said of it.
    ``geometry``: see ``attach``; in others than "plain", the ratio of ``tr_sigma`` to ``true_grad_sq_norm``
    is of what stands for them there (for "sign", its root).
    """

    value: float
    low: float
    high: float
    confidence: float
    num_samples: int
    num_steps: int
    num_skipped: int
    tr_sigma: float
    true_grad_sq_norm: float
    coverage: float = 1.0
    method: str = "per_sample"
    calibration: float | None = None
    calibration_usable: bool = True
    tokens_per_sample: float | None = None
    note: str = ""
    geometry: str = "plain"
    unbiased: float | None = None

    @property
    def actionable(self) -> bool:
        """Whether a batch size can be chosen by it.

        The value is finite, its interval narrow enough, and it is not a proxy without usable calibration.
        """
        known = math.isfinite(self.value) and self.high <= WIDEST_USEFUL * self.low
        return known and not self.uncalibrated

    @property
    def uncalibrated(self) -> bool:
        """Whether it is of a part of the model, and not known well how to bring it to the whole."""
        known = self.calibration is not None and self.calibration_usable
        return self.method == "norm_layers" and not known

    @property
    def tokens(self) -> float | None:
        """The value in tokens, where it is known how many a sample holds."""
        return None if self.tokens_per_sample is None else self.value * self.tokens_per_sample

    def per(self, tokens: float) -> NoiseScale:
        """Of samples that are means over so many tokens each, where this is of tokens.

        Their variance is a ``tokens``-th of a token's, and so is the noise scale. Counts stay.
        """
        names = ("value", "low", "high", "tr_sigma", "unbiased")
        scaled = {k: v / tokens for k in names if (v := getattr(self, k)) is not None}
        return replace(self, **scaled)

    def to_dict(self) -> dict[str, float | int | str | None]:
        """The fields as JSON can hold them: what is not finite becomes ``None``."""
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> NoiseScale:
        """From `to_dict()`. Raises InvalidArgumentError for something else."""
        known = {k: state[k] for k in cls.__dataclass_fields__ if k in state}
        for name in ("value", "high", "tr_sigma", "true_grad_sq_norm"):  # null: it was not finite
            if known.get(name) is None:
                known[name] = math.inf if name == "high" else math.nan
        if math.isnan(known["value"]) and known["tr_sigma"] > 0 >= known["true_grad_sq_norm"]:
            known["value"] = math.inf
        try:
            return cls(**known)
        except TypeError as error:
            raise InvalidArgumentError(f"this is no noise scale: {error}") from error

    def __str__(self) -> str:
        return _sentence(self)


def _sentence(noise: NoiseScale) -> str:
    """Value, interval, what it rests on, and what to do where it cannot be acted on."""
    basis = f"from {noise.num_samples:,} samples in {counted(noise.num_steps, 'step')}"
    basis += _COMPARED.get(noise.method, "")
    end = "up, no upper end" if math.isinf(noise.high) else f"to {readable(noise.high)}"
    range_ = f"({100 * noise.confidence:.3g}% interval {readable(noise.low)} {end})"
    needs, name = _NEEDS[noise.method], f"noise scale{_GEOMETRY[noise.geometry]}"
    advice = [] if noise.actionable else ["too uncertain to act on: measure more steps"]
    if noise.uncalibrated and noise.calibration is None:
        name += " of the normalisation layers"
        advice = [
            "a proxy of unknown calibration: monitor.calibrate() measures what it is to the whole model's"
        ]
    elif noise.uncalibrated:
        advice = ["a proxy of uncertain calibration: monitor.calibrate() with more steps"]
    if noise.num_steps == 0:
        head = f"{name} unknown: no variance, for no step had {needs} or more and finite values"
        advice = [f"measure steps of at least {needs}"]
    elif math.isnan(noise.value):
        head = f"{name} unknown: neither |G|² nor tr Σ averages above zero, {basis}"
        advice = ["check that the loss depends on the parameters, or measure more steps"]
    elif math.isinf(noise.value):
        head = f"{name} not bounded above {range_}, {basis}"
        advice = ["the mean gradient cannot be told from noise yet: measure more steps"]
    else:
        tokens = "" if noise.tokens is None else f" = {readable(noise.tokens)} tokens"
        head = f"{name} {readable(noise.value)}{tokens} {range_}, {basis}"
    if noise.calibration is not None:
        factor = readable(noise.calibration)
        advice.append(f"from the normalisation layers, times a calibration of {factor}")
    if noise.num_skipped:
        skipped = counted(noise.num_skipped, "step")
        advice.append(f"{skipped} left out (not finite, or fewer than {needs})")
    if noise.coverage < 1 and noise.calibration is None:
        advice.append(f"covers only {100 * noise.coverage:.3g}% of the trainable parameters")
    if noise.note:
        advice.append(noise.note)
    return "; ".join([head, *advice])
