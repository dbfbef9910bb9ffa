"""Runs for `gradstats.check`: each on a fresh copy of the model, without dropout, from one seed."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradstats.attaching import attach
from gradstats.distributed import ALONE
from gradstats.errors import GradStatsError, InvalidArgumentError, first_line
from gradstats.fallback import FallbackWarning
from gradstats.stats import GradStats

# Largest relative error that passes, by the dtype that a run computes in.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.2}
_DROPS = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout,
)  # fmt: skip


class _NoDropout(TorchFunctionMode):
    """Dropout draws for a whole batch at once, so a sample alone would get other numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            call = inspect.signature(_attention).bind(*args, **kwargs).arguments
            return func(**{**call, "dropout_p": 0.0, **call.pop("rest", {})})
        return func(*args, **kwargs)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **rest):  # type: ignore[no-untyped-def]
    """What the builtin's arguments are called."""


def joined(loss_fn: Callable[..., Any]) -> Callable[[nn.Module, Any], Tensor]:
    """`loss_fn` as a function of (model, batch).

    A module or a function of torch.nn.functional (or a partial of one) is a loss of outputs and
    targets, and is called loss_fn(model(x), y) with batch = (x, y); anything else is called
    loss_fn(model, batch).
    """
    inner = loss_fn.func if isinstance(loss_fn, partial) else loss_fn
    if not callable(inner):
        raise InvalidArgumentError(f"loss_fn is a {type(loss_fn).__name__}, which cannot be called")
    own = getattr(F, getattr(inner, "__name__", ""), None) is inner
    if not own and not isinstance(inner, nn.Module):
        return loss_fn

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise InvalidArgumentError(
                f"loss_fn is {getattr(inner, '__name__', type(inner).__name__)}, which is called "
                f"loss_fn(model(x), y), so batch must be a pair (x, y); it is a "
                f"{type(batch).__name__}. Pass a pair, or a function loss_fn(model, batch)."
            )
        out = model(batch[0])
        return _in_dtype_of(out, loss_fn)(out, batch[1])  # type: ignore[no-any-return]

    return loss


def _in_dtype_of(out: Any, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a loss module with tensors of its own (class weights), where those need casting."""
    if isinstance(loss_fn, nn.Module) and isinstance(out, Tensor) and out.is_floating_point():
        own = (*loss_fn.parameters(), *loss_fn.buffers())
        if any(t.is_floating_point() and t.dtype != out.dtype for t in own):
            return copy.deepcopy(loss_fn).to(out.dtype)
    return loss_fn


@dataclass
class Measured:
    """One attached run: the record, its plain gradients, and how each parameter was measured."""

    stats: GradStats | None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    fallbacks: dict[str, tuple[int, str]] = field(default_factory=dict)  # bytes, why
    refusal: GradStatsError | None = None


class Trial:
    """Copies of `model` in `dtype` (None: as it is) run `loss_fn`, which was given as (model, batch)."""

    def __init__(
        self, model: nn.Module, loss_fn: Callable[..., Tensor], dtype: torch.dtype | None
    ) -> None:
        self.model, self.loss_fn, self.dtype = model, loss_fn, dtype
        own = {p.dtype for p in model.parameters() if p.is_floating_point()}
        self.kind = dtype or max(own, key=_coarseness)  # what it computes in
        self.name = str(self.kind).removeprefix("torch.")
        self.tolerance = TOLERANCES.get(self.kind, max(TOLERANCES.values()))

    def fresh(self) -> nn.Module:
        """A copy of the model in the dtype of these runs. Raises InvalidArgumentError where it has none."""
        try:
            twin = copy.deepcopy(self.model)
        except Exception as error:
            raise InvalidArgumentError(
                f"check works on copies, and {type(self.model).__name__} cannot be copied "
                f"({first_line(error)}). Give check a model as it is before any forward."
            ) from error
        for module in twin.modules():
            if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
                module.dropout = 0.0
        return twin if self.dtype is None else twin.to(self.dtype)

    def loss(self, model: nn.Module, batch: Any, seed: int = 0) -> Tensor:
        """Raises InvalidArgumentError where `loss_fn` does not give a scalar of this model's."""
        torch.manual_seed(seed)
        try:
            with _NoDropout(), torch.enable_grad():
                value = self.loss_fn(model, batch)
        except GradStatsError:
            raise
        except Exception as error:
            raise InvalidArgumentError(
                f"loss_fn(model, batch) failed: {first_line(error)}. It is called with the model and "
                "the batch; a module or a function of torch.nn.functional is called "
                "loss_fn(model(x), y) with batch = (x, y)."
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InvalidArgumentError(
                f"loss_fn must return a scalar tensor, not {shape}. Take the mean or the sum over "
                "the samples."
            )
        return value.reshape(())

    def gradients(self, batch: Any) -> dict[str, Tensor | None]:
        """Plain autograd's gradient of every trainable parameter; None where the loss does not use it."""
        model = self.fresh()
        params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        value = self.loss(model, batch)
        found: tuple[Tensor | None, ...] = (None,) * len(params)
        if value.requires_grad:
            found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        if all(g is None for g in found):
            raise InvalidArgumentError(
                "the loss depends on no trainable parameter of the model that loss_fn was given. "
                "loss_fn must use its argument (check gives it a copy), without torch.no_grad()."
            )
        return dict(zip(params, found, strict=True))

    def measure(self, batch: Any, batch_dim: int) -> Measured:
        """The same through gradstats, in units where a sample's gradient is its contribution."""
        model = self.fresh()
        monitor = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                monitor = attach(
                    model, batch_dim=batch_dim, loss_reduction="sum", process_group=ALONE
                )
                self.loss(model, batch).backward()
            fallbacks = monitor.fallbacks()
            stats = monitor.step()
        except Exception as error:  # the plain run went well: whatever it is comes of measuring
            return Measured(None, refusal=_refusal(error))
        finally:
            if monitor is not None:
                monitor.detach()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return Measured(stats, grads, fallbacks)


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _refusal(error: Exception) -> GradStatsError:
    if isinstance(error, GradStatsError) and not isinstance(error, InvalidArgumentError):
        return error
    return GradStatsError(
        f"the model runs as it is, but not with gradstats attached: {first_line(error.__cause__ or error)}. "
        "The rule of a function it uses fails, or gradstats does; if no rule is yours, please report it."
    )
