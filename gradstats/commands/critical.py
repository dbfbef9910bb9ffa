"""`gradstats critical module:factory`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from gradstats.commands.options import AsJson, Target
from gradstats.commands.running import INTERRUPTED, check_outputs, one_line, print_json, say_written


def register(application: Any) -> None:
    @application.command()
    def critical(
        target: Target,
        batch_size: Annotated[
            int | None, Option(help="Of the unbranched run. Default: the workload's.")
        ] = None,
        multipliers: Annotated[
            str, Option(help="Of the batch size, separated by commas.")
        ] = "1,2,4,8,16,32",
        rule: Annotated[
            str | None,
            Option(
                help="Learning rate times: sqrt (√k), linear (k), none. Default: sqrt for Adam's kind, "
                "linear for SGD."
            ),
        ] = None,
        warm_up: Annotated[int, Option(help="Steps before the checkpoint.")] = 200,
        checkpoint: Annotated[
            Path | None,
            Option(
                help='File of torch.save({"model": …, "optimizer": …}) of state_dicts, instead of --warm-up.'
            ),
        ] = None,
        samples: Annotated[
            int | None, Option(help="Per branch. Default: 32 steps of the largest batch.")
        ] = None,
        tolerance: Annotated[
            str, Option(help="How much higher the loss may be: 0.01, or 5% of what it falls by.")
        ] = "0.01",
        smoothing: Annotated[
            float, Option(help="Weight of the newest evaluation in the moving average.")
        ] = 0.5,
        evaluations: Annotated[int, Option(help="Of each branch on its way.")] = 8,
        evaluation_samples: Annotated[int, Option(help="Samples to evaluate on, at most.")] = 2048,
        held_out: Annotated[
            bool, Option("--held-out", help="Evaluate on held-out, not on training samples.")
        ] = False,
        confidence: Annotated[float, Option(help="Of the interval.")] = 0.9,
        seeds: Annotated[int, Option(help="Orders of the data; each gives a pair.")] = 3,
        seed: Annotated[int, Option(help="Of the model and of the first order.")] = 0,
        out: Annotated[
            Path | None,
            Option(help="JSON file, kept after every branch; the same command goes on from it."),
        ] = None,
        picture: Annotated[Path | None, Option(help="PNG, SVG or PDF file.")] = None,
        as_json: AsJson = False,
    ) -> None:
        """The critical batch size, by training on from a checkpoint with larger and larger batches.

        Every branch sees as many samples, in the same order, with its learning rate scaled. The critical
        batch is the largest whose smoothed loss stays within the tolerance of the unbranched run's
        (Merrill et al. 2025), with an interval over the seeds, beside the noise scale at the checkpoint.
        FACTORY is a function without arguments that returns (model, loss_fn, data), (model, loss_fn, data,
        optimizer) or a gradstats.Workload.

        Exits with 0 where the end was found, 1 where no tested size was too large or the loss did not
        fall, 2 where an argument cannot be used, 130 on Ctrl-C; finished branches stay in --out.
        """
        with one_line():
            from gradstats.commands.progress import Progress
            from gradstats.workbench.critical import Settings, Tolerance, measure_critical
            from gradstats.workbench.critical.picture import draw
            from gradstats.workbench.workload import load

            settings = Settings(
                batch_size, whole_numbers("--multipliers", multipliers), rule, warm_up, samples,
                evaluations, held_out, evaluation_samples, seeds, seed,
            )  # fmt: skip
            limit = Tolerance.parse(tolerance)
            check_outputs(out, picture)
            workload = load(target, seed=seed)
            try:
                with Progress("critical") as progress:
                    found, content = measure_critical(
                        workload,
                        settings,
                        checkpoint=checkpoint,
                        tolerance=limit,
                        smoothing=smoothing,
                        confidence=confidence,
                        out=out,
                        target=target,
                        progress=progress,
                    )
            except KeyboardInterrupt:
                kept = "; --out FILE would keep finished branches" if out is None else (
                    f"; finished branches are in {out}, and the same command goes on from there"
                )  # fmt: skip
                typer.echo(f"interrupted{kept}", err=True)
                raise typer.Exit(INTERRUPTED) from None
            if as_json:
                print_json(content)
            else:
                _show(found, content["noise_scale_missing"])
            if picture is not None:  # last: where the disk is full, the result has been shown
                draw(found, picture)
            if not as_json:
                say_written(out, picture)
            raise typer.Exit(0 if found.reached and found.fall > 0 else 1)


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """From "1,2,4". Raises InvalidArgumentError for anything else."""
    from gradstats.errors import InvalidArgumentError

    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise InvalidArgumentError(
            f"{name} {text!r} cannot be used; pass whole numbers such as 1,2,4,8"
        )
    return tuple(int(part) for part in parts)


def _show(found: Any, noise_missing: str) -> None:
    from gradstats.estimators import readable
    from gradstats.terminal import console_and_table

    console, make_table = console_and_table()
    ends = f"{found.confidence:.0%} interval"
    table = make_table("batch size", "learning rate", "loss", "above ×1", ends, "within")
    for branch in found.branches:
        known = found.seeds > 1 and branch.multiplier > 1 and branch.final < float("inf")
        table.add_row(
            f"{branch.batch_size:,} (×{branch.multiplier})",
            f"{branch.learning_rate:.3g}",
            f"{branch.final:.5g}",
            "" if branch.multiplier == 1 else f"{branch.difference:+.2g}",
            f"{branch.low:+.2g} to {branch.high:+.2g}" if known else "",
            "yes" if branch.ok else "no",
            style=None if branch.ok else "red",
        )
    console.print(table)
    lines = [str(found), *found.remarks]
    if found.noise_scale is None:
        lines.append(f"the noise scale could not be measured: {noise_missing}")
    elif found.calibration is not None and not found.usable:
        within = found.largest_within > found.batch_size
        more = " More --seeds narrow it." if within and found.reached else ""
        lines.append(f"The factor is not known well enough to act on.{more}")
    elif found.calibration is not None:
        lines.append(
            f"Use it: monitor.recommend(critical={readable(found.calibration.value)}), or the policy "
            f"partial(gradstats.schedulers.noise_scale, factor={readable(found.calibration.value)})."
        )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
