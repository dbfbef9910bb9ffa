"""What a report is made of: logs and result files, read and looked through."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradstats.errors import InvalidArgumentError
from gradstats.loggers import About, read_log
from gradstats.loggers.reading import number
from gradstats.workbench import saved

__all__ = ["KINDS", "Input", "Run", "guarded", "numbers", "objects", "read"]

# Kinds of result files, and the lists of objects that each must hold.
KINDS: dict[str, tuple[str, ...]] = {
    "measure": ("rows",),
    "vram": ("points",),
    "lr_range": ("curves",),
    "sweep": ("trials",),
    "critical": ("branches",),
    "advise": (),
    "bench": ("ops", "steps"),
}
HEAD = 4096  # characters in which a result file names its kind

Array = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class Input:
    """A file: its name in the report, its kind ("log" or one of KINDS), and what it holds.

    `content` is the result's object; a log has `rows` instead, and what it says `about` them. `spoilt`
    counts lines that hold no row, `replaced` rows that a resumed training wrote again.
    """

    name: str
    path: str
    kind: str
    content: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[dict[str, Any]] = ()
    about: About = field(default_factory=About)
    spoilt: int = 0
    replaced: int = 0


@dataclass(frozen=True)
class Run:
    """The rows of one training in the order of their steps, of a log or of a measurement."""

    name: str
    rows: Sequence[dict[str, Any]]
    about: About = field(default_factory=About)
    _columns: dict[str, Array] = field(default_factory=dict, repr=False, compare=False)

    def column(self, key: str) -> Array:
        """(rows,) the numbers under `key`, NaN where there is none."""
        if key not in self._columns:
            self._columns[key] = numbers([row.get(key) for row in self.rows])
        return self._columns[key]

    def last(self, key: str) -> float:
        """The number under `key` in the last row that has a finite one, else NaN."""
        known = self.column(key)
        known = known[np.isfinite(known)]
        return float(known[-1]) if len(known) else math.nan

    @cached_property
    def keys(self) -> list[str]:
        """What rows hold, in the order of the first row that has it."""
        return list(dict.fromkeys(key for row in self.rows for key in row))


def numbers(values: Any) -> Array:
    """A float array of a list, NaN for each entry that is no number; empty where it is no list."""
    values = values if isinstance(values, (list, tuple)) else []
    return np.array([number(value) for value in values], np.float64)


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects in a list; none where it is no list."""
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def read(
    paths: Sequence[Path], progress: Callable[[str, float], object] = lambda what, done: None
) -> list[Input]:
    """Read logs and result files; `progress` is called with a text and the part done, from 0 to 1.

    Raises InvalidArgumentError, which names the file, where one cannot be read, is empty, was cut
    short, is given twice, or is neither a log nor a result of gradstats.
    """
    if not paths:
        raise InvalidArgumentError(
            "no file was given; name a log, or what a command wrote by --out"
        )
    twice = {path for path in paths if list(paths).count(path) > 1}
    if twice:
        raise InvalidArgumentError(f"{min(twice)} was given twice; name each file once")
    found = []
    for i, (path, name) in enumerate(zip(paths, _names(paths), strict=True)):
        progress(f"reading {path}", i / len(paths))
        found.append(_read(path, name))
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """File names, without suffix or folders where these are not needed to tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        for shown in ([path.with_suffix("") for path in paths], paths):
            names = ["/".join(path.parts[-depth:]) for path in shown]
            if len(set(names)) == len(paths):
                return names
    return [str(path) for path in paths]


def _read(path: Path, name: str) -> Input:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read ({error.strerror})") from error
    if not head.strip():
        raise InvalidArgumentError(f"{path} is empty; has its training made a row yet?")
    if re.search(r'"kind":\s*"gradstats ', head):
        content = saved.read(path, *KINDS)
        kind = str(content["kind"]).removeprefix("gradstats ")
        _look_through(path, kind, content)
        return Input(name, str(path), kind, content)
    log = read_log(path)
    if not log.rows:
        raise InvalidArgumentError(
            f"{path} is neither a log of gradstats.Log (none of its {log.spoilt:,} lines is a row) nor a "
            "whole result file; was it cut short?"
        )
    kept = _in_order(log.rows)
    replaced = len(log.rows) - len(kept)
    return Input(name, str(path), "log", {}, kept, log.about, log.spoilt, replaced)


def _look_through(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    for key in KINDS[kind]:
        found = content.get(key)
        if not isinstance(found, list) or not all(isinstance(part, dict) for part in found):
            seen = json.dumps(found)[:40]
            raise InvalidArgumentError(
                f"{path} has {key} = {seen}, where a list of objects is needed; was it changed by hand?"
            )


def _in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the rows of steps that a resumed training has done again."""
    kept: list[dict[str, Any]] = []
    first = math.inf
    for row in reversed(rows):
        if row["step"] < first:
            first = row["step"]
            kept.append(row)
    return kept[::-1]


def guarded(given: Input, make: Callable[[Input], T]) -> T:
    """What `make` gives.

    Raises InvalidArgumentError, which names the file, where its fields are of other kinds than they must be.
    """
    try:
        return make(given)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(
            f"{given.path} does not hold what a result of {given.kind} does "
            f"({type(error).__name__}: {error}); was it changed by hand?"
        ) from error
