"""`gradstats check module:factory`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

from typing import Annotated, Any

import typer
from typer import Option

from gradstats.commands.options import AsJson, Target
from gradstats.commands.running import one_line


def register(application: Any) -> None:
    @application.command()
    def check(
        target: Target,
        samples: Annotated[int, Option(help="Compared one at a time, about.")] = 3,
        batch_dim: Annotated[int | None, Option(help="Default: found out.")] = None,
        as_json: AsJson = False,
    ) -> None:
        """Whether the statistics are exact on your model, compared with plain autograd.

        FACTORY is a function without arguments that returns (model, loss_fn, batch), or what the other
        commands take: data in the place of the batch, an optimizer, a gradstats.Workload. Exits with 0
        where everything is exact, 1 where something is wrong or not measured, 2 where the factory
        or an argument cannot be used.
        """
        with one_line():
            from gradstats.check_command import run

            raise typer.Exit(run(target, samples=samples, batch_dim=batch_dim, as_json=as_json))
