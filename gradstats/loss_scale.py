"""The factor that a GradScaler put on the loss, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradstats.errors import InvalidArgumentError, OrderError


class LossScale:
    """Reads `scaler` (torch.amp.GradScaler, or anything whose `scale(tensor)` multiplies likewise)."""

    def __init__(self, scaler: Any, optimizer: torch.optim.Optimizer | None) -> None:
        if not callable(getattr(scaler, "scale", None)):
            raise InvalidArgumentError(
                f"grad_scaler={scaler!r} has no method scale(). Pass the torch.amp.GradScaler itself."
            )
        self._scaler, self._optimizer = scaler, optimizer

    def factor(self, like: Tensor) -> Tensor:
        """0-d: what the loss was multiplied by.

        Raises OrderError where the scaler scaled nothing yet, or took its scale off the gradients.
        """
        if getattr(self._scaler, "_scale", self) is None and self._scaler.is_enabled():
            raise OrderError(
                "attach(grad_scaler=...) was given a scaler that has not scaled any loss. Call "
                "scaler.scale(loss).backward(), or attach without it."
            )
        known = getattr(self._scaler, "_per_optimizer_states", {})
        stage = known[id(self._optimizer)]["stage"] if id(self._optimizer) in known else None
        if stage is not None and stage.name != "READY":
            raise OrderError(
                f"the scaler has taken its scale off the gradients already ({stage.name.lower()}), and "
                "the squared norms still have it. Call monitor.step() before "
                "scaler.unscale_(optimizer) and scaler.step(optimizer)."
            )
        return self._scaler.scale(torch.ones((), device=like.device))  # type: ignore[no-any-return]
