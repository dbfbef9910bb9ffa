"""`attach(method="norm_layers")`: the normalisation layers' parameters alone, as a proxy.

Their per-sample norms cost next to nothing, and their noise scale follows that of the whole model up to
a factor (Gray, Tiwari, Bergsma and Hestness 2024, arXiv:2411.00999). The factor is the user's to give,
or measured: in `Monitor.calibrate(steps)` the steps to come are measured for all parameters.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradstats import distributed
from gradstats.calibration import Calibration, calibrate
from gradstats.errors import AttachError
from gradstats.estimators import NoiseScale
from gradstats.options import Options
from gradstats.per_sample import PerSample
from gradstats.record import indices_on
from gradstats.stats import Coverage, GradStats, Moments

METHOD = "norm_layers"
LEFT_OUT = 'method="norm_layers" measures normalisation layers only'


class NormLayers(PerSample):
    """As its base, for the parameters of modules whose class is called …Norm…."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        inner = distributed.unwrapped(model)
        self._chosen = norm_parameters(inner)
        if not self._chosen:
            raise AttachError(
                f"{type(inner).__name__} has no trainable normalisation layer (a module whose class name "
                'holds "Norm" and that owns parameters). Use method="per_sample", or "micro_batch" with '
                "gradient accumulation."
            )
        self._given, self._asked = model, options
        factor = options.calibration
        self.calibration = (
            None if factor is None else Calibration(factor, factor, factor, unbiased=factor)
        )
        self._left = 0  # steps that are yet to be measured for all parameters
        self._pairs: list[tuple[int | Tensor, Tensor, Tensor]] = []
        super().__init__(model, options, self._chosen)
        self._all = {n: p.numel() for n, p in inner.named_parameters() if p.requires_grad}

    @property
    def parameters(self) -> tuple[str, ...]:
        """The normalisation layers', also while more are measured."""
        return tuple([n for n in self.names if n in self._chosen])

    def calibrate(self, steps: int) -> None:
        """See `Monitor.calibrate`."""
        self._left, self._pairs = steps, []
        self._switch(None)

    def measure(self) -> GradStats:
        if not self._left:
            return self._narrowed(super().measure())
        whole = super().measure()
        part = self._narrowed(whole)
        self._pairs.append((whole.samples, _squares(whole), _squares(part)))
        self._left -= 1
        if not self._left:
            self._switch(self._chosen)
            self._settle()
        return part

    def _switch(self, only: Collection[str] | None) -> None:
        enabled = self.enabled
        per_layer = only is None or self._asked.per_layer  # what is narrowed down needs its layers
        options = replace(self._asked, per_layer=per_layer)
        self.close()
        super().__init__(self._given, options, only)
        self.enabled = enabled

    def _narrowed(self, stats: GradStats) -> GradStats:
        """Of the normalisation layers alone; what else is trained counts as not measured."""
        seen = stats.coverage
        keep = [i for i, name in enumerate(seen.names) if name in self._chosen]
        rows = indices_on(tuple(keep), seen.measured_mask.device)
        names = tuple([seen.names[i] for i in keep])
        sizes = tuple([seen.sizes[i] for i in keep])
        ok = seen.measured_mask[rows]
        causes = tuple([(mask[rows], text) for mask, text in seen.causes])
        outside = {n: size for n, size in self._all.items() if n not in self._chosen}
        coverage = Coverage(names, sizes, ok, seen.reasons, causes, outside, LEFT_OUT)
        if len(keep) == len(seen.names) or stats.layer_sq_norm is None:
            return replace(stats, coverage=coverage, method=METHOD)
        assert stats.layer_grad_sq_norm is not None
        norms, grads = stats.layer_sq_norm[rows], stats.layer_grad_sq_norm[rows]
        means = stats.layer_mean_sq_norm
        means = norms.mean(1) if means is None else means[rows]
        counted, shown = (ok / ok.any()).to(norms.dtype), self._asked.per_layer
        return replace(
            stats,
            mean_sq_norm=torch.dot(means, counted),
            grad_sq_norm=torch.dot(grads, counted),
            per_sample_sq_norm=torch.mv(norms.t(), counted),
            coverage=coverage,
            grad_var={n: stats.grad_var[n] for n in names if n in stats.grad_var},
            layer_sq_norm=norms if shown else None,
            layer_grad_sq_norm=grads if shown else None,
            layer_mean_sq_norm=means if shown and stats.layer_mean_sq_norm is not None else None,
            method=METHOD,
        )

    def _settle(self) -> None:
        """The factor, from the steps that were measured in full. Waits for the device."""
        found = []
        for samples, *both in self._pairs:
            steps = [Moments(int(samples), 1, *squares.double().cpu()) for squares in both]
            found.append([[float(s.tr_sigma), float(s.true_grad_sq_norm)] for s in steps])
        columns = torch.tensor(found, dtype=torch.float64)
        self.calibration = calibrate(
            columns[:, 0].numpy(), columns[:, 1].numpy(), self._options.confidence
        )
        self._pairs = []

    def adjust(self, noise: NoiseScale) -> NoiseScale:
        """The model's noise scale, where the factor has an interval; else that of the layers.

        However wide that is: factors chosen for a narrow one would be those that came out wrong.
        """
        noise = replace(noise, method=METHOD)
        known = self.calibration
        if known is None or not known.low > 0:
            return noise
        return known.apply(noise)

    def state_dict(self) -> dict[str, Any]:
        """The calibration. One that is not over begins anew after a resume."""
        known = None if self.calibration is None else self.calibration.to_dict()
        return {"calibration": known, "calibrating": self._left + len(self._pairs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        known = state["calibration"]
        self.calibration = None if known is None else Calibration.from_dict(known)
        if state["calibrating"]:
            self.calibrate(state["calibrating"])


def norm_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the trainable parameters that normalisation layers own."""
    found = {
        f"{path}.{key}" if path else key
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for key, param in module._parameters.items()
        if param is not None and param.requires_grad
    }
    return frozenset(name for name, _ in model.named_parameters() if name in found)


def _squares(stats: GradStats) -> Tensor:
    return torch.stack([stats.mean_sq_norm, stats.grad_sq_norm])
