"""What to put in the place of BatchNorm where a device sees few samples at once."""

from __future__ import annotations

from collections.abc import Sequence

from gradstats.workbench.advise.remark import Remark

__all__ = ["ENOUGH", "batch_norm_remarks"]

ENOUGH = 32  # samples per device from which on BatchNorm's statistics are good (Wu and He 2018, figure 1)
GROUP_NORM = "Wu and He 2018, arXiv:1803.08494"
LAYER_NORM = "Ba et al. 2016, arXiv:1607.06450"
SYNCHRONISED = "Peng et al. 2018, arXiv:1711.07240"
NAMED = 3


def batch_norm_remarks(
    layers: Sequence[str] | None, micro_batch_size: int, world_size: int
) -> list[Remark]:
    """Advice for a model with BatchNorm, at so many samples at once on each of `world_size` devices.

    `layers`: names of its BatchNorm layers, empty where it has some of unknown names, None where it has
    none.
    """
    if layers is None or micro_batch_size >= ENOUGH:
        return []
    which = ", ".join(layers[:NAMED])
    if len(layers) > NAMED:
        which += f" and {len(layers) - NAMED} more"
    which = which and f" ({which})"
    found = [
        Remark(
            "BatchNorm",
            f"its statistics{which} are of the {micro_batch_size:,} samples that a device sees "
            "at once; below "
            f"{ENOUGH} they are too noisy and its error grows quickly. Accumulation does not help: each "
            "micro-batch is normalised by itself. Put nn.GroupNorm(min(32, channels), channels) in its place "
            "(a number of groups that divides the channels), which knows no batch",
            GROUP_NORM,
        ),
        Remark("BatchNorm", "for sequences, nn.LayerNorm serves the same end", LAYER_NORM),
    ]
    if world_size > 1:
        together = micro_batch_size * world_size
        enough = "" if together >= ENOUGH else f", still below {ENOUGH}"
        found.append(
            Remark(
                "BatchNorm",
                "or torch.nn.SyncBatchNorm.convert_sync_batchnorm(model), on GPUs under "
                f"DistributedDataParallel: statistics are then of {together:,} samples{enough}, "
                "for a collective "
                "in every such layer",
                SYNCHRONISED,
            )
        )
    return found
