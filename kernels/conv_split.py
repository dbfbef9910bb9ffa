"""How several programs share a tile of a convolution: splits of the batch, or parts of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gradstats.kernels._common import cdiv
from gradstats.kernels.conv_config import Split
from gradstats.kernels.sample_sums import Sharing, run


def run_split(
    first: Callable[[dict[str, Any], tuple[int, int]], None], dw: Tensor, tiles: int, batch: int,
    length: int, moments: bool, split: Split, block: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch `first` with its outputs and grid, then what joins them: (dw, sq_norm, m2).

    Every split has samples, every part positions, and only the last part a ragged end.
    """
    per_split = 1 if split.parts > 1 else cdiv(batch, split.splits)
    per_part = cdiv(cdiv(length, split.parts), block) * block
    parts = cdiv(length, per_part)
    programs = cdiv(batch, per_split) * parts
    shared, size = programs > 1, dw.numel()

    def launch(outputs: dict[str, Any]) -> None:
        sums, spreads = outputs.pop("sums"), outputs.pop("spreads")
        if shared:
            outputs |= {"dw": sums, "m2": spreads}
        plan = {"batch": batch, "per_split": per_split, "parts": parts, "per_part": per_part}
        first({**outputs, **plan}, (tiles, programs))

    # To sample_sums all of dw is one tile, and parts are the blocks of a sample, one a program.
    if parts > 1:
        sharing = Sharing(1, programs + batch, 1, 0, 1, size, 1, size, parts)
    else:
        sharing = Sharing(int(shared), programs * shared, per_split, 0, 1, size, 1, size)
    return run(launch, dw, tiles, batch, moments, sharing)
