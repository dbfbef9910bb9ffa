"""How numbers are written for people."""

from __future__ import annotations


def readable(number: float) -> str:
    """A number to three significant digits: ``312``, ``0.0123``, ``6,400``, ``1.2e+16``."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if 1000 <= abs(rounded) < 1e15 else f"{rounded:.3g}"


def counted(number: int, noun: str) -> str:
    """A number of things: ``1 step``, ``2,000 steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
