"""Which program computes what, where as many programs as the card holds walk lists of work.

Pure functions of the shape, no triton. Work is counted in steps: blocks of positions of one sample
in one tile. All programs take whole tiles in turn, and so are at the same sample at about the same
time, whose rows they find in L2. The tiles that would leave the last turn part-empty are a row of
steps, tile after tile and sample after sample, of which every program takes a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gradstats.kernels._common import cdiv

MAX_SLOTS = 4  # times the programs: what bounds the memory for parts of samples


@dataclass(frozen=True)
class Run:
    """Steps of one tile that one program takes, [first, last) of batch × blocks."""

    tile: int
    first: int
    last: int
    slot: int | None = None  # of the partial sums; None: a whole tile


@dataclass(frozen=True)
class Schedule:
    """`share` steps for each program of the tiles that do not fill a turn; 0: they are whole too.

    A share is whole samples, or with `parts` any steps: its slot holds a part of one sample then.
    """

    programs: int
    share: int = 0
    parts: bool = False

    def whole(self, tiles: int) -> int:
        return tiles - tiles % self.programs if self.share else tiles

    def grid(self, tiles: int, per_tile: int) -> int:
        """Programs that have anything to do, for `per_tile` steps in a tile."""
        whole = self.whole(tiles)
        return min(self.programs, whole) or cdiv(tiles * per_tile, self.share)

    def slots(self, tiles: int, batch: int, blocks: int) -> int:
        """A slot for every piece of the row: it is cut between programs, and between tiles or, with
        parts, samples. The number of cuts of both kinds before a piece is its slot."""
        shared = tiles - self.whole(tiles)
        if not shared:
            return 0
        return cdiv(shared * batch * blocks, self.share) + shared * (batch if self.parts else 1)

    def runs(self, program: int, tiles: int, batch: int, blocks: int) -> Iterator[Run]:
        """What a program does, in order."""
        per_tile, whole = batch * blocks, self.whole(tiles)
        for tile in range(program, whole, self.grid(tiles, per_tile)):
            yield Run(tile, 0, per_tile)
        piece = blocks if self.parts else per_tile
        at, last = program * self.share, min((program + 1) * self.share, (tiles - whole) * per_tile)
        while at < last:
            cut = min(at // piece * piece + piece, last)
            first = at % per_tile
            yield Run(whole + at // per_tile, first, first + cut - at, program + at // piece)
            at = cut


def schedules(programs: int, tiles: int, batch: int, blocks: int) -> Iterator[Schedule]:
    """All that are worth considering: whole tiles, shares of samples, shares of parts of samples."""
    yield Schedule(programs)
    rest = tiles % programs
    if rest:
        yield Schedule(programs, cdiv(rest * batch, programs) * blocks)
    if tiles < programs and tiles * batch <= MAX_SLOTS * programs:
        yield Schedule(programs, cdiv(tiles * batch * blocks, programs), parts=True)
