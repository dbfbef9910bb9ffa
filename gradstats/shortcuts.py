"""Ways past the interposer's Python for plain layers; the compiled extension takes them (csrc/shortcuts.cpp).

After a matrix product, Python's own code and data are no longer in the caches, and the interposer's steps
take ten times what they take alone. So the extension does, where nothing about the call is special, an
`nn.Linear`, `nn.LayerNorm`, `nn.GroupNorm` or `nn.Conv1d` to `nn.Conv3d` inside a pass, a module without
parameters that is one function, and the entry into any other: with a plain tensor that holds the samples in
front and parameters that were not used before in the pass, no mode and no transform of anybody else, no
autocast, nobody who observes operations. It checks all of that at every call, and says NotImplemented where
it is not so; the interposer then does what it always does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradstats import backends, ops, tracing
from gradstats.layout import NeedsLayout
from gradstats.probes import Frame, Mark, Pass, UseOf

# The plain layers: the extension's name of their shortcut, and the methods that it takes the place of.
_LAYERS: dict[type, tuple[str, dict[str, Any]]] = {
    kind: (name, {method: getattr(kind, method) for method in methods})
    for kind, name, *methods in (
        (nn.Linear, "linear", "forward"),
        (nn.LayerNorm, "layer_norm", "forward"),
        (nn.GroupNorm, "group_norm", "forward"),
        (nn.Conv1d, "conv", "forward", "_conv_forward"),
        (nn.Conv2d, "conv", "forward", "_conv_forward"),
        (nn.Conv3d, "conv", "forward", "_conv_forward"),
    )
}
Place = tuple[str, Mark, int]  # a parameter's name, mark and row


def made(interposer: object, device: torch.device) -> Any | None:
    """The extension's shortcuts for `interposer`; None where there is no extension for its device."""
    module: Any = backends.extension()[0]
    if device.type != "cpu" or not hasattr(module, "Shortcuts"):
        return None
    return module.Shortcuts(interposer, ops.observers, (UseOf, Frame, Pass, NeedsLayout))


def of_module(
    shortcuts: Any | None, module: nn.Module, path: str, place: Callable[[str], Place | None]
) -> Callable[..., Any] | None:
    """The way past `Interposer.enter` for the module at `path`; None where there is none.

    It takes the module, its own forward and its only input, and may say NotImplemented. `place` says where
    a parameter of the module is, by its key; None for one that is not measured.
    """
    if shortcuts is None:
        return None
    around: Callable[..., Any] | None = None
    if not tracing.HIDES_CONSTRUCTORS:  # which a pass that begins sees to
        around = shortcuts.entry(path)
    kind = type(module)
    if kind not in _LAYERS:
        return around
    name, methods = _LAYERS[kind]
    if any(getattr(kind, k) is not f or k in module.__dict__ for k, f in methods.items()):
        return around
    places: list[Any] = []
    for key in ("weight", "bias"):
        if module._parameters.get(key) is None:
            places += [None, None, 0]
            continue
        found = place(key)
        if found is None:
            return around
        places += found
    if places[0] is None:
        return around
    make = getattr(shortcuts, name, None)  # an older build may not have it
    if make is None:
        return around
    layer = make(*places)
    if path == "" and around is not None:  # the model is the layer: a pass begins with it
        return partial(_entered, around, layer)
    return layer  # type: ignore[no-any-return]


def _entered(around: Any, layer: Any, module: nn.Module, original: Any, x: Tensor) -> Any:
    def inside(x: Tensor) -> Any:
        out = layer(module, original, x)
        return original(x) if out is NotImplemented else out

    return around(module, inside, x)
