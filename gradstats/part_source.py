"""What the methods that compare parts of a batch have in common."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradstats import distributed, parts
from gradstats.errors import AttachError
from gradstats.estimators import NoiseScale
from gradstats.options import Options
from gradstats.parts import Call, Forwards
from gradstats.record import indices_on
from gradstats.source import Source, Told
from gradstats.stats import Coverage, GradStats


class UnequalPartsWarning(UserWarning):
    """Parts of a batch were of unequal size, and what weight each has was not said."""


class PartSource(Source):
    """A source that has no per-sample gradient: hooks on the model as a whole and on parameters."""

    method: str
    what: str  # a part, in words

    def __init__(self, model: nn.Module, options: Options) -> None:
        self._options = options
        self._model = distributed.unwrapped(model)
        params = dict(self._model.named_parameters())
        if not any(p.requires_grad for p in params.values()):
            raise AttachError(
                f"{type(self._model).__name__} has no trainable parameter, so it has no gradient to "
                "measure. Call requires_grad_(True) on what is to be trained, then attach."
            )
        self.names = tuple(params)
        self.places = {name: distributed.owner_of(self._model, name) for name in self.names}
        self.device = next(iter(params.values())).device
        self.forwards = Forwards(model, options.batch_dim, self.reached)
        self._loss_scale = options.loss_scale()
        self._warned = False

    @abstractmethod
    def reached(self, call: Call, task: int, again: bool) -> None:
        """A backward, `task`, begins to propagate through `call`; not for the first time if `again`."""

    @property
    def enabled(self) -> bool:
        """Whether the steps to come are measured."""
        return self.forwards.enabled

    @enabled.setter
    def enabled(self, yes: bool) -> None:
        self.forwards.enabled = yes

    def params(self) -> list[Tensor]:
        """The parameters in row order, as they are now."""
        return [owner[key] for owner, key in self.places.values()]

    def build(
        self,
        sizes: Tensor,
        sq_norms: Tensor,
        grad_sq_norm: Tensor,
        ok: Tensor,
        causes: tuple[tuple[Tensor, str], ...] = (),
    ) -> GradStats:
        """The record. `sizes` (m,); `sq_norms` (P, m) and `grad_sq_norm` (P,) in units of p.grad."""
        options, params = self._options, self.params()
        by_samples = options.summed or options.weighting == "samples"
        if not by_samples and options.weighting is None:
            alike = sizes.amax() == sizes.amin()
            self._warn_if_unequal(sizes, alike)
            sq_norms = torch.where(alike, sq_norms, torch.nan)
        unit: Any = 1.0
        if options.summed:
            unit = self.size / sizes.sum().clamp_min(1)
        if self._loss_scale is not None:
            unit = unit / self._loss_scale.factor(sq_norms)
        keep = [i for i, p in enumerate(params) if p.requires_grad]
        rows = indices_on(tuple(keep), ok.device)
        names = tuple([self.names[i] for i in keep])
        numels = tuple([params[i].numel() for i in keep])
        causes = tuple([(mask[rows], text) for mask, text in causes])
        coverage = Coverage(names, numels, ok[rows], causes=causes)
        squares = sq_norms[rows] * unit**2, grad_sq_norm[rows] * unit**2
        per_layer = options.per_layer
        return parts.build(self.method, names, sizes, *squares, by_samples, coverage, per_layer)

    def _warn_if_unequal(self, sizes: Tensor, alike: Tensor) -> None:
        if self._warned or sizes.device.type != "cpu" or bool(alike):
            return
        self._warned = True
        warnings.warn(
            f"{self.what} of unequal size in one step ({_few(sizes)} samples) are left out, for it was "
            'not said what they weigh. Pass attach(weighting="samples") where every sample weighs '
            'alike in p.grad, or weighting="parts" where each of them does, as a mean loss divided by '
            "their number.",
            UnequalPartsWarning,
            stacklevel=4,
        )

    def require_unchanged(self) -> None:
        """Nothing is looked for by value here."""

    def samples(self, told: Told) -> AbstractContextManager[None]:
        """See `Monitor.samples`: here only how many they are matters."""
        return self.forwards.samples(told)

    def adjust(self, noise: NoiseScale) -> NoiseScale:
        """The noise scale, with the method's name on it."""
        return replace(noise, method=self.method)

    def close(self) -> None:
        """Leave the model as it was."""
        self.forwards.close()


def _few(sizes: Tensor) -> str:
    shown = [f"{int(n):,}" for n in sizes[:6]]
    return ", ".join(shown) + (", …" if len(sizes) > 6 else "")
