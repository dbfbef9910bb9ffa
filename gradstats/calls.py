"""Small parts of the interposer: looking at calls, and the way out of one that no rule covers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradstats.errors import CaptureError
from gradstats.probes import Frame


class NeedsFallback(BaseException):
    """Parameter `name` is used in a way no rule covers: run this frame's module by the fallback.

    Not an Exception, so that a model's own `except Exception` cannot swallow it.
    """

    def __init__(self, frame: Frame, name: str, reason: str) -> None:
        super().__init__(frame.path, name, reason)
        self.frame, self.name, self.reason = frame, name, reason


class FallbackFailed(BaseException):
    """The fallback cannot run this frame's module."""

    def __init__(self, frame: Frame, need: NeedsFallback, reason: str) -> None:
        super().__init__(frame.path, need.name, reason)
        self.frame, self.need, self.reason = frame, need, reason


_SCALARS = (type(None), bool, int, float, str)


def tensors_in(*values: object) -> list[Tensor]:
    """The tensors among arguments, and in tuples, lists and mappings among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(*value)
        elif type(value) not in _SCALARS and isinstance(value, (dict, Mapping)):
            found += tensors_in(*value.values())
    return found


def named(path: str) -> str:
    """A module by its path, in words."""
    return f"layer {path!r}" if path else "the model"


def within(name: str, path: str) -> bool:
    """Whether the parameter `name` is in the module at `path`."""
    return path == "" or name.startswith(path + ".")


def function_name(func: Any) -> str:
    """What a torch function is called; of a property, its own name."""
    name = getattr(func, "__name__", repr(func))
    return name if name != "__get__" else getattr(func.__self__, "__name__", name)


def require_no_capture() -> None:
    """Raises CaptureError while a CUDA graph is captured."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            "a CUDA graph is being captured in a step that gradstats measures. Replaying it runs kernels "
            "and no Python, so the samples of later replays would not be counted. Capture in a step that "
            "is left out, with attach(every=k), and run every k-th step without the graph; or capture "
            "before attach() or after detach()."
        )


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """torch's, on the CPU and on `device` where that is a CUDA device."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def restore_random_state(state: tuple[Tensor, Tensor | None] | None) -> None:
    """Put back what `random_state` gave; nothing for None."""
    if state is not None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1])
