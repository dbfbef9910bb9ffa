"""`gradstats check module:factory`: find the factory, check what it makes, show the report."""

from __future__ import annotations

import json
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from gradstats.checking import check
from gradstats.errors import InvalidArgumentError
from gradstats.report import CheckReport
from gradstats.terminal import console_and_table
from gradstats.workbench.factory import call_factory
from gradstats.workbench.workload import Workload, workload

GIVES = "(model, loss_fn, batch)"
LARGEST = 16  # samples of a data set that are checked


def run(target: str, *, samples: int, batch_dim: int | None, as_json: bool) -> int:
    """Print the report of what `target` makes; 0 where everything is exact, else 1.

    Raises InvalidArgumentError where `target` cannot be imported, called, or gives something else
    than (model, loss_fn, batch) or what the other commands take.
    """
    model, loss_fn, batch = _make(target)
    report = check(model, loss_fn, batch, samples=samples, batch_dim=batch_dim)
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        _show(report)
    return 0 if report.ok else 1


def _make(target: str) -> tuple[nn.Module, Any, Any]:
    made = call_factory(target, GIVES)
    if _of_a_training(made):
        made = workload(made)
    if isinstance(made, Workload):
        size = min(made.num_samples, made.batch_size or LARGEST)
        return made.model, made.loss_fn, made.take(range(size))
    if not isinstance(made, (tuple, list)) or len(made) != 3:
        seen = type(made).__name__
        seen += f" of {len(made)}" if isinstance(made, (tuple, list)) else ""
        raise InvalidArgumentError(f"{target}() must return {GIVES}, not a {seen}")
    if not isinstance(made[0], nn.Module) or not callable(made[1]):
        kinds = ", ".join(type(part).__name__ for part in made)
        raise InvalidArgumentError(
            f"{target}() returned ({kinds}); the first must be an nn.Module, the second a function"
        )
    return made[0], made[1], made[2]


def _of_a_training(made: Any) -> bool:
    """Whether it is what the other commands take: with data in the place of a batch, or an optimizer."""
    if not isinstance(made, (tuple, list)) or len(made) not in (3, 4):
        return False
    return len(made) == 4 or isinstance(made[2], (Dataset, DataLoader))


def _show(report: CheckReport) -> None:
    console, make_table = console_and_table()
    table = make_table(*report.headings)
    for row, layer in zip(report.rows(), report.layers, strict=True):
        bad = layer.wrong or layer.path == "uncovered"
        table.add_row(*row, style="red" if bad else None)
    console.print(table)
    for text in report.remarks():
        console.print(text, markup=False, soft_wrap=True)
