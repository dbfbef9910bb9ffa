"""The files' contents as the page keeps them: JSON that no markup can break out of, of bounded size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from gradstats.workbench.report.figures import Table
from gradstats.workbench.report.inputs import Input
from gradstats.workbench.report.thinning import thinned
from gradstats.workbench.saved import plain

__all__ = ["Part", "embed", "in_script"]

BUDGET = 900_000  # bytes of JSON, over all files
SHORTEST = 50  # lists are made no shorter than this


@dataclass(frozen=True)
class Part:
    """A file in the page: `left_out` entries of its lists are not there."""

    name: str
    path: str
    kind: str
    download: str
    json: str
    entries: int
    left_out: int


def embed(inputs: Sequence[Input]) -> list[Part]:
    """Each file's content, long lists thinned evenly until all fit the budget.

    What results leave of their shares is for the logs, which come last here.
    """
    order = sorted(range(len(inputs)), key=lambda i: inputs[i].kind == "log")
    parts, left = {}, BUDGET
    for done, i in enumerate(order):
        parts[i] = _part(inputs[i], left // (len(inputs) - done))
        left -= len(parts[i].json)
    return [parts[i] for i in range(len(inputs))]


def in_script(value: Any) -> str:
    """JSON for a script element: no character in it can end the element or begin markup."""
    text = json.dumps(plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def files_table(parts: Sequence[Part]) -> Table:
    rows = [
        [
            part.path,
            "training log" if part.kind == "log" else part.kind,
            f"{part.entries:,}",
            f"{part.left_out:,}" if part.left_out else "nothing",
        ]
        for part in parts
    ]
    return Table(["file", "kind", "rows or entries", "left out of this page"], rows)


def _part(given: Input, budget: int) -> Part:
    content: Any = list(given.rows) if given.kind == "log" else dict(given.content)
    text, left_out = _within(content, budget)
    entries = len(content) if given.kind == "log" else _entries(content)
    stem = PurePath(given.path).stem
    return Part(given.name, given.path, given.kind, f"{stem}.json", text, entries, left_out)


def _within(content: Any, budget: int) -> tuple[str, int]:
    """JSON of the content with lists as long as the budget permits, and the entries left out.

    Begins with short lists, so that of a long log little is written that is thrown away.
    """
    most = SHORTEST
    best = thinned(content, most)
    text = in_script(best[0])
    while best[1] and 1.1 * len(text) < budget:
        longer = max(most + 1, int(most * min(8.0, budget / len(text))))
        tried = thinned(content, longer)
        tried_text = in_script(tried[0])
        if len(tried_text) > budget:
            break
        most, best, text = longer, tried, tried_text
    return text, best[1]


def _entries(value: Any) -> int:
    """Entries of all lists of a result."""
    if isinstance(value, dict):
        return sum(map(_entries, value.values()))
    if isinstance(value, (list, tuple)):
        return len(value) + sum(map(_entries, value))
    return 0
