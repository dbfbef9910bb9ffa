"""The largest micro-batch that fits into memory: fitted from a few sizes, confirmed in a fresh process."""

from gradstats.workbench.vram.result import Point, Vram
from gradstats.workbench.vram.search import largest_micro_batch
from gradstats.workbench.vram.sizes import Formula, allowed_below, formula, parse_bytes

__all__ = [
    "Formula",
    "Point",
    "Vram",
    "allowed_below",
    "formula",
    "largest_micro_batch",
    "parse_bytes",
]
