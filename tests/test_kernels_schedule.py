"""Who computes what: every step once, nobody idle for long, and the kernel does as the lists say."""

from __future__ import annotations

import itertools

import pytest
import torch

from gradstats.kernels.linear_config import config
from gradstats.kernels.schedule import Schedule, schedules


@pytest.mark.parametrize("programs", [1, 2, 7, 132])
def test_every_step_is_done_once(programs):
    kinds = set()
    for tiles, batch, blocks in itertools.product((1, 5, 13, 36, 144), (1, 2, 3, 16), (1, 2, 5)):
        per_tile = batch * blocks
        for s in schedules(programs, tiles, batch, blocks):
            kinds.add((bool(s.share), s.parts))
            done, slots = set(), set()
            lists = [list(s.runs(p, tiles, batch, blocks)) for p in range(programs)]
            working = s.grid(tiles, per_tile)
            assert all(lists[:working])
            assert not any(lists[working:])
            for run in itertools.chain(*lists):
                steps = {(run.tile, step) for step in range(run.first, run.last)}
                assert steps
                assert steps.isdisjoint(done)
                done |= steps
                assert (run.slot is None) == (run.tile < s.whole(tiles))
                assert s.parts or run.first % blocks == run.last % blocks == 0  # whole samples
                if run.slot is not None:
                    assert 0 <= run.slot < s.slots(tiles, batch, blocks)
                    assert run.slot not in slots
                    slots.add(run.slot)
            assert done == set(itertools.product(range(tiles), range(per_tile)))
    assert kinds == ({(False, False)} if programs == 1 else {(0, 0), (1, 0), (1, 1)})


def idle(shape: tuple[int, int, int, int], programs: int | None = None) -> float:
    """Of the programs' time until the last one is done; with `programs`, in whole tiles alone."""
    batch, t, i, o = shape
    c = config(*shape, torch.bfloat16, False)
    s = c.schedule if programs is None else Schedule(programs)
    tiles, blocks = -(-o // c.block_o) * -(-i // c.block_i), -(-t // c.block_t)
    lists = (s.runs(p, tiles, batch, blocks) for p in range(s.programs))
    longest = max(sum(run.last - run.first for run in runs) for runs in lists)
    return 1 - tiles * batch * blocks / (s.programs * longest)


@pytest.mark.parametrize(
    ("shape", "limit", "before"),
    [
        ((16, 1024, 768, 3072), 0.031, 0.45),
        ((16, 1024, 768, 768), 0.128, 0.72),  # 4.4 samples each are 5
        ((1, 8192, 768, 768), 0.003, 0.72),
        ((32, 256, 1024, 1024), 0.031, 0.51),
        ((8, 2048, 4096, 4096), 0.031, 0.03),
    ],
)
def test_programs_are_seldom_idle(shape, limit, before):
    assert idle(shape) <= limit
    assert idle(shape, 132) >= before


def test_the_number_of_multiprocessors_counts():
    for sms in (1, 20, 114, 148):
        c = config(16, 1024, 768, 3072, torch.bfloat16, False, sms)
        assert c.schedule.programs % sms == 0
        assert c.schedule.grid(144, 16 * 16) <= c.schedule.programs
