"""Which path and tile a linear layer's statistics take. Pure functions of the shape, no triton.

Chosen once per call and never tuned by running: a kernel that accumulates must not run twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gradstats.kernels._common import DEFAULT_SMS, DTYPES, cdiv, next_power_of_2


@dataclass(frozen=True)
class Config:
    """How one call runs. `block_i` is the feature block of the Gram and rank-one paths."""

    path: str  # "rank_one", "gram" or "fused"
    block_o: int
    block_i: int
    block_t: int
    num_warps: int
    num_stages: int
    splits: int = 1


RANK_ONE = Config("rank_one", 0, 1024, 1, 4, 1)
MAX_SPLITS = 16


def _gram_is_cheaper(t: int, i: int, o: int, dtype: torch.dtype) -> bool:
    """Extra work of either path as a share of the dW GEMM, from instruction counts."""
    gram = t * (i + o) / (i * o)
    # Tensor cores make the GEMM cheap, so the epilogue weighs 30/T; fp32 lives off plain FMAs.
    return gram <= (0.25 if dtype == torch.float32 else 30 / t)


def _gram_tile(t: int, dtype: torch.dtype) -> Config:
    block_t = min(max(next_power_of_2(t), 16), 32 if dtype == torch.float32 else 64)
    return Config("gram", 0, 32 if dtype == torch.float32 else 128, block_t, 4, 3)


def _fused_tile(t: int, small: bool, dtype: torch.dtype) -> Config:
    """Tiles whose running sums fit in registers: acc, total and perhaps spread."""
    if dtype == torch.float32:
        return Config("fused", 64, 64, 16 if t <= 16 else 32, 8, 3)
    block_t = min(max(next_power_of_2(t), 16), 64)
    if small:
        return Config("fused", 64, 64, block_t, 4, 4)
    return Config("fused", 128, 128, block_t, 8, 4)


def _splits(c: Config, batch: int, t: int, i: int, o: int, num_sms: int) -> int:
    """Splits of the batch: whole waves of programs against the cost of merging the partial sums."""
    tiles = cdiv(o, c.block_o) * cdiv(i, c.block_i)
    merge = 2 * max(c.block_o, c.block_i) / t  # storing and reading a tile, in samples' loads
    at_once = num_sms * (1 if c.block_o == 128 else 2)  # what the registers leave room for

    def cost(s: int) -> float:
        waves = cdiv(tiles * s, at_once)
        return waves * (cdiv(batch, s) + (merge if s > 1 else 0.0))

    return min(range(1, min(batch, MAX_SPLITS) + 1), key=cost)


def config(
    batch: int, t: int, i: int, o: int, dtype: torch.dtype, moments: bool,
    num_sms: int = DEFAULT_SMS,
) -> Config:  # fmt: skip
    """Choose path and tile from the shape alone, so that a call always runs the same way."""
    if t == 1:
        return RANK_ONE
    if not moments and _gram_is_cheaper(t, i, o, dtype):
        return _gram_tile(t, dtype)
    small = min(i, o) <= 64 or cdiv(o, 128) * cdiv(i, 128) * batch < num_sms
    tile = _fused_tile(t, small, dtype)
    return replace(tile, splits=_splits(tile, batch, t, i, o, num_sms))


def all_configs() -> list[tuple[torch.dtype, bool, Config]]:
    """Every (dtype, moments, configuration) that `config` can choose, up to the split."""
    found = dict.fromkeys((d, m, RANK_ONE) for d in DTYPES for m in (False, True))
    for dtype in DTYPES:
        for t in (16, 32, 64):
            found[dtype, False, _gram_tile(t, dtype)] = None
            for small in (False, True):
                for moments in (False, True):
                    found[dtype, moments, _fused_tile(t, small, dtype)] = None
    return list(found)
