"""`gradstats demo`: train, show progress, write the files, print the recommendation."""

from __future__ import annotations

import importlib.util
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstats.errors import GradStatsError, InvalidArgumentError


@dataclass(frozen=True)
class Defaults:
    """Settings of a task: about a minute of training on two cores at most."""

    steps: int
    batch_size: int
    requires: tuple[str, ...] = ()  # modules, beyond what every task needs


DEFAULTS = {
    "text": Defaults(steps=800, batch_size=16),
    "digits": Defaults(steps=600, batch_size=64, requires=("sklearn",)),
}
STEPS, SUMMARY, PICTURE = "steps.jsonl", "summary.json", "noise_scale.png"
PACKAGES = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "rich": "rich"}
INTERRUPTED = 130


def demo(
    task: str, *, steps: int | None, batch_size: int | None, out: Path, seed: int, as_json: bool
) -> int:
    """Run the demo and return the exit code: 0, or 130 after Ctrl-C.

    Raises:
        InvalidArgumentError: an argument cannot be used.
        GradStatsError: a package is missing.
    """
    if task not in DEFAULTS:
        raise InvalidArgumentError(f"--task {task} does not exist; use {' or '.join(DEFAULTS)}")
    defaults = DEFAULTS[task]
    steps = defaults.steps if steps is None else _at_least(1, "--steps", steps)
    batch_size = (
        defaults.batch_size if batch_size is None else _at_least(1, "--batch-size", batch_size)
    )
    _at_least(0, "--seed", seed)
    _require_packages("rich", "matplotlib", *defaults.requires)
    with closing(_prepare(out)) as lines:
        return _run(task, steps, batch_size, out, seed, as_json, lines)


def _run(
    task: str, steps: int, batch_size: int, out: Path, seed: int, as_json: bool, lines: Any
) -> int:
    import torch
    from rich.console import Console

    from gradstats.demo import picture, screen, tasks
    from gradstats.demo.train import train
    from gradstats.workbench.saved import write_text

    # JSON has standard output to itself.
    console = Console(stderr=as_json, highlight=False)
    torch.manual_seed(seed)
    made = tasks.make(task)
    console.print(f"Training a {made.title}: {steps:,} steps of {batch_size:,} {made.unit}")
    with screen.Screen(console, steps) as report:
        generator = torch.Generator().manual_seed(seed)
        run = train(
            made,
            steps=steps,
            batch_size=batch_size,
            generator=generator,
            lines=lines,
            report=report,
        )
    if run.interrupted:
        console.print("Interrupted: what follows was measured until then.")
    summary = {"seed": seed, **run.summary()}
    if as_json:
        print(json.dumps(summary, allow_nan=False), flush=True)
    else:
        screen.show(console, run)
    # Last: where the disk is full, the result has been shown.
    write_text(out / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    picture.draw(run.rows, batch_size, f"A {made.title}", made.unit, out / PICTURE)
    if not as_json:
        names = [STEPS] * (lines.error is None) + [SUMMARY, PICTURE]
        console.print("Written: " + ", ".join(str(out / name) for name in names), soft_wrap=True)
    return INTERRUPTED if run.interrupted else 0


def _at_least(least: int, option: str, value: int) -> int:
    if value < least:
        raise InvalidArgumentError(f"{option} {value} must be at least {least}")
    return value


def _require_packages(*modules: str) -> None:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        names = " and ".join(PACKAGES[m] for m in missing)
        raise GradStatsError(
            f"the demo needs {names}, not installed here; run `pip install 'gradstats[demo]'`"
        )


def _prepare(out: Path) -> Any:
    """Make the folder, clear away an earlier run's files and open the new one's first."""
    from gradstats.loggers import JsonLines

    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (SUMMARY, PICTURE):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise InvalidArgumentError(
            f"--out {out} cannot be written to ({error.strerror}); name another folder"
        ) from error
    return JsonLines(out / STEPS)
