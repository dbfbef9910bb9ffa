"""Two files of benchmarks compared: what became slower or faster beyond its noise. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradstats.errors import InvalidArgumentError
from gradstats.estimators import critical_value
from gradstats.workbench.bench.files import read

__all__ = ["Change", "Comparison", "change", "compare_files"]

MEDIAN = 1.2533  # standard error of a median over that of a mean, for a normal distribution
QUARTILES = 1.349  # its standard deviations between the quartiles
EFFICIENCY = 0.37  # of the quartiles as a measure of scatter: so many degrees of freedom are left
FLOOR = 0.002  # relative: two runs of one program differ by more than their rounds do


@dataclass(frozen=True)
class Change:
    """New over old time of one benchmark, with an interval, and what it is a ratio of.

    `of` is "seconds", or "ratio to <reference>" where both files timed it in turns with a reference on the
    same machine, whose own changes then cancel. `verdict`: "slower" or "faster" where the interval leaves
    1 out, else "same".
    """

    name: str
    old: float
    new: float
    ratio: float
    low: float
    high: float
    of: str

    @property
    def verdict(self) -> str:
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "same"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Comparison:
    """`changes` of the benchmarks in both files; names of those in one alone."""

    changes: tuple[Change, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]

    def slower(self, factor: float) -> list[Change]:
        """Slower beyond their noise, and by at least this factor."""
        return [c for c in self.changes if c.verdict == "slower" and c.ratio >= factor]

    def to_dict(self) -> dict[str, Any]:
        return {
            "changes": [c.to_dict() for c in self.changes],
            "only_old": list(self.only_old),
            "only_new": list(self.only_new),
        }


def compare_files(old: Path, new: Path, *, confidence: float = 0.99) -> Comparison:
    """The benchmarks of two files of pytest-benchmark's format, matched by their full names.

    References that others are ratios to are left out: they are one by definition.

    Raises InvalidArgumentError where a file cannot be read, or they have no benchmark in common.
    """
    first, second = (
        {mark["fullname"]: mark for mark in read(path) if not _is_reference(mark)}
        for path in (old, new)
    )
    both = [name for name in first if name in second]
    if not both:
        raise InvalidArgumentError(f"{old} and {new} have no benchmark in common")
    return Comparison(
        tuple(change(first[name], second[name], confidence) for name in both),
        tuple(name for name in first if name not in second),
        tuple(name for name in second if name not in first),
    )


def change(old: Mapping[str, Any], new: Mapping[str, Any], confidence: float = 0.99) -> Change:
    """What became of one benchmark.

    The medians of the rounds are compared, on the logarithms; a median's standard error is 1.2533/√n of the
    standard deviation, which the quartiles give (robust to slow spells; Student's t allows for how few rounds
    they rest on), and at least 0.2%. Rounds that
    follow each other are not quite independent, nor are two runs of a program alike in all but chance:
    hence the high default of `confidence`, and a factor below which a change should not count.
    """
    of, pairs = "seconds", [_median(mark["stats"]) for mark in (old, new)]
    extras = [mark.get("extra_info") or {} for mark in (old, new)]
    shared = {extra.get("reference") for extra in extras}
    if len(shared) == 1 and all(extra.get("ratio") for extra in extras):
        of = f"ratio to {shared.pop()}"
        pairs = [
            _median({
                "median": extra["ratio"], "q1": extra["ratio_low"], "q3": extra["ratio_high"],
                "rounds": mark["stats"]["rounds"],
            })
            for extra, mark in zip(extras, (old, new), strict=True)
        ]  # fmt: skip
    (before, error), (after, other) = pairs
    ratio = after / before
    rounds = sum(mark["stats"]["rounds"] - 1 for mark in (old, new))
    freedom = max(1, round(EFFICIENCY * rounds))
    reach = math.exp(critical_value(freedom, confidence) * math.hypot(error, other))
    return Change(new["name"], before, after, ratio, ratio / reach, ratio * reach, of)


def _is_reference(mark: Mapping[str, Any]) -> bool:
    extra = mark.get("extra_info") or {}
    return "reference" in extra and extra.get("variant") == extra["reference"]


def _median(stats: Mapping[str, float]) -> tuple[float, float]:
    """A median and the standard error of its logarithm."""
    spread = math.log(stats["q3"] / stats["q1"]) / QUARTILES
    return stats["median"], max(MEDIAN * spread / math.sqrt(stats["rounds"]), FLOOR)
