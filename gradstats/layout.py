"""Finds out how a model flattens samples and positions into rows, by moving one sample.

The forward runs twice more, once with another sample in the place of sample 0. The rows that change are
sample 0's: the first ones of (B·T, …), or every B-th of (T·B, …). Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gradstats.calls import named, random_state, restore_random_state, tensors_in
from gradstats.errors import BatchDimError, UnsupportedLayerError, first_line
from gradstats.probes import ATTRIBUTE, CONSTANT

SAMPLES_FIRST, POSITIONS_FIRST = "samples first", "positions first"
WITHOUT_SAMPLES = "without samples"
# Functions that say themselves where the samples are in their inputs.
_OWN_ORDER = (F.multi_head_attention_forward, torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


class NeedsLayout(BaseException):
    """A flattened input was met whose rows are not known. Not an Exception, as NeedsFallback."""


class _Site(NamedTuple):
    path: str
    prints: Tensor  # (rows, 2): sum and sum of squares of each row
    shape: tuple[int, ...]


class Recorder(TorchFunctionMode):
    """Takes fingerprints of every activation that meets a parameter, module by module.

    But for those whose rows `Monitor.samples` tells: an expert gets other numbers of them.
    """

    def __init__(self, interposer: Any) -> None:
        super().__init__()
        self._interposer = interposer
        self.sites: list[_Site] = []
        self._paths: list[str] = [""]

    def enter(self, path: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the module at `path`; what it meets is noted under that path."""
        self._paths.append(path)
        try:
            return original(*args, **kwargs)
        finally:
            self._paths.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = tensors_in(*args, kwargs or {})
        marks = [getattr(t, ATTRIBUTE, None) for t in tensors]
        open_ = func not in _OWN_ORDER and self._interposer.groups is None
        if open_ and any(m is not None and m.name is not None for m in marks):
            self.sites += [
                _Site(self._paths[-1], _prints(t), tuple(t.shape))
                for t, mark in zip(tensors, marks, strict=True)
                if mark is None and t.dim() > 0
            ]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            _mark(out, marks)
        return out


def _mark(out: Tensor, marks: list[Any]) -> None:
    """What came of parameters and constants alone holds no sample either; else it may hold some."""
    if any(mark is None for mark in marks):
        if getattr(out, ATTRIBUTE, None) is CONSTANT:
            delattr(out, ATTRIBUTE)
    elif getattr(out, ATTRIBUTE, None) is None:
        setattr(out, ATTRIBUTE, next((m for m in marks if m.name is not None), CONSTANT))


class State:
    """Random numbers and buffers, to run a forward again as if for the first time."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._random = module, random_state(device)
        self._buffers = {name: b.clone() for name, b in module.named_buffers()}

    def restore(self) -> None:
        """Put both back."""
        restore_random_state(self._random)
        for name, buffer in self._module.named_buffers():
            if name in self._buffers:
                buffer.data.copy_(self._buffers[name])


def _prints(t: Tensor) -> Tensor:
    wide = t.detach().double().reshape(t.shape[0], -1)
    ramp = torch.linspace(1, 2, wide.shape[1], dtype=wide.dtype, device=wide.device)
    return torch.stack(((wide * ramp).sum(1), wide.square().sum(1)), 1)


def find(
    interposer: Any, state: State, original: Callable[..., Any], args: Any, kwargs: Any, at: int = 0
) -> dict[str, str]:
    """For each module that met rows in another number than samples: how they lie.

    Samples are in dimension 0, and sample `at` is moved. Random numbers and buffers are as `state` has
    them afterwards.

    Raises:
        BatchDimError: the rows of a sample are neither next to each other nor B apart, or the
            forward cannot run with another sample.
        UnsupportedLayerError: samples influence each other.
    """
    batch = interposer.sequences
    other = _another(tensors_in(*args, kwargs), batch, at)
    values = pytree.tree_map(lambda v: _moved(v, batch, at, other), (args, kwargs))
    before = _run(interposer, state, original, args, kwargs)
    try:
        after = _run(interposer, state, original, *values)
    except Exception as error:  # as of lengths that must fall
        raise BatchDimError(
            f"the model has other dimensions of {batch} or flattens samples, and its forward fails when "
            f"a sample takes another's place ({first_line(error)}), so "
            "where the samples are could not be found. Say it with monitor.samples(ids=...)."
        ) from error
    for one, two in zip_longest(before, after):
        if one is None or two is None or (one.path, one.shape) != (two.path, two.shape):
            raise BatchDimError(
                f"the model flattens samples, and from {named((one or two).path)} on it takes other "
                "ways, or gets other numbers of rows, when a sample changes, so their rows could not be "
                "found. Say which sample each row is of with monitor.samples(ids=...)."
            )
    layouts: dict[str, str] = {}
    for a, b in zip(before, after, strict=True):
        rows = a.prints.shape[0]
        if rows == 0 or rows % batch:
            continue
        layout = _layout(a, b, batch, at)
        if rows != batch and layouts.setdefault(a.path, layout) != layout:
            raise _unknown(a.path, rows, batch)
    return layouts


def lengths(
    interposer: Any, state: State, original: Callable[..., Any], args: Any, kwargs: Any
) -> dict[str, bool]:
    """For each module that met (B, T, …) with another T in it: whether the first T is the positions.

    The forward runs with sequences that are one position shorter; empty where it cannot.
    """
    batch, length = interposer.positions
    values = pytree.tree_map(lambda v: _shorter(v, batch, length), (args, kwargs))
    before = _run(interposer, state, original, args, kwargs)
    try:
        after = _run(interposer, state, original, *values)
    except Exception:  # the model takes this length only
        return {}
    if [s.path for s in before] != [s.path for s in after]:
        return {}
    found: dict[str, bool] = {}
    for a, b in zip(before, after, strict=True):
        if a.shape[:2] == (batch, length) and length in a.shape[2:]:
            first = b.shape == (batch, length - 1, *a.shape[2:])
            found[a.path] = found.get(a.path, True) and first
    return found


def _shorter(value: Any, batch: int, length: int) -> Any:
    """Without the last position: of (B, T, …) in dimension 1, of masks and the like everywhere."""
    if not isinstance(value, Tensor):
        return value
    dims = [d for d, size in enumerate(value.shape) if size == length]
    for d in (1,) if value.shape[:2] == (batch, length) else dims:
        value = value.narrow(d, 0, length - 1)
    return value


def _run(
    interposer: Any, state: State, original: Callable[..., Any], args: Any, kwargs: Any
) -> list[_Site]:
    """What a forward's parameters meet. Random numbers and buffers are as before it afterwards."""
    state.restore()
    interposer.recorder = Recorder(interposer)
    try:
        with interposer.recorder:
            original(*args, **kwargs)
        return interposer.recorder.sites  # type: ignore[no-any-return]
    finally:
        interposer.recorder = None
        state.restore()


def _another(inputs: list[Tensor], batch: int, at: int) -> int:
    """The sample that differs most from sample `at`: where both are alike, moving it shows nothing."""
    for t in inputs:
        if t.dim() and t.shape[0] == batch:
            unlike = (t != t[at : at + 1]).reshape(batch, -1).sum(1)
            if unlike.any():
                return int(unlike.argmax())
    return (at + 1) % batch


def _moved(value: Any, batch: int, at: int, other: int) -> Any:
    """Sample `other` in the place of sample `at`."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != batch:
        return value
    return torch.cat((value[:at], value[other : other + 1], value[at + 1 :]))


def _layout(before: _Site, after: _Site, batch: int, at: int) -> str:
    rows = before.prints.shape[0]
    scale = before.prints.abs().amax(0).clamp_min(1e-300)
    changed = ((before.prints - after.prints).abs() > 1e-5 * scale).any(1).nonzero().flatten()
    if not changed.numel():
        return WITHOUT_SAMPLES
    first = bool((changed // (rows // batch) == at).all())
    apart = bool((changed % batch == at).all())
    if rows == batch and not first:
        raise UnsupportedLayerError(
            f"{named(before.path)}: samples influence each other before it, or are in another order "
            f"(with another sample {at}, rows {changed[:5].tolist()} of {rows} change), so their gradients "
            "cannot be told apart. Instead, keep the samples independent and in order; or, if they are in "
            "another dimension, say so with attach(batch_dim=...), if in another order, with "
            "monitor.samples(ids=...) around what sees it."
        )
    if first == apart and rows != batch:
        raise _unknown(before.path, rows, batch)
    return SAMPLES_FIRST if first else POSITIONS_FIRST


def _unknown(path: str, rows: int, batch: int) -> BatchDimError:
    return BatchDimError(
        f"{named(path)} got {rows} rows of {batch} samples, and those of a sample are neither next to "
        f"each other nor {batch} apart. Say which sample each row is of with "
        "monitor.samples(ids=...)."
    )
