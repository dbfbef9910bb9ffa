"""Marks a model's parameters and lets its modules' forwards enter the interposer; and undoes it."""

from __future__ import annotations

import types
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from gradstats import backends, distributed, fallback, shortcuts
from gradstats.errors import AttachError
from gradstats.interpose import Interposer
from gradstats.probes import ATTRIBUTE, CONSTANT, Mark, new_m2_leaf
from gradstats.tokens import TokenInterposer

ENTRY = "_gradstats_entry"
# Modules of these are one function: what holds them says as much about where it was called.
_TRANSPARENT = ("torch.nn.modules.activation", "torch.nn.modules.dropout")


def _entered_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    interposer, path, original, shortcut = self.__dict__[ENTRY]
    # A copy of an attached model, one that was pickled, or a step that is left out.
    if interposer is None or not (interposer.enabled or interposer.recorder):
        return original(*args, **kwargs)
    if shortcut is not None and len(args) == 1 and not kwargs and not is_dynamo_compiling():
        out = shortcut(self, original, *args)
        if out is not NotImplemented:
            return out
    return interposer.enter(self, path, original, args, kwargs)


def _bare_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a module that the interposer need not know of."""
    interposer, _, original, shortcut = self.__dict__[ENTRY]
    plain = interposer is not None and interposer.enabled and len(args) == 1 and not kwargs
    if plain and not is_dynamo_compiling():
        out = shortcut(self, original, *args)
        if out is not NotImplemented:
            return out
    return original(*args, **kwargs)


for _forward in (_entered_forward, _bare_forward):
    _forward.__name__ = "forward"  # so that a pickled model finds its class's forward


def install(
    model: nn.Module,
    batch_dim: int,
    moments: bool,
    chunk_bytes: int,
    per_token: bool = False,
    only: Collection[str] | None = None,
) -> Interposer:
    """Attach to `model`. Raises AttachError where that cannot give right numbers.

    `only`: names of the parameters to measure (default: all).
    """
    backends.forced()  # what the environment asks for must exist
    if not isinstance(model, nn.Module):
        raise AttachError(f"attach() takes the model, an nn.Module, not {type(model).__name__}")
    if not any(_entered(m) for m in model.modules()):
        _leave(model)  # what a copy of an attached model still carries
    aliases = _aliases(model)
    params = dict(model.named_parameters())
    _check(model, params)
    if only is not None:
        aliases = {name: group for name, group in aliases.items() if name in only}
        params = {name: params[name] for name in aliases}
    dtype = torch.float32
    if any(p.dtype == torch.float64 for p in params.values()):
        dtype = torch.float64
    device = next(iter(params.values())).device
    kind = TokenInterposer if per_token else Interposer
    interposer = kind(aliases, batch_dim, dtype, device, fallback.run, chunk_bytes)
    for name, param in params.items():
        m2 = new_m2_leaf(param, dtype) if moments else None
        interposer.marks[name] = Mark(name, m2)
        setattr(param, ATTRIBUTE, interposer.marks[name])
    for buffer in model.buffers():
        setattr(buffer, ATTRIBUTE, CONSTANT)
    ways = interposer.shortcuts if batch_dim == 0 and not per_token else None
    for path, module in model.named_modules():
        if type(module).__module__ in _TRANSPARENT and next(module.parameters(), None) is None:
            if ways is not None:
                _enter(module, _bare_forward, interposer, path, ways.bare())
            continue
        interposer.owners[path] = module._parameters
        shortcut = shortcuts.of_module(ways, module, path, partial(interposer.place, path))
        _enter(module, _entered_forward, interposer, path, shortcut)
    return interposer


def _enter(module: nn.Module, forward: Any, interposer: Interposer, path: str, way: Any) -> None:
    own = module.__dict__.get("forward")
    object.__setattr__(module, ENTRY, (interposer, path, module.forward, way))
    object.__setattr__(module, "_gradstats_own_forward", own)
    module.__dict__["forward"] = types.MethodType(forward, module)


def uninstall(model: nn.Module) -> None:
    """Undo `install`: modules and tensors are left as they were."""
    _leave(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if hasattr(tensor, ATTRIBUTE):
            delattr(tensor, ATTRIBUTE)


def _leave(model: nn.Module) -> None:
    for module in model.modules():
        if ENTRY not in module.__dict__:
            continue
        own = module.__dict__.pop("_gradstats_own_forward")
        del module.__dict__[ENTRY]
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _entered(module: nn.Module) -> bool:
    return ENTRY in module.__dict__ and module.__dict__[ENTRY][0] is not None


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every name of every parameter: tied parameters have several, and one row."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return {group[0]: tuple(group) for group in names.values()}


def _check(model: nn.Module, params: dict[str, nn.Parameter]) -> None:
    if not any(p.requires_grad for p in params.values()):
        raise AttachError(
            f"{type(model).__name__} has no trainable parameter, so it has no gradient to measure. "
            "Call requires_grad_(True) on what is to be trained, then attach."
        )
    taken = [n for n, m in model.named_modules() if _entered(m)]
    if taken:
        raise AttachError(
            f"{type(model).__name__} (module {taken[0]!r}) is attached to a monitor already. Use "
            "that monitor, or call its detach() first."
        )
    shared = [n for n, p in params.items() if isinstance(getattr(p, ATTRIBUTE, None), Mark)]
    if shared:
        raise AttachError(
            f"parameter {shared[0]!r} belongs to another model that a monitor is attached to. "
            "Attach once, to a module that holds both."
        )
    devices = {str(p.device) for p in params.values()}
    if len(devices) > 1:
        raise AttachError(
            f"the parameters are on several devices ({', '.join(sorted(devices))}). Attach to the "
            "part on one device, or move the model to one."
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise AttachError(
                f"module {name!r} is nn.DataParallel, which splits every batch between threads. Use "
                "DistributedDataParallel, or attach to the module inside."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise AttachError(
                f"module {name!r} is a TorchScript module, whose operations cannot be seen. Attach "
                "to the eager module, or use torch.compile."
            )
    distributed.check(model)
