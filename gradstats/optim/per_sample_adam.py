"""Adam whose preconditioner is the mean square of the per-sample gradients.

Roulet and Agarwala 2025, arXiv:2510.00236, section 4: Adam's second moment takes in the square of the
mini-batch's mean gradient, ``E ḡ² = G² + σ²/B``, so it changes with the batch size; per-sample
statistics give each part by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradstats.errors import InvalidArgumentError, NoStatisticsError, UnsupportedLayerError
from gradstats.estimators import require
from gradstats.stats import GradStats

__all__ = ["PerSampleAdam", "adam_update_"]


def adam_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    variances: Sequence[Tensor] | None,
    *,
    steps: Sequence[int],
    measured: Sequence[int],
    learning_rate: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    variance_factor: float | Tensor,
) -> None:
    """One step of Adam with decoupled weight decay, in place.

    ``v ← β₂ v + (1 − β₂)(ḡ² + variance_factor·σ²)``, all else as in `torch.optim.AdamW`; factor 0 is
    AdamW. `params`, `grads`, `exp_avgs`, `exp_avg_sqs`, `variances` (σ²): tensors of equal shapes.
    `steps`: those each parameter took, this one included; `measured`: those with `variances`. None
    for `variances` leaves the second moment as it is.
    """
    (first, second), params, grads = betas, list(params), list(grads)
    means, squares = list(exp_avgs), list(exp_avg_sqs)
    if weight_decay:
        torch._foreach_mul_(params, 1 - learning_rate * weight_decay)
    torch._foreach_lerp_(means, grads, 1 - first)
    if variances is not None:
        now = torch._foreach_mul(list(variances), variance_factor)
        torch._foreach_addcmul_(now, grads, grads)
        torch._foreach_lerp_(squares, now, 1 - second)
    root = torch._foreach_sqrt(squares)
    torch._foreach_div_(root, [(1 - second**n) ** 0.5 for n in measured])
    torch._foreach_add_(root, eps)
    update = torch._foreach_div(means, root)
    torch._foreach_mul_(update, [-1 / (1 - first**n) for n in steps])
    torch._foreach_mul_(update, learning_rate)
    torch._foreach_add_(params, update)


class PerSampleAdam(torch.optim.Optimizer):
    """AdamW with the preconditioner of a batch of `reference_batch_size` samples, whatever the batch.

    ```python
    monitor = gradstats.attach(model, moments=True)
    optimizer = PerSampleAdam(model.named_parameters(), lr=1e-3)
    ...
    optimizer.observe(monitor.step())
    optimizer.step()
    ```
    The second moment takes in ``ḡ² + (1/R − 1/B)σ²``, which for R = 1 is the mean square of the B
    per-sample gradients, and for R = B plain AdamW (also in steps of fewer samples than R). A larger R
    puts the mean before the variance, which that paper finds to train better.

    Args:
        params: *named* parameters, as `model.named_parameters()` gives them, or groups of them.
        lr: as in `torch.optim.AdamW`, like the next three.
        betas: memory of the first and the second moment.
        eps: added to the denominator.
        weight_decay: decoupled.
        reference_batch_size: R, in the samples that the statistics count.

    The variances are brought to the units of `p.grad` at the time of `step()` by the ratio of squared
    norms, so clipping by norm, unscaling and a summed loss do not matter. Parameters of FSDP2 are
    refused, for they are shards and the variances whole.

    Raises InvalidArgumentError for values out of range, and for parameters without names.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        reference_batch_size: int = 1,
    ) -> None:
        require(lr >= 0, "lr", lr, "pass a number of at least 0")
        valid = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        require(valid, "betas", betas, "pass two numbers from 0 to below 1")
        require(eps >= 0, "eps", eps, "pass a number of at least 0")
        require(weight_decay >= 0, "weight_decay", weight_decay, "pass a number of at least 0")
        size = reference_batch_size
        require(size >= 1, "reference_batch_size", size, "pass at least 1 sample")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.reference_batch_size = size
        if any("param_names" not in group for group in self.param_groups):
            raise InvalidArgumentError(
                "PerSampleAdam finds each parameter's statistics by its name; pass "
                "model.named_parameters(), not model.parameters()"
            )
        self._stats: GradStats | None = None

    def observe(self, stats: GradStats | None) -> None:
        """The statistics of the step to come.

        Without new ones (None, or those of a single sample) the second moment stays as it is. Raises
        NoStatisticsError where they hold no variances.
        """
        if stats is not None and not stats.grad_var:
            if isinstance(stats.samples, Tensor) or stats.samples >= 2:
                raise NoStatisticsError(
                    "PerSampleAdam needs the elementwise variances: use attach(model, moments=True)"
                )
            stats = None
        self._stats = stats

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Waits for nothing.

        Raises:
            NoStatisticsError: a parameter with a gradient has no variance in the statistics, or a
                first step came without any.
            UnsupportedLayerError: a parameter is a shard (FSDP2).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stats, self._stats = self._stats, None
        named = [
            [
                (n, p)
                for n, p in zip(g["param_names"], g["params"], strict=True)
                if p.grad is not None
            ]
            for g in self.param_groups
        ]
        together = [pair for group in named for pair in group]
        for name, p in together:
            self._require(name, p, stats)
        with torch.no_grad():
            factor = self._factor(stats, together) if stats is not None and together else 0.0
            for group, members in zip(self.param_groups, named, strict=True):
                if members:
                    self._update(group, members, stats, factor)
        return loss

    def _require(self, name: str, p: Tensor, stats: GradStats | None) -> None:
        if hasattr(p, "full_tensor"):
            raise UnsupportedLayerError(
                f"parameter {name!r} is sharded over processes, while variances are of whole weights; "
                "use PerSampleAdam with DistributedDataParallel, or torch.optim.AdamW"
            )
        known = () if stats is None or stats.layer_grad_sq_norm is None else tuple(stats.grad_var)
        if (not self.state[p]) if stats is None else (name not in known):
            raise NoStatisticsError(
                f"PerSampleAdam has no variance for parameter {name!r}; it has some for {known[:3]}. Use "
                "attach(model, moments=True), the names of the same model, and "
                "optimizer.observe(monitor.step()) before optimizer.step(); coverage.missing of the "
                "statistics tells what was not measured"
            )

    def _factor(self, stats: GradStats, named: Sequence[tuple[str, Tensor]]) -> Tensor:
        """(1/R − 1/B, at least 0) in the units of the gradients' squares: 0-d."""
        # By views and not by an index, which would be copied to the device and waited for.
        assert stats.layer_grad_sq_norm is not None
        rows = dict(zip(stats.coverage.names, stats.layer_grad_sq_norm.unbind(), strict=True))
        then = torch.stack([rows[name] for name, _ in named]).sum()
        grads = [p.grad.to(then.dtype) for _, p in named if p.grad is not None]
        now = torch.stack(torch._foreach_norm(grads)).square().sum()
        n = stats.samples
        weight = 1 / self.reference_batch_size - 1 / (
            n.to(now.dtype) if isinstance(n, Tensor) else n
        )
        weight = weight.clamp_min(0) if isinstance(weight, Tensor) else max(weight, 0.0)
        return torch.where(then > 0, weight * now / then, weight).to(now)

    def _update(
        self,
        group: dict[str, Any],
        members: Sequence[tuple[str, Tensor]],
        stats: GradStats | None,
        factor: float | Tensor,
    ) -> None:
        states = [self.state[p] for _, p in members]
        for state, (_, p) in zip(states, members, strict=True):
            if not state:
                state.update(step=0, measured=0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
            state["measured"] += stats is not None
        adam_update_(
            [p for _, p in members],
            [p.grad for _, p in members if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            None if stats is None else [stats.grad_var[name].to(p) for name, p in members],
            steps=[state["step"] for state in states],
            measured=[state["measured"] for state in states],
            learning_rate=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            variance_factor=factor,
        )
