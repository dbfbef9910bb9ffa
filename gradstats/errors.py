"""The one family of errors: each says what was seen, where, and what to do about it."""

from __future__ import annotations


class GradStatsError(Exception):
    """Base of every error that gradstats raises on purpose."""


class InvalidArgumentError(GradStatsError, ValueError):
    """An argument contradicts another one, or is out of range."""


class BackendError(GradStatsError, RuntimeError):
    """A backend that was asked for by name cannot run here."""


class UnsupportedLayerError(GradStatsError, RuntimeError):
    """No per-sample gradient exists for a layer as it is used, or none is implemented."""


class BatchDimError(GradStatsError, RuntimeError):
    """A layer's input does not carry the samples where they were expected."""


class NoStatisticsError(GradStatsError, RuntimeError):
    """`step()` found no backward pass to read from."""


class CaptureError(GradStatsError, RuntimeError):
    """A CUDA graph is being captured; what it replays later cannot be measured."""


class OrderError(GradStatsError, RuntimeError):
    """`step()` was called too late, or not at all, so the gradients are not what was measured."""


class AttachError(GradStatsError, RuntimeError):
    """The model cannot be attached to as it is."""


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its text, for a message that quotes it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
