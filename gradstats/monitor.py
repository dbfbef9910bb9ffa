"""The monitor: what `attach` returns and a training loop talks to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradstats import advice, distributed, estimators, record, told
from gradstats.calls import require_no_capture
from gradstats.comm_hooks import require_means
from gradstats.errors import GradStatsError, InvalidArgumentError, NoStatisticsError
from gradstats.install import install, uninstall
from gradstats.layouts import StepSeconds
from gradstats.loss_scale import LossScale
from gradstats.moments import SecondMoments
from gradstats.order import Order
from gradstats.self_check import SelfCheck
from gradstats.series import Series
from gradstats.stats import Coverage, GradStats

Method = Literal["per_sample"]
Sample = Literal["example", "token"]


def attach(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    method: Method = "per_sample",
    loss_reduction: Literal["mean", "sum"] = "mean",
    grad_scaler: Any = None,
    every: int = 1,
    moments: bool = False,
    per_layer: bool = True,
    batch_dim: int = 0,
    sample: Sample = "example",
    half_life: float = estimators.DEFAULT_HALF_LIFE,
    confidence: float = 0.9,
    fallback_bytes: int = 2**28,
    self_check: int | None = None,
    process_group: Any = None,
) -> Monitor:
    """Measure per-sample gradient statistics in the ordinary backward passes of `model`.

    The model's outputs and gradients do not change, nothing in it is replaced, and `detach()` undoes
    it. Works before or after `torch.compile`, and before or after wrapping in DistributedDataParallel
    or `fully_shard`. Where several processes train together, all must call `attach` and
    `Monitor.step`, with the same arguments: the ranks' statistics are joined in every step.

    Args:
        model: any module that treats the samples of a batch independently.
        optimizer: where `recommend` reads the learning rate and its scaling rule from.
        method: "per_sample", exact for every sample.
        loss_reduction: how the loss joins samples, "mean" or "sum". Only absolute norms depend on it.
        grad_scaler: the torch.amp.GradScaler that scales the loss, so that absolute norms are in units
            of the loss itself; without it they are of the scaled one.
        every: measure one step out of `every`; the others cost nothing.
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
        half_life: memory of the smoothed noise scale, in steps.
        confidence: of the noise scale's interval.
        fallback_bytes: memory for per-sample gradients of modules without rules, at a time.
        self_check: every so many measured steps, compare one layer's squared norms of two samples
            with their definition in float64 (see `gradstats.self_check`); such a step waits for the
            device.
        process_group: the processes whose gradients are averaged (default: DDP's group, else all).

    Raises:
        AttachError: no trainable parameter, attached already, several devices, tensor parallel or FSDP1,
            or ranks that do not attach alike.
        InvalidArgumentError: an argument is out of range.
    """
    return Monitor(
        model,
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
    )


class Monitor:
    """Statistics of one model's gradients; made by `attach`, whose arguments it takes."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None,
        method: str,
        loss_reduction: str,
        grad_scaler: Any,
        every: int,
        moments: bool,
        per_layer: bool,
        batch_dim: int,
        sample: str,
        half_life: float,
        confidence: float,
        fallback_bytes: int,
        self_check: int | None,
        process_group: Any,
    ) -> None:
        _one_of("method", method, ("per_sample",))
        _one_of("loss_reduction", loss_reduction, ("mean", "sum"))
        _at_least("every", every, 1)
        _at_least("batch_dim", batch_dim, 0)
        _one_of("sample", sample, ("example", "token"))
        if sample == "token" and batch_dim != 0:
            raise InvalidArgumentError(
                f'batch_dim={batch_dim} cannot be used with sample="token", which reads (batch, '
                "positions, …) inputs. Transpose the model's input, or leave batch_dim out."
            )
        _at_least("fallback_bytes", fallback_bytes, 1)
        _at_least("self_check", 1 if self_check is None else self_check, 1)
        estimators.noise_scale([], [], [], half_life=half_life, confidence=confidence)
        self.every = every
        self._group = distributed.group_of(model, process_group)
        self._given, self._model = model, distributed.unwrapped(model)
        self._optimizer = optimizer
        self._summed = loss_reduction == "sum"
        self._loss_scale = None if grad_scaler is None else LossScale(grad_scaler, optimizer)
        self._per_layer = per_layer
        self._half_life, self._confidence = half_life, confidence
        self._sample = sample
        self._interposer = install(
            self._model, batch_dim, moments, fallback_bytes, sample == "token"
        )
        self._owners = [self._owner(name) for name in self._interposer.index]
        settings = repr((every, moments, batch_dim, sample, loss_reduction, self._interposer.dtype))
        try:
            self._ranks = distributed.join_ranks(
                self._model, self._interposer, self._group, settings, moments
            )
        except BaseException:
            uninstall(self._model)
            raise
        self._moments = None
        if moments:
            self._moments = SecondMoments(self._interposer, self._params, self._ranks)
        places = dict(zip(self._interposer.index, self._owners, strict=True))
        self._order = Order(self._interposer.ledger, places)
        self._self_check = SelfCheck(self_check) if self_check else None
        self._attached = True
        self._steps = 0
        self._series = Series()
        self._last_coverage: Coverage | float = 1.0
        self._last_batch: int | Tensor | None = None

    # ---- the loop ------------------------------------------------------------------------------

    def step(self) -> GradStats | None:
        """Close an optimizer step: call it after backward, before clipping and `optimizer.step()`.

        Everything that was propagated backward since the last call belongs to the step, in any
        number of micro-batches. Does not wait for the device. Returns None on a step that `every`
        leaves out. Where several processes train together, every one must call it, after a backward
        whose gradients were averaged: it holds one collective.

        Raises:
            CaptureError: a CUDA graph is being captured.
            NoStatisticsError: no backward went through the model since the last call.
            OrderError: the gradients were changed, used, cleared or unscaled before this call.
            UnsupportedLayerError: DDP has a communication hook that makes something else than a mean.
            GradStatsError: the self check found a wrong number.
        """
        self._require_attached()
        interposer = self._interposer
        if not interposer.enabled:
            return self._next(None)
        require_no_capture()
        names, params = tuple(interposer.index), self._params()
        distributed.require_joined(self._ranks, self._group, params)
        deliveries, reasons = interposer.take()
        try:
            require_means(self._given)
            self._order.require_intact()
            if self._self_check is not None:
                self._self_check.finish()
            groups = record.group(deliveries, reasons)
            scale = self._loss_scale.factor(groups[0].rows) if self._loss_scale else None
        except GradStatsError:
            self._give_up(params)
            raise
        if self._ranks is None:
            joined, local = None, record.gather(names, params, groups, reasons)
        else:
            absent = self._ranks.absent(params)
            local = record.gather(names, params, groups, reasons, absent)
            joined = self._ranks.join(params, local)
        m2 = self._moments.take([g.batch for g in groups], joined) if self._moments else {}
        if self._ranks is not None and joined is not None:
            error = self._ranks.finish(joined)
            if error is not None:
                self._next(None)
                raise error
        stats = record.build(
            names, params, local, joined, reasons, self._summed, self._per_layer, m2, scale
        )
        self._series.add(stats)
        return self._next(stats)

    def _give_up(self, params: list[Tensor]) -> None:
        """No statistics here: forget what belongs to no step, and let no other rank wait for it."""
        joined = self._ranks.join_failed(params) if self._ranks else None
        if self._moments:
            self._moments.take([], joined)
        if self._ranks:
            self._ranks.forget()
            self._next(None)  # as the others do, so that `every` leaves out the same steps

    def samples(
        self,
        ids: Tensor | None = None,
        num_samples: int | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> AbstractContextManager[None]:
        """Say whose rows a flattened input holds, for the forwards inside the `with` block.

        Around the model's forward, or within it around a part that sees other rows, as an expert
        does of the tokens that are routed to it. Waits for the device once.

        `ids`: (rows,), the sample of each row, numbered from 0: packed sequences, (B·T, …) before a
        linear layer, gathered tokens. Tensors with as many rows, (rows, …) or (1, rows, …), are read by
        it, tensors with `num_samples` entries in `batch_dim` as ever (default: those of the forward
        around it, else the largest id plus 1). Linear layers, embeddings, LayerNorm, RMSNorm and
        elementwise parameters take flattened inputs; others are reported as not covered, or refused.
        `cu_seqlens`: (samples + 1,), the same for sequences one after the other: where each begins,
        and the number of rows.
        `mask`: booleans, one for each sample ((batch, positions) where a sample is a token): False for
        what is there to fill the batch up. It is left out of the counts, and must have no part in
        the loss: a parameter whose gradient it contributed to is reported as not covered.

        Raises:
            BatchDimError: ids are not whole numbers from 0 to `num_samples` − 1, or within a forward
                of another number of samples; offsets that fall; a mask of another size.
            InvalidArgumentError: arguments that do not go together; ids where tokens are samples; a
                mask with `moments=True`.
        """
        moments = self._moments is not None
        return told.samples(self._interposer, ids, num_samples, cu_seqlens, mask, moments)

    def _next(self, stats: GradStats | None) -> GradStats | None:
        self._steps += 1
        self._interposer.enabled = self._steps % self.every == 0
        if stats is not None:  # not the record itself, which may hold a tensor for every weight
            self._last_coverage, self._last_batch = stats.coverage, stats.samples
        return stats

    def _owner(self, name: str) -> tuple[dict[str, Any], str]:
        path, _, key = name.rpartition(".")
        return self._model.get_submodule(path)._parameters, key

    def _params(self) -> list[Tensor]:
        """The parameters in row order, as they are now: FSDP and others replace the objects."""
        return [owner[key] for owner, key in self._owners]

    def fallbacks(self) -> dict[str, tuple[int, str]]:
        """Parameters measured sample by sample: bytes of per-sample gradients of their module, why.

        For the batch size of the last forward. Known once a forward ran.
        """
        it = self._interposer
        return {
            name: (plan.cost(it.batch), it.fallbacks[path].reason)
            for path, plan in it.plans.items()
            if path in it.fallbacks
            for name in plan.names()
        }

    @property
    def sample(self) -> str:
        """What counts are of: "example" or "token", as `attach` was told."""
        return self._sample

    # ---- reading -------------------------------------------------------------------------------

    def noise_scale(self) -> estimators.NoiseScale:
        """The smoothed gradient noise scale B_noise = tr(Σ)/|G|², with its interval, in samples.

        Waits for the device. Before any step, or after steps of one sample only, its value is NaN
        and its sentence says why.
        """
        return estimators.noise_scale(
            *self._read(),
            half_life=self._half_life,
            confidence=self._confidence,
            coverage=self._coverage(),
        )

    def recommend(
        self,
        *,
        step_seconds: StepSeconds | None = None,
        max_micro_batch_size: int | None = None,
        max_batch_size: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        **options: Any,
    ) -> advice.BatchSizeAdvice:
        """The batch size that the measured noise scale calls for; see `gradstats.recommend`.

        `batch_size` is the present one (default: samples in the last step), `learning_rate` the
        present rate (default: the optimizer's, where `attach` was given one); `options` are its others.

        Raises:
            NoStatisticsError: nothing was measured yet.
        """
        ranks = 1 if self._ranks is None else self._ranks.size
        if batch_size is None and self._last_batch is not None:
            batch_size = math.ceil(int(self._last_batch) / ranks) * ranks
        if not batch_size:
            raise NoStatisticsError(
                "recommend() needs at least one measured step to know the present batch size. Train "
                "for some steps with monitor.step() in the loop, or pass batch_size=."
            )
        name = None
        if self._optimizer is not None:
            name = type(self._optimizer).__name__
            if learning_rate is None:
                learning_rate = float(self._optimizer.param_groups[0]["lr"])
        return advice.recommend(
            self.noise_scale(),
            batch_size=batch_size,
            learning_rate=learning_rate,
            optimizer=name,
            step_seconds=step_seconds,
            max_micro_batch_size=max_micro_batch_size,
            max_batch_size=max_batch_size,
            world_size=ranks,
            **options,
        )

    def _read(self) -> tuple[list[int], list[float], list[float]]:
        if self._series.pending:
            self._order.require_unchanged()
        return self._series.read()

    def _coverage(self) -> float:
        last = self._last_coverage
        return last if isinstance(last, float) else last.fraction

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The estimate so far as plain numbers; exact, so that a resumed run goes on as this one."""
        self._read()
        return {
            "version": 1,
            "steps": self._steps,
            **self._series.state_dict(),
            "coverage": self._coverage(),
            "batch_size": None if self._last_batch is None else int(self._last_batch),
            "parameters": list(self._interposer.index),
            "sample": self._sample,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. Raises InvalidArgumentError for the state of another model."""
        if state.get("version") != 1:
            raise InvalidArgumentError(
                f"this monitor reads states of version 1, not {state.get('version')!r}; the file was "
                "written by another version of gradstats, or is not a monitor's state"
            )
        if state["parameters"] != list(self._interposer.index):
            raise InvalidArgumentError(
                f"the state is of another model: its parameters begin {state['parameters'][:3]}, "
                f"this model's {list(self._interposer.index)[:3]}"
            )
        unit = state.get("sample", "example")
        if unit != self._sample:
            raise InvalidArgumentError(
                f"the state counts in samples of another kind: attach(..., sample={unit!r}) goes on "
                f"from it, not sample={self._sample!r}"
            )
        self._series.load_state_dict(state)
        self._steps = state["steps"]
        self._interposer.enabled = self._steps % self.every == 0
        self._last_coverage, self._last_batch = float(state["coverage"]), state["batch_size"]

    def detach(self) -> None:
        """Leave the model as it was before `attach`. What was measured can still be read."""
        if self._attached:
            self._attached = False
            if self._self_check is not None:
                self._self_check.close()
            if self._ranks is not None:
                self._ranks.close()
            uninstall(self._model)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _require_attached(self) -> None:
        if not self._attached:
            raise GradStatsError("this monitor was detached; attach(model) gives a new one")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidArgumentError(
            f"{name}={value!r} is not known here; use {' or '.join(map(repr, known))}"
        )


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise InvalidArgumentError(f"{name}={value!r} must be a whole number of at least {least}")
