"""A piece of advice beside the plan, with where it comes from."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Remark"]


@dataclass(frozen=True)
class Remark:
    """`topic` in a word or two; `source`: the publication, or "" for what follows from the files."""

    topic: str
    text: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.topic}: {self.text}" + (f" ({self.source})" if self.source else "")

    def to_dict(self) -> dict[str, str]:
        """The fields."""
        return asdict(self)
