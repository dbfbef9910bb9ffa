"""`gradstats lr-range module:factory`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from gradstats.commands.options import AsJson, Out, Seed, Target
from gradstats.commands.running import INTERRUPTED, check_outputs, hand_over, one_line, say_written
from gradstats.errors import InvalidArgumentError


def register(application: Any) -> None:
    @application.command("lr-range")
    def lr_range(
        target: Target,
        batch_sizes: Annotated[
            str | None,
            Option(
                metavar="B,B,...",
                help="As 16,32,64; from three on a scaling rule is fitted. Default: the workload's.",
            ),
        ] = None,
        steps: Annotated[int, Option(help="Optimizer steps of a run at one rate.")] = 20,
        repeats: Annotated[int, Option(help="Runs at each rate, in other data orders.")] = 3,
        lowest: Annotated[
            float | None, Option(help="Lowest rate tried, with --highest. Default: found.")
        ] = None,
        highest: Annotated[float | None, Option(help="Highest rate tried.")] = None,
        loss_samples: Annotated[
            int, Option(help="On which the loss after a run is taken, at most.")
        ] = 1024,
        seed: Seed = 0,
        picture: Annotated[Path | None, Option(help="Draw the curves here.")] = None,
        out: Out = None,
        as_json: AsJson = False,
    ) -> None:
        """The range of learning rates your training gets ahead at, from where it is now.

        Short runs at one rate each, all from the same weights, show where the loss begins to fall and
        where it rises; everything is then restored, and a hash of it compared. FACTORY is a function
        without arguments that returns (model, loss_fn, data), (model, loss_fn, data, optimizer) or a
        gradstats.Workload.

        Exits with 0 where there is a range, 1 where the loss falls at no rate or the training fails,
        2 where the factory or an argument cannot be used, 130 after Ctrl-C, with what was found by then.
        """
        with one_line():
            sizes = _sizes(batch_sizes)
            if (lowest is None) != (highest is None):
                raise InvalidArgumentError(
                    "--lowest and --highest go together; give both or neither"
                )
            window = None if lowest is None or highest is None else (lowest, highest)
            options = {
                "batch_sizes": sizes,
                "steps": steps,
                "repeats": repeats,
                "window": window,
                "loss_samples": loss_samples,
                "seed": seed,
            }
            raise typer.Exit(_run(target, options, seed, picture, out, as_json))


def _sizes(text: str | None) -> list[int]:
    try:
        return [] if text is None else [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidArgumentError(
            f"--batch-sizes {text} must be whole numbers with commas between them, as in 16,32,64"
        ) from error


def _run(
    target: str,
    options: dict[str, Any],
    seed: int,
    picture: Path | None,
    out: Path | None,
    as_json: bool,
) -> int:
    from gradstats.commands.progress import Progress
    from gradstats.workbench.lr_range import lr_range
    from gradstats.workbench.lr_range.chart import draw
    from gradstats.workbench.workload import load

    check_outputs(out, picture)
    workload = load(target, seed=seed)
    with Progress("lr-range") as progress:
        found = lr_range(workload, report=progress, **options)
    hand_over("lr_range", target, found, lambda: _show(found), out, as_json)
    if not found.curves:
        picture = None
    if picture is not None:
        draw(found.curves, found.scaling, f"Learning rates of {target}", picture)
    if not as_json:
        say_written(out, picture)
    if found.interrupted:
        return INTERRUPTED
    return 0 if any(curve.low is not None for curve in found.curves) else 1


def _show(found: Any) -> None:
    from gradstats.terminal import console_and_table
    from gradstats.workbench.lr_range.chart import text_chart

    console, make_table = console_and_table()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if found.interrupted:
        say("Interrupted: what follows was measured until then.")
    if len(found.curves) == 1:
        say(f"Loss after {found.steps} steps at each learning rate\n")
        say(text_chart(found.curves[0]) + "\n")
    elif found.curves:
        table = make_table("batch", "low", "high", "rises at", "falls most at", "suggested")
        for curve in found.curves:
            rates = (curve.low, curve.high, curve.diverged_at, curve.best, curve.suggested)
            cells = ["" if rate is None else f"{rate:.3g}" for rate in rates]
            table.add_row(f"{curve.batch_size:,}", *cells)
        console.print(table)
    say(str(found))
    say(
        f"{found.optimizer}, at {found.present_rate:.3g} now; {found.steps_taken:,} steps taken and undone: "
        f"weights, optimizer and random numbers have the same hash as before "
        f"({_short(found.before)} = {_short(found.after)})"
    )


def _short(fingerprint: dict[str, str]) -> str:
    """The first digits of a hash over the hashes of all parts."""
    import hashlib

    return hashlib.sha256("".join(fingerprint.values()).encode()).hexdigest()[:12]
