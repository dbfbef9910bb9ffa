"""The monitor: what `attach` returns and a training loop talks to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradstats import advice, estimators
from gradstats.agreement import decide_on_first_rank
from gradstats.cadence import cadence_of
from gradstats.calls import require_no_capture
from gradstats.distributed import group_of, unwrapped
from gradstats.errors import GradStatsError, InvalidArgumentError, NoStatisticsError
from gradstats.geometry import Geometry
from gradstats.hessian import Curvature, curvature
from gradstats.layouts import StepSeconds
from gradstats.micro_batch import MicroBatches
from gradstats.momentum_reader import MomentumReader
from gradstats.norm_layers import NormLayers
from gradstats.options import Options, at_least
from gradstats.per_sample import PerSample
from gradstats.rank_means import RankMeans
from gradstats.series import Columns, Series
from gradstats.source import Source, Told
from gradstats.stats import Coverage, GradStats

SOURCES: dict[str, Callable[[nn.Module, Options], Source]] = {
    "per_sample": PerSample,
    "norm_layers": NormLayers,
    "micro_batch": MicroBatches,
    "ranks": RankMeans,
}


class Monitor:
    """Statistics of one model's gradients; made by `attach`."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self._options = options
        self._model = unwrapped(model)
        self._momentum = MomentumReader(model, options) if options.from_momentum else None
        self._geometry = Geometry(model, options) if options.geometry else None
        self._source = SOURCES[options.method](model, options)
        self._cadence = cadence_of(
            options.every,
            next(self._model.parameters()).device,
            partial(decide_on_first_rank, group=group_of(model, options.process_group))
            if self._source.size > 1
            else None,
        )
        self._attached = True
        self._steps = 0
        self._series = Series()
        self._estimate: tuple[Columns, estimators.NoiseScale] | None = None  # of these steps
        self._last_coverage: Coverage | float = 1.0
        self._last_batches: tuple[int | Tensor, ...] = ()  # samples of the last two steps

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The one that `attach` was given."""
        return self._options.optimizer

    @property
    def world_size(self) -> int:
        """Processes whose samples make up a step."""
        return self._source.size

    @property
    def batch_size(self) -> int | None:
        """Samples in a step at present: the larger of the last two, for an epoch's last is often smaller.

        None before a step. Waits for the device where several processes train together.
        """
        return max((int(b) for b in self._last_batches), default=None)

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
        if not self._attached:
            raise GradStatsError("this monitor was detached; attach(model) gives a new one")
        if not self._source.enabled:
            return self._next(None)
        require_no_capture()
        try:
            stats = self._source.measure()
        except GradStatsError:
            if self._source.size > 1:  # as the others do, so that `every` leaves out the same steps
                self._next(None)
            raise
        self._series.add(stats)
        if self._momentum is not None:
            self._momentum.add(stats)
        if self._geometry is not None:
            self._geometry.add(stats)
        return self._next(stats)

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
        return self._source.samples(Told(ids, num_samples, cu_seqlens, mask))

    def _next(self, stats: GradStats | None) -> GradStats | None:
        self._source.enabled = self._cadence.after(self._steps, self._source.enabled)
        self._steps += 1
        if stats is not None:  # not the record itself, which may hold a tensor for every weight
            self._last_coverage = stats.coverage
            self._last_batches = (*self._last_batches[-1:], stats.samples)
        return stats

    def fallbacks(self) -> dict[str, tuple[int, str]]:
        """Parameters measured sample by sample: bytes of per-sample gradients of their module, why.

        For the batch size of the last forward. Known once a forward ran.
        """
        return self._source.fallbacks()

    @property
    def sample(self) -> str:
        """What counts are of: "example" or "token", as `attach` was told."""
        return self._options.sample

    # ---- reading -------------------------------------------------------------------------------

    def noise_scale(self, geometry: str = "plain") -> estimators.NoiseScale:
        """The smoothed gradient noise scale B_noise = tr(Σ)/|G|², with its interval, in samples.

        Waits for the device. Before any step, or after steps of one sample only, its value is NaN
        and its sentence says why. `geometry`: as `attach(geometry=...)` was told to follow; "plain"
        always.

        Raises:
            InvalidArgumentError: a geometry that is not followed.
        """
        if geometry != "plain":
            return self._followed().noise_scale(geometry)
        series = self._read()
        if self._estimate is None or self._estimate[0] is not series:
            found = estimators.noise_scale(
                *series,
                half_life=self._options.half_life,
                confidence=self._options.confidence,
                coverage=self._coverage(),
            )
            self._estimate = series, found
        noise = self._estimate[1]
        if self._momentum is not None:
            noise = self._momentum.adjust(noise, series)
        noise = replace(noise, tokens_per_sample=self._options.tokens_per_sample)
        return self._source.adjust(noise)

    def layer_noise_scales(self, geometry: str = "plain") -> dict[str, estimators.NoiseScale]:
        """The noise scale of each parameter, by name, in a geometry that `attach` was told to follow.

        Raises:
            InvalidArgumentError: it is not followed.
        """
        return self._followed().layers(geometry)

    def _followed(self) -> Geometry:
        if self._geometry is None:
            raise InvalidArgumentError(
                "no geometry is followed here: attach(..., geometry=...) with the ones wanted"
            )
        return self._geometry

    def curvature(
        self, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Sequence[Any]
    ) -> Curvature:
        """tr(HΣ)/(GᵀHG) and the best learning rate, on demand; see `gradstats.curvature`.

        Call it between two steps, every so many of them, and `merge` what it returns. Nothing of it
        counts as a step.
        """
        source, options = self._source, self._options
        enabled, source.enabled = source.enabled, False
        try:
            where = {"batch_dim": options.batch_dim, "confidence": options.confidence}
            return curvature(self._model, loss_fn, batches, **where)  # type: ignore[arg-type]
        finally:
            source.enabled = enabled

    def calibrate(self, steps: int = 100) -> None:
        """Measure the next `steps` steps for all parameters, to learn what the proxy is to the model.

        For method="norm_layers". Those steps cost what method="per_sample" costs; the factor between the
        two noise scales is then known with an interval, which always widens that of `noise_scale()`, and is
        acted on where it is known to within a factor of 1.5. Call it between two steps, on all ranks alike.
        """
        at_least("steps", steps, 1)
        if not isinstance(self._source, NormLayers):
            raise InvalidArgumentError(
                f'calibrate() is for method="norm_layers"; method={self._options.method!r} measures all '
                "parameters"
            )
        self._source.calibrate(steps)

    def recommend(
        self,
        *,
        step_seconds: StepSeconds | None = None,
        max_micro_batch_size: int | None = None,
        max_batch_size: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        geometry: str = "plain",
        **options: Any,
    ) -> advice.BatchSizeAdvice:
        """The batch size that the measured noise scale calls for; see `gradstats.recommend`.

        `batch_size` is the present one (default: that of the last steps), `learning_rate` the
        present rate (default: the optimizer's, where `attach` was given one); `geometry` that of the noise
        scale to go by; `options` are its others.

        Raises:
            NoStatisticsError: nothing was measured yet.
            InvalidArgumentError: times of whole samples where tokens are counted.
        """
        advice.require_one_unit(self.sample, step_seconds, options.get("tokens_per_sample"))
        ranks = self.world_size
        if batch_size is None and self.batch_size is not None:
            batch_size = math.ceil(self.batch_size / ranks) * ranks
        if not batch_size:
            raise NoStatisticsError(
                "recommend() needs at least one measured step to know the present batch size. Train "
                "for some steps with monitor.step() in the loop, or pass batch_size=."
            )
        name = None
        if self._options.optimizer is not None:
            name = type(self._options.optimizer).__name__
            if learning_rate is None:
                learning_rate = float(self._options.optimizer.param_groups[0]["lr"])
        return advice.recommend(
            self.noise_scale(geometry),
            batch_size=batch_size,
            learning_rate=learning_rate,
            optimizer=name,
            step_seconds=step_seconds,
            max_micro_batch_size=max_micro_batch_size,
            max_batch_size=max_batch_size,
            world_size=ranks,
            **options,
        )

    def _read(self) -> Columns:
        if self._series.pending:
            self._source.require_unchanged()
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
            "cadence": self._cadence.state_dict(),
            **self._series.state_dict(),
            "coverage": self._coverage(),
            "batch_size": self.batch_size,
            "parameters": list(self._source.parameters),
            "sample": self._options.sample,
            "method": self._options.method,
            **self._source.state_dict(),
            "geometry": None if self._geometry is None else self._geometry.state_dict(),
            "momentum": None if self._momentum is None else self._momentum.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. Raises InvalidArgumentError for the state of another model."""
        if not isinstance(state, Mapping):
            raise InvalidArgumentError(
                f"load_state_dict() takes what state_dict() gave, not {type(state).__name__}"
            )
        if state.get("version") != 1:
            raise InvalidArgumentError(
                f"this monitor reads states of version 1, not {state.get('version')!r}; the file was "
                "written by another version of gradstats, or is not a monitor's state"
            )
        if state["parameters"] != list(self._source.parameters):
            raise InvalidArgumentError(
                f"the state is of another model: its parameters begin {state['parameters'][:3]}, "
                f"this model's {list(self._source.parameters)[:3]}"
            )
        unit = state.get("sample", "example")
        if unit != self._options.sample:
            raise InvalidArgumentError(
                f"the state counts in samples of another kind: attach(..., sample={unit!r}) goes on "
                f"from it, not sample={self._options.sample!r}"
            )
        method = state.get("method", "per_sample")
        if method != self._options.method:
            raise InvalidArgumentError(
                f"the state was measured by another method: attach(..., method={method!r}) goes on from "
                f"it, not method={self._options.method!r}"
            )
        self._series.load_state_dict(state)
        self._source.load_state_dict(dict(state))
        if self._momentum is not None and state.get("momentum") is not None:
            self._momentum.load_state_dict(state["momentum"])
        if self._geometry is not None and state.get("geometry") is not None:
            self._geometry.load_state_dict(state["geometry"])
        self._steps = state["steps"]
        self._source.enabled = self._cadence.load_state_dict(self._steps, state.get("cadence"))
        self._last_coverage = float(state["coverage"])
        self._last_batches = () if state["batch_size"] is None else (state["batch_size"],)

    def detach(self) -> None:
        """Leave the model as it was before `attach`. What was measured can still be read."""
        if self._attached:
            self._attached = False
            self._source.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()
