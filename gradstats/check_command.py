"""`gradstats check module:factory`: find the factory, check what it makes, show the report."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from torch import nn

from gradstats.checking import check
from gradstats.errors import InvalidArgumentError
from gradstats.report import CheckReport
from gradstats.terminal import console_and_table


def run(target: str, *, samples: int, batch_dim: int | None, as_json: bool) -> int:
    """Print the report of what `target` makes; 0 where everything is exact, else 1.

    Raises InvalidArgumentError where `target` cannot be imported, called, or gives something else
    than (model, loss_fn, batch).
    """
    model, loss_fn, batch = _make(target)
    report = check(model, loss_fn, batch, samples=samples, batch_dim=batch_dim)
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        _show(report)
    return 0 if report.ok else 1


def _make(target: str) -> tuple[nn.Module, Any, Any]:
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise InvalidArgumentError(
            f"{target!r} is not of the form module:factory, as in my_project.training:example"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder the command runs in, as `python -m` has it
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InvalidArgumentError(
            f"module {module_name!r} cannot be imported ({_line(error)}). Run in the folder that "
            "holds it, and name it as `import` would, without .py."
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        seen = "is not there" if factory is None else f"is a {type(factory).__name__}"
        raise InvalidArgumentError(
            f"{name!r} in module {module_name!r} {seen}; it must be a function without arguments "
            "that returns (model, loss_fn, batch)"
        )
    try:
        made = factory()
    except Exception as error:
        raise InvalidArgumentError(
            f"{target}() failed: {_line(error)}. It is called without arguments and must return "
            "(model, loss_fn, batch)."
        ) from error
    if not isinstance(made, (tuple, list)) or len(made) != 3:
        seen = type(made).__name__
        seen += f" of {len(made)}" if isinstance(made, (tuple, list)) else ""
        raise InvalidArgumentError(f"{target}() must return (model, loss_fn, batch), not a {seen}")
    if not isinstance(made[0], nn.Module) or not callable(made[1]):
        kinds = ", ".join(type(part).__name__ for part in made)
        raise InvalidArgumentError(
            f"{target}() returned ({kinds}); the first must be an nn.Module, the second a function"
        )
    return made[0], made[1], made[2]


def _show(report: CheckReport) -> None:
    console, make_table = console_and_table()
    table = make_table(*report.headings)
    for row, layer in zip(report.rows(), report.layers, strict=True):
        bad = layer.wrong or layer.path == "uncovered"
        table.add_row(*row, style="red" if bad else None)
    console.print(table)
    for text in report.remarks():
        console.print(text, markup=False, soft_wrap=True)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
