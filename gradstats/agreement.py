"""One decision for all ranks: made on the first, sent to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from gradstats.errors import GradStatsError

__all__ = ["decide_on_first_rank"]

T = TypeVar("T")


def decide_on_first_rank(decide: Callable[[], T], group: Any = None) -> T:
    """What `decide` returns on the group's first rank, on every rank. Others do not call it.

    A collective where several processes train together. An error on the first rank is raised there, and
    as a GradStatsError on the others, so that none waits for a decision that does not come.
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return decide()
    sent: list[Any] = [None, None]
    error: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            sent[0] = decide()
        except Exception as caught:
            error, sent[1] = caught, f"{type(caught).__name__}: {caught}"
    source = 0 if group is None else dist.get_global_rank(group, 0)
    dist.broadcast_object_list(sent, src=source, group=group)
    if error is not None:
        raise error
    if sent[1] is not None:
        raise GradStatsError(f"the first rank could not decide: {sent[1]}")
    decision: T = sent[0]
    return decision
