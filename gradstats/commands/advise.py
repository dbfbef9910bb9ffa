"""`gradstats advise`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from gradstats.commands.options import AsJson
from gradstats.commands.running import check_outputs, hand_over, one_line, print_json, say_written


def register(application: Any) -> None:
    @application.command()
    def advise(
        files: Annotated[
            list[Path] | None,
            Argument(help="Results of the other commands, and logs (.jsonl), in any order."),
        ] = None,
        target: Annotated[
            str | None,
            Option(
                metavar="MODULE:FACTORY", help="Your training: BatchNorm layers, data, optimizer."
            ),
        ] = None,
        task: Annotated[
            str | None,
            Option(help="A published starting point where nothing was measured; see --tasks."),
        ] = None,
        tasks: Annotated[bool, Option("--tasks", help="List those, and end.")] = False,
        batch_size: Annotated[
            int | None, Option(help="Samples per step at present. Default: as measured.")
        ] = None,
        learning_rate: Annotated[
            float | None, Option(help="At present. Default: as measured.")
        ] = None,
        optimizer: Annotated[str | None, Option(help="SGD, AdamW, … Default: as measured.")] = None,
        data_samples: Annotated[
            int | None, Option(help="Samples in the data, for epochs. Default: as measured.")
        ] = None,
        ranks: Annotated[
            int | None, Option(help="Devices to train on. Default: as measured, else 1.")
        ] = None,
        collective_seconds: Annotated[
            float, Option(help="Of a step's collectives over all ranks.")
        ] = 0.0,
        max_micro_batch_size: Annotated[
            int | None,
            Option(help="Samples that fit a device. Default: as `gradstats vram` found."),
        ] = None,
        max_batch_size: Annotated[int | None, Option(help="Largest batch allowed.")] = None,
        epochs: Annotated[float | None, Option(help="Planned, at the present batch size.")] = None,
        steps: Annotated[
            int | None, Option(help="Planned, at the present batch size, instead of --epochs.")
        ] = None,
        goal: Annotated[str, Option(help="time or cost.")] = "time",
        price: Annotated[float | None, Option(help="Of a device for an hour.")] = None,
        batch_norm: Annotated[
            bool | None,
            Option(
                "--batch-norm/--no-batch-norm", help="The model has BatchNorm layers, or has none."
            ),
        ] = None,
        out: Annotated[Path | None, Option(help="Write the plan here.")] = None,
        as_json: AsJson = False,
    ) -> None:
        """The plan: batch, micro-batches, ranks, learning rate, warm-up, steps; and why.

        From result files of measure, vram, lr-range, critical and sweep, and from logs, in which signs of
        overfitting are looked for too; or from a published starting point for a task. Exits with 0 with a
        plan, 2 where a file or an argument cannot be used, or there is nothing to go by.
        """
        with one_line():
            from gradstats.workbench import advise as bench

            check_outputs(out)
            if tasks:
                _list(bench.STARTING_POINTS, as_json)
                raise typer.Exit
            evidence = bench.gather(files or [])
            if target is not None:
                evidence = bench.of_target(target).joined(evidence)
            evidence = bench.with_present(
                evidence,
                batch_size=batch_size,
                learning_rate=learning_rate,
                optimizer=optimizer,
                data_samples=data_samples,
                largest=max_micro_batch_size,
            )
            found = bench.advise(
                evidence,
                task=task,
                ranks=ranks,
                collective_seconds=collective_seconds,
                max_batch_size=max_batch_size,
                epochs=epochs,
                steps_left=steps,
                goal=goal,  # type: ignore[arg-type]
                device_hour_price=price,
                batch_norm=batch_norm,
            )
            hand_over("advise", target, found, lambda: _show(found, evidence), out, as_json)
            if not as_json:
                say_written(out)


def _list(points: Any, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json({name: asdict(point) for name, point in points.items()})
        return
    from gradstats.terminal import console_and_table

    console, make_table = console_and_table()
    table = make_table(
        "task", "batch size", "optimizer", "learning rate", "source", title_justify="left"
    )
    table.columns[-1].overflow = "fold"  # a source is no use where its number is cut off
    table.columns[0].no_wrap = True
    for name, point in points.items():
        size = f"{point.batch_size:,} {point.unit}"
        table.add_row(name, size, point.optimizer, f"{point.learning_rate:.3g}", point.source)
    console.print(table)
    console.print("Published starting points, not measurements.")


def _show(found: Any, evidence: Any) -> None:
    from rich.table import Table

    from gradstats.estimators import readable
    from gradstats.terminal import console_and_table

    console, _ = console_and_table()
    plan = found.plan
    title = "Plan" if plan.measured else "A published starting point, not a measurement"
    table = Table.grid("", "", padding=(0, 2))
    table.title, table.title_justify = title, "left"

    def row(name: str, value: Any, text: str) -> None:
        if value is not None:
            table.add_row(name, text)

    now = evidence.batch_size if plan.measured else None
    changed = "" if now in (None, plan.batch_size) else f"   (now {now:,})"
    row("batch size", plan.batch_size, f"{plan.batch_size:,} {plan.unit}{changed}")
    if plan.micro_batch_size is not None:
        parts = f"{plan.micro_batch_size:,} × {plan.accumulation_steps:,} × {plan.world_size:,}"
        row("made up of", parts, f"{parts}   (micro-batch × accumulation × ranks)")
    row("optimizer", plan.optimizer, f"{plan.optimizer}")
    if plan.learning_rate is not None:
        ends = ""
        if plan.learning_rate_low is not None and plan.learning_rate_high is not None:
            ends = f"   ({plan.learning_rate_low:.3g} to {plan.learning_rate_high:.3g})"
        row("learning rate", plan.learning_rate, f"{plan.learning_rate:.3g}{ends}")
    row("warm-up", plan.warmup_steps, f"{plan.warmup_steps or 0:,} steps")
    row("steps", plan.steps, f"{plan.steps or 0:,}   ({plan.samples or 0:,} {plan.unit})")
    row("epochs", plan.epochs, f"{plan.epochs or 0:.3g}")
    row("hours", plan.hours, readable(plan.hours or 0))
    row("price", plan.price, readable(plan.price or 0))
    console.print(table)
    for name, lines in (("Why", found.reasons), ("Besides", found.remarks)):
        if lines:
            console.print(f"\n{name}", style="bold")
        for line in lines:
            console.print(f"- {line}", markup=False, soft_wrap=True)
