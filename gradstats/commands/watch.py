"""`gradstats watch FILE`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from gradstats.commands.running import one_line, print_json

LAYERS = 5
HEIGHT = 8  # rows of a chart
NARROW = 100  # columns below which charts stand one below the other


def register(application: Any) -> None:
    @application.command()
    def watch(
        file: Annotated[Path, Argument(help="JSON lines of gradstats.Log.")],
        interval: Annotated[float, Option(help="Seconds between looks.")] = 2.0,
        wait: Annotated[bool, Option("--wait", help="For a file that is not there yet.")] = False,
        once: Annotated[bool, Option("--once", help="Print one view and end.")] = False,
        as_json: Annotated[
            bool, Option("--json", help="One JSON object: the state now; implies --once.")
        ] = False,
    ) -> None:
        """A running training: loss, noise scale against the batch used, speed, layers, warnings.

        Follows the file as it grows; where the output is not a terminal, prints a line for each new row.
        Half-written and spoilt lines are passed over, and a file that is emptied or replaced is read
        anew. Ends by Ctrl-C (130). With --once and --json, exits with 0, or 1 where the file holds no
        row. Exits with 2 where it cannot be read, or is not there (see --wait).
        """
        with one_line():
            from gradstats.errors import InvalidArgumentError
            from gradstats.workbench.watch import Follower

            if not interval > 0:
                raise InvalidArgumentError(f"--interval {interval} must be above 0")
            follower = Follower(file)
            follower.read()
            while not follower.exists:
                if not wait:
                    raise InvalidArgumentError(
                        f"{file} is not there; name another, or --wait for it"
                    )
                time.sleep(interval)
                follower.read()
            if once or as_json:
                raise typer.Exit(_once(follower, as_json))
            _follow(follower, interval)


def _state(follower: Any) -> Any:
    from gradstats.workbench.watch import state_of

    return state_of(
        follower.rows,
        about=follower.about,
        age=follower.age,
        spoilt=follower.spoilt,
        restarts=follower.restarts,
        resumed=follower.resumed,
    )


def _once(follower: Any, as_json: bool) -> int:
    state = _state(follower)
    if as_json:
        counts = {key: getattr(follower, key) for key in ("spoilt", "restarts", "resumed")}
        print_json({"file": follower.path, **counts, **state.to_dict()})
    else:
        from gradstats.terminal import console_and_table

        console, _ = console_and_table()
        console.print(_view(follower, state, console))
    return 0 if state.rows else 1


def _follow(follower: Any, interval: float) -> None:
    from rich.live import Live

    from gradstats.terminal import console_and_table

    console, _ = console_and_table()
    if not console.is_terminal:
        _print_rows(follower, interval, console)
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(_view(follower, _state(follower), console), refresh=True)
                time.sleep(interval)
                follower.read()
    finally:  # what was on the screen stays to be read
        console.print(_view(follower, _state(follower), console))


def _print_rows(follower: Any, interval: float, console: Any) -> None:
    """A line for each row, and each warning when it comes up."""
    said: set[str] = set()
    shown = -1.0
    restarts = 0
    while True:
        if follower.restarts != restarts:
            restarts, shown = follower.restarts, -1.0
        for row in follower.rows:
            if row["step"] > shown:
                console.print(_line(row), markup=False, soft_wrap=True)
        shown = follower.rows[-1]["step"] if follower.rows else -1.0
        warnings = _state(follower).warnings
        for kind, text in warnings.items():
            if kind not in said:
                console.print(f"warning: {text}", markup=False, soft_wrap=True)
        said = set(warnings)  # what is over and comes back is said again
        time.sleep(interval)
        follower.read()


def _line(row: Any) -> str:
    from gradstats.estimators import readable
    from gradstats.terminal import between
    from gradstats.workbench.watch.state import number

    parts = [f"step {row['step']:,}"]
    for name, key in (("loss", "loss"), ("noise scale", "noise_scale"), ("batch", "batch_size")):
        if key in row:
            value = number(row, key)
            parts.append(f"{name} {'unknown' if value is None else readable(value)}")
        if key == "noise_scale" and key in row:
            ends = number(row, "noise_scale_low"), number(row, "noise_scale_high")
            parts[-1] += f" ({between(*ends)})"
    return "  ".join(parts)


# ---- the view ------------------------------------------------------------------------------------


def _view(follower: Any, state: Any, console: Any) -> Any:
    from rich.console import Group
    from rich.text import Text

    from gradstats.terminal import shares_bar

    parts: list[Any] = [_head(follower, state)]
    if not state.rows:
        parts.append(Text("no row yet"))
    parts += _charts(follower.rows, console)
    if state.layers:
        parts.append(Text("\nWhere the noise is (share of tr Σ)", style="bold"))
        width = max(len(name) for name in list(state.layers)[:LAYERS])
        for name, share in list(state.layers.items())[:LAYERS]:
            parts.append(Text(f"  {name:<{width}}  {share:6.1%}  {shares_bar(share, console)}"))
    parts += [Text(f"! {text}", style="yellow") for text in state.warnings.values()]
    return Group(*parts)


def _head(follower: Any, state: Any) -> Any:
    from rich.text import Text

    from gradstats.estimators import readable
    from gradstats.terminal import between
    from gradstats.workbench.watch.state import number

    last = state.last
    lines = [f"{follower.path}"]
    facts = []
    for name, key in (("step", "step"), ("samples", "samples"), ("learning rate", "learning_rate")):
        value = number(last, key)
        if value is not None:
            facts.append(f"{name} {value:,.0f}" if value == int(value) else f"{name} {value:.3g}")
    if state.samples_per_second is not None:
        facts.append(f"{readable(state.samples_per_second)} samples/s")
    loss = number(last, "loss")
    if loss is not None:
        facts.append(f"loss {loss:.4g}")
    lines.append("   ".join(facts))
    if "noise_scale" in last:
        value = number(last, "noise_scale")
        ends = between(number(last, "noise_scale_low"), number(last, "noise_scale_high"))
        used = number(last, "batch_size")
        lines.append(
            f"noise scale {'unknown' if value is None else readable(value)}  (interval {ends})"
            + ("" if used is None else f"   batch used {used:,.0f}")
            + ("" if state.advice is None else f", advised {state.advice['batch_size']:,}")
        )
    return Text("\n".join(line for line in lines if line), style="bold")


def _charts(rows: Any, console: Any) -> list[Any]:
    from rich.columns import Columns
    from rich.text import Text

    from gradstats.workbench.watch import Band, Line, chart
    from gradstats.workbench.watch.state import number

    plain = not (console.encoding or "").lower().startswith("utf")
    beside = console.width >= NARROW
    width = (console.width - 3) // 2 if beside else console.width - 1

    def series(key: str) -> list[tuple[float, float]]:
        pairs = ((number(row, "samples"), number(row, key)) for row in rows)
        return [(x, y) for x, y in pairs if x is not None and y is not None]

    def drawn(title: str, cells: Any) -> Any:
        text = Text(f"\n{title}\n")
        for row in cells:
            for letter, style in row:
                text.append(letter, style)
            text.append("\n")
        return text

    found = []
    losses = [Line(series("loss"), "cyan"), Line(series("validation_loss"), "magenta", "o")]
    size = {"width": width, "height": HEIGHT, "plain": plain}
    if cells := chart(losses, **size):
        held = " (held out: magenta)" if losses[1].points else ""
        found.append(drawn(f"loss by samples{held}", cells))
    band = [
        (x, number(row, "noise_scale_low") or 0.0, number(row, "noise_scale_high") or float("inf"))
        for row in rows
        if (x := number(row, "samples")) is not None and number(row, "noise_scale") is not None
    ]
    noise = [Line(series("noise_scale"), "yellow"), Line(series("batch_size"), "green", "-")]
    if noise[0].points and (cells := chart(noise, [Band(band, "dim yellow")], log=True, **size)):
        found.append(drawn("noise scale and its interval (yellow), batch used (green)", cells))
    return [Columns(found, padding=(0, 1), width=width)] if beside and found else found
