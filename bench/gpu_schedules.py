"""The other schedules of the Triton kernel for linear layers, to time beside the one it chooses.

The choice rests on nominal rates; these ratios are what would correct them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradstats import backends
from gradstats.errors import first_line
from gradstats.kernels import _common
from gradstats.kernels._common import cdiv
from gradstats.kernels.linear_config import Config, config, per_sm
from gradstats.kernels.schedule import Schedule, schedules

TOLERANCE = 1e-4  # of norms: sums of the same float32 products in another order


def label(s: Schedule | None) -> str:
    if s is None:
        return "a program a tile"
    return "parts shared" if s.parts else "samples shared" if s.share else "whole tiles"


def stats(c: Config) -> Callable[[Tensor, Tensor], Any]:
    def run(x: Tensor, g: Tensor) -> Any:
        from gradstats.kernels.linear_stats import weight_stats  # needs triton

        return weight_stats(x, g, False, c)

    return run


def variants(
    name: str, make: Callable[[], Sequence[Tensor]], device: str, dtype: torch.dtype
) -> dict[str, Callable[..., Any]]:
    """One for every schedule but the chosen; what differs from that one is not timed."""
    if backends.refusal("triton", "linear_stats", device, dtype) is not None:
        return {}
    x, g = make()
    (batch, t, i), o = x.shape, g.shape[2]
    sms, arch = _common.planned_for(x)
    chosen = config(batch, t, i, o, dtype, False, sms, arch)
    if chosen.schedule is None:
        return {}
    tiles = cdiv(o, chosen.block_o) * cdiv(i, chosen.block_i)
    others = schedules(sms * per_sm(chosen), tiles, batch, cdiv(t, chosen.block_t))
    true = stats(chosen)(x, g)[1]
    found = {}
    for s in (None, *others):
        run = stats(replace(chosen, schedule=s))
        if s == chosen.schedule:
            continue
        try:
            same = torch.allclose(run(x, g)[1], true, rtol=TOLERANCE, atol=0)
            why = "" if same else "differ from the chosen schedule's"
        except Exception as error:  # does not compile, or does not fit
            why = first_line(error)
        if why:
            print(f"{name}: norms, {label(s)}, are not timed: {why}", flush=True)
        else:
            found[f"norms, {label(s)}"] = run
    return found
