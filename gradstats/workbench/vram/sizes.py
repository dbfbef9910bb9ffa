"""Bytes as people write them, the textbook formula, and which micro-batch sizes are chosen. Numbers only."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass

from gradstats.errors import InvalidArgumentError

__all__ = ["Formula", "allowed_below", "formula", "parse_bytes", "show_bytes"]

UNITS = {"": 1, "B": 1} | {
    prefix + end: base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for end, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


@dataclass(frozen=True)
class Formula:
    """(total − model)/per_sample, all in one unit; `chosen` is the allowed size at or below `largest`."""

    total: float
    model: float
    per_sample: float
    largest: int
    chosen: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields as JSON can hold them."""
        return asdict(self)


def formula(
    total: float, model: float, per_sample: float, *, multiple_of: int | None = None
) -> Formula:
    """The textbook's largest batch: what the model leaves of the memory, over what a sample takes.

    It leaves out what is neither (the context of the device, workspaces, fragments), so it is a
    comparison, not an answer.

    Args:
        total, model, per_sample: memory, in any one unit.
        multiple_of: see `allowed_below`.

    Raises InvalidArgumentError for numbers that are not finite, or a sample that takes nothing.
    """
    if not all(map(math.isfinite, (total, model, per_sample))) or total < 0 or model < 0:
        raise InvalidArgumentError(
            f"total={total}, model={model}, per_sample={per_sample}: pass finite sizes of at least 0"
        )
    if per_sample <= 0:
        raise InvalidArgumentError(f"per_sample={per_sample}: a sample must take some memory")
    # (0.7 − 0.1)/0.2 is 3, though rounding makes it 2.9999999999999996.
    largest = max(0, math.floor((total - model) / per_sample * (1 + 1e-12)))
    return Formula(total, model, per_sample, largest, allowed_below(largest, multiple_of))


def allowed_below(size: int, multiple_of: int | None = None) -> int:
    """The largest micro-batch size that is chosen where `size` samples fit; 0 where none does.

    Powers of two by default: they divide each other, so that any global batch that is one is reached by
    whole accumulation steps. With `multiple_of`, its multiples; below the first of them, powers of two.

    Raises InvalidArgumentError for a `multiple_of` below 1.
    """
    if multiple_of is not None and multiple_of < 1:
        raise InvalidArgumentError(f"multiple_of={multiple_of} must be at least 1")
    if size < 1:
        return 0
    if multiple_of is not None and size >= multiple_of:
        return size // multiple_of * multiple_of
    return 1 << (size.bit_length() - 1)


def parse_bytes(text: str) -> float:
    """Bytes of "2GB", "1.5 GiB", "800M" or a bare number: KB, MB, GB, TB (also without B) are powers of
    1000, KiB, MiB, GiB, TiB of 1024.

    Raises InvalidArgumentError for anything else, and for less than nothing.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise InvalidArgumentError(
            f"{text!r} is not an amount of memory; write it like 2GB, 1.5GiB or 800MB"
        )
    return float(found[1]) * float(UNITS[found[2].upper()])


def show_bytes(size: float) -> str:
    """For people, to three digits: "1.25 GB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return (
                f"{size / scale:.3g} {unit}"
                if size / scale < 1000
                else f"{size / scale:,.0f} {unit}"
            )
    return f"{size:.0f} bytes"
