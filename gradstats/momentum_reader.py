"""Reads the optimizer's momentum buffers in a step, without waiting for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradstats.distributed import owner_of, sharded, unwrapped
from gradstats.errors import InvalidArgumentError, UnsupportedLayerError
from gradstats.estimators import NoiseScale, noise_scale, readable
from gradstats.momentum import BufferWeights, MomentumStep, compare
from gradstats.options import Options
from gradstats.series import HISTORY, Columns
from gradstats.stats import GradStats, Moments

BUFFERS = ("momentum_buffer", "exp_avg")
_PENDING = tuple[int | Tensor, Tensor, float, float, bool]


class MomentumReader:
    """|G|² of each step by the buffer; see `gradstats.momentum`."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        if options.optimizer is None or options.every != 1 or options.summed:
            raise InvalidArgumentError(
                f"from_momentum=True needs attach(optimizer=...), every=1 (not {options.every}) and "
                f'loss_reduction="mean" (not {options.loss_reduction!r}): it follows the buffer from '
                "step to step"
            )
        self._optimizer, self._options = options.optimizer, options
        self._model = unwrapped(model)
        self._weights = BufferWeights()
        self._pending: deque[_PENDING] = deque(maxlen=HISTORY)
        self._found: deque[float] = deque(maxlen=HISTORY)
        self._settings()

    def _settings(self) -> tuple[float, float, float]:
        """(β, c, c of a first step), which all parameter groups must share."""
        known = {_of(group) for group in self._optimizer.param_groups}
        if len(known) != 1 or None in known:
            raise InvalidArgumentError(
                f"from_momentum=True: {type(self._optimizer).__name__} must have momentum or betas, the "
                "same in all parameter groups. Attach without it."
            )
        for group in self._optimizer.param_groups:
            decoupled = group.get(
                "decoupled_weight_decay", "AdamW" in type(self._optimizer).__name__
            )
            if group.get("weight_decay", 0) and not decoupled and _is_torch(self._optimizer):
                raise InvalidArgumentError(
                    f"from_momentum=True: {type(self._optimizer).__name__} adds weight_decay="
                    f"{group['weight_decay']} to the gradient, so its buffer does not average gradients "
                    "alone. Use decoupled weight decay (AdamW), or attach without it."
                )
        found = known.pop()
        assert found is not None
        return found

    def add(self, stats: GradStats) -> None:
        """Remember a step, before the optimizer's own. Raises UnsupportedLayerError for sharded ones."""
        decay, entry, first = self._settings()
        names, zero = stats.coverage.names, torch.zeros((), device=stats.mean_sq_norm.device)
        rows: list[Tensor] = []
        known = gone = 0
        for name in names:
            owner, key = owner_of(self._model, name)
            param = owner[key]
            state = self._optimizer.state.get(param, {})
            buffer = next((state[b] for b in BUFFERS if state.get(b) is not None), None)
            grad = param.grad
            if grad is not None and sharded(grad):
                raise UnsupportedLayerError(
                    f"from_momentum=True: parameter {name!r} is sharded over processes, and its buffer "
                    "too. Attach without it."
                )
            known, gone = known + (buffer is not None), gone + (grad is not None and buffer is None)
            rows.append(torch.stack(_products(buffer, grad, zero)))
        ok = stats.coverage.measured_mask.double()
        own, inner, raw = torch.where(ok[:, None] > 0, torch.stack(rows), 0.0).sum(0)
        # A loss scale is in the gradient and not in the buffer.
        unit = torch.where(raw > 0, stats.grad_sq_norm.double() / raw, 1.0).sqrt()
        sign = -1.0 if self._optimizer.param_groups[0].get("maximize", False) else 1.0
        if known and gone:
            own = own * torch.nan
        numbers = (
            stats.mean_sq_norm.double(),
            stats.grad_sq_norm.double(),
            own,
            inner * unit * sign,
        )
        there = known > 0
        self._pending.append(
            (stats.samples, torch.stack(numbers), decay, entry if there else first, there)
        )

    def _read(self) -> None:
        pending = list(self._pending)
        self._pending.clear()
        if not pending:
            return
        values = torch.stack([p[1] for p in pending]).cpu()
        for (samples, _, decay, entry, there), row in zip(pending, values, strict=True):
            step = Moments(int(samples), 1, row[0], row[1])
            found = MomentumStep(
                int(samples), float(step.tr_sigma), float(row[1]),
                float(row[2]) if there else None, float(row[3]), decay, entry,
            )  # fmt: skip
            self._found.append(self._weights.follow(found)[0])

    def adjust(self, noise: NoiseScale, series: Columns) -> NoiseScale:
        """The noise scale with |G|² from the buffer, or as it was, with a note why."""
        self._read()
        if not self._found:
            return noise
        counts, traces, single = series[:, -len(self._found) :]
        options = self._options
        seen = compare(
            self._found, single, half_life=options.half_life, confidence=options.confidence
        )
        if seen.stale is False:
            decay = self._settings()[0]
            found = noise_scale(
                counts, traces, self._found, half_life=options.half_life,
                confidence=options.confidence, coverage=noise.coverage, decay=decay,
            )  # fmt: skip
            note = f"single steps leave room for {readable(max(seen.bound, 1.0))} times that"
            return replace(found, note=f"|G|² from the optimizer's momentum buffer ({note})")
        broken = self._weights.breaks
        if seen.stale:
            why = "the momentum buffer is stale, for the gradient turns"
        elif math.isfinite(seen.bound):
            why = "they cannot tell yet whether the momentum buffer is fresh"
        elif broken:
            why = (
                f"the buffer does not average the measured gradients ({broken} times; clipping, weight "
                "decay in the gradient or unmeasured steps do that)"
            )
        else:
            why = "the momentum buffer holds too few steps yet"
        return replace(noise, note=f"|G|² from single steps: {why}")

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        self._read()
        return {"weights": self._weights.to_dict(), "found": list(self._found)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._pending.clear()
        self._weights = BufferWeights.from_dict(state["weights"])
        self._found = deque(state["found"], maxlen=HISTORY)


def _of(group: Mapping[str, Any]) -> tuple[float, float, float] | None:
    if "betas" in group:
        decay = float(group["betas"][0])
        return decay, 1 - decay, 1 - decay
    decay = float(group.get("momentum", 0.0))
    return (decay, 1 - float(group.get("dampening", 0.0)), 1.0) if decay else None


def _is_torch(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim")


def _products(buffer: Tensor | None, grad: Tensor | None, zero: Tensor) -> list[Tensor]:
    """⟨m, m⟩, ⟨m, g⟩, ⟨g, g⟩, each 0-d."""

    def dot(a: Tensor | None, b: Tensor | None) -> Tensor:
        if a is None or b is None:
            return zero.double()
        wide = torch.promote_types(a.dtype, torch.float32)
        return torch.dot(a.detach().flatten().to(wide), b.detach().flatten().to(wide)).double()

    return [dot(buffer, buffer), dot(buffer, grad), dot(grad, grad)]
