"""How numbers are written for people."""

from __future__ import annotations


def readable(number: float) -> str:
    """A number to three significant digits: ``312``, ``0.0123``, ``6,400``, ``1.2e+16``."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if 1000 <= abs(rounded) < 1e15 else f"{rounded:.3g}"


def span(low: str, high: str | None) -> str:
    """From one number to another, as they are written: ``30 to 50``, ``30``, ``30 up`` without an end."""
    if high is None:
        return f"{low} up"
    return low if low == high else f"{low} to {high}"


def sizes(low: int, high: int | None) -> str:
    """An interval of batch sizes: ``1,024 to 2,048``, ``96``, ``96 up`` without an end."""
    return span(f"{low:,}", None if high is None else f"{high:,}")


def beyond_memory(size: int) -> str:
    """In the place of a largest micro-batch: `size` ran, and memory is not what limits it."""
    return f"more than {size:,}, not limited by memory"


def counted(number: int, noun: str) -> str:
    """A number of things: ``1 step``, ``2,000 steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
