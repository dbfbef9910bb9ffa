"""Where a model's gradients come from: the processes that train it together, and which parameter is where."""

from __future__ import annotations

import sys
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradstats.errors import AttachError, NoStatisticsError

ALONE = object()  # as a process group: this process, whoever else is there
# Norms of one gradient on several ranks agree to rounding; of different ones they do not.
AGREEMENT = 1e-4
APART = (
    "its p.grad is not the mean over the ranks: it differs from rank to rank, or is missing where "
    "samples contributed. Wrap the model in DistributedDataParallel or fully_shard, and let the last "
    "backward before step() run outside no_sync()"
)
FAILED = "step() raised an error on another rank"


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and DistributedDataParallel: parameters keep their names."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def owner_of(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where a parameter sits, whatever object is there: the dict and its key."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path)._parameters, key


def initialised() -> bool:
    """Whether torch.distributed runs with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def group_of(model: nn.Module, group: Any) -> Any:
    """The group that `model` is trained by: the one given, DDP's own, or (None) all processes."""
    if group is ALONE:
        return group
    if group is not None and not initialised():
        raise AttachError(
            "process_group= was given, but torch.distributed is not initialised with more than one "
            "process. Call init_process_group before attach, or leave it out."
        )
    inside = getattr(model, "_orig_mod", model)
    if not isinstance(inside, nn.parallel.DistributedDataParallel):
        return group
    own = inside.process_group
    if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(
        own
    ):
        raise AttachError(
            f"process_group= holds the ranks {dist.get_process_group_ranks(group)}, but "
            "DistributedDataParallel averages gradients over "
            f"{dist.get_process_group_ranks(own)}. Leave process_group out, or give it the same ranks."
        )
    return own


def check(model: nn.Module) -> None:
    """Refuse parameters that are split in a way that statistics cannot be had from."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for path, module in model.named_modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FullyShardedDataParallel):  # type: ignore[union-attr]
            raise AttachError(
                f"module {path or type(module).__name__!r} is FullyShardedDataParallel, which flattens "
                "its parameters into one. Use torch.distributed.fsdp.fully_shard (FSDP2) or "
                "DistributedDataParallel."
            )
    for name, param in model.named_parameters():
        if sharded(param) and not _in_fsdp(model, name):
            raise AttachError(tensor_parallel(name))


def require_alike(described: str, size: int, group: Any, device: torch.device) -> None:
    """Collective. Raises AttachError on every rank where they do not describe the same."""
    own = torch.tensor([zlib.crc32(described.encode())], device=device)
    every = own.new_empty(size)
    all_gather(every, own, group=group)
    if len(set(every.tolist())) > 1:
        raise AttachError(
            f"the {size} processes attached to different models or with different arguments, so their "
            "statistics cannot be joined. Attach to the same module everywhere, or give "
            "process_group= the processes that share it."
        )


def all_gather(every: Tensor, own: Tensor, group: Any) -> None:
    """Every rank's `own` (n,) into `every` (W·n,), under the name that this torch has for it."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, name)(every, own, group=group)


def whole(grad: Tensor) -> Tensor:
    """The whole gradient, gathered from the ranks where it is sharded."""
    return grad.full_tensor() if sharded(grad) else grad  # type: ignore[attr-defined]


def sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor: this process holds a part of it, or a copy that torch keeps alike."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "placements")


def _in_fsdp(model: nn.Module, name: str) -> bool:
    from torch.distributed.fsdp import FSDPModule

    path = name.split(".")[:-1]
    above = [model.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)]
    return any(isinstance(module, FSDPModule) for module in above)


def tensor_parallel(name: str) -> str:
    """Why such a parameter is refused, in words."""
    return (
        f"parameter {name!r} is distributed otherwise than by fully_shard, as for tensor or sequence "
        "parallelism: each rank then holds a part of every sample's gradient, and the squares of "
        "parts of a sum do not add. Attach to a model that is parallel over samples only (DDP, "
        "fully_shard), or measure on one device."
    )


def lost_step(failed: Tensor, size: int) -> NoStatisticsError:
    """The error of a step in which `failed` () of the `size` ranks raised one."""
    return NoStatisticsError(
        f"{FAILED} ({int(failed)} of {size}), so this step has no global statistics; the message there "
        "says why. Every rank must run forward, backward and step() alike."
    )
