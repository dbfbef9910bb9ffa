"""`gradstats demo`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from gradstats.commands.options import AsJson
from gradstats.commands.running import one_line


def register(application: Any) -> None:
    @application.command()
    def demo(
        task: Annotated[str, Option(help="text or digits.")] = "text",
        steps: Annotated[int | None, Option(help="Optimizer steps.")] = None,
        batch_size: Annotated[int | None, Option(help="Samples per step.")] = None,
        out: Annotated[Path, Option(help="Folder for the files.")] = Path("runs/demo"),
        seed: Annotated[int, Option(help="Of the model and its data.")] = 0,
        as_json: AsJson = False,
    ) -> None:
        """Train a small network for about a minute and recommend its batch size.

        Writes steps.jsonl, summary.json and noise_scale.png. Ctrl-C keeps what was measured.
        """
        with one_line():
            from gradstats.demo.command import demo as run

            code = run(
                task, steps=steps, batch_size=batch_size, out=out, seed=seed, as_json=as_json
            )
            raise typer.Exit(code)
