"""What collectives send and how long they take, by number of ranks: formulas, for plans. Numbers only.

Bytes are exact; seconds are a model: a message costs `latency` to start and then flows at
`bytes_per_second`, and nothing else is on the wire. A ring takes W − 1 turns (twice that to reduce), the
least traffic and the most latency; a tree takes ⌈log₂ W⌉ (NCCL chooses between the like by size).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from gradstats.estimators import require, whole

__all__ = [
    "Network",
    "all_gather_bytes",
    "all_gather_seconds",
    "all_reduce_bytes",
    "all_reduce_seconds",
    "fastest",
    "moments_bytes",
    "statistics_bytes",
]

Shape = Literal["ring", "tree"]


@dataclass(frozen=True)
class Network:
    """The slowest link between ranks: `bytes_per_second` from a rank, `latency` in seconds per message."""

    bytes_per_second: float
    latency: float

    def __post_init__(self) -> None:
        speed, wait = self.bytes_per_second, self.latency
        require(0 < speed < math.inf, "bytes_per_second", speed, "pass a number above 0")
        require(0 <= wait < math.inf, "latency", wait, "pass seconds of at least 0")


# ---- what gradstats sends -------------------------------------------------------------------------


def statistics_bytes(num_parameters: int) -> int:
    """A rank's part of the one all-gather in `monitor.step()`, for so many parameter tensors.

    3 numbers for each (Σ‖d_i‖², the squared norm of its gradient, whether it was measured) and 2 more
    (samples, whether the step failed), in float64: see `gradstats.ranks`.
    """
    return 8 * (3 * whole("num_parameters", num_parameters) + 2)


def moments_bytes(num_elements: int, element_size: int = 4) -> int:
    """The all-reduce that ``moments=True`` adds: a number for each element of the parameters."""
    return whole("num_elements", num_elements) * whole("element_size", element_size)


# ---- what collectives cost ------------------------------------------------------------------------


def all_gather_bytes(part: int, world_size: int) -> int:
    """What each rank receives of the others' parts of `part` bytes; in a ring it sends as much."""
    return (whole("world_size", world_size) - 1) * part


def all_reduce_bytes(size: int, world_size: int) -> float:
    """What each rank sends to add up a buffer of `size` bytes: ``2·(W − 1)/W·size``, the least there is."""
    return 2 * (whole("world_size", world_size) - 1) / world_size * size


def all_gather_seconds(
    part: int, world_size: int, network: Network, shape: Shape = "ring"
) -> float:
    """A ring: ``(W − 1)·(latency + part/speed)``; a tree: ``⌈log₂ W⌉·latency`` and the same bytes."""
    turns = _turns(world_size, shape)
    return turns * network.latency + all_gather_bytes(part, world_size) / network.bytes_per_second


def all_reduce_seconds(
    size: int, world_size: int, network: Network, shape: Shape = "ring"
) -> float:
    """Reduced and handed out: twice the turns of an all-gather, ``2·(W − 1)/W·size`` bytes.

    A tree is taken to be pipelined, with its two halves' traffic as that of a ring.
    """
    turns = 2 * _turns(world_size, shape)
    return turns * network.latency + all_reduce_bytes(size, world_size) / network.bytes_per_second


def fastest(seconds: Callable[..., float], size: int, world_size: int, network: Network) -> float:
    """Seconds in the faster of the shapes: `seconds` is one of the functions above."""
    return min(seconds(size, world_size, network, shape) for shape in get_args(Shape))


def _turns(world_size: int, shape: Shape) -> int:
    world = whole("world_size", world_size)
    require(shape in get_args(Shape), "shape", shape, f"pass one of {get_args(Shape)}")
    return world - 1 if shape == "ring" else math.ceil(math.log2(world))
