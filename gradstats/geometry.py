"""The noise scale as the optimizer sees it, of the whole model and of each parameter.

plain   tr Σ/|G|²
adam    tr(PΣ)/(GᵀPG) with P = 1/(√v̂ + ε), the optimizer's preconditioner before the step, in which this
        step's samples have no part: both are unbiased, elementwise σ² and ḡ² − σ²/N
sign    ‖σ‖₁²/‖G‖₁², what a step by signs sees (Bernstein et al. 2018, arXiv:1802.04434). |ḡ| says nothing
        of |G| where there is more noise than gradient; sign(m)·ḡ, with a momentum m of earlier steps, is
        unbiased for the part of ‖G‖₁ that steps along sign(m) gain. It is at most ‖G‖₁, so the
        noise scale is at most what is reported. ‖σ‖₁ of one step is unbiased for normal gradients; what
        it lacks for others, variances averaged over the steps tell: see `roots`.
"""

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
from gradstats.estimators import NoiseScale, noise_scale
from gradstats.options import Options
from gradstats.roots import AveragedRoots, shortness
from gradstats.stats import GradStats, at_least_one

HISTORY = 1000  # steps: two numbers per parameter and geometry each

__all__ = ["Geometry", "adam_moments", "sign_moments"]


def adam_moments(
    grad: Tensor, var: Tensor, preconditioner: Tensor, samples: int | Tensor
) -> tuple[Tensor, Tensor]:
    """(tr(PΣ), GᵀPG), unbiased, of one parameter: its mean gradient, σ² per sample, and diagonal P."""
    noise = (preconditioner * var).sum()
    return noise, (preconditioner * grad.square()).sum() - noise / at_least_one(samples)


def sign_moments(
    grad: Tensor, var: Tensor, momentum: Tensor, samples: int | Tensor
) -> tuple[Tensor, Tensor]:
    """(‖σ‖₁, the part of ‖G‖₁ along sign(momentum)), unbiased (σ: for normal gradients) of one parameter.

    `momentum`: of earlier steps, with none of these samples.
    """
    return var.sqrt().sum() / shortness(samples), (momentum.sign() * grad).sum()


class Geometry:
    """Follows the noise scale in each of `options.geometry`, in the pass that `moments` make anyway."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        if not options.moments and set(options.geometry) - {"plain"}:
            raise InvalidArgumentError(
                f"geometry={options.geometry!r} needs the elementwise variances: attach(moments=True)"
            )
        if options.optimizer is None and set(options.geometry) - {"plain"}:
            raise InvalidArgumentError(
                f"geometry={options.geometry!r} reads the optimizer's state: attach(optimizer=...)"
            )
        if options.geometry and not options.per_layer:
            raise InvalidArgumentError("geometry= follows each layer, and needs per_layer=True")
        self._options = options
        self._model = unwrapped(model)
        self.names: tuple[str, ...] = ()
        self._pending: deque[tuple[int | Tensor, Tensor]] = deque(maxlen=HISTORY)
        self._found: deque[tuple[int, list[list[list[float]]]]] = deque(maxlen=HISTORY)
        self._roots = AveragedRoots(options.half_life)

    def add(self, stats: GradStats) -> None:
        """Remember a step, before the optimizer's. Does not wait for the device."""
        names = stats.coverage.names
        if names != self.names:  # frozen or freed since: what was before is of other parameters
            self._pending.clear()
            self._found.clear()
            self._roots.clear()
            self.names = names
        read = {"plain": self._plain, "adam": self._adam, "sign": self._sign}
        rows = [read[kind](stats) for kind in self._options.geometry]
        self._pending.append((stats.samples, torch.stack(rows)))

    def _plain(self, stats: GradStats) -> Tensor:
        """(P, 2) of tr Σ and |G|²."""
        noise, grads = stats.layer_tr_sigma, stats.layer_grad_sq_norm
        assert noise is not None
        assert grads is not None
        true = grads - noise * (stats.num_groups / at_least_one(stats.samples))
        return torch.stack((noise, true), 1).double()

    def _adam(self, stats: GradStats) -> Tensor:
        return self._by_parameter(stats, _preconditioner, adam_moments)

    def _sign(self, stats: GradStats) -> Tensor:
        variances = [stats.grad_var.get(name) for name in stats.coverage.names]
        self._roots.add(variances, stats.coverage.sizes, stats.samples)
        return self._by_parameter(stats, _momentum, sign_moments)

    def _by_parameter(self, stats: GradStats, read: Any, moments: Any) -> Tensor:
        nothing = torch.full((), torch.nan, dtype=torch.float64, device=stats.mean_sq_norm.device)
        pairs: list[Tensor] = []
        optimizer = self._options.optimizer
        assert optimizer is not None
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for row, name in enumerate(stats.coverage.names):
            owner, key = owner_of(self._model, name)
            param = owner[key]
            grad = param.grad
            if grad is not None and sharded(grad):
                raise UnsupportedLayerError(
                    f"geometry=...: parameter {name!r} is sharded over processes, and its optimizer state "
                    "too, while variances are of whole weights. Attach without it."
                )
            found = None
            if name in stats.grad_var and grad is not None and id(param) in groups:
                found = read(optimizer.state.get(param, {}), groups[id(param)])
            if found is None:
                pairs += (nothing, nothing)
                continue
            var = stats.grad_var[name]
            assert grad is not None
            pairs += moments(
                self._in_units(grad.to(var.dtype), stats, row), var, found, stats.samples
            )
        return torch.stack(pairs).double().view(-1, 2)

    def _in_units(self, grad: Tensor, stats: GradStats, row: int) -> Tensor:
        """In the record's: a summed loss and a loss scale are in `p.grad`, and not in the variance."""
        if not self._options.summed and self._options.grad_scaler is None:
            return grad
        assert stats.layer_grad_sq_norm is not None
        own = torch.linalg.vector_norm(grad)
        wanted = stats.layer_grad_sq_norm[row].sqrt().to(grad.dtype)
        return grad * torch.where(own > 0, wanted / own, 1.0)

    def _read(self) -> None:
        pending = list(self._pending)
        self._pending.clear()
        if pending:
            values = torch.stack([rows for _, rows in pending]).cpu().tolist()
            counts = [int(n) for n, _ in pending]
            self._found.extend(zip(counts, values, strict=True))

    def noise_scale(self, kind: str) -> NoiseScale:
        """Of all parameters together."""
        return self._of(kind, [sum_known(rows) for rows in self._whole(kind)])

    def layers(self, kind: str) -> dict[str, NoiseScale]:
        """Of each parameter."""
        steps = self._whole(kind)
        return {
            name: self._of(kind, [rows[i] for rows in steps]) for i, name in enumerate(self.names)
        }

    def _whole(self, kind: str) -> list[list[list[float]]]:
        """Of each step and parameter, with what the roots of a step's variances lack."""
        steps = self._rows(kind)
        factors = self._roots.factors() if kind == "sign" else []
        if not factors:  # no variances were seen, or a state of a version that kept none
            return steps
        return [
            [[factor * noise, gain] for factor, (noise, gain) in zip(factors, rows, strict=True)]
            for rows in steps
        ]

    def _rows(self, kind: str) -> list[list[list[float]]]:
        if kind not in self._options.geometry:
            raise InvalidArgumentError(
                f"geometry={kind!r} was not followed; attach(geometry=...) follows "
                f"{self._options.geometry or 'none'} here"
            )
        self._read()
        place = self._options.geometry.index(kind)
        return [rows[place] for _, rows in self._found]

    def _of(self, kind: str, pairs: list[list[float]]) -> NoiseScale:
        options = self._options
        found = noise_scale(
            [n for n, _ in self._found], [a for a, _ in pairs], [b for _, b in pairs],
            half_life=options.half_life, confidence=options.confidence, squared=kind == "sign",
        )  # fmt: skip
        found = replace(found, geometry=kind, tokens_per_sample=options.tokens_per_sample)
        if kind != "sign":
            return found
        return replace(found, note="at most, for a momentum's signs are not all right")

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        self._read()
        found = [[n, rows] for n, rows in self._found]
        return {"names": list(self.names), "found": found, "roots": self._roots.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._pending.clear()
        self.names = tuple(state["names"])
        self._found = deque(((n, rows) for n, rows in state["found"]), maxlen=HISTORY)
        self._roots.load_state_dict(state.get("roots"))


def sum_known(rows: list[list[float]]) -> list[float]:
    """Both columns, over the parameters that were measured; NaN where none was."""
    known = [row for row in rows if not math.isnan(row[0])]
    return [math.fsum(column) for column in zip(*known, strict=True)] if known else [math.nan] * 2


def _preconditioner(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
    """1/(√v̂ + ε) as Adam and its kin, and RMSprop, would use it before this step."""
    if "square_avg" in state:
        square, size = state["square_avg"], 1.0
    elif "exp_avg_sq" in state:
        square = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        size = 1 - group["betas"][1] ** state.get("measured", state["step"])
    else:
        return None
    found: Tensor = 1 / ((square / size).sqrt() + group["eps"])
    return found


def _momentum(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
    found: Tensor | None = state.get("momentum_buffer", state.get("exp_avg"))
    return -found if found is not None and group.get("maximize", False) else found
