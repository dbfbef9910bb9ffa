"""The record of one optimizer step: exact per-sample gradient statistics, on the device.

Write c_i for sample i's contribution to `p.grad` over the step and N for the number of samples; in
the units of the record the gradient of sample i is g_i = N·c_i (g_i = c_i for a summed loss), so
that their mean is the gradient of the mean loss, Ḡ. With Σ the covariance of the g_i and G their true
mean (McCandlish et al., arXiv:1812.06162, appendix A.1):

    mean_sq_norm      = mean ‖g_i‖²                                E = |G|² + tr Σ
    grad_sq_norm      = ‖Ḡ‖²                                       E = |G|² + tr Σ / N
    tr_sigma          = (mean_sq_norm − grad_sq_norm)·N/(N − K)    unbiased
    true_grad_sq_norm = grad_sq_norm − tr_sigma·K/N                unbiased; may be negative
    noise_scale       = tr_sigma / true_grad_sq_norm

c_i holds whatever weight the loss gives sample i: its share of the tokens of a mean over tokens, or its
own weight. Then g_i scatters by its weight too. Of a mean over tokens the divisor is drawn as well, which
takes that part out of the gradient's variance again: tr Σ is above N times that variance by cv²·|G|², and
the noise scale by cv² samples, where cv is the counts' standard deviation over their mean and tokens of
long and short samples are alike.

K is the number of independent mean gradients a record holds: 1 for a step, more after a merge. A
step of one sample has no variance: its tr_sigma and what follows from it are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from gradstats.errors import InvalidArgumentError


def at_least_one(count: int | Tensor) -> int | Tensor:
    """To divide by; a tensor stays one."""
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)


@dataclass(frozen=True)
class Moments:
    """What a whole record and each of its layers have in common. All tensors are 0-d.

    `samples`: on the device where it was counted over several processes.
    """

    samples: int | Tensor
    num_groups: int
    mean_sq_norm: Tensor
    grad_sq_norm: Tensor

    @property
    def num_samples(self) -> int:
        """N, of all processes. Waits for the device where there are several."""
        return int(self.samples)

    @property
    def tr_sigma(self) -> Tensor:
        """Trace of the per-sample gradient covariance, unbiased. NaN where N = K."""
        n, k = self.samples, self.num_groups
        spread = self.mean_sq_norm - self.grad_sq_norm
        if isinstance(n, Tensor):
            return spread * torch.where(n > k, n / (n - k), torch.nan).to(spread.dtype)
        return spread * (n / (n - k) if n > k else math.nan)

    @property
    def true_grad_sq_norm(self) -> Tensor:
        """|G|², unbiased: negative where the noise happens to outweigh it."""
        return self.grad_sq_norm - self.tr_sigma * (self.num_groups / at_least_one(self.samples))

    @property
    def noise_scale(self) -> Tensor:
        """B_noise of this record alone, in samples; a ratio of noisy numbers, see `Monitor`."""
        return self.tr_sigma / self.true_grad_sq_norm


@dataclass(frozen=True)
class LayerStats(Moments):
    """The same for one parameter: `per_sample_sq_norm` is (N,), of this process's samples."""

    per_sample_sq_norm: Tensor


@dataclass(frozen=True)
class Coverage:
    """How much of the model a record speaks for. Reading it waits for the device.

    `causes`: reasons that are known on the device only, each with the parameters it is true of.
    `outside`: sizes of trainable parameters that were left out on purpose, by name, and `outside_reason`.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    measured_mask: Tensor
    reasons: Mapping[str, str] = field(default_factory=dict)
    causes: Sequence[tuple[Tensor, str]] = ()
    outside: Mapping[str, int] = field(default_factory=dict)
    outside_reason: str = ""

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the parameters that were measured."""
        mask = self.measured_mask.tolist()
        return tuple(n for n, ok in zip(self.names, mask, strict=True) if ok)

    @property
    def fraction(self) -> float:
        """Measured share of the trainable parameters' entries, 0 to 1."""
        mask = self.measured_mask.tolist()
        done = sum(s for s, ok in zip(self.sizes, mask, strict=True) if ok)
        total = sum(self.sizes) + sum(self.outside.values())
        return done / total if total else 0.0

    @property
    def missing(self) -> dict[str, str]:
        """Names of the parameters that were not measured, each with the reason."""
        unseen = (
            "its gradient did not come through operations of the forward that gradstats saw, once "
            "each: was backward called twice through one forward, or is the parameter used outside "
            "the model's forward, as by a penalty added to the loss?"
        )
        known = set(self.measured)
        found = dict(self.reasons)
        for mask, reason in self.causes:
            for name, true in zip(self.names, mask.tolist(), strict=True):
                if true:
                    found.setdefault(name, reason)
        missing = {n: found.get(n, unseen) for n in self.names if n not in known}
        return missing | dict.fromkeys(self.outside, self.outside_reason)


class Scaled(Mapping[str, Tensor]):
    """Tensors by name that are multiplied by `factor` when they are first asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], factor: float | Tensor) -> None:
        self._tensors = dict(tensors)
        self._factor = factor
        self._scaled: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if name not in self._scaled:
            self._scaled.add(name)
            tensor.mul_(self._factor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Layers(Mapping[str, LayerStats]):
    """Views into the record's vectors, made when they are asked for."""

    def __init__(self, names: Sequence[str], make: Callable[[int], LayerStats]) -> None:
        self._index = {name: i for i, name in enumerate(names)}
        self._make = make

    def __getitem__(self, name: str) -> LayerStats:
        return self._make(self._index[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


@dataclass(frozen=True)
class GradStats(Moments):
    """Statistics of one step. Nothing here was read from the device yet.

    `per_sample_sq_norm`: (N,), ‖g_i‖² over all measured parameters. `layer_*` are the same per
    parameter, in the order of `coverage.names`: `layer_sq_norm` (P, N), `layer_grad_sq_norm` (P,).
    Where several processes train together, these two hold this process's samples, and everything
    else is of all of them: `layer_mean_sq_norm` (P,) is then kept, for the rows do not show it.
    `grad_var`: with `moments=True`, each measured weight's unbiased per-sample gradient variance, in
    the weight's shape; its sum is that layer's `tr_sigma`.
    `method`: that of `attach`. "norm_layers" is of those layers alone. "micro_batch" and "ranks" know no
    sample's own norm: `per_sample_sq_norm` is empty, and `mean_sq_norm` is tr Σ + |G|² as estimated.
    """

    per_sample_sq_norm: Tensor
    coverage: Coverage
    grad_var: Mapping[str, Tensor] = field(default_factory=dict)
    layer_sq_norm: Tensor | None = None
    layer_grad_sq_norm: Tensor | None = None
    layer_mean_sq_norm: Tensor | None = None
    method: str = "per_sample"

    @property
    def layers(self) -> Mapping[str, LayerStats]:
        """Per parameter, by name; parameters that were not measured hold NaN."""
        rows, grads, means = self.layer_sq_norm, self.layer_grad_sq_norm, self.layer_mean_sq_norm
        if rows is None or grads is None:
            return {}

        def make(i: int) -> LayerStats:
            ok = self.coverage.measured_mask[i]
            row = torch.where(ok, rows[i], torch.nan)
            if means is None:
                mean = row.sum() / at_least_one(self.samples)
            else:
                mean = torch.where(ok, means[i], torch.nan)
            grad = torch.where(ok, grads[i], torch.nan)
            return LayerStats(self.samples, self.num_groups, mean, grad, row)

        return _Layers(self.coverage.names, make)

    @property
    def layer_tr_sigma(self) -> Tensor | None:
        """(P,): each parameter's tr Σ, in the order of `coverage.names`; NaN where it was not measured."""
        rows, grads, means = self.layer_sq_norm, self.layer_grad_sq_norm, self.layer_mean_sq_norm
        if rows is None or grads is None:
            return None
        if means is None:
            means = rows.sum(1) / at_least_one(self.samples)
        found = Moments(self.samples, self.num_groups, means, grads).tr_sigma
        return torch.where(self.coverage.measured_mask, found, torch.nan)

    def merge(self, other: GradStats) -> GradStats:
        """Pool two records of different samples, exactly: as if both had been summed at once.

        Each keeps its own mean gradient (steps, or workers that do not average), so the variance is
        the pooled one within them, with N − K degrees of freedom. Associative. The parameters must
        be the same; elementwise variances are pooled by their degrees of freedom.
        """
        if self.method != other.method:
            raise InvalidArgumentError(
                f"records of method {self.method!r} and {other.method!r} cannot be merged: they are of "
                "unlike precision, or of other parameters"
            )
        if self.coverage.names != other.coverage.names:
            raise InvalidArgumentError(
                "records of different models cannot be merged: their parameters are "
                f"{list(self.coverage.names)[:3]}… and {list(other.coverage.names)[:3]}…"
            )
        n, m = self.samples, other.samples
        total = at_least_one(n + m)

        def pool(a: Tensor, b: Tensor) -> Tensor:
            return (a * n + b * m) / total

        both = self.coverage.measured_mask & other.coverage.measured_mask
        reasons = {**self.coverage.reasons, **other.coverage.reasons}
        causes = (*self.coverage.causes, *other.coverage.causes)
        rows = grads = means = None
        if self.layer_sq_norm is not None and other.layer_sq_norm is not None:
            assert self.layer_grad_sq_norm is not None
            assert other.layer_grad_sq_norm is not None
            rows = torch.cat([self.layer_sq_norm, other.layer_sq_norm], 1)
            grads = pool(self.layer_grad_sq_norm, other.layer_grad_sq_norm)
            if self.layer_mean_sq_norm is not None and other.layer_mean_sq_norm is not None:
                means = pool(self.layer_mean_sq_norm, other.layer_mean_sq_norm)
        free, more = n - self.num_groups, m - other.num_groups
        return GradStats(
            samples=n + m,
            num_groups=self.num_groups + other.num_groups,
            mean_sq_norm=pool(self.mean_sq_norm, other.mean_sq_norm),
            grad_sq_norm=pool(self.grad_sq_norm, other.grad_sq_norm),
            per_sample_sq_norm=torch.cat([self.per_sample_sq_norm, other.per_sample_sq_norm]),
            coverage=replace(
                self.coverage, measured_mask=both, reasons=reasons, causes=tuple(causes)
            ),
            grad_var={
                name: (free * var + more * other.grad_var[name]) / at_least_one(free + more)
                for name, var in self.grad_var.items()
                if name in other.grad_var
            },
            layer_sq_norm=rows,
            layer_grad_sq_norm=grads,
            layer_mean_sq_norm=means,
            method=self.method,
        )

    @staticmethod
    def merge_all(records: Sequence[GradStats]) -> GradStats:
        """All records of a list, pooled."""
        if not records:
            raise InvalidArgumentError("merge_all needs at least one record")
        return reduce(GradStats.merge, records)
