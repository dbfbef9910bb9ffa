"""How full the schedules of `linear_stats` (Triton) keep a card. Counted, without a GPU.

Run `python bench/schedules.py [--sms 132]` for the table in bench/NOTES.md: the share of the
programs' time in which they have no work, with whole tiles alone and as scheduled. It counts steps
alone, not what joining partial sums takes; the choice weighs that too.
"""

from __future__ import annotations

import argparse

import torch

from gradstats.kernels._common import cdiv
from gradstats.kernels.linear_config import config, per_sm
from gradstats.kernels.schedule import Schedule
from gradstats.workbench.bench.timing import table

SHAPES = (
    (16, 1024, 768, 3072),
    (8, 2048, 4096, 4096),
    (4, 4096, 4096, 11008),
    (16, 1024, 768, 50304),
    (16, 1024, 768, 768),
    (4, 4096, 768, 3072),
    (1, 8192, 768, 768),
    *((32, t, width, width) for t in (64, 128, 197, 256) for width in (1024, 4096)),
)
HEAD = ("B, T, I, O", "moments", "tiles", "work, turns", "whole tiles: idle", "as scheduled",
        "idle", "slots, MB")  # fmt: skip


def idle(s: Schedule, tiles: int, batch: int, blocks: int) -> float:
    """The share of all programs' time, until the last of them is done, that is not work."""
    lists = (s.runs(p, tiles, batch, blocks) for p in range(s.programs))
    longest = max(sum(run.last - run.first for run in runs) for runs in lists)
    return 1 - tiles * batch * blocks / (s.programs * longest)


def row(shape: tuple[int, int, int, int], moments: bool, num_sms: int) -> list[str]:
    batch, t, i, o = shape
    c = config(batch, t, i, o, torch.bfloat16, moments, num_sms)
    head = [", ".join(map(str, shape)), "yes" if moments else "no"]
    s = c.schedule
    if s is None:
        return [*head, *[""] * 3, c.path, "", ""]
    tiles, blocks = cdiv(o, c.block_o) * cdiv(i, c.block_i), cdiv(t, c.block_t)
    what = "whole tiles"
    if s.share:
        per = f"{s.share} blocks" if s.parts else f"{s.share // blocks} samples"
        what = f"{s.whole(tiles)} whole, {tiles - s.whole(tiles)} shared, {per} each"
    size = s.slots(tiles, batch, blocks) * c.block_o * c.block_i * 4e-6
    size *= 2 if moments and not s.parts else 1
    return [
        *head, str(tiles), f"{tiles / (num_sms * per_sm(c)):.2f}",
        f"{idle(Schedule(s.programs), tiles, batch, blocks):.1%}", what,
        f"{idle(s, tiles, batch, blocks):.1%}", f"{size:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sms", type=int, default=132, help="multiprocessors of the card")
    args = parser.parse_args()
    print(table(HEAD, [row(s, m, args.sms) for m in (False, True) for s in SHAPES]))


if __name__ == "__main__":
    main()
