"""`gradstats doctor`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

from typing import Annotated, Any

import typer

from gradstats.commands.running import one_line


def register(application: Any) -> None:
    @application.command()
    def doctor(
        as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    ) -> None:
        """Which backends can run here, which are used and why, and how to get those missing.

        Exits with 1 where the backend named by GRADSTATS_BACKEND cannot run.
        """
        with one_line():
            from gradstats import doctor as doctor_module

            raise typer.Exit(doctor_module.doctor(as_json=as_json))
