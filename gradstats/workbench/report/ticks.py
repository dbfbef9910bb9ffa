"""Round numbers along an axis, and how they are written."""

from __future__ import annotations

import math

__all__ = ["linear_ticks", "log_ticks", "short"]

SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten from low to high, low < high."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(
        power * n
        for n in (1, 2, 5, 10, 20, 50)
        if math.floor(high / (power * n) + 1e-9) - math.ceil(low / (power * n) - 1e-9) < most
    )
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers from low to high, 0 < low < high, evenly far apart in their logarithms.

    Powers of ten where there are several, with 2 and 5 (or 3) times them in between where there is
    room; multiples of one step where the range is too narrow for those.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**e for e in range(first, last + 1) for d in digits]
        found = [t for t in found if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
        if 2 <= len(found) <= most:
            return found
    if len(found) > most:
        return found[:: -(-len(found) // most)]
    return [t for t in linear_ticks(low, high, most) if t > 0]


def short(value: float) -> str:
    """A tick as text: ``0.05``, ``250``, ``20k``, ``1.5M``, ``3e-5``."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    for scale, suffix in SUFFIXES:
        if size >= scale * (10 if scale == 1e3 else 1):  # 2,000, but 20k
            return f"{value / scale:.4g}{suffix}"
    return f"{float(f'{value:.4g}'):,g}"
