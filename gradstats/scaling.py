"""The optimizer's learning rate, momentum and betas, brought to the batch size of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from gradstats.advice import Rule, scale_learning_rate
from gradstats.errors import InvalidArgumentError
from gradstats.estimators import require, whole
from gradstats.rates import scale_decay, warm_up

__all__ = ["BatchScaling"]

DECAYS = ("momentum", "beta2")


class BatchScaling:
    """Scales an optimizer's learning rate to the batch size, under any learning-rate scheduler.

    The hyperparameters in `optimizer.param_groups` stay those of `batch_size` samples and belong to
    whoever sets them: a scheduler reads and writes them as if nothing were scaled, and its state and
    the optimizer's hold nothing of the factor. They are scaled when `optimizer.step()` begins and put
    back when it ends, so no scheduler can overwrite the factor and none can apply it twice.

    Args:
        optimizer: any torch optimizer that does not scale itself (AdaScale does).
        batch_size: global batch size, in samples, that its hyperparameters suit.
        rule: "linear", "sqrt" or "noise" (see `gradstats.advice.scale_learning_rate`), or None where
            the rate is to stay.
        half_life: decays that keep their half-life in samples: "momentum" (SGD's momentum, Adam's
            β₁), "beta2" (Adam's β₂, RMSProp's α). Where torch's SGD accumulates undamped, its rate is
            then multiplied by (1 − m')/(1 − m) as well, for the rules speak of lr/(1 − momentum).
        warm_up: samples over which a new factor above the present one is reached.

    Raises InvalidArgumentError for values out of range, and for an optimizer that is scaled already.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        batch_size: int,
        rule: Rule | None,
        half_life: tuple[str, ...] = (),
        warm_up: float = 0,
    ) -> None:
        batch_size = whole("batch_size", batch_size)
        require(
            rule is None or rule in get_args(Rule), "rule", rule, f"pass one of {get_args(Rule)}"
        )
        require(set(half_life) <= set(DECAYS), "half_life", half_life, f"pass some of {DECAYS}")
        require(0 <= warm_up < math.inf, "warm_up", warm_up, "pass a number of samples, at least 0")
        other = getattr(optimizer, "scaled_by", None)
        if other is not None:
            raise InvalidArgumentError(
                f"{type(optimizer).__name__} has its learning rate scaled already, by {other}; two "
                "factors would multiply. Remove one of them"
            )
        self.optimizer = optimizer
        self.base_batch_size = self.batch_size = batch_size
        self.rule, self.half_life, self.warm_up = rule, tuple(half_life), warm_up
        self._noise: float | None = None
        self._factor = self._from = 1.0
        self._since = 0  # samples since the factor last changed
        self._held: list[dict[str, Any]] = []  # what step() must put back
        optimizer.scaled_by = type(self).__name__  # type: ignore[attr-defined]
        self._hooks = (
            optimizer.register_step_pre_hook(self._scale),
            optimizer.register_step_post_hook(self._restore),
        )

    @property
    def factor(self) -> float:
        """What the learning rate of the next step is multiplied by, without momentum's share."""
        if self._factor <= self._from:
            return self._factor
        return warm_up(self._since, self.warm_up, self._from, self._factor)

    def update(self, batch_size: int, noise: float | None = None) -> float:
        """The next steps are of `batch_size` samples, at this noise scale. Returns the final factor.

        Rule "noise" goes on with the last noise scale where this one is not a number. Before there
        was any, its factor is min(1, B/B₀), the lowest that any noise scale gives.
        """
        if noise is not None and not math.isnan(noise):
            self._noise = noise
        new = 1.0
        if self.rule == "noise" and self._noise is None:
            new = min(1.0, batch_size / self.base_batch_size)
        elif self.rule is not None:
            new = scale_learning_rate(
                1.0, self.base_batch_size, batch_size, rule=self.rule, noise=self._noise
            )
        if batch_size != self.batch_size:  # a noise scale that moves on does not start it again
            self._from, self._since = self.factor, 0
        self.batch_size, self._factor = batch_size, new
        return new

    def learning_rates(self) -> list[float]:
        """The rate of each parameter group in the next step, for logs."""
        return [float(self._scaled(group)["lr"]) for group in self.optimizer.param_groups]

    def close(self) -> None:
        """Leave the optimizer as it was."""
        for hook in self._hooks:
            hook.remove()
        self.optimizer.scaled_by = None  # type: ignore[attr-defined]

    # ---- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The factor and how far its warm-up is, as plain numbers."""
        return {
            "version": 1,
            "base_batch_size": self.base_batch_size,
            "batch_size": self.batch_size,
            "rule": self.rule,
            "noise": self._noise,
            "factor": self._factor,
            "from": self._from,
            "since": self._since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. Raises InvalidArgumentError where it is of other settings."""
        own = (1, self.base_batch_size, self.rule)
        seen = tuple(state.get(key) for key in ("version", "base_batch_size", "rule"))
        if seen != own:
            raise InvalidArgumentError(
                f"the state has (version, base_batch_size, rule) = {seen}, this BatchScaling {own}; "
                "make it with the arguments of the run that is resumed"
            )
        self.batch_size, self._noise = state["batch_size"], state["noise"]
        self._factor, self._from, self._since = state["factor"], state["from"], state["since"]

    # ---- inside optimizer.step() -----------------------------------------------------------------

    def _scaled(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What changes in a parameter group, without touching it."""
        ratio = self.batch_size / self.base_batch_size
        factor = self.factor
        new: dict[str, Any] = {}

        def keep(decay: float) -> float:
            return scale_decay(decay, 1.0, ratio)

        if "momentum" in self.half_life and "momentum" in group:
            old = float(group["momentum"])
            new["momentum"] = keep(old)
            if old < 1 and not group.get("dampening", 0):
                factor *= (1 - new["momentum"]) / (1 - old)
        if "betas" in group:
            first, second, *rest = group["betas"]
            first = keep(first) if "momentum" in self.half_life else first
            second = keep(second) if "beta2" in self.half_life else second
            new["betas"] = (first, second, *rest)
        if "beta2" in self.half_life and isinstance(self.optimizer, torch.optim.RMSprop):
            new["alpha"] = keep(group["alpha"])
        return {"lr": group["lr"] * factor, **new}

    def _scale(self, *_: object) -> None:
        self._put_back()  # a step that raised left them scaled
        for group in self.optimizer.param_groups:
            new = self._scaled(group)
            self._held.append({k: _copy(group[k]) for k in new})
            _write(group, new)

    def _restore(self, *_: object) -> None:
        if self._held:  # not again where a step calls that of its base class, with hooks of its own
            self._put_back()
            self._since += self.batch_size

    def _put_back(self) -> None:
        for group, held in zip(self.optimizer.param_groups, self._held, strict=False):
            _write(group, held)
        self._held = []


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _write(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Into the tensor where there is one: compiled and captured steps read that very tensor."""
    for key, value in values.items():
        if isinstance(group[key], Tensor):
            group[key].copy_(torch.as_tensor(value))
        else:
            group[key] = value
