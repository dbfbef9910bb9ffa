"""What the demo prints: live progress, and the recommendation at the end."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from gradstats.demo.train import Progress as Reached
from gradstats.demo.train import Run
from gradstats.estimators import readable
from gradstats.terminal import advice_table

PLAIN_LINES = 20  # of progress, where the output is not a terminal
STYLE: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD}
LAYERS = 6  # rows of the table of shares


class Screen:
    """Progress on a terminal as a bar, elsewhere as lines; a context manager."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        self._printed = -1
        self._bar: Progress | None = None
        if console.is_terminal:
            count = TextColumn("{task.completed}/{task.total}")
            text = TextColumn("{task.description}")
            self._bar = Progress(count, BarColumn(12), text, console=console)
            self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Screen:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, reached: Reached) -> None:
        noise = reached.noise
        end = "∞" if noise.high == float("inf") else readable(noise.high)
        minutes, seconds = divmod(round(reached.seconds_left), 60)
        text = (
            f"loss {reached.loss:.3f}  noise scale {readable(noise.value)} "
            f"({readable(noise.low)}–{end})  {reached.samples_per_second:.0f}/s  "
            f"ETA {minutes}:{seconds:02}"
        )
        last = reached.step == self._steps
        if self._bar:
            self._bar.update(self._task, completed=reached.step, description=text)
        elif reached.step * PLAIN_LINES // self._steps > self._printed or last:
            self._printed = reached.step * PLAIN_LINES // self._steps
            self._console.print(f"step {reached.step}/{self._steps}  {text}", soft_wrap=True)
        if last:
            self._console.print("Timing a few steps at other batch sizes …")


def show(console: Console, run: Run) -> None:
    """Print the result of a run for people."""
    summary = run.summary()
    console.print()
    console.print(f"{summary['steps']:,} steps of {run.batch_size:,} {run.task.unit}", end="")
    console.print(f" in {run.seconds:.0f} s; loss {_loss(summary)}")
    console.print(summary["noise_scale_sentence"])
    if summary["recommendation"]:
        rate = run.task.optimizer.param_groups[0]["lr"]
        console.print(advice_table(summary["recommendation"], rate))
    if run.step_seconds:
        console.print(_times(run))
    shares = list(run.shares().items())[:LAYERS]
    if shares:
        table = Table("layer", "share of tr Σ", title="Where the noise is", **STYLE)
        for name, share in shares:
            table.add_row(name, f"{share:.1%}")
        console.print(table)


def _loss(summary: dict[str, Any]) -> str:
    first, last = summary["first_loss"], summary["last_loss"]
    return "unknown" if first is None or last is None else f"{first:.3f} → {last:.3f}"


def _times(run: Run) -> Table:
    title = "Measured on this machine"
    table = Table("batch size", "seconds per step", "samples per second", title=title, **STYLE)
    for size, seconds in run.step_seconds.items():
        table.add_row(f"{size:,}", f"{seconds:.4f}", f"{size / seconds:,.0f}")
    return table
