"""What the commands need to show a report to people; rich is imported when it is shown."""

from __future__ import annotations

from typing import Any

from gradstats.errors import GradStatsError


def console_and_table() -> tuple[Any, Any]:
    """A console, and a function that makes a table of the given headings.

    Raises GradStatsError where rich is not installed.
    """
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise GradStatsError(
            f"the report needs rich ({error}); run `pip install 'gradstats[cli]'`, or add --json"
        ) from error
    return Console(highlight=False), lambda *headings, **options: Table(
        *headings, box=SIMPLE_HEAD, **options
    )
