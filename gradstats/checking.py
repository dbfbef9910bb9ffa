"""`gradstats.check`: what gradstats measures on a model, against plain autograd one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradstats import truth
from gradstats.batches import Samples
from gradstats.calls import named, random_state, restore_random_state
from gradstats.distributed import unwrapped
from gradstats.errors import InvalidArgumentError
from gradstats.report import CheckReport, LayerCheck, Path
from gradstats.trial import TOLERANCES, Measured, Trial, joined
from gradstats.truth import Truth


def check(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    batch: Any,
    *,
    samples: int = 3,
    batch_dim: int | None = None,
) -> CheckReport:
    """Whether gradstats is exact on this model, loss and batch, layer by layer, and what to change.

    Runs on copies of the model, in float64 where its code allows that, without dropout; the model, its
    gradients, buffers and mode and torch's random numbers stay as they are. Takes a few forwards and
    backwards of `samples` samples, two of the whole batch, and the memory of two copies of the model
    and `samples` + 1 gradients in float64.

    What it finds out: which dimension of the inputs holds the samples (a sample is replaced: the
    others' outputs must not change); which module lets samples influence each other; whether the loss
    is the mean or the sum of the samples' own; how each parameter is measured; and how far each
    parameter's per-sample squared gradient norms are from those of plain autograd, one sample at a
    time. It does not see random numbers other than torch's, nor what only other batches reach.

    Args:
        model: as it will be attached to. What is inside `torch.compile(model)` is checked eagerly.
        loss_fn: called loss_fn(model, batch), or, where it is an nn.Module or a function of
            torch.nn.functional (or a functools.partial of one), loss_fn(model(x), y) with
            batch = (x, y). Returns a scalar.
        batch: any nest of tuples, lists and dicts of tensors, at least 2 samples, on the model's device.
        samples: how many samples are compared one at a time, about; at least 2.
        batch_dim: the dimension of the inputs that holds the samples (default: found out).

    Raises:
        InvalidArgumentError: `loss_fn` fails on the batch, is no scalar or does not use the model it
            is given, the model cannot be copied, or an argument is out of range.
    """
    if samples < 2:
        raise InvalidArgumentError(f"samples={samples} must be at least 2, to tell them apart")
    model, loss = unwrapped(model), joined(loss_fn)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise InvalidArgumentError(
            f"{type(model).__name__} has no trainable parameter, so there is nothing to check"
        )
    state = random_state(trainable[0].device)
    try:
        own = Trial(model, loss, None)
        own.gradients(batch)  # what is wrong with the arguments shows here
        exact, notes = _reference(model, loss, batch, own)
        found, note = truth.find(exact, batch, samples, batch_dim)
        return _report(model, batch, own, exact, found, [*notes, *([note] if note else [])])
    finally:
        restore_random_state(state)


def _reference(model: nn.Module, loss: Any, batch: Any, own: Trial) -> tuple[Trial, list[str]]:
    """Runs in float64; where code insists on its own dtype, `own`."""
    wide = Trial(model, loss, torch.float64)
    try:
        everything = Samples(batch, 0)
        wide.loss(wide.fresh(), everything.take(range(everything.size), torch.float64))
    except ValueError as error:
        if not isinstance(error, InvalidArgumentError):
            raise InvalidArgumentError(f"{error}, so it holds no samples") from None
        why = str(error.__cause__ or error).strip().splitlines()[0]
        return own, [f"compared in {own.name} only, for the model does not run in float64: {why}"]
    return wide, []


def _report(
    model: nn.Module, batch: Any, own: Trial, exact: Trial, found: Truth, notes: list[str]
) -> CheckReport:
    problems, joins = _joining(exact, found)
    if found.reduction == "weighted":
        notes.append(
            "the loss weighs samples differently, as a mean over tokens or class weights do; the "
            "statistics are those of the samples' weighted contributions"
        )
    errors: dict[torch.dtype, dict[str, float]] = {}
    for trial in [] if joins else [own, exact]:
        if trial.kind not in errors:
            measured = trial.measure(found.samples.take(range(found.count), trial.dtype), found.dim)
            errors[trial.kind] = _errors(found, measured)
    full = own.measure(batch, found.dim)
    layers = []
    for name, param in model.named_parameters():
        pair = errors.get(own.kind, {}).get(name), errors.get(torch.float64, {}).get(name)
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        layers.append(_layer(name, owner, param, found, full, own.tolerance, pair))
    if full.refusal is not None:
        problems.append(str(full.refusal))
    problems += [_wrong(layer) for layer in layers if layer.wrong]
    problems += [
        f"parameter {layer.name!r} ({layer.module}) is not measured: {layer.reason}"
        for layer in layers
        if layer.path == "uncovered" and full.refusal is None
    ]
    return CheckReport(
        layers=tuple(layers),
        problems=tuple(problems),
        notes=tuple(notes),
        batch_dim=found.dim,
        loss_reduction=found.reduction,
        batch_size=found.samples.size,
        num_samples=0 if joins else found.count,
        mixing=found.mixing.path if found.mixing else None,
        dtype=own.name,
        reference_dtype=exact.name,
    )


def _joining(exact: Trial, found: Truth) -> tuple[list[str], bool]:
    """What joins the samples, in words, and whether nothing can be compared for it."""
    few = found.samples.take(range(found.count), exact.dtype)
    one, other = (float(exact.loss(exact.fresh(), few, seed).detach()) for seed in (0, 1))
    problems = []
    if one != other:
        problems.append(
            "the loss is random even without dropout, so a sample alone cannot be compared with the "
            "same sample in a batch. Check with model.eval(), or draw the same numbers in loss_fn."
        )
    elif found.mixing is not None:
        seen = found.mixing
        problems.append(
            f"{named(seen.path)} ({seen.kind}) lets samples influence each other: when sample 0 was "
            f"replaced, its output for the others changed by {seen.change:.0e} of its largest entry, "
            "though its input for them did not. No per-sample gradient exists then. Use GroupNorm or "
            "LayerNorm in place of BatchNorm, or call .eval() on it; for attention and recurrent "
            "layers, see batch_first: here the samples were looked for in dimension "
            f"{found.dim} (check(..., batch_dim=...) says otherwise)."
        )
    elif found.alone is not None:
        problems.append(
            f"a sample alone does not run: {found.alone}. Nothing can be compared one sample at a "
            "time; make the model and loss_fn work for a batch of one."
        )
    elif found.reduction is None:
        problems.append(
            f"loss_fn joins the samples: the gradient of {found.count} samples is no weighted sum of "
            f"the gradients of each alone (by {found.gap:.0e}), though no module of the model mixes "
            "them. In-batch negatives and batch statistics in a loss have no per-sample gradient: "
            "make the loss a mean or a sum over the samples."
        )
    return problems, bool(problems)


def _errors(found: Truth, measured: Measured) -> dict[str, float]:
    """Largest relative error of squared norms and of the gradient, by measured parameter."""
    if measured.stats is None:
        return {}
    largest = max(float(true.max()) for true in found.sq_norm.values())
    errors = {}
    for name in measured.stats.coverage.measured:
        true, gradient = found.sq_norm[name], found.gradient[name]
        scale = max(float(true.max()), 1e-10 * largest, 1e-300)
        seen = measured.stats.layers[name].per_sample_sq_norm.double().cpu()
        gaps = [float((seen - true).abs().max()) / scale]
        if gradient is not None and name in measured.gradients:
            gap = measured.gradients[name].double() - gradient.double()
            gaps.append(float(gap.norm()) / scale**0.5)
        errors[name] = max(gaps, key=lambda e: float("inf") if e != e else e)
    return errors


def _layer(
    name: str, owner: str, param: Tensor, found: Truth, full: Measured, tolerance: float,
    errors: Sequence[float | None],
) -> LayerCheck:  # fmt: skip
    own, wide = errors
    limits = ((own, tolerance), (wide, TOLERANCES[torch.float64]))
    wrong = any(e is not None and not e <= limit for e, limit in limits)
    path: Path = "rule"
    cost, reason = full.fallbacks.get(name, (0, ""))
    if not param.requires_grad:
        path = "frozen"
    elif full.stats is None:
        path, reason = "uncovered", f"refused: {full.refusal}"
    elif name in full.stats.coverage.missing:
        path, reason = "uncovered", full.stats.coverage.missing[name]
    elif found.gradient[name] is None:
        path = "unused"
    elif name in full.fallbacks:
        path = "fallback"
    return LayerCheck(name, owner, param.numel(), path, own, wide, cost, reason, wrong)


def _wrong(layer: LayerCheck) -> str:
    worst = max(e for e in (layer.error, layer.error_float64) if e is not None)
    return (
        f"parameter {layer.name!r} ({layer.module}) is measured wrongly, by {worst:.0e} of the truth. "
        "Either the rule of a function it is used in is wrong (if it is yours, compare it with plain "
        "autograd), or the loss uses the parameter outside the model's forward, as a penalty does."
    )
