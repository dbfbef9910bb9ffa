"""Whether the calls of a training loop come in the order that the statistics need.

The squared norms are of what the backward added to `p.grad`; so `p.grad` must still be that when
`step()` reads it. One parameter, the smallest, is watched: its gradient's identity and version, and
its own version, at the end of every backward. Nothing waits for the device. It sees what touches all
gradients (clipping, unscaling, zeroing, an optimizer's step), not what changes other ones alone, nor
what writes through `.data`. Not watched where several processes average their gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradstats.errors import OrderError
from gradstats.probes import Ledger

COMPARED = 4096  # entries of a gradient that are compared by value, at least, where it has as many

_STEP = "Call monitor.step() once per optimizer step, right after backward"


class MissingStepWarning(UserWarning):
    """Gradients were used or cleared without `step()`: what was measured of them is dropped."""


class _Seen(NamedTuple):
    param: Tensor
    grad: Tensor | None
    param_version: int
    grad_version: int
    value: Tensor | None = None  # entries of the gradient, where they are compared too


def _entries(grad: Tensor) -> Tensor:
    """Some from all over it: what scales a gradient scales them all."""
    flat = grad.detach().reshape(-1)
    return flat[:: max(1, len(flat) // COMPARED)]


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Order:
    """Watches one of the parameters `places`, by name (dict and key), whose backwards go to `ledger`."""

    def __init__(self, ledger: Ledger, places: Mapping[str, tuple[dict[str, Any], str]]) -> None:
        self._ledger = ledger
        sizes = {n: d[k].numel() for n, (d, k) in places.items() if d[k].requires_grad}
        self._name = min(sizes, key=lambda name: sizes[name])
        self._place = places[self._name]
        self._seen: _Seen | None = None
        self._settled = 0  # deliveries of the backwards before the last
        self._crossed = self._warned = False
        self._steps = 0
        self._doubts: list[Tensor] = []  # 0-d, on the device: whether a value had changed
        ledger.settled = self._after_backward

    def _look(self) -> _Seen:
        owner, key = self._place
        param = owner[key]
        grad = param.grad
        return _Seen(param, grad, param._version, 0 if grad is None else grad._version)

    def _after_backward(self) -> None:
        """The autograd engine runs this at the end of a backward that delivered something."""
        old, new = self._seen, self._look()
        if old is not None and old.grad is not None and old.param is new.param:
            moved = new.grad is not old.grad or new.param_version != old.param_version
            if moved and self._settled and not _distributed():
                del self._ledger.deliveries[: self._settled]
                self._crossed = True
                self._warn()
        compared = self._steps < 8 or self._steps % 64 == 0
        if compared and new.grad is not None and not _distributed():
            new = new._replace(value=_entries(new.grad).clone())
        self._seen, self._settled = new, len(self._ledger.deliveries)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "gradients that gradstats measured were used by the optimizer or cleared, and "
                f"monitor.step() was not called; those measurements are dropped. {_STEP}; "
                "attach(every=k) measures one step out of k.",
                MissingStepWarning,
                stacklevel=2,
            )

    def require_intact(self) -> None:
        """Raises OrderError where `p.grad` is not what the backwards since the last step left."""
        seen, crossed = self._seen, self._crossed
        self._seen, self._settled, self._crossed = None, 0, False
        self._steps += 1
        name = self._name
        if crossed:
            raise OrderError(
                "since the last monitor.step(), gradients were used by the optimizer or cleared "
                f"between two backwards (seen at parameter {name!r}), so what was measured is not "
                f"what the gradients hold. {_STEP}; attach(every=k) measures one step out of k."
            )
        owner, key = self._place
        param = owner[key]
        if seen is None or seen.grad is None or seen.param is not param:
            return
        grad = param.grad
        same = grad is seen.grad and grad._version == seen.grad_version
        if (same and seen.value is None) or _distributed():
            return
        if grad is not seen.grad:
            raise self._late("cleared" if grad is None else "replaced")
        if grad._version != seen.grad_version:
            raise self._late("changed in place")
        if seen.value is not None:
            known = seen.value == seen.value  # not NaN
            self._doubts.append((_entries(grad) != seen.value).logical_and(known).any())
            if grad.device.type == "cpu":  # where that costs nothing
                self.require_unchanged()

    def require_unchanged(self) -> None:
        """The same by value, as unscaling leaves no other trace. Waits for the device.

        Compared in the first steps and now and then later, for a loop does it in every step.
        """
        doubts, self._doubts = self._doubts, []
        if doubts and bool(torch.stack(doubts).any()):
            raise self._late("changed in place")

    def _late(self, what: str) -> OrderError:
        return OrderError(
            f"the gradient of parameter {self._name!r} was {what} between backward and "
            "monitor.step(), so it is no longer the sum of what was measured. Call monitor.step() "
            "right after loss.backward(): before clipping, scaler.unscale_(optimizer), any scaling by "
            "hand, scaler.step(optimizer) and zero_grad()."
        )
