"""`gradstats doctor`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

from typing import Any

import typer

from gradstats.commands.options import AsJson
from gradstats.commands.running import one_line


def register(application: Any) -> None:
    @application.command()
    def doctor(
        as_json: AsJson = False,
    ) -> None:
        """Backends and why they are used, what limits this machine, optional packages; how to get more.

        Exits with 0 where all that was asked for works, 1 where the backend named by GRADSTATS_BACKEND
        cannot run, 2 where an argument cannot be used, 130 after Ctrl-C.
        """
        with one_line():
            from gradstats import doctor as doctor_module

            raise typer.Exit(doctor_module.doctor(as_json=as_json))
