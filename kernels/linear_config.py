"""Which path and tile the statistics of linear layers and convolutions take.

Pure functions of the shape, no triton.
Chosen once per call and never tuned by running: a kernel that accumulates must not run twice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from gradstats.kernels._common import DEFAULT_ARCH, DEFAULT_SMS, DTYPES, cdiv, next_power_of_2


@dataclass(frozen=True)
class Config:
    """How one call runs. `block_i` is the feature block of the Gram and rank-one paths."""

    path: str  # "rank_one", "gram" or "fused"
    block_o: int
    block_i: int
    block_t: int
    num_warps: int
    num_stages: int
    splits: int = 1  # of the batch
    parts: int = 1  # of every sample's positions
    described: bool = False  # loads through tensor descriptors, where the inputs' layout allows


RANK_ONE = Config("rank_one", 0, 1024, 1, 4, 1)
MAX_PARTS = 32
JOINED = 4  # waves of partial sums at most: what bounds their memory
# Of a multiprocessor and clock: products, 16-bit numbers from L2, bytes to or from HBM.
MMA, FMA, L2, HBM = 2048, 128, 24, 20


def _gram_is_cheaper(t: int, i: int, o: int, dtype: torch.dtype) -> bool:
    """Extra work of either path as a share of the dW GEMM, from instruction counts."""
    gram = t * (i + o) / (i * o)
    # Tensor cores make the GEMM cheap, so the epilogue weighs 30/T; fp32 lives off plain FMAs.
    return gram <= (0.25 if dtype == torch.float32 else 30 / t)


def _gram_tile(t: int, dtype: torch.dtype) -> Config:
    block_t = min(max(next_power_of_2(t), 16), 32 if dtype == torch.float32 else 64)
    return Config("gram", 0, 32 if dtype == torch.float32 else 128, block_t, 4, 3)


def _fused_tile(t: int, small: bool, dtype: torch.dtype, moments: bool, arch: int) -> Config:
    """Tiles whose running sums fit in registers: acc, total and perhaps spread."""
    if dtype == torch.float32:
        return Config("fused", 64, 64, 16 if t <= 16 else 32, 8, 3)
    block_t = min(max(next_power_of_2(t), 16), 64)
    described = arch // 10 in (9, 10)
    if small:
        return Config("fused", 64, 64, block_t, 4, 4, described=described)
    if moments and arch // 10 not in (9, 10):  # operands take registers too, where MMA reads them
        block_t = min(block_t, 32 if arch < 90 else 16)
    return Config("fused", 128, 128, block_t, 8, 4, described=described)


def plan(
    c: Config, batch: int, t: int, tiles: int, dtype: torch.dtype, moments: bool,
    num_sms: int = DEFAULT_SMS,
) -> tuple[float, Config]:  # fmt: skip
    """Splits of the batch, or parts of its samples where there are too few of them, and the cost:
    clocks of all waves of programs, from the nominal rates of a Hopper GPU.
    """
    per_sm = 1 if c.block_o == 128 else 3 if c.described else 2  # that registers and memory hold
    wide = dtype == torch.float32
    room = JOINED * num_sms * per_sm

    def cost(choice: tuple[int, int]) -> float:
        splits, parts = choice
        joins = splits * (batch if parts > 1 else 1) * parts  # partial sums of a tile
        waves = cdiv(tiles * joins, num_sms * per_sm)
        active = tiles * joins / waves / num_sms
        length = cdiv(batch, splits) * t
        if parts > 1:
            length = cdiv(cdiv(t, parts), c.block_t) * c.block_t
        products = max(active, 1) * c.block_o * c.block_i / (FMA if wide else MMA)
        loads = active * (c.block_o + c.block_i) * (2 if wide else 1) / L2
        clocks = length * max(products, loads, 5)
        if joins > 1:  # stored and read once, with m2 twice
            clocks += (
                active * c.block_o * c.block_i * 8 / HBM * (2 if moments and parts == 1 else 1)
            )
        return waves * clocks + (joins * 500 if joins > 1 else 0)  # joined one after the other

    choices = [(s, 1) for s in range(1, min(batch, max(room // tiles, 1)) + 1)]
    parts_at_most = min(cdiv(t, c.block_t), MAX_PARTS, room // (tiles * batch))
    choices += [(1, p) for p in range(2, parts_at_most + 1)]
    splits, parts = min(choices, key=cost)
    return cost((splits, parts)), replace(c, splits=splits, parts=parts)


@functools.lru_cache(4096)  # a pure function of the shape
def config(
    batch: int, t: int, i: int, o: int, dtype: torch.dtype, moments: bool,
    num_sms: int = DEFAULT_SMS, arch: int = DEFAULT_ARCH,
) -> Config:  # fmt: skip
    """Choose path and tile from the shape alone, so that a call always runs the same way."""
    if t == 1:
        return RANK_ONE
    if not moments and _gram_is_cheaper(t, i, o, dtype):
        return _gram_tile(t, dtype)
    tiles = [_fused_tile(t, small, dtype, moments, arch) for small in (False, True)]
    plans = [
        plan(c, batch, t, cdiv(o, c.block_o) * cdiv(i, c.block_i), dtype, moments, num_sms)
        for c in tiles[min(i, o) <= 64 :]
    ]
    return min(plans, key=lambda p: p[0])[1]


@functools.lru_cache(4096)
def conv_config(
    batch: int, s: int, c: int, o: int, taps: int, groups: int, dtype: torch.dtype, moments: bool,
    num_sms: int = DEFAULT_SMS, arch: int = DEFAULT_ARCH,
) -> tuple[Config, int]:  # fmt: skip
    """For s positions and c → o channels in each group: configuration, channels of a tap in a tile.

    Few channels share a tile's columns with other taps; then every element has its own bounds, and
    only the small tile has registers for them.
    """
    few = next_power_of_2(c if dtype == torch.float32 else max(c, 4))  # 8 bytes at a time, or 4
    if not moments and _gram_is_cheaper(s, c * taps, o, dtype):
        tile = _gram_tile(16 if dtype == torch.float32 else s, dtype)
        return replace(tile, block_i=min(tile.block_i, max(few, 16))), 0
    plans = []
    for small in (False, True)[min(c, o) <= 64 :]:
        tile = replace(_fused_tile(s, small, dtype, moments, arch), described=False)
        if dtype == torch.float32 or arch // 10 not in (9, 10):  # operands take registers too
            most = 16 if dtype == torch.float32 else 32
            tile = replace(tile, block_t=min(tile.block_t, most))
        channels = min(tile.block_i, few)
        columns = cdiv(taps, tile.block_i // channels) * cdiv(c, channels)
        tiles = groups * cdiv(o, tile.block_o) * columns
        plans.append((*plan(tile, batch, s, tiles, dtype, moments, num_sms), channels))
    _, tile, channels = min(plans, key=lambda p: p[0])
    return tile, channels


def all_configs(arch: int = DEFAULT_ARCH) -> list[tuple[torch.dtype, bool, Config]]:
    """Every (dtype, moments, configuration) that `config` can choose, up to the split."""
    found = dict.fromkeys((d, m, RANK_ONE) for d in DTYPES for m in (False, True))
    for dtype in DTYPES:
        for t in (16, 32, 64):
            found[dtype, False, _gram_tile(t, dtype)] = None
            for small in (False, True):
                for moments in (False, True):
                    found[dtype, moments, _fused_tile(t, small, dtype, moments, arch)] = None
    return list(found)
