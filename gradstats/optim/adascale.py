"""AdaScale SGD (Johnson et al., ICML 2020, arXiv:2007.05105): a learning rate that follows the gain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradstats.errors import InvalidArgumentError
from gradstats.estimators import require
from gradstats.stats import GradStats

__all__ = ["AdaScale", "adascale_gain", "sgd_update_"]

# Entries of the estimates; SCHEDULED are the steps that a schedule was told to take.
WEIGHT, TR_SIGMA, TRUE_GRAD, GAIN, STEPS, SCHEDULED = range(6)


def adascale_gain(
    tr_sigma: Tensor, true_grad_sq_norm: Tensor, from_batch: float, to_batch: float | Tensor
) -> Tensor:
    """Gain of a batch of `to_batch` samples over one of `from_batch`: 0-d, between 1 and their ratio.

    ``r = (σ² + μ²)/(σ²/S + μ²)`` with σ² = tr Σ/from_batch, μ² = |G|² and S = to_batch/from_batch
    (arXiv:2007.05105, section 3.2). Negative estimates count as 0; 1 where both are. On the device.
    """
    noise, signal = tr_sigma.clamp_min(0), true_grad_sq_norm.clamp_min(0)
    top, bottom = noise / from_batch + signal, noise / to_batch + signal
    return torch.where(bottom > 0, top / bottom, 1.0)


def sgd_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor | None],
    *,
    learning_rate: float,
    gain: Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> list[Tensor | None]:
    """One step of SGD at ``gain × learning_rate``, in place. Returns the momentum buffers.

    `params`, `grads`: tensors of equal shapes. `buffers`: those of the last step, None at first.
    `gain`: 0-d, on their device. With a gain of 1 it is `torch.optim.SGD`, to the bit. Decay of the
    weights (λw in the gradient) is scaled like the rate.
    """
    params, updates = list(params), list(grads)
    if weight_decay:
        updates = list(torch._foreach_add(updates, params, alpha=weight_decay))
    kept: list[Tensor | None] = [None] * len(params)
    if momentum:
        moved = [
            g.clone() if old is None else old.mul_(momentum).add_(g)
            for g, old in zip(updates, buffers, strict=True)
        ]
        kept = list(moved)
        updates = list(torch._foreach_add(updates, moved, alpha=momentum)) if nesterov else moved
    # The gain enters by a product of its own: with 1, every rounding is that of plain SGD.
    torch._foreach_add_(params, torch._foreach_mul(updates, gain), alpha=-learning_rate)
    return kept


class AdaScale(torch.optim.Optimizer):
    """SGD whose rate is multiplied by the gain r_t that the present batch has over a small one.

    ```python
    optimizer.observe(monitor.step())
    optimizer.step()
    ```
    The learning rate and its schedule are those that suit `base_batch_size` samples; the schedule is
    to be stepped by scale-invariant iterations, of which a step counts for r_t:
    ``for _ in range(optimizer.schedule_steps()): scheduler.step()``. Training ends when
    `scale_invariant_steps` reaches the number of steps that the small batch would take.

    Args:
        params: parameters, or groups of them, as for any optimizer.
        lr: as in `torch.optim.SGD`, like the next three.
        momentum: of the buffer.
        weight_decay: added to the gradient.
        nesterov: whether momentum looks ahead.
        base_batch_size: global batch size that `lr` and its schedule are for, in the samples that the
            statistics count (tokens under ``attach(sample="token")``).
        half_life: steps after which an estimate of tr Σ or |G|² counts half.

    `observe` and `step` wait for nothing. Where several processes train together, all see the same
    statistics, and so the same gain.

    Raises InvalidArgumentError for values out of range.
    """

    scaled_by = "AdaScale"  # see `BatchScaling`

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        base_batch_size: int,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        half_life: float = 50.0,
    ) -> None:
        require(lr >= 0, "lr", lr, "pass a number of at least 0")
        require(base_batch_size >= 1, "base_batch_size", base_batch_size, "pass at least 1 sample")
        require(0 <= momentum < 1, "momentum", momentum, "pass a number from 0 to below 1")
        require(weight_decay >= 0, "weight_decay", weight_decay, "pass a number of at least 0")
        require(momentum > 0 or not nesterov, "nesterov", nesterov, "it needs momentum above 0")
        require(half_life > 0, "half_life", half_life, "pass a number of steps above 0")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)
        self.base_batch_size = base_batch_size
        self._keep = 0.5 ** (1 / half_life)
        # In the first group, where checkpoints of every kind find it.
        start = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
        self.param_groups[0]["estimates"] = start

    def observe(self, stats: GradStats | None) -> None:
        """Take in a step's statistics; None, or values that are not finite, leave the gain as it is."""
        if stats is None:
            return
        group = self.param_groups[0]
        old = group["estimates"].to(stats.mean_sq_norm.device)
        now = torch.stack([stats.tr_sigma, stats.true_grad_sq_norm]).to(old)
        weight = old[WEIGHT] * self._keep + 1
        # An exponential moving average, bias-corrected; the ratio comes last.
        means = old[TR_SIGMA : TRUE_GRAD + 1] + (now - old[TR_SIGMA : TRUE_GRAD + 1]) / weight
        samples = stats.samples
        gain = adascale_gain(means[0], means[1], self.base_batch_size, samples)
        new = torch.cat([weight.view(1), means, gain.view(1), old[STEPS:]])
        group["estimates"] = torch.where(now.isfinite().all(), new, old)

    @property
    def gain(self) -> float:
        """r_t of the next step. Waits for the device."""
        return float(self.param_groups[0]["estimates"][GAIN])

    @property
    def scale_invariant_steps(self) -> float:
        """Sum of the gains of the steps so far. Waits for the device."""
        return float(self.param_groups[0]["estimates"][STEPS])

    def schedule_steps(self) -> int:
        """How often a learning-rate schedule is to be stepped now, to stand at ⌊Σ r_t⌋ steps.

        Waits for the device. The steps it gave count as taken.
        """
        estimates = self.param_groups[0]["estimates"].clone()
        reached = estimates[STEPS].floor()
        due = int(reached - estimates[SCHEDULED])
        estimates[SCHEDULED] = reached
        self.param_groups[0]["estimates"] = estimates
        return due

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step at the gain of the statistics last observed (1 before any)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        estimates = self.param_groups[0]["estimates"]
        with torch.no_grad():
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                if not params:
                    continue
                buffers = sgd_update_(
                    params,
                    [p.grad for p in params if p.grad is not None],
                    [self.state[p].get("momentum_buffer") for p in params],
                    learning_rate=float(group["lr"]),
                    gain=estimates[GAIN].to(params[0].device),
                    momentum=group["momentum"],
                    weight_decay=group["weight_decay"],
                    nesterov=group["nesterov"],
                )
                for p, buffer in zip(params, buffers, strict=True):
                    if buffer is not None:
                        self.state[p]["momentum_buffer"] = buffer
            counted = torch.zeros_like(estimates)
            counted[STEPS] = estimates[GAIN]
            self.param_groups[0]["estimates"] = estimates + counted
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. Raises InvalidArgumentError for another optimizer's state."""
        groups = state_dict["param_groups"]
        if not groups or "estimates" not in groups[0]:
            raise InvalidArgumentError(
                "the state is of another optimizer: it holds no estimates of AdaScale. Load one that "
                "was made by AdaScale.state_dict()"
            )
        super().load_state_dict(dict(state_dict))
