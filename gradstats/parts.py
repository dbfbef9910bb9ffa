"""Statistics of a step from the mean gradients of parts of its batch, small against big.

A step's N samples come in m parts (micro-batches, ranks) of n_k samples with mean gradients ḡ_k, and
the step's gradient is Ḡ = Σ_k a_k ḡ_k, Σ a_k = 1. Where samples are independent,

    E‖ḡ_k‖² = |G|² + tr Σ/n_k        E‖Ḡ‖² = |G|² + tr Σ·Σ_k a_k²/n_k

so for any sizes n_k and shares a_k (McCandlish et al., arXiv:1812.06162, appendix A.1, is m equal parts)

    tr_sigma          = (Σ_k a_k‖ḡ_k‖² − ‖Ḡ‖²)/(Σ_k a_k(1 − a_k)/n_k)      unbiased
    true_grad_sq_norm = ‖Ḡ‖² − tr_sigma·Σ_k a_k²/n_k                        unbiased
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradstats.calls import tensors_in
from gradstats.errors import BatchDimError, InvalidArgumentError
from gradstats.ops import call
from gradstats.record import flags_on, held
from gradstats.source import Told
from gradstats.stats import Coverage, GradStats


def estimate(
    sizes: Tensor, sq_norms: Tensor, grad_sq_norm: Tensor, by_samples: bool
) -> tuple[Tensor, Tensor]:
    """Unbiased (tr Σ, |G|²), each (...), from m parts in the last dimension.

    `sizes`: (m,) samples n_k, in float64. `sq_norms`: (..., m) of what each part adds to the mean
    gradient, ‖a_k ḡ_k‖². `grad_sq_norm`: (...), ‖Ḡ‖². `by_samples`: a_k = n_k/N, else 1/m. NaN for one
    part alone, and where a part without samples has a share.
    """
    share = sizes / sizes.sum() if by_samples else torch.full_like(sizes, 1 / sizes.shape[-1])
    some = share > 0
    safe = torch.where(some, share, 1.0)
    count = torch.where(some, sizes, 1.0)
    spread = (safe * (1 - share) / count * some).sum(-1)  # 0 for one part
    mean = (torch.where(some, sq_norms / safe, 0.0)).sum(-1)
    known = (spread > 0) & (count > 0).all()
    tr_sigma = torch.where(known, (mean - grad_sq_norm) / spread, torch.nan)
    return tr_sigma, grad_sq_norm - tr_sigma * (share**2 / count * some).sum(-1)


def build(
    method: str,
    names: Sequence[str],
    sizes: Tensor,
    sq_norms: Tensor,
    grad_sq_norm: Tensor,
    by_samples: bool,
    coverage: Coverage,
    per_layer: bool,
) -> GradStats:
    """The record. `sq_norms`: (P, m) as in `estimate`, `grad_sq_norm` (P,), of every parameter."""
    tr_sigma, true = estimate(sizes, sq_norms, grad_sq_norm, by_samples)
    samples = sizes.sum()
    mean, grad = true + tr_sigma, true + tr_sigma / samples
    ok = coverage.measured_mask
    counted = (ok / ok.any()).to(mean.dtype)  # nothing measured: 0/0, and every total is NaN
    whole: Any = int(samples) if samples.device.type == "cpu" else samples
    return GradStats(
        samples=whole,
        num_groups=1,
        mean_sq_norm=torch.where(ok, mean, 0.0) @ counted,
        grad_sq_norm=torch.where(ok, grad, 0.0) @ counted,
        per_sample_sq_norm=mean.new_zeros(0),
        coverage=coverage,
        layer_sq_norm=mean.new_zeros(len(names), 0) if per_layer else None,
        layer_grad_sq_norm=grad if per_layer else None,
        layer_mean_sq_norm=mean if per_layer else None,
        method=method,
    )


def sq_norms(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """(P,) squared norms in float64; None counts as zero."""
    there = [t is not None for t in tensors]
    found = [held(t) for t in tensors if t is not None]
    norms = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    if not found:
        return norms
    values = call.multi_sq_norm(found).double()
    if all(there):
        return values  # type: ignore[no-any-return]
    return norms.masked_scatter_(flags_on(tuple(there), device), values)


@dataclass
class Call:
    """One forward of the model."""

    size: int
    synchronised: bool
    task: int | None = None  # the backward() call that reached its outputs


class Reached(Protocol):
    """Called when a backward, `task`, begins to propagate through `call`."""

    def __call__(self, call: Call, task: int, again: bool) -> None: ...


class _Hook:
    """Copies and pickles of the model come without what it calls."""

    def __init__(self, forwards: Forwards | None) -> None:
        self._forwards = forwards

    def __call__(self, model: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if not torch.compiler.is_compiling() and self._forwards is not None:
            self._forwards.after(model, args, kwargs, out)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> Any:
        return (_Hook, (None,))


class Forwards:
    """Counts the samples of the model's forwards, and tells when a backward reaches their outputs.

    A hook on the model as a whole, and on its outputs; nothing in the model is looked at.
    """

    def __init__(self, model: nn.Module, batch_dim: int, reached: Reached) -> None:
        self._batch_dim, self._reached = batch_dim, reached
        self._told: int | None = None
        self.enabled = True
        self._handle = model.register_forward_hook(_Hook(self), with_kwargs=True)

    def after(self, model: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """A forward is over."""
        if not self.enabled or not torch.is_grad_enabled():
            return
        outputs = [t for t in tensors_in(out) if t.requires_grad]
        if outputs:
            synchronised = getattr(model, "require_backward_grad_sync", True)
            call = Call(self._size(args, kwargs), synchronised)
            for tensor in outputs:
                tensor.register_hook(partial(self._reach, call))

    def _reach(self, call: Call, grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if call.task != task and self.enabled:
            again = call.task is not None
            call.task = task
            self._reached(call, task, again)

    def _size(self, args: Any, kwargs: Any) -> int:
        if self._told is not None:
            return self._told
        for tensor in tensors_in(*args, kwargs):
            if tensor.dim() > self._batch_dim:
                return tensor.shape[self._batch_dim]
        raise BatchDimError(
            f"the model was called without a tensor that has a dimension {self._batch_dim}, so the number "
            "of samples is not known. Set attach(batch_dim=...), or say it: with "
            "monitor.samples(num_samples=...) around the forward."
        )

    @contextmanager
    def samples(self, told: Told) -> Iterator[None]:
        """How many samples the forwards inside the block hold; of `ids` and `mask` only that counts."""
        before = self._told
        if told.mask is not None:
            self._told = int(told.mask.sum())
        elif told.cu_seqlens is not None:
            self._told = len(told.cu_seqlens) - 1
        elif told.num_samples is not None:
            self._told = told.num_samples
        elif told.ids is not None:
            self._told = int(told.ids.max()) + 1
        else:
            raise InvalidArgumentError("samples() needs num_samples=, ids=, cu_seqlens= or mask=")
        try:
            yield
        finally:
            self._told = before

    def close(self) -> None:
        """Look no longer."""
        self._handle.remove()
