"""A hash of everything that a training step changes: equal hashes mean equal to the bit."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["fingerprint"]


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """SHA-256 by part: weights, gradients, buffers, modes, the optimizer's state and hyperparameters, and
    the random number generators of Python, numpy and torch (its cards' too, once they are in use).

    Tensors count by dtype, shape and bytes, wherever they lie; buffers outside of checkpoints as well.
    """
    params = list(model.named_parameters())
    groups = optimizer.param_groups
    stepped = [p for group in groups for p in group["params"]]
    states = [optimizer.state.get(p) for p in stepped]
    rest = {k: v for k, v in optimizer.state.items() if not isinstance(k, Tensor)}
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    parts: dict[str, Any] = {
        "weights": [params, stepped],
        "gradients": [(name, p.grad) for name, p in params] + [p.grad for p in stepped],
        "buffers": list(model.named_buffers()),
        "modes": [module.training for module in model.modules()],
        "optimizer state": [states, rest, len(optimizer.state)],
        "hyperparameters": [{k: v for k, v in g.items() if k != "params"} for g in groups],
        "random numbers": [
            random.getstate(), list(np.random.get_state()), torch.get_rng_state(), cards  # noqa: NPY002
        ],
    }  # fmt: skip
    found = {}
    for name, value in parts.items():
        digest = hashlib.sha256()
        _feed(digest, value)
        found[name] = digest.hexdigest()
    return found


def _feed(digest: Any, value: Any) -> None:
    """Kinds and lengths go in with the values, so that different nests cannot look alike."""
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        digest.update(f"array {value.dtype} {value.shape} ".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        digest.update(f"map {len(value)} ".encode())
        for key, part in value.items():
            _feed(digest, key)
            _feed(digest, part)
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)} ".encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(f"{type(value).__name__} {value!r} ".encode())
