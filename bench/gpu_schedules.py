"""The other paths and schedules of the Triton kernels for linear layers, beside what is chosen.

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
from gradstats.kernels.linear_config import Config, config, fused_config, gram_tile, per_sm
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


def candidates(chosen: Config, x: Tensor, g: Tensor) -> dict[str, Config]:
    """What else could run: the other path, and the fused one's other schedules."""
    (batch, t, i), o = x.shape, g.shape[2]
    sms, arch = _common.planned_for(x)
    if chosen.path == "gram":
        return {"fused": fused_config(batch, t, i, o, x.dtype, False, sms, arch)}
    found = {}
    if t * (i + o) <= i * o:  # else it does more than dW alone
        found["Gram"] = gram_tile(t, x.dtype, arch)
    tiles = cdiv(o, chosen.block_o) * cdiv(i, chosen.block_i)
    others = schedules(sms * per_sm(chosen), tiles, batch, cdiv(t, chosen.block_t))
    for s in (None, *others):
        if s != chosen.schedule:
            found[label(s)] = replace(chosen, schedule=s)
    return found


def variants(
    name: str, make: Callable[[], Sequence[Tensor]], device: str, dtype: torch.dtype
) -> dict[str, Callable[..., Any]]:
    """One for each candidate but the chosen; what differs from that one is not timed."""
    if backends.refusal("triton", "linear_stats", device, dtype) is not None:
        return {}
    x, g = make()
    (batch, t, i), o = x.shape, g.shape[2]
    chosen = config(batch, t, i, o, dtype, False, *_common.planned_for(x))
    if chosen.path == "rank_one":
        return {}
    true = stats(chosen)(x, g)[1]
    found = {}
    for what, c in candidates(chosen, x, g).items():
        run = stats(c)
        try:
            same = torch.allclose(run(x, g)[1], true, rtol=TOLERANCE, atol=0)
            why = "" if same else "differ from the chosen ones'"
        except Exception as error:  # does not compile, or does not fit
            why = first_line(error)
        if why:
            print(f"{name}: norms, {what}, are not timed: {why}", flush=True)
        else:
            found[f"norms, {what}"] = run
    return found
