"""Which path and tile the statistics of a convolution take, and how programs share its samples.

Pure functions of the shape, no triton.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from gradstats.kernels._common import DEFAULT_ARCH, DEFAULT_SMS, cdiv, next_power_of_2
from gradstats.kernels.linear_config import (
    Config,
    fused_tile,
    gram_is_cheaper,
    gram_tile,
    joining,
    pace,
    per_sm,
)

MAX_PARTS = 32
JOINED = 4  # waves of partial sums at most: what bounds their memory


@dataclass(frozen=True)
class Split:
    """Programs of each tile: for `splits` of the batch, or `parts` of every sample's positions."""

    splits: int = 1
    parts: int = 1


def plan(
    c: Config, batch: int, t: int, tiles: int, dtype: torch.dtype, moments: bool,
    num_sms: int = DEFAULT_SMS,
) -> tuple[float, Split]:  # fmt: skip
    """Splits of the batch, or parts of its samples where there are too few of them, and the cost:
    clocks of all waves of programs, from the nominal rates of a Hopper GPU.
    """
    programs = num_sms * per_sm(c)
    room = JOINED * programs

    def cost(s: Split) -> float:
        joins = s.splits * (batch if s.parts > 1 else 1) * s.parts  # partial sums of a tile
        waves = cdiv(tiles * joins, programs)
        active = tiles * joins / waves / num_sms
        length = cdiv(batch, s.splits) * t
        if s.parts > 1:
            length = cdiv(cdiv(t, s.parts), c.block_t) * c.block_t
        clocks = length * pace(c, dtype, active)
        if joins == 1:
            return waves * clocks
        both = moments and s.parts == 1
        return waves * (clocks + joining(c, active, 0, both)) + joining(c, 0, joins, both)

    choices = [Split(n) for n in range(1, min(batch, max(room // tiles, 1)) + 1)]
    parts_at_most = min(cdiv(t, c.block_t), MAX_PARTS, room // (tiles * batch))
    choices += [Split(parts=n) for n in range(2, parts_at_most + 1)]
    best = min(choices, key=cost)
    return cost(best), best


@functools.lru_cache(4096)
def conv_config(
    batch: int, s: int, c: int, o: int, taps: int, groups: int, dtype: torch.dtype, moments: bool,
    num_sms: int = DEFAULT_SMS, arch: int = DEFAULT_ARCH,
) -> tuple[Config, Split, int]:  # fmt: skip
    """For s positions and c → o channels in each group: configuration, split, channels of a tap in
    a tile.

    Few channels share a tile's columns with other taps; then every element has its own bounds, and
    only the small tile has registers for them.
    """
    few = next_power_of_2(c if dtype == torch.float32 else max(c, 4))  # 8 bytes at a time, or 4
    if not moments and gram_is_cheaper(s, c * taps, o, dtype):
        tile = gram_tile(16 if dtype == torch.float32 else min(s, 64), dtype)
        return replace(tile, block_i=min(tile.block_i, max(few, 16))), Split(), 0
    plans = []
    for small in (False, True)[min(c, o) <= 64 :]:
        tile = replace(fused_tile(s, small, dtype, moments, arch), described=False)
        tile = replace(tile, num_stages=3 if dtype == torch.float32 else 4)
        if dtype == torch.float32 or arch // 10 not in (9, 10):  # operands take registers too
            most = 16 if dtype == torch.float32 else 32
            if arch // 10 == 9 and not moments and few >= tile.block_i:
                most = 32  # one tap in a tile; 16 spilled there by Triton 3.6
            tile = replace(tile, block_t=min(tile.block_t, most))
        channels = min(tile.block_i, few)
        columns = cdiv(taps, tile.block_i // channels) * cdiv(c, channels)
        tiles = groups * cdiv(o, tile.block_o) * columns
        plans.append((*plan(tile, batch, s, tiles, dtype, moments, num_sms), tile, channels))
    _, split, tile, channels = min(plans, key=lambda p: p[0])
    return tile, split, channels
