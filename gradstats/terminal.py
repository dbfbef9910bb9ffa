"""What the commands need to show a report to people; rich is imported when it is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradstats.errors import GradStatsError
from gradstats.words import readable, sizes, span


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


def between(low: float | None, high: float | None) -> str:
    """An interval: "30 to 50", or "30 up" where it has no upper end."""
    low = low or 0.0
    if high is None or not math.isfinite(high):
        return span(readable(low), None)
    return span(readable(low), readable(high))


def advice_table(advice: Mapping[str, Any], learning_rate: float | None) -> Any:
    """The parts of a `BatchSizeAdvice.to_dict()`, one per line; `learning_rate` is the present one."""
    from rich.table import Table

    now, size = advice["present_batch_size"], advice["batch_size"]
    interval = sizes(advice["low"], advice["high"])
    change = f"keep {now:,}" if size == now else f"{now:,} → {size:,}"
    table = Table.grid("", "", padding=(0, 2))
    table.title, table.title_justify = "\nRecommendation", "left"
    table.add_row("batch size", f"{change}   (the interval gives {interval})")
    parts = [advice[key] for key in ("micro_batch_size", "accumulation_steps", "world_size")]
    if parts[1:] != [1, 1]:
        micro, count, world = parts
        ranks = f" × {world:,} ranks" if world > 1 else ""
        table.add_row("made up of", f"{count:,} micro-batches of {micro:,}{ranks}")
    if advice["learning_rate"] is not None:
        scaled = f"{advice['learning_rate']:.3g}"
        if learning_rate is None or size == now:
            table.add_row("learning rate", f"{'keep ' * (size == now)}{scaled}")
        else:
            table.add_row("learning rate", f"{learning_rate:.3g} → {scaled}")
    for name, what in (("steps", "steps"), ("samples", "samples"), ("time", "seconds")):
        if advice[what] is not None and size != now:
            table.add_row(f"expected {name}", f"{readable(advice[what])} × what {now:,} would take")
    table.add_row("why", advice["reason"].replace("; ", "\n") + "\n")
    return table


def shares_bar(share: float, console: Any, width: int = 20) -> str:
    """A bar of `width` characters for a whole."""
    letter = "█" if (console.encoding or "").lower().startswith("utf") else "#"
    return letter * max(0, min(width, round(share * width)))
