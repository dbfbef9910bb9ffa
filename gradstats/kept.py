"""What a training step changes, kept and put back to the bit: for steps that are taken on trial."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradstats.errors import InvalidArgumentError

__all__ = ["kept"]

PutBack = Callable[[], object]


def kept(things: Iterable[Any]) -> PutBack:
    """Copy the state of `things` and of the random number generators; call what it returns to put it back.

    It may be called any number of times.

    Modules: parameters, their gradients, buffers (those outside of checkpoints too) and modes. Optimizers:
    state, hyperparameters, and the parameters they step. `torch.Generator`s. Anything else by its
    `state_dict` and `load_state_dict`. Tensors are written in place, so that whoever holds one (a
    captured graph, a bucket of gradients) finds the values as they were.

    Raises InvalidArgumentError for a thing that none of this fits.
    """
    back = [_random_numbers()]
    for thing in things:
        if isinstance(thing, nn.Module):
            back.append(_module(thing))
        elif isinstance(thing, torch.optim.Optimizer):
            back.append(_optimizer(thing))
        elif isinstance(thing, torch.Generator):
            back.append(partial(thing.set_state, thing.get_state()))
        elif hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict"):
            back.append(partial(_load, thing, copy.deepcopy(thing.state_dict())))
        else:
            raise InvalidArgumentError(
                f"the state of a {type(thing).__name__} cannot be kept: it has no state_dict() and "
                "load_state_dict(). Pass modules, optimizers, schedulers, generators, loaders, monitors"
            )

    def put_back() -> None:
        with torch.no_grad():
            for write in back:
                write()

    return put_back


def _load(thing: Any, state: Any) -> None:
    thing.load_state_dict(copy.deepcopy(state))  # which it may keep, and change


def _random_numbers() -> PutBack:
    python, numbers, host = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def write() -> None:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002
        torch.set_rng_state(host)
        if cards is not None:
            torch.cuda.set_rng_state_all(cards)

    return write


def _module(model: nn.Module) -> PutBack:
    modes = [(module, module.training) for module in model.modules()]
    owners: list[dict[str, Any]] = []
    for module in model.modules():
        owners += [module._parameters, module._buffers]
    cells = [(owner, key, t, _copy(t)) for owner in owners for key, t in owner.items()]
    gradients = _gradients(model.parameters())

    def write() -> None:
        for module, mode in modes:
            module.training = mode
        for owner, key, tensor, old in cells:
            owner[key] = tensor
            _write(tensor, old)
        gradients()

    return write


def _gradients(params: Iterable[Tensor]) -> PutBack:
    held = [(param, param.grad, _copy(param.grad)) for param in params]

    def write() -> None:
        for param, grad, old in held:
            _write(grad, old)
            param.grad = grad

    return write


def _optimizer(optimizer: torch.optim.Optimizer) -> PutBack:
    """Not by load_state_dict, which casts to the parameters' dtype and makes new tensors."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    values = [(param, _copy(param)) for param in params]
    gradients = _gradients(params)
    states = {p: (s, _entries(s)) for p, s in optimizer.state.items()}
    groups = [(group, _entries(group)) for group in optimizer.param_groups]

    def write() -> None:
        for param, old in values:
            _write(param, old)
        gradients()
        for param in [p for p in optimizer.state if p not in states]:
            del optimizer.state[param]
        for param, (state, entries) in states.items():
            optimizer.state[param] = state
            _write_entries(state, entries)
        for group, entries in groups:
            _write_entries(group, entries)

    return write


def _entries(held: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each value, and a copy of it; of a group's parameters the list alone."""
    return {
        key: (value, list(value) if key == "params" else copy.deepcopy(value))
        for key, value in held.items()
    }


def _write_entries(held: dict[str, Any], entries: dict[str, tuple[Any, Any]]) -> None:
    for key in set(held) - set(entries):
        del held[key]
    for key, (value, old) in entries.items():
        if isinstance(value, Tensor):
            held[key] = value
            _write(value, old)
        else:
            held[key] = list(old) if key == "params" else copy.deepcopy(old)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _write(tensor: Tensor | None, old: Tensor | None) -> None:
    if tensor is not None and old is not None:
        tensor.copy_(old)
