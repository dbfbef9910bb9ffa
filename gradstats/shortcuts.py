"""Ways past the interposer's Python for plain layers; the compiled extension takes them (csrc/shortcuts.cpp).

After a matrix product, Python's own code and data are no longer in the caches, and the interposer's steps
take ten times what they take alone. So an `nn.Linear` or `nn.LayerNorm` inside a pass, and a module without parameters that
is one function, are done by the extension where nothing about the call is special: a plain tensor with
the samples in front and parameters that were not used before in the pass, no mode and no transform of
anybody else, no autocast, nobody who observes operations. It checks all of that at every call, and says
None where it is not so; the interposer then does what it always does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradstats import backends, ops
from gradstats.probes import Mark, UseOf

_FORWARDS: dict[type, Any] = {kind: kind.forward for kind in (nn.Linear, nn.LayerNorm)}
Place = tuple[str, Mark, int]  # a parameter's name, mark and row


def made(interposer: object, device: torch.device) -> Any | None:
    """The extension's shortcuts for `interposer`; None where there is no extension for its device."""
    module: Any = backends.extension()[0]
    if device.type != "cpu" or not hasattr(module, "Shortcuts"):
        return None
    return module.Shortcuts(interposer, ops.observers, UseOf)


def of_module(
    shortcuts: Any, module: nn.Module, place: Callable[[str], Place | None]
) -> Callable[..., Any] | None:
    """The way past `Interposer.enter` for a module, from it and its input; None where there is none.

    `place` says where a parameter of the module is, by its key; None for one that is not measured.
    """
    forward = _FORWARDS.get(type(module))
    plain = forward is type(module).forward and "forward" not in module.__dict__
    if shortcuts is None or forward is None or not plain:
        return None
    places: list[Any] = []
    for key in ("weight", "bias"):
        if module._parameters.get(key) is None:
            places += [None, None, 0]
            continue
        found = place(key)
        if found is None:
            return None
        places += found
    way: Callable[..., Any]
    if type(module) is nn.Linear:
        way = shortcuts.linear(*places)
    elif module._parameters.get("weight") is not None:
        way = shortcuts.layer_norm(*places)
    else:
        return None
    return way
