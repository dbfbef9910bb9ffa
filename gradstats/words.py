"""A noise scale as a sentence that a person can act on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradstats.estimators import NoiseScale

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


def sentence(noise: NoiseScale) -> str:
    """Value, interval, what it rests on, and what to do where it cannot be acted on."""
    basis = f"from {noise.num_samples:,} samples in {_count(noise.num_steps, 'step')}"
    basis += _COMPARED.get(noise.method, "")
    end = "up, no upper end" if math.isinf(noise.high) else f"to {readable(noise.high)}"
    range_ = f"({100 * noise.confidence:.3g}% interval {readable(noise.low)} {end})"
    needs, name = _NEEDS[noise.method], f"noise scale{_GEOMETRY[noise.geometry]}"
    advice = [] if noise.actionable else ["too uncertain to act on: measure more steps"]
    if noise.uncalibrated:
        name += " of the normalisation layers"
        advice = [
            "a proxy of unknown calibration: monitor.calibrate() measures what it is to the whole model's"
        ]
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
        skipped = _count(noise.num_skipped, "step")
        advice.append(f"{skipped} left out (not finite, or fewer than {needs})")
    if noise.coverage < 1 and noise.calibration is None:
        advice.append(f"covers only {100 * noise.coverage:.3g}% of the trainable parameters")
    if noise.note:
        advice.append(noise.note)
    return "; ".join([head, *advice])


def readable(number: float) -> str:
    """A number to three significant digits: ``312``, ``0.0123``, ``6,400``, ``1.2e+16``."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if 1000 <= abs(rounded) < 1e15 else f"{rounded:.3g}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
