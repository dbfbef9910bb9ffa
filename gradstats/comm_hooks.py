"""What a DDP communication hook makes of the gradients: the mean over the ranks, or something else."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradstats.errors import UnsupportedLayerError

# Of torch.distributed.algorithms.ddp_comm_hooks.default_hooks: the mean, rounded at most.
MEANS = ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook")


def ddp_of(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The DDP module that `attach` was given, if it was given one."""
    inside: Any = getattr(model, "_orig_mod", model)
    return inside if isinstance(inside, nn.parallel.DistributedDataParallel) else None


def require_means(ddp: nn.parallel.DistributedDataParallel | None) -> None:
    """Raise UnsupportedLayerError where it has another hook, registered before `attach` or after."""
    if ddp is None:
        return
    for hook, _ in getattr(ddp, "_comm_hooks", ()):
        name = getattr(hook, "__name__", type(hook).__name__)
        origin = getattr(hook, "__module__", "")
        if name not in MEANS or not origin.endswith("ddp_comm_hooks.default_hooks"):
            raise UnsupportedLayerError(
                f"DistributedDataParallel has the communication hook {name!r}, and p.grad is then not "
                "known to be the mean of the ranks' gradients, which the statistics rest on. Train the "
                f"measured steps without it, or with one of {', '.join(MEANS)}."
            )
