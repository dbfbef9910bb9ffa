"""Which path, tile and schedule the statistics of a linear layer take.

Pure functions of the shape, no triton.
Chosen once per call and never tuned by running: a kernel that accumulates must not run twice.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import torch

from gradstats.kernels._common import DEFAULT_ARCH, DEFAULT_SMS, DTYPES, cdiv, next_power_of_2
from gradstats.kernels.schedule import Schedule, schedules


@dataclass(frozen=True)
class Config:
    """How one call runs. `block_i` is the feature block of the Gram and rank-one paths."""

    path: str  # "rank_one", "gram" or "fused"
    block_o: int
    block_i: int
    block_t: int
    num_warps: int
    num_stages: int
    described: bool = False  # loads through tensor descriptors, where the inputs' layout allows
    schedule: Schedule | None = None  # of the fused path; None: a program for every tile


RANK_ONE = Config("rank_one", 0, 1024, 1, 4, 1)
GRAM_STEPS, GRAM_PARTS = 4, 8  # blocks of columns that a program takes at least, parts at most
SURE = 1.5  # times cheaper by rates that are nominal
# Of a multiprocessor and clock: products, 16-bit numbers from L2, bytes to or from HBM.
MMA, FMA, L2, HBM = 2048, 128, 24, 20


def gram_is_cheaper(t: int, i: int, o: int, dtype: torch.dtype) -> bool:
    """Extra work of either path as a share of the dW GEMM, from instruction counts."""
    gram = t * (i + o) / (i * o)
    # Tensor cores make the GEMM cheap, so the epilogue weighs 30/T; fp32 lives off plain FMAs.
    return gram <= (0.25 if dtype == torch.float32 else 30 / t)


def gram_reads_less(t: int, i: int, o: int, dtype: torch.dtype, arch: int) -> bool:
    """The same from rows read out of L2, where that and not the products sets the pace of both.

    The library's dW has tiles that L2 can feed, the fused path's are smaller for its sums; a Gram
    reads a row for every block of rows.
    """
    if dtype == torch.float32 or arch // 10 not in (9, 10):
        return False
    blocks = cdiv(t, gram_tile(t, dtype, arch).block_t)
    gram = blocks * (i + o) / L2 / (i * o / MMA)
    c = fused_tile(t, min(i, o) <= 64, dtype, False, arch)
    products = per_sm(c) * c.block_o * c.block_i / MMA
    fused = pace(c, dtype, per_sm(c)) / products - 1 + 30 / t
    return SURE * gram <= fused


def gram_tile(t: int, dtype: torch.dtype, arch: int = DEFAULT_ARCH) -> Config:
    if dtype == torch.float32:
        return Config("gram", 0, 32, min(max(next_power_of_2(t), 16), 32), 4, 3)
    if t > 64 and arch // 10 == 9:  # rows are read for every block of them; elsewhere it spills
        return Config("gram", 0, 64, 128, 8, 3)
    return Config("gram", 0, 128, min(max(next_power_of_2(t), 16), 64), 4, 3)


def gram_parts(programs: int, width: int, c: Config, num_sms: int = DEFAULT_SMS) -> int:
    """Parts of the columns, a power of two, where samples alone would leave most of a card idle."""
    wanted = min(num_sms // programs, cdiv(width, GRAM_STEPS * c.block_i), GRAM_PARTS)
    return 1 << max(wanted, 1).bit_length() - 1


def fused_tile(
    t: int, small: bool, dtype: torch.dtype, moments: bool, arch: int, described: bool = True
) -> Config:
    """Tiles whose running sums fit in registers: acc, total and perhaps spread.

    `described`: the layout of the inputs allows tensor descriptors.
    """
    if dtype == torch.float32:
        # Short blocks have room for a stage more; without it sm_80 spilled 8 bytes, as sm_100 does
        # in long blocks, and sm_90 with moments by Triton 3.6.
        short = t <= 16 or arch // 10 == 10 or (moments and arch // 10 == 9)
        return Config("fused", 64, 64, *((16, 8, 4) if short else (32, 8, 3)))
    block_t = min(max(next_power_of_2(t), 16), 64)
    engine = arch // 10 in (9, 10)  # a copy engine, which takes descriptors
    described = described and engine
    if small and arch // 10 == 10 and not described:  # addresses for 64 positions spill 8 bytes
        return Config("fused", 64, 64, min(block_t, 32), 4, 4)
    if small:
        return Config("fused", 64, 64, block_t, 4, 3, described)
    if not engine and (moments or arch >= 90):  # operands take registers too, where MMA reads them
        block_t = min(block_t, 16 if moments and arch >= 90 else 32)
    # 227 or 163 KB of shared memory for a program; elsewhere 99, and on Hopper three small ones.
    num_stages = 4 if engine or arch in (80, 87) else 3
    return Config("fused", 128, 128, block_t, 8, num_stages, described)


def per_sm(c: Config) -> int:
    """Programs that registers and shared memory of a multiprocessor hold."""
    return 1 if c.block_o == 128 else 3 if c.described else 2


def pace(c: Config, dtype: torch.dtype, active: float) -> float:
    """Clocks that a position takes while a multiprocessor has so many programs."""
    wide = dtype == torch.float32
    products = max(active, 1) * c.block_o * c.block_i / (FMA if wide else MMA)
    loads = active * (c.block_o + c.block_i) * (2 if wide else 1) / L2
    return max(products, loads, 5)


def joining(c: Config, slots: float, in_a_row: float, moments: bool) -> float:
    """Clocks to write and read so many partial sums of a multiprocessor, added `in_a_row`."""
    return slots * c.block_o * c.block_i * 8 / HBM * (2 if moments else 1) + in_a_row * 500


def cost(
    c: Config, s: Schedule, tiles: int, batch: int, t: int, dtype: torch.dtype, moments: bool,
    num_sms: int = DEFAULT_SMS,
) -> float:  # fmt: skip
    """Clocks of the longest list of work, from the nominal rates of a Hopper GPU."""
    blocks = cdiv(t, c.block_t)
    turns, rest = divmod(tiles, s.programs)
    line = batch * blocks
    clocks = turns * line * c.block_t * pace(c, dtype, s.programs / num_sms)
    if not s.share:
        return clocks + bool(rest) * line * c.block_t * pace(c, dtype, rest / num_sms)
    slots = s.slots(tiles, batch, blocks)
    active = min(cdiv(rest * line, s.share), s.programs) / num_sms
    clocks += s.share * c.block_t * pace(c, dtype, active)
    return clocks + joining(c, slots / num_sms, slots / rest, moments and not s.parts)


@functools.lru_cache(4096)  # a pure function of the shape
def config(
    batch: int, t: int, i: int, o: int, dtype: torch.dtype, moments: bool,
    num_sms: int = DEFAULT_SMS, arch: int = DEFAULT_ARCH, described: bool = True,
) -> Config:  # fmt: skip
    """Choose path, tile and schedule from shape and layout: a call always runs the same way."""
    if t == 1:
        return RANK_ONE
    gram = gram_is_cheaper(t, i, o, dtype) or gram_reads_less(t, i, o, dtype, arch)
    if gram and not moments:
        return gram_tile(t, dtype, arch)
    return fused_config(batch, t, i, o, dtype, moments, num_sms, arch, described)


def fused_config(
    batch: int, t: int, i: int, o: int, dtype: torch.dtype, moments: bool,
    num_sms: int = DEFAULT_SMS, arch: int = DEFAULT_ARCH, described: bool = True,
) -> Config:  # fmt: skip
    """The cheapest tile and schedule of the fused path."""
    found = []
    for small in (False, True)[min(i, o) <= 64 :]:
        c = fused_tile(t, small, dtype, moments, arch, described)
        tiles = cdiv(o, c.block_o) * cdiv(i, c.block_i)
        for s in schedules(num_sms * per_sm(c), tiles, batch, cdiv(t, c.block_t)):
            clocks = cost(c, s, tiles, batch, t, dtype, moments, num_sms)
            found.append((clocks, replace(c, schedule=s)))
    return min(found, key=lambda choice: choice[0])[1]


def all_configs(arch: int = DEFAULT_ARCH) -> list[tuple[torch.dtype, bool, Config]]:
    """Every (dtype, moments, configuration) that `config` can choose, up to the schedule."""
    found = dict.fromkeys((d, m, RANK_ONE) for d in DTYPES for m in (False, True))
    flags = (False, True)
    for dtype, t in itertools.product(DTYPES, (16, 32, 64, 128)):
        found[dtype, False, gram_tile(t, dtype, arch)] = None
        for small, moments, described in itertools.product(flags, flags, flags):
            found[dtype, moments, fused_tile(t, small, dtype, moments, arch, described)] = None
    return list(found)
