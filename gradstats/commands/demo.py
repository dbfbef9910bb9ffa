"""`gradstats demo`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from gradstats.commands.running import one_line


def register(application: Any) -> None:
    @application.command()
    def demo(
        task: Annotated[str, typer.Option(help="text or digits.")] = "text",
        steps: Annotated[Optional[int], typer.Option(help="Optimizer steps.")] = None,  # noqa: UP045
        batch_size: Annotated[Optional[int], typer.Option(help="Samples per step.")] = None,  # noqa: UP045
        out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("runs/demo"),
        seed: Annotated[int, typer.Option(help="Of the model and its data.")] = 0,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
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
