"""`gradstats sweep module:factory`."""

# No `from __future__ import annotations`: typer reads the annotations where they are evaluated.

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from gradstats.commands.options import AsJson, Target
from gradstats.commands.running import INTERRUPTED, check_outputs, one_line, print_json, say_written


def register(application: Any) -> None:
    @application.command()
    def sweep(
        target: Target,
        plans: Annotated[
            str,
            Option(help="Batch size x steps, as 16x2000,64x500,256x125 (64x500@0.1: its rate)."),
        ],
        seeds: Annotated[int, Option(help="Trials of each plan.")] = 5,
        learning_rate: Annotated[
            float | None, Option(help="Of the base plan. Default: the optimizer's.")
        ] = None,
        rule: Annotated[
            str, Option(help="Other plans' rates from it: same, linear, sqrt or noise.")
        ] = "same",
        base: Annotated[
            str | None,
            Option(help="Plan that the rate suits. Default: that of the factory's batch size."),
        ] = None,
        noise_scale: Annotated[
            float | None,
            Option(help="For --rule noise. Default: measured in the base plan's first trial."),
        ] = None,
        warm_up: Annotated[float, Option(help="Share of the samples, 0 to 1.")] = 0.0,
        decay: Annotated[str, Option(help="Of the rate: none, cosine or linear.")] = "none",
        looks: Annotated[int, Option(help="Points of each curve.")] = 40,
        evaluation: Annotated[int, Option(help="Samples that a loss is taken on, at most.")] = 2048,
        micro_batch_size: Annotated[
            int | None, Option(help="Samples of one backward at most.")
        ] = None,
        sharpness: Annotated[
            bool, Option("--sharpness", help="Of the minima: Keskar's, and the top eigenvalue.")
        ] = False,
        epsilon: Annotated[float, Option(help="Of --sharpness.")] = 1e-3,
        subspace: Annotated[
            int | None, Option(help="Dimensions: --sharpness in a random subspace too.")
        ] = None,
        variance: Annotated[
            bool, Option(help="Measure the gradient's variance against 1/B.")
        ] = True,
        precision: Annotated[float, Option(help="Standard error of that variance.")] = 0.02,
        target_loss: Annotated[
            float | None, Option(help="For steps to it. Default: the lowest that all reach.")
        ] = None,
        out: Annotated[
            Path, Option(help="Result file; trials are kept in a folder beside it.")
        ] = Path("runs/sweep.json"),
        picture: Annotated[Path | None, Option(help="Draw the result (PNG, SVG, PDF).")] = None,
        jobs: Annotated[int, Option(help="Trials at a time, in processes.")] = 1,
        threads: Annotated[
            int | None, Option(help="Of each trial. Default: the cores over --jobs.")
        ] = None,
        ray: Annotated[
            str | None,
            Option(help="Train on a Ray cluster: its address, or local.", metavar="ADDRESS"),
        ] = None,
        checkpoint_seconds: Annotated[float, Option(help="Between checkpoints of a trial.")] = 10.0,
        as_json: AsJson = False,
    ) -> None:
        """Many small steps or few large ones? Trains each plan from several seeds and compares them.

        FACTORY is a function without arguments that returns (model, loss_fn, data), with an optimizer as
        a fourth, or a gradstats.Workload. The same command goes on with a sweep that was interrupted or
        killed. Exits with 0 where all trials ended, 1 where some diverged or failed, 2 where an argument
        cannot be used, 130 after Ctrl-C.
        """
        with one_line():
            from gradstats.commands import sweep_screen as screen
            from gradstats.errors import InvalidArgumentError
            from gradstats.workbench import saved
            from gradstats.workbench import sweep as sweeps

            if not out.name or out.is_dir():
                raise InvalidArgumentError(f"--out {out} is a folder; name a file")
            if subspace is not None and not sharpness:
                raise InvalidArgumentError("--subspace belongs to --sharpness; add it")
            settings = sweeps.Settings(
                target,
                sweeps.parse(plans),
                seeds,
                learning_rate,
                rule,  # type: ignore[arg-type]
                base,
                noise_scale,
                warm_up,
                decay,  # type: ignore[arg-type]
                looks,
                evaluation,
                micro_batch_size,
                sweeps.Sharpness(epsilon, subspace) if sharpness else None,
                variance,
                precision,
                target_loss,
                threads,
            )
            check_outputs(out, picture)
            with screen.Screen(settings) as report:
                found = sweeps.sweep(
                    settings,
                    folder=out.with_name(f"{out.stem}.trials"),
                    jobs=jobs,
                    ray=ray,
                    checkpoint_seconds=checkpoint_seconds,
                    report=report,
                )
            if as_json:
                print_json({"kind": "gradstats sweep", "version": saved.VERSION, **found.to_dict()})
            else:
                screen.show(found)
            saved.write(out, "sweep", found.to_dict())  # last: the result has been shown
            if picture is not None:
                from gradstats.workbench.sweep.picture import draw

                draw(found.to_dict(), picture)
            if not as_json:
                say_written(out, picture)
            raise typer.Exit(INTERRUPTED if found.interrupted else int(bool(found.failed)))
