"""What a trial depends on, as bytes, and whether it is still the same."""

from __future__ import annotations

import hashlib
import io
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradstats.workbench.workload import Workload, load

__all__ = [
    "fingerprint",
    "load_optimizer",
    "load_seeded",
    "packed",
    "unpacked",
    "weights",
    "write_weights",
]


def load_seeded(target: str, seed: int) -> Workload:
    """The workload, with every generator of random numbers seeded before it is made."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    return load(target, seed=seed)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those outside of checkpoints too."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in held.items()}


def write_weights(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Write what `weights` gave, in place."""
    with torch.no_grad():
        for name, tensor in weights(model).items():
            tensor.copy_(saved[name])


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict`, which casts to the parameters' dtype, then every tensor in its own dtype."""
    optimizer.load_state_dict(state)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, saved in state["state"].items():
        held = optimizer.state[params[index]]
        for key, value in saved.items():
            if isinstance(value, Tensor) and held[key].dtype != value.dtype:
                held[key] = value.to(held[key].device)


def fingerprint(workload: Workload) -> str:
    """A short hash of the initial weights, the optimizer and the number of samples."""
    optimizer = workload.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    text = hashlib.sha256()
    for name, tensor in weights(workload.model).items():
        text.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        text.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    about = type(optimizer).__name__, groups, workload.num_samples, workload.num_validation
    text.update(repr(about).encode())
    return text.hexdigest()[:16]


def packed(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def unpacked(data: bytes) -> dict[str, Any]:
    """What `packed` made. Raises an error of torch's or pickle's where the bytes are something else."""
    found: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return found
