"""What a DDP communication hook makes of the gradients: the mean over the ranks, or something else."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradstats.errors import UnsupportedLayerError

# Of torch.distributed.algorithms.ddp_comm_hooks.default_hooks: the mean, rounded at most.
MEANS = ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook")


def require_means(model: nn.Module) -> None:
    """Raise UnsupportedLayerError where `model`, as it was attached, has another hook.

    A hook is seen where `attach` was given the DDP module itself, registered before or after.
    """
    inside: Any = getattr(model, "_orig_mod", model)
    if not isinstance(inside, nn.parallel.DistributedDataParallel):
        return
    for hook, _ in getattr(inside, "_comm_hooks", ()):
        name = getattr(hook, "__name__", type(hook).__name__)
        origin = getattr(hook, "__module__", "")
        if name not in MEANS or not origin.endswith("ddp_comm_hooks.default_hooks"):
            raise UnsupportedLayerError(
                f"DistributedDataParallel has the communication hook {name!r}, and p.grad is then not "
                "known to be the mean of the ranks' gradients, which the statistics rest on. Train the "
                f"measured steps without it, or with one of {', '.join(MEANS)}."
            )
