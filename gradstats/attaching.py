"""`attach`: what is measured of a model, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from gradstats import estimators
from gradstats.cadence import Every
from gradstats.monitor import Monitor
from gradstats.options import Method, Options, Sample, Weighting


def attach(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    method: Method = "per_sample",
    loss_reduction: Literal["mean", "sum"] = "mean",
    grad_scaler: Any = None,
    every: Every = 1,
    moments: bool = False,
    per_layer: bool = True,
    batch_dim: int = 0,
    sample: Sample = "example",
    half_life: float = estimators.DEFAULT_HALF_LIFE,
    confidence: float = 0.9,
    fallback_bytes: int = 2**28,
    self_check: int | None = None,
    process_group: Any = None,
    weighting: Weighting | None = None,
    calibration: float | None = None,
    tokens_per_sample: float | None = None,
    from_momentum: bool = False,
    geometry: str | Sequence[str] = (),
) -> Monitor:
    """Measure per-sample gradient statistics in the ordinary backward passes of `model`.

    The model's outputs and gradients do not change, nothing in it is replaced, and `detach()` undoes
    it. Works before or after `torch.compile`, and before or after wrapping in DistributedDataParallel
    or `fully_shard`. Where several processes train together, all must call `attach` and
    `Monitor.step`, with the same arguments: the ranks' statistics are joined in every step.

    Args:
        model: any module that treats the samples of a batch independently.
        optimizer: where `recommend` reads the learning rate and its scaling rule from.
        method: how the noise is seen; records and noise scale mean the same with each.
            "per_sample": exact, from every sample's gradient in the backward pass.
            "norm_layers": the same for the parameters of normalisation layers alone, a cheap proxy for
            the model; needs a `calibration`, or `Monitor.calibrate`.
            "micro_batch": the gradients of a step's micro-batches against their mean, for gradient
            accumulation in one process. "ranks": those of the ranks against their mean, for
            DistributedDataParallel. These two take any model, also one without per-sample gradients
            (BatchNorm in training mode), at far greater variance.
        loss_reduction: how the loss joins samples, "mean" or "sum". Only absolute norms depend on it.
        grad_scaler: the torch.amp.GradScaler that scales the loss, so that absolute norms are in units
            of the loss itself; without it they are of the scaled one.
        every: measure one step out of `every`; the others cost nothing. "sparse": all of the first 32
            steps, then 32 in each doubling of their number, down to one out of 64: for following a noise
            scale that grows as a training goes on, with a short `half_life`, at next to no cost.
            `gradstats.Budget(share)`: as often as that share of the training's time pays for, as timed.
        moments: also the elementwise variance of each weight's gradient (`GradStats.grad_var`), at
            one tensor of the weight's size each.
        per_layer: keep the statistics of each parameter in the record.
        batch_dim: the dimension that holds the samples, in every layer's input.
        sample: "example", an entry of that dimension; or "token", a position of a sequence: each row of
            (batch, positions, …) inputs is a sample, with the part of a weight's gradient that came
            through it, g_t·a_tᵀ (not the gradient of its own term of the loss, which attention spreads
            over the rows before it). All counts and batch sizes are then in tokens, and
            `per_sample_sq_norm` is in the order of the input's first two dimensions. Convolutions,
            recurrent layers and what sees pooled positions are reported as not covered.
        half_life: memory of the smoothed noise scale, in measured steps.
        confidence: of the noise scale's interval.
        fallback_bytes: memory for per-sample gradients of modules without rules, at a time.
        self_check: every so many measured steps, compare one layer's squared norms of two samples
            with their definition in float64 (see `gradstats.self_check`); such a step waits for the
            device.
        process_group: the processes whose gradients are averaged (default: DDP's group, else all).
        weighting: what unequal micro-batches or ranks weigh in `p.grad`: "samples", every sample alike;
            "parts", each micro-batch or rank alike, as a mean loss over accumulation_steps, and DDP's
            mean of mean losses. Where it is not said, steps with unequal ones are left out, and warned of.
        calibration: the model's noise scale over that of its normalisation layers, where it is known.
        tokens_per_sample: to give the noise scale in tokens too.
        from_momentum: estimate |G|² from the optimizer's momentum buffer (SGD with momentum, Adam and
            AdamW, PerSampleAdam, AdaScale), which averages over more samples than a step. Where the buffer
            is not what it should be, or the gradient turns within its memory, |G|² comes from single
            steps as ever, and the noise scale says why.
        geometry: follow the noise scale of each layer, and in the optimizer's eyes, over the last 1000
            steps: "plain", "adam" (with Adam's preconditioner), "sign" (of steps by sign), or several.
            The last two need `moments=True` and the optimizer. See `Monitor.layer_noise_scales`.

    Raises:
        AttachError: no trainable parameter, attached already, several devices, tensor parallel or FSDP1,
            or ranks that do not attach alike.
        InvalidArgumentError: an argument is out of range.
    """
    options = Options(
        optimizer=optimizer,
        method=method,
        loss_reduction=loss_reduction,
        grad_scaler=grad_scaler,
        every=every,
        moments=moments,
        per_layer=per_layer,
        batch_dim=batch_dim,
        sample=sample,
        half_life=half_life,
        confidence=confidence,
        fallback_bytes=fallback_bytes,
        self_check=self_check,
        process_group=process_group,
        weighting=weighting,
        calibration=calibration,
        tokens_per_sample=tokens_per_sample,
        from_momentum=from_momentum,
        geometry=(geometry,) if isinstance(geometry, str) else tuple(geometry),
    )
    return Monitor(model, options)
